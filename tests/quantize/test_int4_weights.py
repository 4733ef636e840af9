"""quantize.int4_weights: codes on their grid, searches that never lose, GPTQ against rounding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from quantizing import DATA, change, draw, embedding, logits, same_after_loading
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import tensor_bytes
from samcompress.quantize._gptq import TOKENS, Products, gptq
from samcompress.quantize._int4 import (
    Int4Conv2d,
    Int4Linear,
    group_codes,
    group_scale,
    int4_twin,
)
from samcompress.quantize.b_float16 import BFloat16
from samcompress.quantize.int4_weights import Int4Weights

INT4 = (Int4Linear, Int4Conv2d)


def run(sam: Any = None, data: Any = DATA, **fields: Any) -> Any:
    step = Int4Weights(**{"min_size": 0, "group_size": 16, "images": 2, **fields})
    return step(random_sam() if sam is None else sam, data=data, progress=False)


# --- codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_codes_are_nearest_and_use_the_range(size: float) -> None:
    weight = size * draw(5, 4, 16)
    scale = group_scale(weight, clip_search=False)
    codes = group_codes(weight, scale)
    assert torch.equal(codes, codes.round())
    assert (codes.abs().amax(-1) == 7).all()
    # A scale of eight bits may be 0.4 % short, and then clips the largest weight a little.
    error = (codes * scale.float()[..., None] - weight).abs().amax(-1)
    assert (error <= scale.float() * 0.54).all()


def test_groups_of_nothing_stay_zero() -> None:
    weight = torch.zeros(2, 16)
    weight[1, 0] = 1e-44
    codes = group_codes(weight, group_scale(weight))
    assert torch.equal(codes[0], torch.zeros(16))
    assert torch.isfinite(codes).all()


def test_clip_search_never_loses() -> None:
    weight = draw(40, 8, 64) ** 3  # long tails

    def error(search: bool) -> torch.Tensor:
        scale = group_scale(weight, clip_search=search)
        return (group_codes(weight, scale) * scale.float()[..., None] - weight).square().sum(-1)

    assert (error(True) <= error(False)).all()
    assert error(True).sum() < 0.97 * error(False).sum()


@pytest.mark.parametrize("layer", [nn.Linear(32, 6), nn.Conv2d(4, 6, 4, stride=2, padding=1)])
def test_layer_equals_its_float_twin(layer: Any) -> None:
    weight = layer.weight.detach().flatten(1).view(6, -1, 16)
    scale = group_scale(weight)
    codes = group_codes(weight, scale)
    assert {float(c) for c in codes.unique()} >= {-7.0, 7.0}
    small: Any = int4_twin(layer, 16)
    small.fill(codes, scale)
    assert small.weight.numel() * 2 == layer.weight.numel()
    twin = copy.deepcopy(layer)
    twin.weight.data = (codes * scale.float()[..., None]).view(layer.weight.shape)
    x = draw(2, 4, 8, 8) if isinstance(layer, nn.Conv2d) else draw(2, 3, 32)
    assert torch.equal(small(x), twin(x))
    assert "g=16" in repr(small)


# --- GPTQ -----------------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    groups = weight.view(len(weight), -1, group)
    return group_codes(groups, group_scale(groups, bits=bits), bits=bits)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_on_correlated_inputs(bits: int) -> None:
    weight = draw(48, 64)
    x = draw(512, 8, seed=5) @ draw(8, 64, seed=6) + 0.1 * draw(512, 64, seed=7)

    def error(codes: torch.Tensor, scale: torch.Tensor) -> float:
        found = (codes * scale.float()[..., None]).flatten(1)
        return float((x @ (found - weight).t()).square().mean())

    nearest = rounded(weight, 16, bits)
    plain = error(nearest, group_scale(weight.view(48, -1, 16), bits=bits))
    assert error(*gptq(weight, x.t() @ x, 16, bits=bits)) <= 0.8 * plain


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_without_correlation_is_rounding(bits: int) -> None:
    weight = draw(20, 64)
    codes, scale = gptq(weight, torch.eye(64), 16, bits=bits)
    assert torch.equal(codes, rounded(weight, 16, bits))
    assert torch.equal(scale, group_scale(weight.view(20, -1, 16), bits=bits))


def test_gptq_with_inputs_of_zero() -> None:
    codes, scale = gptq(draw(4, 32), torch.zeros(32, 32), 16)
    assert torch.isfinite(codes).all()
    assert torch.isfinite(scale.float()).all()


def test_products_are_summed_over_images() -> None:
    found = Products("a")
    found.update(draw(1, 5, 5, 8))
    found.update(draw(7, 8, seed=9))
    every = torch.cat([draw(1, 5, 5, 8).view(-1, 8), draw(7, 8, seed=9)])
    torch.testing.assert_close(found.total, every.T @ every)
    many = Products("a")
    many.update(torch.ones(3 * TOKENS - 1, 2))
    assert many.total is not None
    assert TOKENS / 2 < float(many.total[0, 0]) <= TOKENS


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_changes_and_what_stays(method: str) -> None:
    sam = random_sam()
    small = run(sam, method=method)
    names = sc.lineage(small)[-1].state["layers"]
    assert {n for n, m in small.named_modules() if isinstance(m, INT4)} == set(names)
    was, now = sam.state_dict(), small.state_dict()
    for name in was:
        if name.rsplit(".", 1)[0] not in names:
            assert torch.equal(was[name], now[name]), name
    assert 0 < change(embedding(small), embedding(sam)) < 0.3
    assert torch.isfinite(logits(small)).all()


def test_gptq_of_a_model_loses_less() -> None:
    sam = random_sam(depth=4, embed_dim=64, num_heads=4)
    plain, better = (
        embedding(run(sam, method=m, images=4, where="image_encoder.blocks.**"))
        for m in ("rtn", "gptq")
    )
    assert change(better, embedding(sam)) < change(plain, embedding(sam))


def test_file_of_vit_b() -> None:
    sam = sc.build("vit_b")
    before = tensor_bytes(sam)
    small = Int4Weights(clip_search=False)(sam, progress=False, consume=True)
    assert tensor_bytes(small) / before < 0.166
    assert tensor_bytes(BFloat16()(small, progress=False, consume=True)) / before < 0.147


def test_saved_and_loaded(tmp_path: Path) -> None:
    again = same_after_loading(run(), tmp_path / "small")
    kinds = {m.weight.dtype for m in again.modules() if isinstance(m, INT4)}
    assert kinds == {torch.uint8}


def test_casts_keep_codes_and_scales() -> None:
    small = run()
    for moved in (copy.deepcopy(small).half(), copy.deepcopy(small).bfloat16().float()):
        for name in sc.lineage(small)[-1].state["layers"]:
            was, now = small.get_submodule(name), moved.get_submodule(name)
            assert torch.equal(was.weight, now.weight)
            assert torch.equal(was.scale, now.scale)
            assert now.scale.dtype == torch.bfloat16


def test_follows_substitution_and_fused() -> None:
    for step in (sc.substitute.TinyViT(), sc.attention.Fused()):
        sam = step(random_sam(), progress=False)
        small = run(sam, min_size=2048)
        assert tensor_bytes(small) < 0.5 * tensor_bytes(sam)
        assert torch.isfinite(logits(small)).all()


def test_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    small = run()
    exported = sc.compile.Export()(small, progress=False, workdir=tmp_path)
    assert change(embedding(exported), embedding(small)) < 1e-5


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], sam: Any = None, **fields: Any) -> str:
    with pytest.raises(error) as caught:
        run(sam, **fields)
    return str(caught.value)


def test_twice() -> None:
    text = message(errors.ModelError, run())
    assert text.startswith("quantize.int4_weights met layers that hold integers already.")
    simulated = sc.quantize.FakeQuant(activation_bits=None)(random_sam(), progress=False)
    text = message(errors.ModelError, simulated)
    assert text.startswith("quantize.int4_weights met a model that simulates quantization.")
    with pytest.raises(errors.ModelError, match=r"int8_weights met a model that simulates"):
        sc.quantize.Int8Weights()(simulated, progress=False)


def test_groups_that_do_not_divide() -> None:
    text = message(errors.ModelError, group_size=48, where="image_encoder.blocks.**")
    assert text.splitlines() == [
        "quantize.int4_weights cannot divide a layer into groups.",
        "  where     image_encoder.blocks.0.attn.qkv",
        "  got       32 weights a channel",
        "  expected  a multiple of group_size=48",
        "  try       group_size=16",
    ]


def test_bad_fields() -> None:
    assert "group_size is out of range" in message(errors.ConfigError, group_size=7)
    assert "min_size is negative" in message(errors.ConfigError, min_size=-1)
    assert "images is out of range" in message(errors.ConfigError, images=0)
    assert "method has a value it cannot take" in message(errors.ConfigError, method="awq")


def test_gptq_needs_images() -> None:
    assert "needs images" in message(errors.DataError, data=None, method="gptq")
    assert run(data=None) is not None
    sam = random_sam()
    sam.image_encoder.blocks[0].norm1.weight.data.fill_(torch.nan)
    text = message(errors.DataError, sam, method="gptq", where="image_encoder.**")
    assert "image_encoder.blocks.0.attn.qkv" in text
    assert "not finite" in text


def test_small_layers_and_no_layers() -> None:
    text = message(errors.NoEffectError, min_size=10**9)
    assert "layers of fewer than 1000000000 weights" in text
    assert "matched no module" in message(errors.NoEffectError, where="image_encoder.layers.**")
