"""quantize.int8_static: integers equal their simulation, ranges come from images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from quantizing import (
    DATA,
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
from samcompress.core import errors
from samcompress.quantize import _int8
from samcompress.quantize._int8 import StaticLinear
from samcompress.quantize._layers import dequantize
from samcompress.quantize._uniform import Grid
from samcompress.quantize.b_float16 import BFloat16
from samcompress.quantize.int8_static import Int8Static


def run(sam: Any = None, data: Any = DATA, **fields: Any) -> Any:
    step = Int8Static(**{"images": 2, "force": True, **fields})
    return step(random_sam() if sam is None else sam, data=data, progress=False)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 1.0), (0.0, 2.0), (-2.0, 2.0), (-1.5, 0.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_integers_equal_simulation(low: float, high: float, bias: bool) -> None:
    layer = nn.Linear(250, 131, bias=bias)
    small = StaticLinear(layer)
    small.fill(layer.weight)
    scale, zero = Grid(8).steps(torch.tensor(low), torch.tensor(high))
    small.set_grid(scale, zero)
    x = draw(7, 250)  # beyond the range too
    weight = dequantize(small.weight, small.scale, torch.float32)
    on_grid = Grid(8).fake(x, scale, zero)
    expected = on_grid.double() @ weight.double().t()
    expected = expected + layer.bias if bias else expected
    assert change(small(x).double(), expected) < 1e-5
    # The zero point is taken out through sums of rows, in whole numbers.
    rows = small.weight.long().sum(1) * int(small.input_zero)
    assert torch.equal(small.shift.long(), rows)
    # A token of zeros is exact: padding stays padding.
    nothing = small(torch.zeros(1, 250))[0]
    assert torch.equal(nothing, layer.bias if bias else torch.zeros(131))


def test_scales_stay_float32() -> None:
    small = run().bfloat16()
    for name in sc.lineage(small)[-1].state["layers"]:
        layer: Any = small.get_submodule(name)
        kinds = layer.weight.dtype, layer.scale.dtype, layer.input_scale.dtype, layer.shift.dtype
        assert kinds == (torch.int8, torch.float32, torch.float32, torch.int32)


def test_what_changes_and_what_stays() -> None:
    sam = random_sam()
    small = run(sam)
    state = sc.lineage(small)[-1].state
    assert len(state["layers"]) == 8
    unchanged_elsewhere(sam, small, state["layers"])
    worst = list(state["worst"].values())
    assert len(worst) == 5
    assert worst == sorted(worst, reverse=True)
    assert 0 < worst[-1] <= worst[0] < 0.1
    assert not any(m._forward_pre_hooks for m in small.modules())


@pytest.mark.parametrize("kind", ["minmax", "avg_minmax", "percentile", "mse"])
def test_error_of_twelve_blocks(kind: str) -> None:
    sam = deep_sam()
    small = run(sam, observer=kind)
    image = DATA[0].image  # one that was seen
    pair = [sc.predict(m, [image], [[]]) and m for m in (small, sam)]
    assert pair == [small, sam]
    assert 0 < change(logits(small), logits(sam)) < 0.1


def test_same_ranges_in_any_order_and_from_the_work_folder(tmp_path: Path) -> None:
    sam = random_sam()
    found = run(sam, observer="minmax")
    turned = run(sam, observer="minmax", data=[DATA[1], DATA[0]])
    assert torch.equal(embedding(found), embedding(turned))
    step = Int8Static(images=2, force=True)
    first, second = (step(sam, data=DATA, progress=False, workdir=tmp_path) for _ in range(2))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert torch.equal(embedding(first), embedding(second))
    assert torch.equal(embedding(first), embedding(run(sam)))


def test_masks_of_trained_tiny(trained: Any) -> None:
    data = sc.shapes(8, seed=2, size=(96, 128))
    assert mask_iou(run(trained, data=data, images=8), trained) >= 0.95


def test_saved_and_loaded(tmp_path: Path) -> None:
    same_after_loading(run(), tmp_path / "small")
    same_after_loading(BFloat16()(run(), progress=False), tmp_path / "smaller")


def test_follows_fused_and_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    small = run(sc.attention.Fused()(random_sam(), progress=False))
    exported = sc.compile.Export()(small, progress=False, workdir=tmp_path)
    assert change(embedding(exported), embedding(small)) < 1e-3


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], sam: Any = None, **fields: Any) -> str:
    with pytest.raises(error) as caught:
        run(sam, **fields)
    return str(caught.value)


def test_twice_and_no_data() -> None:
    text = message(errors.ModelError, run())
    assert text.startswith("quantize.int8_static met layers that hold integers already.")
    assert "needs images" in message(errors.DataError, data=None)
    assert "images is out of range" in message(errors.ConfigError, images=0)


def test_values_that_are_not_finite() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[1].norm2.bias.data[0] = float("nan")
    text = message(errors.DataError, sam)
    assert "image_encoder.blocks.1.mlp.lin1" in text


def test_slower_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {nn.Linear: 1.0, StaticLinear: 2.0}
    monkeypatch.setattr(_int8, "_median_ms", lambda layer, x: times[type(layer)])
    text = message(errors.ModelError, force=False)
    assert text.startswith("quantize.int8_static would make the layers slower on this machine.")
