"""Masks compared: by hand, against slow definitions, and on COCO."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from samcompress.core import data
from samcompress.core.errors import ShapeError
from samcompress.evaluate.masks import (
    boundary,
    boundary_iou,
    decode,
    encode,
    farthest,
    iou,
    run_iou,
    squared_distance,
    tight_box,
)


def blobs(seed: int, shape: tuple[int, int] = (23, 31)) -> np.ndarray:
    """A mask with islands, holes and parts at the border."""
    noise = np.random.default_rng(seed).random(shape)
    near = np.pad(noise, 1)
    sums = sum(
        near[1 + y : 1 + y + shape[0], 1 + x : 1 + x + shape[1]]
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    )
    return sums > 4.2


@pytest.fixture(scope="module")
def coco(shared: Path) -> dict[int, tuple[np.ndarray, bool]]:
    """Mask and crowd flag of the 1050 instances by ascending id."""
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")
    every = {i.id: (i.mask, i.crowd) for sample in found for i in sample.instances}
    return dict(sorted(every.items()))


def test_iou_by_hand() -> None:
    first = np.zeros((4, 4), bool)
    first[:2] = True  # 8 pixels
    second = np.zeros((4, 4), bool)
    second[:, :3] = True  # 12 pixels, 6 of them shared
    assert iou(first, second) == pytest.approx(6 / 14)
    assert iou(first, first) == 1
    assert iou(first, ~first) == 0
    empty = np.zeros((4, 4), bool)
    assert iou(empty, empty) == 1
    assert iou(empty, first) == 0


def test_iou_broadcasts_leading_sizes() -> None:
    masks = np.stack([blobs(i) for i in range(6)]).reshape(2, 3, 23, 31)
    found = iou(masks, blobs(1))
    assert found.shape == (2, 3)
    assert found[0, 1] == 1
    assert found[1, 2] == iou(blobs(5), blobs(1))


def test_iou_refuses_other_size() -> None:
    with pytest.raises(ShapeError) as err:
        iou(np.ones((4, 4), bool), np.ones((4, 5), bool))
    assert str(err.value) == (
        "masks of different sizes cannot be compared.\n"
        "  got       (4, 4)\n"
        "  expected  (4, 5)\n"
        "  try       bring both masks to the original size of the image"
    )


@pytest.mark.parametrize("seed", range(5))
def test_distance_against_every_pair(seed: int) -> None:
    mask = blobs(seed)
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    slow = np.zeros_like(padded, dtype=np.int64)
    for y, x in np.argwhere(padded):
        slow[y, x] = ((outside - [y, x]) ** 2).sum(1).min()
    assert np.array_equal(squared_distance(mask), slow[1:-1, 1:-1])
    y, x = divmod(int(slow[1:-1, 1:-1].argmax()), mask.shape[1])
    assert farthest(mask) == (x, y, slow.max())


def test_farthest_prefers_the_first_of_equals_and_unclicked_pixels() -> None:
    mask = np.zeros((5, 9), bool)
    mask[1:4, 1:4] = mask[1:4, 5:8] = True
    assert farthest(mask) == (2, 2, 4)
    assert farthest(mask, without=[(2, 2), (0, 0)]) == (6, 2, 4)
    dot = np.zeros((3, 3), bool)
    dot[1, 1] = True
    assert farthest(dot) == (1, 1, 1)
    assert farthest(dot, without=[(1, 1)]) is None
    assert farthest(np.zeros((3, 3), bool)) is None
    assert not squared_distance(np.zeros((3, 3), bool)).any()


def test_tight_box_ends_are_exclusive() -> None:
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:7] = True
    assert tight_box(mask) == (2, 1, 7, 3)
    assert tight_box(np.zeros((6, 8), bool)) is None


@pytest.mark.parametrize("ratio", [0.02, 0.06, 0.2])
def test_boundary_against_repeated_erosion(ratio: float) -> None:
    mask = blobs(3, (40, 50)) | (np.hypot(*np.ogrid[-20:20, -25:25]) < 15)
    inside = np.pad(mask, 1)
    for _ in range(max(1, round(ratio * np.hypot(40, 50)))):
        grown = np.pad(inside, 1)
        inside = np.logical_and.reduce(
            [grown[y : y + 42, x : x + 52] for y in range(3) for x in range(3)]
        )
    assert np.array_equal(boundary(mask, ratio=ratio), mask & ~inside[1:-1, 1:-1])


def test_boundary_iou() -> None:
    mask = np.zeros((100, 100), bool)
    mask[10:50, 10:50] = True
    assert boundary_iou(mask, mask) == 1
    assert boundary_iou(mask, ~mask) < 0.1
    empty = np.zeros_like(mask)
    assert boundary_iou(empty, empty) == 1
    # Width 3: a thinner mask is its own boundary.
    thin, moved = np.zeros_like(mask), np.zeros_like(mask)
    thin[20:25, 10:90] = moved[22:27, 10:90] = True
    assert boundary_iou(thin, moved) == iou(thin, moved)


def test_runs_round_trip_and_compare() -> None:
    first, second, empty = blobs(1), blobs(2), np.zeros((23, 31), bool)
    for mask in (first, second, empty, ~empty):
        assert np.array_equal(decode(encode(mask)), mask)
    assert run_iou(encode(first), encode(second)) == pytest.approx(iou(first, second).item())
    assert run_iou(encode(empty), encode(empty)) == 1
    assert run_iou(encode(empty), encode(first)) == 0


def test_coco_masks(coco: dict[int, tuple[np.ndarray, bool]]) -> None:
    digest = hashlib.sha256()
    for key, (mask, _) in coco.items():
        run = encode(mask)
        assert np.array_equal(decode(run), mask)
        digest.update(f"{key}:{run['counts']}".encode())
    assert len(coco) == 1050
    assert sum(int(mask.sum()) for mask, _ in coco.values()) == 9_544_020
    assert digest.hexdigest().startswith("281be4e5e83b64c6")


def test_coco_perfect_and_shifted(coco: dict[int, tuple[np.ndarray, bool]]) -> None:
    values, rims = [], []
    for index, (mask, crowd) in enumerate(coco.values()):
        if crowd:
            continue
        right, down = index % 7, index % 3
        height, width = mask.shape
        moved = np.zeros_like(mask)
        moved[down:, right:] = mask[: height - down, : width - right]
        values.append(iou(moved, mask).item())
        rims.append(boundary_iou(moved, mask))
        assert index % 50 or (iou(mask, mask), iou(~mask, mask), boundary_iou(mask, mask)) == (
            1,
            0,
            1,
        )
    assert len(values) == 1036
    assert np.mean(values) == pytest.approx(0.713160, abs=5e-7)
    assert np.mean(rims) == pytest.approx(0.678002, abs=5e-7)
