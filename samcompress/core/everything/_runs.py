"""Masks as run lengths down the columns, as COCO keeps them; boxes and areas without unpacking."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int32]


def encode(masks: Tensor) -> list[Counts]:
    """Run lengths of masks, beginning with the zeros.

    Args:
        masks: (R, H, W) bool, on any device.

    Returns:
        For each mask the lengths of its runs: zeros, ones, zeros, ... down the first column, then
        down the next. The first is 0 where the first pixel is set.
    """
    return [_counts(*found, masks.shape[1:]) for found in _changes(masks)]


def encode_array(mask: NDArray[np.bool_]) -> Counts:
    """Run lengths of one (H, W) mask."""
    return _counts(*_changes_of(mask), mask.shape)


def _changes(masks: Tensor) -> list[tuple[NDArray[np.int64], bool]]:
    """Where runs begin, but for the first, and whether the first pixel is set.

    Pixels are compared with those above in the order in which they lie in memory, and only the few
    places found are brought into that of the columns: no mask is transposed.
    """
    if masks.device.type == "cpu":
        return [_changes_of(mask) for mask in masks.numpy()]
    return _changes_together(masks)


def _changes_together(masks: Tensor) -> list[tuple[NDArray[np.int64], bool]]:
    """The same on the device, from which only the places come back."""
    height = masks.shape[1]
    inner = (masks[:, 1:] != masks[:, :-1]).nonzero().cpu().numpy()
    over = (masks[:, 0, 1:] != masks[:, -1, :-1]).nonzero().cpu().numpy()
    first = masks[:, 0, 0].cpu().numpy()
    places = np.concatenate([inner[:, 2] * height + inner[:, 1] + 1, (over[:, 1] + 1) * height])
    owner = np.concatenate([inner[:, 0], over[:, 0]])
    order = np.lexsort((places, owner))
    ends = np.searchsorted(owner[order], np.arange(len(masks) + 1))
    parts = (places[order[a:b]] for a, b in pairwise(ends))
    return list(zip(parts, first.tolist(), strict=True))


def _changes_of(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], bool]:
    height, width = mask.shape
    inner = np.flatnonzero(mask[1:] != mask[:-1])
    over = np.flatnonzero(mask[0, 1:] != mask[-1, :-1])
    rows, columns = np.divmod(inner, width)
    places = np.concatenate([columns * height + rows + 1, (over + 1) * height])
    places.sort()
    return places, bool(mask[0, 0])


def _counts(places: NDArray[np.int64], begins: bool, size: tuple[int, ...]) -> Counts:
    ends = [0] if begins else []
    return np.diff(np.concatenate([[0], ends, places, [size[0] * size[1]]])).astype(np.int32)


def decode(counts: Counts, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) bool from run lengths."""
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    mask: NDArray[np.bool_] = flat.reshape(size[1], size[0]).T
    return mask


def area(counts: Counts) -> int:
    """Pixels of a mask."""
    return int(counts[1::2].sum())


def box(counts: Counts, height: int) -> tuple[int, int, int, int]:
    """First and last column and row of a mask: x0, y0, x1, y1, all inside; zeros if empty."""
    ends = np.cumsum(counts)
    begins, ends = ends[0::2][: len(counts) // 2], ends[1::2] - 1
    if not len(begins):
        return (0, 0, 0, 0)
    left, right = int(begins[0] // height), int(ends[-1] // height)
    if (begins // height != ends // height).any():
        # A run that goes on in the next column has a column's end and the next one's beginning.
        return left, 0, right, height - 1
    return left, int((begins % height).min()), right, int((ends % height).max())


def coco(counts: Counts, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's uncompressed form."""
    return {"size": list(size), "counts": counts.tolist()}


def overlaps(masks: Tensor, threshold: float, offset: float) -> Tensor:
    """Stability: IoU of masks cut above their threshold with the same cut below it.

    Args:
        masks: (R, H, W) logits.
        threshold: of the masks.
        offset: how far above and below.

    Returns:
        (R,) float32, NaN where even the lower cut is empty.
    """
    high, low = (_filled(masks, cut) for cut in (threshold + offset, threshold - offset))
    return high / low


def _filled(masks: Tensor, cut: float) -> Tensor:
    if masks.device.type == "cpu" and masks.dtype == torch.float32:
        # Several times as fast as a sum of booleans in torch.
        found = [np.count_nonzero(mask > np.float32(cut)) for mask in masks.numpy()]
        return torch.tensor(found, dtype=torch.int32)
    return (masks > cut).flatten(1).sum(1, dtype=torch.int32)
