"""Segmenting everything: equal to segment_anything's generator, and what each setting does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import SURE, Oracle
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn

import samcompress as sc
from samcompress.core._shared_decoder import sharable
from samcompress.core.errors import ConfigError, DataError, ModelError, ShapeError
from samcompress.core.everything import Everything, Segments, samplers
from samcompress.core.everything._decode import Plain, Shared, decoder_for
from samcompress.core.everything.generator import Session
from samcompress.core.framing import framing_of
from samcompress.core.predict import encode

Found = list[dict[str, Any]]
OFF = {"min_iou": 0.0, "min_stability": 0.0}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return sc.shapes(1, seed=3, size=(96, 131))[0].image


def reference(sam: nn.Module, image: np.ndarray, settings: Everything, side: int) -> Found:
    return SamAutomaticMaskGenerator(
        sam,
        points_per_side=side,
        pred_iou_thresh=settings.min_iou,
        stability_score_thresh=settings.min_stability,
        stability_score_offset=settings.stability_offset,
        box_nms_thresh=settings.nms,
        min_mask_region_area=settings.min_region,
    ).generate(image)


def exactly(found: Found, wanted: Found) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        assert np.array_equal(mine["segmentation"], theirs["segmentation"])
        for name in mine.keys() - {"segmentation"}:
            assert np.array_equal(mine[name], theirs[name], equal_nan=True), name


def nearly(found: Found, wanted: Found) -> None:
    """The same masks in the same order, but for pixels whose logits are 0 to rounding."""
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine["segmentation"] != theirs["segmentation"]).sum() <= 3
        assert mine["point_coords"] == theirs["point_coords"]
        # One pixel more or less counts in the stability of a small mask.
        loose = {"predicted_iou": 1e-4, "stability_score": max(1e-4, 3 / (1 + mine["area"]))}
        for name, error in loose.items():
            assert mine[name] == pytest.approx(theirs[name], abs=error, nan_ok=True)


@pytest.mark.parametrize("filters", ["off", "on", "regions"])
def test_equals_segment_anything(trained: nn.Module, photo: np.ndarray, filters: str) -> None:
    fields: dict[str, Any] = {"off": OFF, "on": {"min_iou": 0.5, "min_stability": 0.6}}.get(
        filters, {"min_iou": 0.3, "min_stability": 0.3, "min_region": 30}
    )
    if filters == "regions":
        pytest.importorskip("cv2")
    settings = Everything(
        sampler=samplers.Grid(side=8), decoder="model", points_per_batch=64, **fields
    )
    wanted = reference(trained, photo, settings, 8)
    assert wanted
    exactly(settings(trained, photo).to_sam(), wanted)
    nearly(Everything(sampler=samplers.Grid(side=8), **fields)(trained, photo).to_sam(), wanted)


@pytest.mark.parametrize("filters", ["off", "on"])
def test_equals_on_photos(shared: Path, filters: str) -> None:
    mini = sc.load("mini")
    fields = OFF if filters == "off" else {"min_iou": 0.2, "min_stability": 0.4}
    sampler = samplers.Grid(side=5)
    for sample in sc.data.open(shared / "data" / "sa1b")[5:7]:
        settings = Everything(sampler=sampler, decoder="model", points_per_batch=64, **fields)
        wanted = reference(mini, sample.image, settings, 5)
        assert wanted
        exactly(settings(mini, sample.image).to_sam(), wanted)
        nearly(Everything(sampler=sampler, **fields)(mini, sample.image).to_sam(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("filters", ["off", "on"])
def test_equals_on_a_photo_with_vit_b(shared: Path, filters: str) -> None:
    sam = sc.build("vit_b")
    drawn = torch.Generator().manual_seed(1)
    for parameter in sam.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=drawn))
    image = sc.data.open(shared / "data" / "sa1b")[0].image
    fields = OFF if filters == "off" else {"min_iou": 0.0, "min_stability": 0.3}
    settings = Everything(sampler=samplers.Grid(side=4), **fields)
    nearly(settings(sam, image).to_sam(), reference(sam, image, settings, 4))


def test_forms_of_masks(trained: nn.Module, photo: np.ndarray) -> None:
    pytest.importorskip("pycocotools")
    settings = Everything(
        sampler=samplers.Grid(side=4), decoder="model", points_per_batch=64, **OFF
    )
    found = settings(trained, photo)
    for form in ("uncompressed_rle", "coco_rle"):
        wanted = SamAutomaticMaskGenerator(
            trained,
            points_per_side=4,
            pred_iou_thresh=0,
            stability_score_thresh=0,
            output_mode=form,
        ).generate(photo)
        mine = found.to_sam(form)
        assert [m["segmentation"] for m in mine] == [w["segmentation"] for w in wanted]
        json.dumps(mine)
    with pytest.raises(ConfigError, match="no such form of masks") as raised:
        found.to_sam("polygon")
    assert "binary_mask, uncompressed_rle, coco_rle" in str(raised.value)


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("kind", ["point", "box", "both"])
def test_shared_decoder(tiny_sam: nn.Module, count: int, kind: str) -> None:
    image = sc.shapes(1, seed=1, size=64)[0].image
    (embedding,) = encode(tiny_sam, [image])
    drawn = np.random.default_rng(0)
    points, corner = drawn.uniform(0, 60, (2, count, 2))
    prompts = samplers.Prompts(
        points=None if kind == "box" else points,
        boxes=None if kind == "point" else np.concatenate([corner * 0.5, 32 + corner / 2], 1),
        multimask=kind == "point",
    )
    with torch.inference_mode():
        assert isinstance(decoder_for(tiny_sam, embedding.features), Shared)
        mine = Session(tiny_sam, embedding).decode(prompts)
        theirs = Session(tiny_sam, embedding, shared=False).decode(prompts)
        assert mine.scores.shape == (count, 3 if kind == "point" else 1)
        assert torch.allclose(mine.scores, theirs.scores, atol=1e-5)
        rows, masks = torch.ones_like(mine.scores).nonzero().flip(0).T
        assert torch.allclose(mine.low(rows, masks), theirs.low(rows, masks), atol=1e-4)


def test_other_decoders_are_called_as_they_are(tiny_sam: nn.Module) -> None:
    assert sharable(tiny_sam.mask_decoder)
    image = sc.shapes(1, size=64)[0].image
    settings = Everything(sampler=samplers.Grid(side=4), **OFF)
    for step in (
        sc.quantize.Int8Weights(),
        sc.substitute.Conventions(of="tiny_sam"),
        sc.substitute.Conventions(of="edge_sam", stability=True),
        sc.substitute.Conventions(of="efficient_sam"),
        sc.substitute.Conventions(of="nano_sam"),
        sc.quantize.BFloat16(),
    ):
        model = step(tiny_sam, progress=False)
        (embedding,) = encode(model, [image])
        found = settings(model, image)
        assert found.stats.prompts == 16
        plain = Everything(sampler=samplers.Grid(side=4), decoder="model", **OFF)(model, image)
        assert len(found) == len(plain)
        if sharable(model.mask_decoder):
            continue
        assert isinstance(decoder_for(model, embedding.features), Plain), step
        assert all(np.array_equal(a, b) for a, b in zip(found.counts, plain.counts, strict=True))
    hooked = copy.deepcopy(tiny_sam)
    hooked.mask_decoder.transformer.layers[0].register_forward_hook(lambda *_: None)
    assert not sharable(hooked.mask_decoder)


def test_cut_decoders_are_shared(tiny_sam: nn.Module, photo: np.ndarray) -> None:
    for step in (sc.substitute.LightDecoder(), sc.substitute.LightDecoder(attention_dim=8)):
        model = step(tiny_sam, progress=False)
        assert sharable(model.mask_decoder)
        settings = Everything(sampler=samplers.Grid(side=4), **OFF)
        nearly(settings(model, photo).to_sam(), reference(model, photo, settings, 4))


def test_exported_models(tiny_sam: nn.Module) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    image = sc.shapes(1, seed=4, size=64)[0].image
    exported = sc.compile.Export()(tiny_sam, progress=False)
    settings = Everything(sampler=samplers.Grid(side=4), **OFF)
    nearly(settings(exported, image).to_sam(), settings(tiny_sam, image).to_sam())


def test_model_is_left_alone(tiny_sam: nn.Module, photo: np.ndarray) -> None:
    tiny_sam.train()
    before = {k: v.clone() for k, v in tiny_sam.state_dict().items()}
    Everything(sampler=samplers.Grid(side=2), **OFF)(tiny_sam, photo)
    assert all(m.training for m in tiny_sam.modules())
    assert all(torch.equal(v, before[k]) for k, v in tiny_sam.state_dict().items())


@pytest.mark.parametrize("sampler", [samplers.Grid(side=6), samplers.Hierarchical(side=12)])
def test_batches_change_nothing(
    trained: nn.Module, photo: np.ndarray, sampler: samplers.Sampler
) -> None:
    one, many = (
        Everything(sampler=sampler, points_per_batch=n, min_iou=0.3, min_stability=0.3)(
            trained, photo
        )
        for n in (1, 64)
    )
    assert len(one) == len(many) > 0
    assert np.abs(one.scores - many.scores).max() < 1e-4
    assert (one.stats.decoder_calls, one.stats.prompts) == (one.stats.prompts, many.stats.prompts)
    masks = np.zeros((3, 31, 41), bool)
    masks[0, :20, :20] = masks[1, 5:9, 5:9] = masks[2, 25:, 30:] = True
    image = np.zeros((31, 41, 3), np.uint8)
    runs = [
        Everything(sampler=sampler, points_per_batch=n)(Oracle(masks), image) for n in (1, 7, 64)
    ]
    assert len({json.dumps(run.to_sam("uncompressed_rle")) for run in runs}) == 1


def test_filters(trained: nn.Module, photo: np.ndarray) -> None:
    def run(**fields: Any) -> Segments:
        return Everything(sampler=samplers.Grid(side=4), nms=1.0, **fields)(trained, photo)

    whole = run(min_iou=-np.inf, min_stability=-np.inf)
    assert len(whole) == 48 == whole.stats.masks["stability"]
    assert len(run(min_iou=np.inf, min_stability=0)) == 0
    assert len(run(min_iou=0, min_stability=np.inf)) == 0
    # Above for the predicted IoU, from for the stability.
    edge = float(np.sort(whole.predicted_iou)[20])
    assert len(run(min_iou=edge, min_stability=0)) == (whole.predicted_iou > edge).sum()
    edge = float(np.sort(whole.stability)[20])
    assert len(run(min_iou=0, min_stability=edge)) == (whole.stability >= edge).sum()
    best = run(min_iou=0, min_stability=0, max_masks=5)
    assert np.array_equal(best.scores, np.sort(whole.scores)[::-1][:5])


def test_masks_of_nothing_have_no_stability() -> None:
    oracle, image = Oracle(np.zeros((1, 9, 9), bool)), np.zeros((9, 9, 3), np.uint8)
    assert len(Everything(sampler=samplers.Grid(side=2), min_iou=0)(oracle, image)) == 0
    kept = Everything(sampler=samplers.Grid(side=2), nms=1.0, **OFF)(oracle, image)
    assert len(kept) == 12
    assert np.isnan(kept.stability).all()
    assert not kept.masks.any()
    assert kept.boxes.tolist() == [[0, 0, 0, 0]] * 12


def test_empty_cases(tiny_sam: nn.Module) -> None:
    drawn = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 120), (120, 7), (1100, 30)):
        image = drawn.integers(0, 255, (height, width, 3)).astype(np.uint8)
        found = Everything(sampler=samplers.Grid(side=2), **OFF)(tiny_sam, image)
        assert found.masks.shape == (len(found), height, width)
        nothing = Everything(sampler=samplers.Grid(side=2), min_iou=9.0)(tiny_sam, image)
        assert (len(nothing), nothing.to_sam()) == (0, [])
        assert nothing.masks.shape == (0, height, width)
        assert nothing.take([]).areas.shape == (0,)
    with pytest.raises(ShapeError, match="an image has the wrong shape"):
        Everything()(tiny_sam, np.zeros((9, 9), np.uint8))
    with pytest.raises(DataError, match="an image is too small for this sampler") as raised:
        Everything(sampler=samplers.Hierarchical())(tiny_sam, np.zeros((31, 99, 3), np.uint8))
    assert "99 x 31 pixels" in str(raised.value)
    with pytest.raises(ModelError, match="float32 only"):
        Everything()(copy.deepcopy(tiny_sam).bfloat16(), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ModelError, match="this model has no head for a heat map"):
        Everything(sampler=samplers.Heat())(tiny_sam, np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"points_per_batch": 0}, "points_per_batch is out of range"),
        ({"nms": -1.0}, "nms is out of range"),
        ({"max_masks": 0}, "max_masks is out of range"),
        ({"nms_of": "pixels"}, "there is no such nms_of"),
        ({"decoder": "own"}, "there is no such decoder"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Everything(**fields)


def test_stats_add_up(trained: nn.Module, photo: np.ndarray) -> None:
    oracle = Oracle(np.ones((1, 20, 30), bool))
    settings = Everything(sampler=samplers.CoverageSkip(levels=(2, 4), tau=SURE + 1, batch=3))
    stats = settings(oracle, np.zeros((20, 30, 3), np.uint8)).stats
    assert stats.prompts == sum(oracle.mask_decoder.asked) == 20
    assert stats.decoder_calls == len(oracle.mask_decoder.asked) == stats.rounds == 8
    stats = Everything(sampler=samplers.Grid(side=16), min_iou=0.2)(trained, photo).stats
    assert stats.masks["decoded"] == 3 * stats.prompts == 768
    counts = list(stats.masks.values())
    assert counts == sorted(counts, reverse=True)
    parts = stats.encoder_s + stats.sampling_s + stats.decoding_s + stats.post_s
    assert parts == pytest.approx(stats.total_s, rel=0.05)
    assert stats.peak_bytes is None or 0 <= stats.peak_bytes < 2**30
    assert "decoder calls" in str(stats)
    assert "<table" in stats._repr_html_()


def test_thresholds_are_matched(trained: nn.Module, photo: np.ndarray) -> None:
    settings = Everything(
        sampler=samplers.CoverageSkip(tau=2.0), min_iou=0.6, min_stability=0.7, nms=1.0
    )
    itself = settings.calibrate_thresholds(trained, trained, [photo])
    assert itself.min_iou == pytest.approx(0.6, abs=0.02)
    assert itself.min_stability == pytest.approx(0.7, abs=0.02)
    assert itself.sampler.tau == pytest.approx(2.0, abs=0.05)
    # A student that expects less of its masks, and is less sure of their pixels.
    student = copy.deepcopy(trained)
    with torch.no_grad():
        student.mask_decoder.iou_prediction_head.layers[-1].bias -= 0.4
        for head in student.mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight *= 0.5
            head.layers[-1].bias *= 0.5
    matched = settings.calibrate_thresholds(student, trained, [photo])
    assert matched.min_iou == pytest.approx(0.2, abs=0.05)
    assert matched.sampler.tau == pytest.approx(1.0, abs=0.2)
    grid = samplers.Grid(side=16)
    with_own, as_is, wanted = (
        len(Everything(sampler=grid, min_iou=s.min_iou, min_stability=s.min_stability, nms=1.0)(
            m, photo))
        for s, m in ((matched, student), (settings, student), (settings, trained))
    )  # fmt: skip
    assert as_is < 0.5 * wanted
    assert with_own == pytest.approx(wanted, rel=0.2)
    with pytest.raises(ConfigError, match="without images"):
        settings.calibrate_thresholds(student, trained, [])


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (333, 777)])
def test_places_there_and_back(trained: nn.Module, size: tuple[int, int]) -> None:
    framing = framing_of(trained)
    points = np.random.default_rng(0).uniform(0, 1, (50, 2)) * size[::-1]
    there = points * framing.scale(size)
    assert np.abs(there / framing.scale(size) - points).max() < 1e-3
    wanted = ResizeLongestSide(framing.frame).apply_coords(points, size)
    assert np.abs(there - wanted).max() < 1e-3
    boxes = np.concatenate([points[:25], points[25:]], 1)
    there = (boxes.reshape(-1, 2) * framing.scale(size)).reshape(-1, 4)
    assert np.abs(there - ResizeLongestSide(framing.frame).apply_boxes(boxes, size)).max() < 1e-3


def test_label_tells_settings_apart() -> None:
    kinds = [{}, {"min_iou": 0.5}, {"nms_of": "masks"}, {"sampler": samplers.Grid(side=8)}]
    labels = [Everything(**fields).label for fields in kinds]
    assert labels[0] == "Grid(side=32) iou>0.88 stability>=0.95 nms-boxes-0.7"
    assert len(set(labels)) == 4
    frozen = Everything()
    with pytest.raises(AttributeError):
        frozen.min_iou = 0.5  # type: ignore[misc]
