"""Masks compared: IoU, boundary IoU, exact distance to the boundary, run lengths.

All masks are boolean numpy arrays at the original size of their image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.data._annotation import decoder
from ..core.errors import ShapeError

Mask = NDArray[np.bool_]


def iou(predicted: Mask, target: Mask) -> np.ndarray:
    """Intersection over union.

    Args:
        predicted: (..., H, W) bool.
        target: (..., H, W) bool; the leading sizes broadcast.

    Returns:
        (...) float64 in [0, 1]; 1 where both masks are empty.

    Raises:
        ShapeError: if H or W differ.

    Example:
        >>> iou(np.array([[True, True]]), np.array([[True, False]])).item()
        0.5
    """
    if predicted.shape[-2:] != target.shape[-2:]:
        raise ShapeError(
            "masks of different sizes cannot be compared.",
            got=predicted.shape[-2:],
            expected=target.shape[-2:],
            fix="bring both masks to the original size of the image",
        )
    first, second = np.broadcast_arrays(predicted, target)
    values = np.empty(first.shape[:-2])
    # One mask at a time: numpy counts a whole array many times faster than along axes.
    for index in np.ndindex(values.shape):
        both = np.count_nonzero(first[index] & second[index])
        either = np.count_nonzero(first[index] | second[index])
        values[index] = both / either if either else 1.0
    return values


def boundary(mask: Mask, *, ratio: float = 0.02) -> Mask:
    """The rim of a mask: what an erosion takes away.

    Args:
        mask: (H, W) bool; the border of the image counts as boundary.
        ratio: width of the rim as a share of the image's diagonal, at least 1 pixel.

    Returns:
        (H, W) bool.

    Source:
        Cheng et al. 2021, arXiv 2103.16562.
    """
    from scipy.ndimage import minimum_filter

    box = tight_box(mask)
    if box is None:
        return np.zeros(mask.shape, bool)
    x0, y0, x1, y1 = box
    width = max(1, round(ratio * math.hypot(*mask.shape)))
    # Eroding d times with a 3x3 square is one minimum over 2d+1; outside the tight box all is zero.
    part = mask[y0:y1, x0:x1].view(np.uint8)
    kept = minimum_filter(part, size=2 * width + 1, mode="constant", cval=0)
    rim: Mask = np.zeros(mask.shape, bool)
    rim[y0:y1, x0:x1] = part > kept
    return rim


def boundary_iou(predicted: Mask, target: Mask, *, ratio: float = 0.02) -> float:
    """IoU of the two rims: how well the outline fits, whatever the size of the object.

    Args:
        predicted: (H, W) bool.
        target: (H, W) bool.
        ratio: width of the rim as a share of the image's diagonal.

    Returns:
        A number in [0, 1]; 1 where both masks are empty.

    Raises:
        ShapeError: if the sizes differ.

    Source:
        Cheng et al. 2021, arXiv 2103.16562.
    """
    return float(iou(boundary(predicted, ratio=ratio), boundary(target, ratio=ratio)))


def box_iou(mask: Mask, box: Sequence[float]) -> float:
    """IoU of a mask with all pixels whose centre lies in a box; 1 where there are none in either.

    Args:
        mask: (H, W) bool.
        box: x0, y0, x1, y1 in pixels, not rounded.
    """
    x0, y0, x1, y1 = (max(0, math.ceil(value - 0.5)) for value in box)
    inside = mask[y0:y1, x0:x1]
    both = np.count_nonzero(inside)
    either = np.count_nonzero(mask) + inside.size - both
    return both / either if either else 1.0


def tight_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 of the smallest box of whole pixels around a mask; None if it is empty.

    The ends are exclusive, as x + w and y + h of an annotation are.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(columns):
        return None
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def squared_distance(mask: Mask) -> np.ndarray:
    """Squared Euclidean distance of every pixel of a mask to the nearest pixel outside it.

    Integers, so that ties are exact and the same on every platform. Outside the image is outside
    the mask.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) int64; 0 outside the mask.

    Example:
        >>> squared_distance(np.ones((3, 3), bool)).tolist()
        [[1, 1, 1], [1, 4, 1], [1, 1, 1]]
    """
    result = np.zeros(mask.shape, np.int64)
    box = tight_box(mask)
    if box is not None:
        x0, y0, x1, y1 = box
        result[y0:y1, x0:x1] = _squared_distance(mask[y0:y1, x0:x1])
    return result


def farthest(mask: Mask, *, without: Iterable[tuple[int, int]] = ()) -> tuple[int, int, int] | None:
    """The pixel of a mask farthest from its boundary.

    Args:
        mask: (H, W) bool.
        without: x, y of pixels that may not be chosen.

    Returns:
        x, y and the squared distance; ties go to the first in row-major order. None if no pixel is
        left to choose.
    """
    box = tight_box(mask)
    if box is None:
        return None
    x0, y0, x1, y1 = box
    distance = _squared_distance(mask[y0:y1, x0:x1])
    for x, y in without:
        if x0 <= x < x1 and y0 <= y < y1:
            distance[y - y0, x - x0] = 0
    y, x = divmod(int(distance.argmax()), x1 - x0)
    return (x0 + x, y0 + y, int(distance[y, x])) if distance[y, x] else None


def _squared_distance(part: Mask) -> np.ndarray:
    """`squared_distance` in the tight box: each nearest outside pixel is in it or on its rim."""
    from scipy.ndimage import distance_transform_edt

    padded = np.pad(part, 1)
    rows, columns = distance_transform_edt(padded, return_distances=False, return_indices=True)
    rows -= np.arange(padded.shape[0], dtype=rows.dtype)[:, None]
    columns -= np.arange(padded.shape[1], dtype=columns.dtype)[None]
    squared: np.ndarray = (rows**2 + columns**2)[1:-1, 1:-1].astype(np.int64)
    return squared


def encode(mask: Mask) -> dict[str, Any]:
    """Run lengths of a mask in COCO's compressed form, ready for JSON.

    Args:
        mask: (H, W) bool.

    Returns:
        ``{"size": [H, W], "counts": text}``.
    """
    from pycocotools import mask as coco

    run = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in run["size"]], "counts": run["counts"].decode("ascii")}


def decode(run: dict[str, Any]) -> Mask:
    """The (H, W) bool mask of `encode`.

    Raises:
        DataError: if the runs do not fill the size.
    """
    height, width = run["size"]
    return decoder(run, (height, width))()


def run_iou(first: dict[str, Any], second: dict[str, Any]) -> float:
    """IoU of two masks in the form of `encode`, without decoding them; 1 where both are empty."""
    from pycocotools import mask as coco

    both = int(coco.area(coco.merge([first, second], intersect=True)))
    either = int(coco.area(first)) + int(coco.area(second)) - both
    return both / either if either else 1.0
