"""Samplers of prompts against true masks: what they ask, and what they can find at best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import SURE, Oracle, Walk, walk
from PIL import Image
from segment_anything.utils.amg import build_point_grid
from torch import nn

import samcompress as sc
from samcompress.core.errors import ConfigError, ShapeError
from samcompress.core.everything import Everything, Segments, choose, samplers
from samcompress.core.everything.samplers import CoverageSkip, Grid, Hierarchical, lattice
from samcompress.core.predict import encode

WHOLE = np.ones((1, 480, 640), bool)
NOTHING = np.zeros((1, 480, 640), bool)


def blank(masks: np.ndarray) -> np.ndarray:
    return np.zeros((*masks.shape[1:], 3), np.uint8)


# --- the grid ---


def test_grid_points() -> None:
    for side in (1, 2, 7, 32):
        points = lattice(side, (480, 640))
        assert points.shape == (side * side, 2)
        along = (np.arange(side) + 0.5) / side
        assert np.allclose(points[:side, 0], along * 640)
        assert np.allclose(points[::side, 1], along * 480)
        assert np.array_equal(points, build_point_grid(side) * [640, 480])
    assert lattice(1, (3, 5)).tolist() == [[2.5, 1.5]]


def nested() -> np.ndarray:
    """Masks in one another, side by side, and one that no coarse point meets."""
    masks = np.zeros((6, 61, 83), bool)
    masks[0] = True
    masks[1, 5:40, 5:50] = True
    masks[2, 8:20, 10:30] = True
    masks[3, 22:38, 8:48] = True
    masks[4, 45:55, 60:80] = True
    masks[5, 58:60, 81:83] = True
    return masks


def test_grid_finds_what_it_meets() -> None:
    masks = nested()
    settings = Everything(sampler=Grid(side=8), nms=1.0)
    found = settings(Oracle(masks), blank(masks))
    points = lattice(8, masks.shape[1:]).astype(int)
    order = np.argsort(masks.sum((1, 2)), kind="stable")
    wanted = [[i for i in order if masks[i, y, x]][:3] for x, y in points]
    assert len(found) == sum(map(len, wanted))
    expected = masks[[i for under in wanted for i in under]]
    assert np.array_equal(found.masks, expected)
    assert np.array_equal(
        found.points, np.repeat(lattice(8, masks.shape[1:]), [len(w) for w in wanted], 0)
    )
    # With suppression each is left once.
    once = Everything(sampler=Grid(side=8))(Oracle(masks), blank(masks))
    assert {m.tobytes() for m in once.masks} == {m.tobytes() for m in expected}
    assert len(once) == 5


@pytest.mark.parametrize("sampler", [Grid(side=16), Hierarchical(), CoverageSkip(batch=16)])
def test_walk_is_what_the_generator_does(sampler: samplers.Sampler) -> None:
    masks = sc.shapes(1, seed=7, size=(90, 120))[0].masks()
    quick = walk(sampler, masks)
    found = Everything(sampler=sampler, nms=1.0)(Oracle(masks), blank(masks))
    assert found.stats.prompts == quick.prompts
    assert len({m.tobytes() for m in found.masks}) == quick.hit > 0


def test_flipped_images_have_flipped_masks() -> None:
    # Odd sides: cutting a coordinate to whole pixels is then the same from either end.
    masks = np.zeros((3, 479, 641), bool)
    masks[0, 30:200, 30:300] = masks[1, 250:400, 320:330] = masks[2, 240:245, 500:641] = True
    flipped = np.ascontiguousarray(masks[:, :, ::-1])

    def set_of(sampler: samplers.Sampler, masks: np.ndarray, back: int = 1) -> set[bytes]:
        found = Everything(sampler=sampler)(Oracle(masks), blank(masks))
        return {m[:, ::back].tobytes() for m in found.masks}

    assert set_of(Grid(side=8), masks) == set_of(Grid(side=8), flipped, -1)
    # Known: TinySAM's fine lattice is not symmetric.
    fine = Hierarchical(side=16).fine((479, 641))
    mirrored = {(640 - int(x), int(y)) for x, y in fine}
    assert mirrored != {(int(x), int(y)) for x, y in fine}


# --- TinySAM's two rounds ---


@pytest.mark.parametrize(("size", "count"), [((1024, 1024), 961), ((480, 640), 961)])
def test_hierarchical_lattice(size: tuple[int, int], count: int) -> None:
    both = np.concatenate([lattice(8, size), Hierarchical().fine(size)])
    assert len(both) == count == len(np.unique(both, axis=0))
    assert (both >= 0).all()
    assert (both < [size[1], size[0]]).all()
    odd = Hierarchical().fine((479, 641))
    assert 897 <= len(odd) <= 1024 - 64


def test_hierarchical_rounds() -> None:
    assert walk(Hierarchical(), WHOLE).prompts == 64
    assert walk(Hierarchical(), NOTHING).prompts == 961
    assert walk(Hierarchical(tau=np.inf), WHOLE).prompts == 961
    assert walk(Hierarchical(tau=-np.inf), WHOLE).prompts == 64
    masks = sc.shapes(1, seed=5, size=(96, 128))[0].masks()
    counts = [
        Everything(sampler=Hierarchical(tau=tau))(Oracle(masks), blank(masks)).stats.prompts
        for tau in (np.inf, SURE + 1, 8.5, -SURE, -np.inf)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_one_hit_of_everything_ends_it() -> None:
    # Infinitely low, the threshold makes any accepted mask cover the whole image.
    masks = np.zeros((1, 64, 96), bool)
    masks[0, :9, :9] = True
    found = Everything(sampler=Hierarchical(tau=-np.inf))(Oracle(masks), blank(masks))
    assert (found.stats.prompts, found.stats.rounds) == (64, 1)


# --- coverage skip ---


def test_coverage_skip_is_a_grid_without_coverage() -> None:
    masks = nested()
    grid, skip = (
        Everything(sampler=s)(Oracle(masks), blank(masks))
        for s in (Grid(side=8), CoverageSkip(levels=(8,), tau=np.inf, batch=10))
    )
    assert grid.to_sam("uncompressed_rle") == skip.to_sam("uncompressed_rle")
    assert skip.stats.prompts == 64


def test_coverage_skip_depends_on_its_batch_alone() -> None:
    masks = nested()
    runs = {
        (batch, calls): Everything(
            sampler=CoverageSkip(levels=(4, 8), batch=batch), points_per_batch=calls
        )(Oracle(masks), blank(masks))
        for batch in (1, 64)
        for calls in (1, 9)
    }
    assert runs[1, 1].to_sam("uncompressed_rle") == runs[1, 9].to_sam("uncompressed_rle")
    assert runs[64, 1].to_sam("uncompressed_rle") == runs[64, 9].to_sam("uncompressed_rle")
    assert runs[1, 1].stats.prompts < runs[64, 1].stats.prompts
    assert "depends on `batch` by design" in CoverageSkip.__doc__


def test_large_masks_are_looked_into() -> None:
    masks = np.zeros((2, 64, 64), bool)
    masks[0] = True
    masks[1, 20:30, 20:30] = True

    def prompts(**fields: float) -> Walk:
        return walk(CoverageSkip(levels=(2, 8, 16), **fields), masks)

    # The first point meets nothing but the whole, and hides the part.
    assert prompts() == Walk(4, 1, 2)
    assert prompts(large=0.5, large_side=8) == Walk(4 + 64, 2, 2)
    deeper = prompts(large=0.5, large_side=16, batch=1)
    assert 64 < deeper.prompts - 4 < 64 + 256
    assert deeper.hit == 2


def test_samplers_check_their_fields() -> None:
    for wrong in (
        lambda: Grid(side=0),
        lambda: Hierarchical(side=3),
        lambda: CoverageSkip(batch=0),
        lambda: CoverageSkip(levels=()),
        lambda: CoverageSkip(levels=(4, 0)),
    ):
        with pytest.raises(ConfigError, match="is out of range"):
            wrong()


# --- what samplers can find at best, on the shared data: the table of the method's card ---

Masks = list[np.ndarray]
TABLES = {
    "sa1b": {
        Grid(side=8): (64, 64, 0.6132),
        Grid(side=16): (256, 256, 0.7778),
        Grid(side=32): (1024, 1024, 0.9095),
        Grid(side=64): (4096, 4096, 0.9835),
        Hierarchical(side=16): (54.6, None, 0.7778),
        Hierarchical(side=32): (167.9, 698, 0.9177),
        Hierarchical(side=64): (617.5, None, 0.9815),
        CoverageSkip(levels=(32,)): (251.9, None, 0.9095),
        CoverageSkip(levels=(8, 32)): (175.3, None, 0.9177),
        CoverageSkip(): (148.8, None, 0.9403),
        CoverageSkip(levels=(8, 16, 32, 64)): (563.5, None, 0.9959),
    },
    "bsds500": {
        Grid(side=8): (64, 64, 0.4500),
        Grid(side=16): (256, 256, 0.5955),
        Grid(side=32): (1024, 1024, 0.7273),
        Grid(side=64): (4096, 4096, 0.8361),
        Hierarchical(side=16): (40.1, None, 0.5978),
        Hierarchical(side=32): (87.8, 215, 0.7289),
        Hierarchical(side=64): (279.6, None, 0.8351),
        CoverageSkip(levels=(32,)): (214.8, None, 0.7273),
        CoverageSkip(levels=(8, 32)): (87.4, None, 0.7333),
        CoverageSkip(): (32.3, None, 0.7550),
        CoverageSkip(levels=(8, 16, 32, 64)): (78.9, None, 0.8503),
    },
    "coco": {
        Grid(side=8): (64, 64, 0.4440),
        Grid(side=16): (256, 256, 0.6573),
        Grid(side=32): (1024, 1024, 0.8755),
        Grid(side=64): (4096, 4096, 0.9768),
    },
    "coco, small": {
        Grid(side=8): (64, 64, 0.0929),
        Grid(side=16): (256, 256, 0.2808),
        Grid(side=32): (1024, 1024, 0.7214),
        Grid(side=64): (4096, 4096, 0.9482),
    },
}


def masks_of(name: str, data: Path) -> Masks:
    if name == "sa1b":
        return [sample.masks() for sample in sc.data.open(data / "sa1b")]
    if name == "bsds500":
        labels = [
            np.asarray(Image.open(p)) for p in sorted((data / "bsds500/test").glob("*_1.png"))
        ]
        return [np.stack([a == value for value in np.unique(a)]) for a in labels]
    largest = 32**2 if name == "coco, small" else np.inf
    found = []
    for sample in sc.data.open(f"{data}/coco@val2017"):
        kept = [i.mask for i in sample.instances if not i.crowd and i.area < largest]
        found += [np.stack(kept)] if kept else []
    return found


@pytest.mark.parametrize("name", TABLES)
def test_ceilings(shared: Path, name: str) -> None:
    sets = masks_of(name, shared / "data")
    for sampler, (mean, most, ceiling) in TABLES[name].items():
        walks = [walk(sampler, masks) for masks in sets]
        prompts = [w.prompts for w in walks]
        assert np.mean(prompts) == pytest.approx(mean, abs=0.05001), sampler
        assert most in (None, max(prompts)), sampler
        share = sum(w.hit for w in walks) / sum(w.masks for w in walks)
        assert share == pytest.approx(ceiling, abs=0.5001e-4), sampler


# --- boxes of a detector ---


def test_boxes_of_a_detector() -> None:
    masks = nested()[1:5]
    boxes = np.array(
        [[5, 5, 50, 40], [10, 8, 30, 20], [10, 8, 30, 19.9], [60, 45, 80, 55], [7, 7, 7.5, 20]]
    )
    scores = np.array([0.9, 0.7, 0.6, 0.3, 0.8])
    seen: list[np.ndarray] = []

    def detect(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(image)
        return boxes, scores

    oracle, image = Oracle(masks), blank(masks)
    found = Everything(sampler=samplers.Boxes(detect=detect))(oracle, image)
    # The third overlaps with a better one, the fourth is not certain, the fifth is too thin.
    assert np.array_equal(found.masks, masks[[0, 1]])
    assert found.scores.tolist() == [np.float32(0.9), np.float32(0.7)]
    assert found.predicted_iou.tolist() == [1, 1]
    assert np.array_equal(found.prompt_boxes, boxes[:2])
    assert np.isnan(found.points).all()
    assert seen[0] is image
    # One mask a box; neither filters nor suppression, however alike the masks are.
    less = Everything(sampler=samplers.Boxes(detect=detect, confidence=0.2, nms=1.0), min_iou=2)
    assert [len(less(oracle, image)), less(oracle, image).stats.prompts] == [4, 4]
    best = Everything(sampler=samplers.Boxes(detect=detect, most=1))(oracle, image)
    assert len(best) == 1


def test_batches_of_boxes_change_nothing(trained: nn.Module) -> None:
    image = sc.shapes(1, seed=2, size=96)[0].image
    corners = np.random.default_rng(0).uniform(0, 40, (9, 2))
    sampler = samplers.Boxes(
        detect=lambda _: (np.concatenate([corners, corners + 30], 1), np.linspace(0.5, 1, 9))
    )
    one, many = (Everything(sampler=sampler, points_per_batch=n)(trained, image) for n in (1, 64))
    assert len(one) == len(many) == 9
    assert np.abs(one.predicted_iou - many.predicted_iou).max() < 1e-4
    assert (one.masks != many.masks).sum() <= 9


def test_detector_of_nothing(tiny_sam: nn.Module) -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    for nothing in (np.zeros((0, 4)), [], torch.zeros(0, 4)):
        sampler = samplers.Boxes(detect=lambda _, nothing=nothing: (nothing, []))
        found = Everything(sampler=sampler)(tiny_sam, image)
        assert (len(found), found.stats.prompts, found.stats.decoder_calls) == (0, 0, 0)
    with pytest.raises(ShapeError, match="boxes have the wrong shape") as raised:
        Everything(sampler=samplers.Boxes(detect=lambda _: (np.zeros((2, 4)), [0.5])))(
            tiny_sam, image
        )
    assert "boxes (2, 4), scores (1,)" in str(raised.value)


# --- FastSAM's rules ---


@pytest.mark.parametrize(("inset", "whole"), [(19, True), (20, False), (21, False)])
def test_border_snap(inset: int, whole: bool) -> None:
    # Without the snap it overlaps by less than 0.9 with the image.
    box = torch.tensor([[inset, inset, 400 - inset, 300 - inset]]).float()
    found = choose.whole_frame(box, (300, 400))
    assert torch.equal(found, torch.tensor([[0.0, 0, 400, 300]]) if whole else box)
    outside = torch.tensor([[-50.0, -50, 450, 350], [0, 0, 200, 300]])
    assert choose.whole_frame(outside, (300, 400))[0].tolist() == [0, 0, 400, 300]
    assert torch.equal(choose.whole_frame(outside, (300, 400))[1], outside[1])


def proposals(masks: np.ndarray, scores: np.ndarray) -> Segments:
    return Segments.of(SimpleNamespace(masks=masks, scores=scores))


def test_prompts_choose_among_proposals() -> None:
    masks = nested()
    found = proposals(masks, np.array([0.1, 0.9, 0.5, 0.7, 0.6, 0.2]))
    assert found.scores.tolist() == np.float32([0.9, 0.7, 0.6, 0.5, 0.2, 0.1]).tolist()
    assert np.array_equal(found.masks, masks[[1, 3, 4, 2, 5, 0]])
    ious = [(m & masks[3]).sum() / (m | masks[3]).sum() for m in found.masks]
    assert found.by_box([8, 22, 48, 38]) == int(np.argmax(ious)) == 1
    assert found.by_box([0, 0, 83, 61]) == 5
    assert found.take([2]).by_box([0, 0, 5, 5]) is None
    assert found.take([]).by_box([0, 0, 5, 5]) is None
    # Painted from the largest to the smallest.
    part = found.by_points([[15, 10]], [1])
    assert np.array_equal(part, masks[0])
    some = proposals(masks[1:], np.ones(5))
    hole = some.by_points([[7, 6], [15, 10]], [1, 0])
    # The large one, which the second point clears, then the small one: nothing is left of either.
    assert not hole.any()
    both = some.by_points([[7, 6], [70, 50]], [1, 1])
    assert np.array_equal(both, masks[1] | masks[4])
    without = some.take([0, 2]).by_points([[6, 6], [15, 30]], [1, 0])
    assert not (without & masks[3]).any()
    with pytest.raises(ConfigError, match="differ in number"):
        some.by_points([[1, 1]], [])


# --- the heat map ---


def test_heat_asks_at_peaks(tiny_sam: nn.Module) -> None:
    image = np.zeros((60, 128, 3), np.uint8)
    (embedding,) = encode(tiny_sam, [image])
    h, w = embedding.features.shape[-2:]
    heat, sides = torch.zeros(1, 1, h, w), torch.ones(1, 4, h, w)
    # The last one lies in the padding.
    for row, column, value in ((1, 2, 0.9), (1, 3, 0.8), (2, 6, 0.5), (h - 1, 4, 0.95)):
        heat[0, 0, row, column] = value
    tiny_sam.heat_head = _Fixed(heat, sides)
    scene = samplers.Scene(image, embedding, tiny_sam)
    points, boxes, values = samplers.peaks(scene)
    cell = 128 / w
    assert np.allclose(values[:2], [0.9, 0.5])
    assert np.allclose(points[:2], [[2.5 * cell, 1.5 * cell], [6.5 * cell, 2.5 * cell]])
    assert np.allclose(boxes[0], [1.5 * cell, 0.5 * cell, 3.5 * cell, 2.5 * cell])
    lots = list(_rounds(samplers.Heat(thresholds=(0.6, 0.3), prompt="point"), scene, None))
    assert [lot.points.tolist() for lot in lots] == [[points[0].tolist()], [points[1].tolist()]]
    assert all(lot.multimask and lot.boxes is None for lot in lots)
    # What the first round found hides the second peak.
    hidden = list(_rounds(samplers.Heat(thresholds=(0.6, 0.3)), scene, 0.2))
    assert [len(lot) for lot in hidden] == [1]
    assert not hidden[0].multimask
    assert hidden[0].boxes.shape == (1, 4)
    assert list(_rounds(samplers.Heat(thresholds=(0.99,)), scene, None)) == []
    assert sum(map(len, _rounds(samplers.Heat(most=1), scene, None))) == 1


class _Fixed(nn.Module):
    def __init__(self, *maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.maps


def _rounds(sampler: samplers.Sampler, scene: samplers.Scene, share: float | None):
    cover = np.full(scene.size, np.inf if share is None else share, np.float32)
    rounds = sampler.rounds(scene)
    asked = next(rounds, None)
    while asked is not None:
        yield asked
        try:
            asked = rounds.send(samplers.Accepted(cover))
        except StopIteration:
            asked = None
