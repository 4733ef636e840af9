"""Truth and answers at the low resolution in which a model draws masks, and clicks drawn there."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..core.framing import Framing
from .masks import Mask

# Fewer wrong pixels than this are taken for none.
_FEWEST = 10
# Side of the square through which a truth goes to be as smooth as an answer.
_SIDE = 1024


@dataclass(frozen=True)
class Field:
    """One truth in a model's frame.

    Attributes:
        truth: (4h, 4w) bool.
        step: width and height of a cell in pixels of the image.
        size: height H and width W of the image.
        key: seed, image id and annotation id, from which all draws come.
    """

    truth: Mask
    step: tuple[float, float]
    size: tuple[int, int]
    key: tuple[int, Any, Any]

    @classmethod
    def of(
        cls, mask: Mask, framing: Framing, low: tuple[int, int], key: tuple[int, Any, Any]
    ) -> Field:
        """The field of a truth.

        Args:
            mask: (H, W) bool.
            framing: the model's.
            low: height and width of the model's low-resolution masks.
            key: seed, image id and annotation id.
        """
        size = (mask.shape[0], mask.shape[1])
        height, width = framing.inside(size)
        inside = F.interpolate(_tensor(mask), (height, width), mode="bilinear")
        square = F.pad(inside, (0, framing.frame - width, 0, framing.frame - height))
        truth = F.interpolate((square > 0.5).float(), low, mode="bilinear")[0, 0] > 0.5
        x, y = framing.scale(size)
        return cls(
            truth.numpy(), (framing.frame / low[1] / x, framing.frame / low[0] / y), size, key
        )

    def draw(self, answer: Mask, *, step: int) -> tuple[float, float, int] | None:
        """A wrong cell, all with equal chance.

        Args:
            answer: (4h, 4w) bool, what the model gave.
            step: which draw of this object it is.

        Returns:
            x and y of the cell's centre in the image, and 1 for a missed or 0 for an extra cell;
            None where fewer than 10 cells are wrong.

        Source:
            EdgeSAM, arXiv 2312.06660.
        """
        (height, width), (dx, dy) = self.size, self.step
        wrong = self.truth ^ answer
        # What is drawn into the padding is no place to click.
        wrong[math.ceil(height / dy - 0.5) :] = False
        wrong[:, math.ceil(width / dx - 0.5) :] = False
        cells = np.flatnonzero(wrong)
        if len(cells) < _FEWEST:
            return None
        cell = int(generator(*self.key, step=step).choice(cells))
        row, column = divmod(cell, wrong.shape[1])
        # A point names the pixel whose centre is half a pixel further.
        x = min(max((column + 0.5) * dx - 0.5, 0.0), width - 1.0)
        y = min(max((row + 0.5) * dy - 0.5, 0.0), height - 1.0)
        return x, y, int(self.truth[row, column])


def resampled(mask: Mask) -> Mask:
    """A truth after the way that answers go: to a longest side of 1024 and back, bilinear.

    It loses what is finer than that grid, and is a little smoother at the edge.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) bool.
    """
    size = (mask.shape[0], mask.shape[1])
    there = Framing(_SIDE, _SIDE).inside(size)
    large = F.interpolate(_tensor(mask), there, mode="bilinear") > 0.5
    back: Mask = (F.interpolate(large.float(), size, mode="bilinear")[0, 0] > 0.5).numpy()
    return back


def generator(
    seed: int, image_id: Any, annotation_id: Any, *, step: int = 0
) -> np.random.Generator:
    """A stream of its own for every object and draw, whatever the order of the objects."""
    text = f"{seed}:{image_id}:{annotation_id}" + (f":{step}" if step else "")
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _tensor(mask: Mask) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None]
