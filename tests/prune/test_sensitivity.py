"""Sensitivity: each layer alone, by hand, as a table and as a picture."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pruning import SCENES, encode, prune, toy

import samcompress as sc
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint
from samcompress.core.predict import preprocess
from samcompress.prune._sensitivity import Point, Sensitivity, sensitivity

MLP = "image_encoder.blocks.{}.mlp"


def found(sam: Any = None, data: Any = SCENES, **fields: Any) -> Sensitivity:
    fields = {"criterion": "magnitude", "axes": ("mlp",), "progress": False, **fields}
    return sensitivity(toy() if sam is None else sam, data, **fields)


def test_error_is_that_of_pruning_this_layer_alone() -> None:
    sam = toy()
    before = fingerprint(sam)
    curve = found(sam).curves[MLP.format(1)]
    assert fingerprint(sam) == before
    assert [point.left for point in curve] == [88, 64, 48, 32]
    small = prune(sc.prune.Mlp(ratio=0.5, criterion="magnitude", where=MLP.format(1)), sam)
    with torch.no_grad():
        pairs = [
            [model.image_encoder(preprocess(model, s.image)[0][None]) for model in (small, sam)]
            for s in SCENES
        ]
    expected = sum(float((a - b).norm() / b.norm()) for a, b in pairs) / 2
    assert curve[2].error == pytest.approx(expected, rel=1e-5)
    errors_ = [point.error for point in curve]
    assert errors_ == sorted(errors_)


def test_masks_are_compared_with_those_annotated(trained: Any) -> None:
    # Trained on such scenes: what shakes it loses IoU, what does not loses next to none.
    scenes = sc.shapes(2, seed=5, size=(96, 128))
    curves = found(trained, scenes, by="masks", ratios=(0.1, 0.9), axes=("heads", "mlp"))
    lost = [curve[-1].error for curve in curves.curves.values()]
    assert max(lost) > 0.02
    assert all(curve[0].error < 0.02 for name, curve in curves.curves.items() if "mlp" in name)
    damage = curves.damage()[MLP.format(0)]
    assert damage == {p.left: max(p.error, 0.0) for p in curves.curves[MLP.format(0)]}


def test_every_part_of_the_decoder_shows() -> None:
    curves = found(axes=("decoder",), ratios=(0.5,), criterion="random").curves
    assert len(curves) == 2 + 7 + 2 * 5
    assert all(curve[-1].error > 0 for curve in curves.values())


def test_rounding_leaves_out_what_removes_nothing() -> None:
    curve = found(axes=("heads",), ratios=(0.1, 0.3, 0.5)).curves["image_encoder.blocks.0.attn"]
    assert [(point.ratio, point.left) for point in curve] == [(0.3, 3), (0.5, 2)]


def test_table_and_json() -> None:
    made = Sensitivity(
        "embedding",
        {"a.0.mlp": 8, "a.0.attn": 4},
        {"a.0.mlp": (Point(0.1, 7, 0.01), Point(0.5, 4, 0.25)), "a.0.attn": (Point(0.5, 2, 0.5),)},
    )
    assert str(made).splitlines() == [
        "Each layer alone, by the share of its units removed",
        "layer     units    10 %   50 %",
        "--------  -----  ------  -----",
        "a.0.mlp       8  0.0100  0.250",
        "a.0.attn      4       -  0.500",
    ]
    assert made._repr_html_().startswith("<div")
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    assert made.damage() == {"a.0.mlp": {7: pytest.approx(1e-4), 4: 0.0625}, "a.0.attn": {2: 0.25}}


def test_plot() -> None:
    made = found(axes=("heads", "mlp"), ratios=(0.3, 0.5), criterion="random")
    figure = made.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # notebooks show it
    axes = figure.axes[0]
    assert len(axes.lines) == 8
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attn", "mlp"]
    from matplotlib.figure import Figure

    mine = Figure().subplots()
    assert made.plot(mine) is mine.figure
    assert mine.get_ylabel() == "relative error"


def test_progress() -> None:
    seen: list[Any] = []
    found(progress=seen.append, ratios=(0.5,))
    assert [(e.step, e.label, e.done, e.total) for e in seen if e.label == "layers"] == [
        ("prune.sensitivity", "layers", done, 4) for done in range(1, 5)
    ]


def test_small_types() -> None:
    sam = toy()
    half = toy()
    half.image_encoder.bfloat16()
    for name, curve in found(half, ratios=(0.5,)).curves.items():
        assert curve[0].error == pytest.approx(
            found(sam, ratios=(0.5,)).curves[name][0].error, rel=0.1
        )
    assert encode(sam).isfinite().all()


@pytest.mark.parametrize("ratio", [0, 1, -0.1])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        found(ratios=(0.5, ratio))
    assert str(caught.value).splitlines() == [
        "prune.sensitivity: ratios is out of range.",
        f"  got       {ratio}",
        "  expected  0 < ratio < 1",
    ]


def test_no_ratios() -> None:
    with pytest.raises(errors.ConfigError, match="ratios is empty"):
        found(ratios=())


def test_no_data_no_objects_no_sam() -> None:
    with pytest.raises(errors.DataError):
        found(data=[])
    images = [sc.Sample.from_arrays("plain", SCENES[0].image, [])]
    with pytest.raises(errors.DataError, match=r"prune\.sensitivity needs annotated objects"):
        found(data=images, by="masks")
    with pytest.raises(errors.ModelError, match="this is not a SAM"):
        found(torch.nn.Linear(2, 2))


def test_unknown_axis_and_replaced_layer() -> None:
    with pytest.raises(errors.ConfigError, match=r"prune\.sensitivity: axes has a value"):
        found(axes=("tokens",))
    with pytest.raises(errors.ModelError, match=r"prune\.sensitivity cannot cut a layer that was"):
        found(prune(sc.quantize.Int8Weights(min_size=0)))
