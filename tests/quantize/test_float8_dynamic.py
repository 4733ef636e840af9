"""quantize.float8_dynamic: rounding to E4M3, products, what is stored and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from quantizing import change, draw, embedding, same_after_loading, unchanged_elsewhere
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.quantize import float8_dynamic
from samcompress.quantize.float8_dynamic import Float8Dynamic, Float8Linear, float8


def run(sam: Any = None, **fields: Any) -> Any:
    step = Float8Dynamic(**{"force": True, **fields})
    return step(random_sam() if sam is None else sam, progress=False)


def eights(layer: nn.Linear) -> Float8Linear:
    made = Float8Linear(layer)
    made.fill(layer.weight)
    return made


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows as float8 with their scales, without our code."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    units = x / scale
    # Below 2 ** -6 numbers are spaced evenly; above, by an eighth of their power of two.
    step = 2.0 ** (units.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (units / step).round() * step * scale


def test_rows_are_rounded_to_three_bits() -> None:
    x = draw(40, 64)
    x[3] = 0
    x[4] = 1e-30
    codes, scale = float8(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (40, 1)
    torch.testing.assert_close(codes.float() * scale, rounded(x), rtol=1e-6, atol=0)
    assert codes[5:].float().abs().amax(1).tolist() == [448] * 35
    assert not codes[3].float().any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (2, 3, 5, 40)])
def test_layer_equals_rounding_in_floating_point(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(40, 30, bias=bias)
    x = draw(*shape)
    expected = rounded(x) @ rounded(layer.weight.detach()).t()
    expected = expected + layer.bias if bias else expected
    found = eights(layer)(x)
    assert found.shape == (*shape[:-1], 30)
    assert change(found, expected) < 1e-5
    assert 0.005 < change(found, layer(x)) < 0.06


def test_tokens_of_zeros_give_the_bias() -> None:
    layer = nn.Linear(16, 8)
    assert torch.equal(eights(layer)(torch.zeros(3, 16)), layer.bias.detach().expand(3, 8))


def test_only_linears_of_the_encoder_change(tmp_path: Path) -> None:
    sam = random_sam()
    small = run(sam)
    layers = sc.lineage(small)[-1].state["layers"]
    assert all(isinstance(small.get_submodule(name), Float8Linear) for name in layers)
    assert sum(isinstance(m, nn.Linear) for m in small.image_encoder.modules()) == 0
    unchanged_elsewhere(sam, small, layers)
    assert 0.001 < change(embedding(small), embedding(sam)) < 0.2
    same_after_loading(small, tmp_path)


def test_casts_leave_codes_and_scales_alone(tmp_path: Path) -> None:
    small = run()
    half = sc.quantize.BFloat16()(small, progress=False)
    for name in sc.lineage(small)[-1].state["layers"]:
        layer, cast = small.get_submodule(name), half.get_submodule(name)
        assert cast.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(cast.weight.view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(cast.scale, layer.scale)
    assert change(embedding(half), embedding(small)) < 0.05
    same_after_loading(half, tmp_path)


def test_refused_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    from samcompress.quantize import _int8

    monkeypatch.setattr(_int8, "speedup", lambda *_: 0.5)
    with pytest.raises(errors.ModelError, match="would make the layers slower"):
        run(force=False)
    monkeypatch.setattr(_int8, "speedup", lambda *_: 1.5)
    assert sc.lineage(run(force=False))[-1].state["speedup"] == 1.5


@pytest.mark.parametrize(
    ("product", "got"),
    [
        (lambda codes, *_: torch.zeros(len(codes), len(codes)), "products wrong by 100.0%"),
        (lambda *_: torch.ones(2, 3) @ torch.ones(2, 3), "mat1 and mat2 shapes"),
    ],
)
def test_refused_where_products_are_wrong(
    product: Any, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8_dynamic, "product", product)
    float8_dynamic._check_product.cache_clear()
    try:
        with pytest.raises(errors.BackendError, match="does not multiply float8 here") as caught:
            run()
        assert got in str(caught.value)
    finally:
        float8_dynamic._check_product.cache_clear()


def test_not_rounded_twice() -> None:
    small = run()
    for step in (Float8Dynamic(force=True), sc.quantize.Int8Dynamic(force=True)):
        with pytest.raises(errors.ModelError, match="met layers that hold integers already"):
            step(small, progress=False)
    with pytest.raises(errors.ModelError, match="quantized already"):
        sc.quantize.FakeQuant(activation_bits=None)(small, progress=False)


def test_a_weight_that_is_not_finite() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[1].mlp.lin1.weight.data[0, 0] = float("nan")
    with pytest.raises(errors.ModelError, match="not finite"):
        run(sam)


@pytest.mark.slow
def test_vit_b() -> None:
    sam = sc.build("vit_b", image_size=256)
    small = run(sam)
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert 0.01 < change(small.image_encoder(images), sam.image_encoder(images)) < 0.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu() -> None:
    sam = random_sam().cuda()
    small = run(sam)
    assert 0.001 < change(embedding(small), embedding(sam)) < 0.2
