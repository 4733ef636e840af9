"""Run lengths, suppression and the removal of small regions, against naive versions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from segment_anything.utils.amg import (
    batched_mask_to_box,
    calculate_stability_score,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
)

from samcompress.core.everything import Everything, Segments, _collect, _regions, _runs
from samcompress.core.everything._collect import Collector
from samcompress.core.framing import Framing


def some_masks(seed: int = 0) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.randn(12, 1, 4, 5, generator=drawn), (23, 31), mode="bilinear"
    )[:, 0]
    masks = smooth > 0.1
    masks[0], masks[1] = False, True
    masks[2] = False
    masks[2, -1, 4], masks[2, 0, 5] = True, True  # a run over the end of a column
    masks[3] = False
    masks[3, 0, 0] = True
    masks[4] = False
    masks[4, -1, -1] = True
    masks[5] = torch.rand(23, 31, generator=drawn) > 0.5
    return masks


def test_run_lengths() -> None:
    masks = some_masks()
    wanted = mask_to_rle_pytorch(masks)
    counts = _runs.encode(masks)
    assert [_runs.coco(c, (23, 31)) for c in counts] == wanted
    boxes = batched_mask_to_box(masks)
    for mask, box, runs in zip(masks.numpy(), boxes.tolist(), counts, strict=True):
        assert np.array_equal(_runs.decode(runs, (23, 31)), mask)
        assert np.array_equal(rle_to_mask(_runs.coco(runs, (23, 31))), mask)
        assert _runs.area(runs) == mask.sum()
        assert list(_runs.box(runs, 23)) == box
        assert np.array_equal(_runs.encode_array(mask), runs)


def test_run_lengths_by_hand() -> None:
    mask = torch.tensor([[[0, 1, 0], [1, 1, 0]]], dtype=torch.bool)
    assert _runs.encode(mask)[0].tolist() == [1, 3, 2]
    assert _runs.box(np.array([1, 3, 2]), 2) == (0, 0, 1, 1)
    assert _runs.encode(~mask)[0].tolist() == [0, 1, 3, 2]
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert [c.tolist() for c in _runs.encode(torch.cat([one, ~one]))] == [[0, 1], [1]]


def test_the_way_of_gpus_gives_the_same() -> None:
    masks = some_masks(1)
    wanted = [c.tolist() for c in _runs.encode(masks)]
    found = [_runs._counts(*f, (23, 31)).tolist() for f in _runs._changes_together(masks)]
    assert found == wanted


def test_stability() -> None:
    logits = torch.randn(5, 20, 30, generator=torch.Generator().manual_seed(0)) * 2
    logits[0] = -9
    for threshold, offset in ((0.0, 1.0), (0.3, 0.5)):
        wanted = calculate_stability_score(logits, threshold, offset)
        assert torch.equal(_runs.overlaps(logits, threshold, offset)[1:], wanted[1:])
        assert _runs.overlaps(logits, threshold, offset)[0].isnan()
        double = _runs.overlaps(logits.double(), threshold, offset)
        assert torch.equal(double[1:], wanted[1:])


def collector(**fields: object) -> Collector:
    return Collector(Everything(**fields), Framing(64, 64), (40, 60), 0.0, None)


def some_segments(boxes: np.ndarray, scores: np.ndarray) -> Segments:
    masks = np.zeros((len(boxes), 40, 60), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    found = Segments.of(SimpleNamespace(masks=masks, scores=-np.arange(len(boxes))))
    assert np.array_equal(found.boxes, boxes)
    return found


def naive(ious: np.ndarray, scores: np.ndarray, most: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(ious[i, j] <= most for j in kept):
            kept.append(i)
    return kept


def drawn_boxes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    corner, sides = draw.integers(0, 30, (60, 2)), draw.integers(2, 9, (60, 2))
    # Few scores, so that many are tied.
    return np.concatenate([corner, corner + sides], 1), draw.integers(1, 6, 60).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [0.3, 0.7, 1.0])
def test_suppression_of_boxes(seed: int, most: float) -> None:
    boxes, scores = drawn_boxes(seed)
    found = some_segments(boxes, scores)
    kept = collector(nms=most)._unlike(found, scores)
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inside = (high - low).clip(0).prod(2)
    # Rounded as torchvision rounds: many of these IoUs are exactly 0.3.
    ious = (inside / (sides[:, None] + sides[None] - inside)).astype(np.float32).astype(float)
    assert kept.tolist() == naive(ious, scores, most)
    again = collector(nms=most)._unlike(found.take(kept), scores[kept])
    assert again.tolist() == list(range(len(kept)))
    if most == 1:
        assert len(kept) == len(boxes)


@pytest.mark.parametrize("seed", range(2))
def test_suppression_of_masks(seed: int) -> None:
    boxes, scores = drawn_boxes(seed)
    found = some_segments(boxes, scores)
    flat = found.masks.reshape(len(found), -1).astype(int)
    inside = flat @ flat.T
    ious = inside / (flat.sum(1)[:, None] + flat.sum(1)[None] - inside)
    for most in (0.3, 0.7, 1.0):
        kept = collector(nms=most, nms_of="masks")._unlike(found, scores)
        assert kept.tolist() == naive(ious, scores, most)
    # Two masks with the same box: boxes suppress one, masks do not.
    ring = np.ones((2, 40, 60), bool)
    ring[1, 2:-2, 2:-2] = False
    both = Segments.of(SimpleNamespace(masks=ring, scores=np.array([0.9, 0.8])))
    assert len(collector()._unlike(both, both.scores)) == 1
    assert len(collector(nms_of="masks")._unlike(both, both.scores)) == 2


def test_small_regions() -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("scipy")
    masks = some_masks(2).numpy()
    masks = np.concatenate([masks, masks ^ some_masks(5).numpy()])
    masks = masks[masks.any((1, 2))]
    found = Segments.of(SimpleNamespace(masks=masks, scores=-np.arange(len(masks))))
    for least in (2, 9, 60):
        mine, changed = _regions.cleaned(found, least)
        for index, mask in enumerate(masks):
            holes, _ = remove_small_regions(mask, least, "holes")
            wanted, _ = remove_small_regions(holes, least, "islands")
            assert np.array_equal(mine.mask(index), wanted)
            assert changed[index] == (not np.array_equal(mask, wanted))
        assert np.array_equal(mine.boxes, batched_mask_to_box(torch.from_numpy(mine.masks)))


def test_few_masks_are_in_full_size_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    full_size = Framing.full_size

    def watched(self: Framing, low: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        seen.append(len(low))
        return full_size(self, low, size)

    monkeypatch.setattr(Framing, "full_size", watched)
    monkeypatch.setitem(_collect.CHUNK, "cpu", 4 * 40 * 60 * 5)
    found = collector(min_iou=0, min_stability=0, nms=1.0)
    answers = SimpleNamespace(scores=torch.rand(6, 3))
    rows, masks = torch.ones(6, 3).nonzero().T
    prompts = SimpleNamespace(filtered=True, scores=None, points=np.zeros((6, 2)), boxes=None)
    found.add(torch.randn(18, 16, 16), rows, masks, answers, prompts)
    assert seen == [5, 5, 5, 3]
    assert len(found.finish()) == 18
