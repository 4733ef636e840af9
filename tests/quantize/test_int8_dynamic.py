"""quantize.int8_dynamic: exact integer products, float32 around them, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from quantizing import (
    change,
    deep_sam,
    draw,
    embedding,
    logits,
    mask_iou,
    same_after_loading,
    unchanged_elsewhere,
)
from torch import nn

import samcompress as sc
from samcompress.compile._graphs import allowed
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint
from samcompress.core.sizes import tensor_bytes
from samcompress.quantize import _int8
from samcompress.quantize._int8 import DynamicLinear, product
from samcompress.quantize._layers import quantize_channels
from samcompress.quantize.b_float16 import BFloat16
from samcompress.quantize.int8_dynamic import Int8Dynamic
from samcompress.quantize.int8_weights import Int8Weights


def run(sam: Any = None, **fields: Any) -> Any:
    step = Int8Dynamic(**{"force": True, **fields})
    return step(random_sam() if sam is None else sam, progress=False)


def integer(layer: nn.Linear) -> DynamicLinear:
    made = DynamicLinear(layer)
    made.fill(layer.weight)
    return made


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "wide", "high"), [(1, 256, 128), (5, 250, 131), (7, 256, 128), (196, 768, 2304)]
)
def test_products_are_those_of_whole_numbers(rows: int, wide: int, high: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, weight = (
        torch.randint(-127, 128, (n, wide), generator=generator).to(torch.int8)
        for n in (rows, high)
    )
    found = product(codes, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), codes.long() @ weight.long().t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (2, 3, 5, 40), (1100, 40)])
def test_layer_equals_rounding_in_floating_point(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(40, 30, bias=bias)
    x = draw(*shape)
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes, weight_scale = quantize_channels(layer.weight)
    weight = codes.double() * weight_scale.double()[:, None]
    expected = ((x / scale).round() * scale).double() @ weight.t()
    expected = expected + layer.bias if bias else expected
    found = integer(layer)(x)
    assert found.shape == (*shape[:-1], 30)
    assert change(found.double(), expected) < 1e-5
    assert 0 < change(found, layer(x)) < 0.02


def test_tokens_do_not_meet() -> None:
    layer = integer(nn.Linear(16, 8))
    x = draw(_int8.ROWS + 50, 16)
    x[3] *= 1e6
    whole = layer(x)
    for row in (0, 3, _int8.ROWS, _int8.ROWS + 49):
        assert torch.equal(layer(x[row : row + 1])[0], whole[row])


def test_zeros_give_the_bias_and_tiny_tokens_stay_finite() -> None:
    layer = nn.Linear(16, 8)
    found = integer(layer)(torch.stack([torch.zeros(16), torch.full((16,), 1e-44)]))
    assert torch.equal(found[0], layer.bias)
    assert torch.isfinite(found).all()


def test_no_gradient_and_no_error_outside_no_grad() -> None:
    x = draw(2, 16).requires_grad_()
    assert not integer(nn.Linear(16, 8))(x).requires_grad


def test_scales_stay_float32_in_a_bfloat16_layer() -> None:
    layer = nn.Linear(64, 48)
    low = integer(layer).bfloat16()
    assert (low.weight.dtype, low.scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(low.scale, integer(layer).scale)
    x = draw(9, 64).bfloat16()
    found = low(x)
    assert found.dtype == torch.bfloat16
    layer.bias.data = low.bias.data.float()
    # Rounded once, at the very end.
    assert torch.equal(found, integer(layer)(x.float()).bfloat16())


# --- models ---------------------------------------------------------------------------------------


def test_what_changes_and_what_stays() -> None:
    sam = random_sam()
    before = fingerprint(sam)
    small = run(sam)
    names = sc.lineage(small)[-1].state["layers"]
    assert len(names) == 8
    assert all(type(small.get_submodule(name)) is DynamicLinear for name in names)
    unchanged_elsewhere(sam, small, names)
    assert fingerprint(sam) == before


def test_error_of_twelve_blocks() -> None:
    sam = deep_sam()
    expected = embedding(sam)
    small = run(sam)
    assert 0 < change(embedding(small), expected) <= 0.025
    both = BFloat16()(small, progress=False)
    assert change(embedding(both), expected) <= 0.04
    assert tensor_bytes(both) < tensor_bytes(small) < tensor_bytes(sam)


def test_file_of_vit_b() -> None:
    sam = sc.build("vit_b")
    before = tensor_bytes(sam)
    small = Int8Dynamic(force=True)(sam, progress=False, consume=True)
    assert tensor_bytes(small) / before < 0.33
    assert tensor_bytes(BFloat16()(small, progress=False, consume=True)) / before < 0.28


def test_masks_of_trained_tiny(trained: Any) -> None:
    assert mask_iou(run(trained), trained) >= 0.97


def test_saved_and_loaded(tmp_path: Path) -> None:
    small = run()
    again = same_after_loading(small, tmp_path / "small")
    assert all(type(v) is torch.Tensor for v in again.state_dict().values())
    kept = {n: b for n, b in again.named_buffers() if n.endswith("weight")}
    assert {b.dtype for b in kept.values()} == {torch.int8}


def test_casts_and_copies_keep_codes_and_scales() -> None:
    small = run()
    for moved in (
        copy.deepcopy(small),
        copy.deepcopy(small).to("cpu"),
        copy.deepcopy(small).bfloat16(),
        copy.deepcopy(small).half().float(),
    ):
        for name in sc.lineage(small)[-1].state["layers"]:
            was, now = small.get_submodule(name), moved.get_submodule(name)
            assert torch.equal(was.weight, now.weight)
            assert torch.equal(was.scale, now.scale)
            assert now.scale.dtype == torch.float32


# --- chains ---------------------------------------------------------------------------------------


def test_before_and_after_fused_attention() -> None:
    sam = random_sam()
    after = (sc.attention.Fused() | Int8Dynamic(force=True))(sam, progress=False)
    steps = [Int8Dynamic(force=True), sc.attention.Fused()]
    first = sc.Pipeline(steps, any_order=True)(sam, progress=False)
    plain = embedding(run(sam))
    assert change(embedding(after), plain) < 2e-3
    assert torch.equal(embedding(first), embedding(after))
    assert type(first.image_encoder.blocks[0].attn.qkv) is DynamicLinear


def test_follows_pruning_and_distillation() -> None:
    chain = (
        sc.prune.Mlp(ratio=0.5, criterion="magnitude")
        | sc.distill.Encoder(steps=2, batch_size=2)
        | Int8Dynamic(force=True)
    )
    data = sc.shapes(2, seed=3, size=(60, 80))
    small = chain(random_sam(), data=data, teacher=random_sam(seed=5), progress=False)
    wide = small.image_encoder.blocks[0].mlp.lin1
    assert type(wide) is DynamicLinear
    assert wide.weight.shape == (48, 32)
    assert torch.isfinite(logits(small)).all()


def test_linears_of_a_substituted_encoder() -> None:
    sam = sc.substitute.TinyViT()(random_sam(), progress=False)
    small = (Int8Dynamic(force=True) | Int8Weights(where="image_encoder.**"))(sam, progress=False)
    kinds = {type(m).__name__ for m in small.image_encoder.modules()}
    assert {"DynamicLinear", "Int8Conv2d"} <= kinds
    assert not {"Linear"} & kinds
    assert change(embedding(small), embedding(sam)) < 0.1


def test_exports_integer_products(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    small = run()
    exported = sc.compile.Export()(small, progress=False, workdir=tmp_path)
    assert change(embedding(exported), embedding(small)) < 1e-3
    (path,) = exported.image_encoder.artifacts.values()
    nodes = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert nodes.count("MatMulInteger") == 8
    linears = 4 * sum(p.numel() for n, p in random_sam().named_parameters() if ".lin" in n)
    assert path.stat().st_size < linears + 100_000


def test_exports_of_rounded_tokens_may_differ_more() -> None:
    sam = random_sam()
    assert allowed([sam.image_encoder], 1e-4) == 1e-4
    assert allowed([sam.mask_decoder, run(sam).image_encoder], 1e-4) == 1e-2


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], sam: Any = None, **fields: Any) -> str:
    with pytest.raises(error) as caught:
        run(sam, **fields)
    return str(caught.value)


@pytest.mark.parametrize("first", [Int8Dynamic(force=True), Int8Weights(min_size=0)])
def test_integers_twice(first: Any) -> None:
    text = message(errors.ModelError, first(random_sam(), progress=False))
    lines = text.splitlines()
    assert lines[0] == "quantize.int8_dynamic met layers that hold integers already."
    assert "integers are not rounded twice" in text


def test_slower_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = random_sam()
    times = {nn.Linear: 2.0, DynamicLinear: 4.0}
    monkeypatch.setattr(_int8, "_median_ms", lambda layer, x: times[type(layer)])
    assert message(errors.ModelError, sam, force=False).splitlines() == [
        "quantize.int8_dynamic would make the layers slower on this machine.",
        "  where     8 Linears, 1024 tokens",
        "  got       0.5 times the speed of torch.float32",
        "  expected  more than 1",
        "  try       sc.quantize.Int8Weights() for the file alone, or force=True",
    ]
    times[DynamicLinear] = 0.5
    assert sc.lineage(run(sam, force=False))[-1].state["speedup"] == 4.0


def test_time_of_a_layer_is_taken() -> None:
    assert _int8._median_ms(nn.Linear(8, 8), torch.ones(4, 8)) > 0


def test_nothing_matched() -> None:
    text = message(errors.NoEffectError, where="image_encoder.blocks.*.norm1")
    assert text.startswith("quantize.int8_dynamic matched no module it can act on.")


def test_weights_that_are_not_finite() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[0].mlp.lin1.weight.data[0, 0] = float("nan")
    text = message(errors.ModelError, sam)
    assert text.splitlines()[:2] == [
        "quantize.int8_dynamic met a weight that is not finite.",
        "  where     image_encoder.blocks.0.mlp.lin1.weight",
    ]


def test_no_integer_product_on_the_device() -> None:
    text = message(errors.ModelError, random_sam().to("meta"))
    assert text.splitlines()[:2] == [
        "quantize.int8_dynamic finds no integer product on this device.",
        "  got       meta",
    ]


def test_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    _int8._check_product.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=2**15))
    text = message(errors.BackendError)
    assert text.startswith("torch multiplies integers wrongly here.")
    assert "Int8Weights" in text
    monkeypatch.undo()
    _int8._check_product("cpu")


# --- speed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_block_of_real_width_is_faster() -> None:
    info = Path("/proc/cpuinfo")
    if not info.is_file() or "vnni" not in info.read_text():
        pytest.skip("no VNNI")
    sam = sc.build("vit_b", depth=1, global_attn_indexes=(), image_size=512)
    names = [n for n, m in sam.image_encoder.named_modules() if type(m) is nn.Linear]
    assert _int8.speedup(sam, names, DynamicLinear) >= 1.2
