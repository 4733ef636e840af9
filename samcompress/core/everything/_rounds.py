"""What samplers and the generator tell each other."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..predict import Embedding

Points = NDArray[np.float64]
Cover = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """What a sampler may look at.

    Attributes:
        image: (H, W, 3) uint8.
        embedding: of the image.
        model: the SAM that made it.
    """

    image: NDArray[np.uint8]
    embedding: Embedding
    model: nn.Module

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.embedding.size


@dataclass(frozen=True)
class Prompts:
    """P prompts in the image's pixels, each a point, a box, or both.

    Attributes:
        points: (P, 2) x, y inside an object; None for none.
        boxes: (P, 4) x0, y0, x1, y1; None for none.
        scores: (P,) a detector's, which then stand for the predicted IoU; None for none.
        multimask: the masks of an ambiguous prompt, not the single one.
        filtered: whether masks must pass the filters and suppression.
    """

    points: Points | None = None
    boxes: Points | None = None
    scores: NDArray[np.float32] | None = None
    multimask: bool = True
    filtered: bool = True

    def __len__(self) -> int:
        given = self.points if self.points is not None else self.boxes
        return 0 if given is None else len(given)

    def part(self, low: int, high: int) -> Prompts:
        """Those from `low` to before `high`."""
        part = slice(low, high)
        points, boxes = (None if a is None else a[part] for a in (self.points, self.boxes))
        scores = None if self.scores is None else self.scores[part]
        return replace(self, points=points, boxes=boxes, scores=scores)


@dataclass(frozen=True)
class Accepted:
    """What has been found so far.

    Attributes:
        cover: (H, W) share of the image of the smallest accepted mask that has logits above the
            sampler's `tau` here; infinite where there is none.
    """

    cover: Cover


Rounds = Generator[Prompts, Accepted, None]


class Sampler(Protocol):
    """Chooses prompts.

    Attributes:
        tau: logits above which an accepted mask covers a pixel; None if that does not matter.
    """

    @property
    def tau(self) -> float | None:
        """See above."""

    def rounds(self, scene: Scene) -> Rounds:
        """Prompts, one lot after the other."""


def lattice(side: int, size: tuple[int, int]) -> Points:
    """segment_anything's grid: (side * side, 2) x, y in pixels, x changing fastest.

    Args:
        side: points along each side of the image.
        size: height and width of the image.

    Example:
        >>> lattice(2, (4, 8)).tolist()
        [[2.0, 1.0], [6.0, 1.0], [2.0, 3.0], [6.0, 3.0]]
    """
    offset = 1 / (2 * side)
    along = np.linspace(offset, 1 - offset, side)
    points: Points = np.stack(np.meshgrid(along, along), -1).reshape(-1, 2)
    return points * np.array(size[::-1], np.float64)
