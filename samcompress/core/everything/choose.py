"""FastSAM's rules: which of the proposed masks a prompt means, whatever model proposed them.

No prompt can make a mask that was not proposed. Prompts in words need a further model and are left
out.

Source: FastSAM, X. Zhao et al. 2023, arXiv 2306.12156; its code is AGPL-3.0, nothing of it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    from .segments import Segments


def whole_frame(
    boxes: Tensor,
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    *,
    margin: float = 20,
    iou: float = 0.9,
) -> Tensor:
    """Boxes that are nearly the whole image become the whole image.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in pixels.
        size: height and width of the image.
        corner: row and column of its first pixel, where it lies in a larger input.
        margin: for the comparison, sides nearer to the border than this are put on it.
        iou: boxes that then overlap with the image by more than this are replaced.
    """
    (top, left), (height, width) = corner, size
    frame = boxes.new_tensor([left, top, left + width, top + height])
    snapped = torch.where((boxes - frame).abs() < margin, frame, boxes)
    snapped = torch.cat([snapped[:, :2].maximum(frame[:2]), snapped[:, 2:].minimum(frame[2:])], 1)
    share = (snapped[:, 2:] - snapped[:, :2]).clamp(min=0).prod(1) / (height * width)
    return torch.where((share > iou)[:, None], frame, boxes)


def by_box(found: Segments, box: Sequence[float]) -> int | None:
    """Index of the mask that a box means: the one of the largest IoU with it.

    Args:
        found: the masks.
        box: x0, y0, x1, y1 in the image's pixels.

    Returns:
        None if no mask has a pixel in the box.
    """
    height, width = found.size
    x0, y0, x1, y1 = (round(v) for v in box)
    part = np.s_[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
    area = max(0, x1 - x0) * max(0, y1 - y0)
    inside = np.array([np.count_nonzero(found.mask(i)[part]) for i in range(len(found))])
    if not inside.any():
        return None
    return int(np.argmax(inside / (area + found.areas - inside)))


def by_points(
    found: Segments, points: Sequence[Sequence[float]], labels: Sequence[int]
) -> NDArray[np.bool_]:
    """The mask that points mean.

    Masks are painted in the order of falling area, so that a part lies on its whole: one with a
    point inside that is wanted is set, and one with a point that is not wanted is cleared.

    Args:
        found: the masks.
        points: x, y in the image's pixels.
        labels: 1 for wanted, 0 for not wanted.

    Returns:
        (H, W) bool.

    Raises:
        ConfigError: if points and labels differ in number.
    """
    if len(points) != len(labels):
        raise ConfigError(
            "points and labels differ in number.", got=f"{len(points)} and {len(labels)}"
        )
    painted = np.zeros(found.size, bool)
    for index in np.argsort(-found.areas, kind="stable"):
        mask = found.mask(index)
        for (x, y), label in zip(points, labels, strict=True):
            if mask[int(y), int(x)]:
                painted[mask] = label == 1
    return painted
