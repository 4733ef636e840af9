"""Small holes and islands removed; suppression by the masks themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._require import require
from . import _runs
from .segments import Segments, boxes_of


def cleaned(found: Segments, least: int) -> tuple[Segments, NDArray[np.bool_]]:
    """Fill holes and remove islands smaller than `least` pixels.

    Returns:
        The masks, and (R,) which of them were changed.

    Raises:
        MissingDependencyError: if scipy is not installed.
    """
    label = require("scipy.ndimage", purpose="min_region").label
    counts, changed = list(found.counts), np.zeros(len(found), bool)
    for index in range(len(found)):
        mask = found.mask(index)
        filled = _without_small(mask, least, label, holes=True)
        left = _without_small(filled, least, label, holes=False)
        if not np.array_equal(mask, left):
            counts[index], changed[index] = _runs.encode_array(left), True
    boxes = np.where(changed[:, None], boxes_of(counts, found.size[0]), found.boxes)
    return replace(found, counts=tuple(counts), boxes=boxes), changed


def _without_small(
    mask: NDArray[np.bool_], least: int, label: Any, *, holes: bool
) -> NDArray[np.bool_]:
    regions, count = label(mask ^ holes, structure=np.ones((3, 3), int))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    small = np.flatnonzero(sizes < least) + 1
    if not len(small):
        return mask
    if holes:
        filled: NDArray[np.bool_] = mask | np.isin(regions, small)
        return filled
    # The largest stays, however small.
    kept = (
        np.setdiff1d(np.arange(1, count + 1), small) if len(small) < count else sizes.argmax() + 1
    )
    remaining: NDArray[np.bool_] = np.isin(regions, kept)
    return remaining


def unlike(found: Segments, scores: NDArray[np.float32], most: float) -> NDArray[np.int64]:
    """Greedy suppression by the IoU of masks, best first, ties by index.

    Args:
        found: the masks.
        scores: (R,) what decides which of two stays.
        most: largest IoU of two masks that stay.
    """
    order = np.argsort(-scores, kind="stable")
    areas = found.areas
    x0, y0, x1, y1 = found.boxes.T
    kept: list[int] = []
    packed: dict[int, NDArray[np.uint8]] = {}
    for index in order:
        # Only masks of like area whose boxes overlap can be alike.
        others = np.array(kept, np.int64)
        small, large = (
            np.minimum(areas[others], areas[index]),
            np.maximum(areas[others], areas[index]),
        )
        near = (small > most * large) & (x0[others] <= x1[index]) & (x1[others] >= x0[index])
        near &= (y0[others] <= y1[index]) & (y1[others] >= y0[index])
        bits = np.packbits(found.mask(index))
        if all(_iou(bits, packed[i], areas[index], areas[i]) <= most for i in others[near]):
            kept.append(int(index))
            packed[int(index)] = bits
    return np.array(kept, np.int64)


BITS = np.array([bin(n).count("1") for n in range(256)], np.uint8)


def _iou(a: NDArray[np.uint8], b: NDArray[np.uint8], area_a: int, area_b: int) -> float:
    inside = int(BITS[a & b].sum(dtype=np.int64))
    return inside / max(int(area_a) + int(area_b) - inside, 1)
