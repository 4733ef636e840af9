"""What is asked about one object: points, a box, an earlier mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .errors import ConfigError, DataError, ShapeError


@dataclass(frozen=True)
class Prompt:
    """What is asked about one object, in pixels of the original image.

    Args:
        points: (N, 2) x, y; None for no points.
        labels: (N,) 1 inside the object, 0 outside it; all 1 if left out.
        box: (4,) x0, y0, x1, y1.
        mask: (1, 4h, 4w) low-resolution logits, as an earlier `Prediction.logits` gives.

    Raises:
        ConfigError: if nothing is given, a number is not finite, or a label is not 0 or 1.
        ShapeError: if an array has another shape.

    Example:
        >>> Prompt(points=[[20, 30]])
        Prompt(points=1, box=False, mask=False)
    """

    points: Any = None
    labels: Any = None
    box: Any = None
    mask: Any = None

    def __post_init__(self) -> None:
        points = _array("points", self.points, (-1, 2))
        labels = _array("labels", self.labels, (-1,))
        if points is not None and labels is None:
            labels = np.ones(len(points), np.float32)
        for name, value in (
            ("points", points),
            ("labels", labels),
            ("box", _array("box", self.box, (4,))),
            ("mask", _array("mask", self.mask, (1, -1, -1))),
        ):
            object.__setattr__(self, name, value)
        if points is None and labels is None and self.box is None and self.mask is None:
            raise ConfigError("a prompt asks nothing.", expected="points, a box or a mask")
        numbers = [0 if a is None else len(a) for a in (points, labels)]
        if numbers[0] != numbers[1]:
            raise ShapeError(
                "points and labels of a prompt differ in number.",
                got=f"{numbers[0]} points, {numbers[1]} labels",
            )
        if points is not None and len(points) == 0:
            raise ConfigError("a prompt has an empty list of points.", fix="leave out points=")
        if labels is not None and not np.isin(labels, (0, 1)).all():
            raise ConfigError(
                "a point's label is neither 0 nor 1.", got=labels.tolist(), expected="0 or 1"
            )

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Number of points, whether there is a box, whether there is a mask."""
        n = 0 if self.points is None else len(self.points)
        return n, self.box is not None, self.mask is not None

    def __repr__(self) -> str:
        n, box, mask = self.kind
        return f"Prompt(points={n}, box={box}, mask={mask})"


def check_inside(prompt: Prompt, size: tuple[int, int], index: int) -> None:
    """Check that a prompt asks about a place in its image.

    Args:
        prompt: the prompt.
        size: height H and width W of the image.
        index: the prompt's place in its list, for the error.

    Raises:
        DataError: if a point or the whole box lies outside.
    """
    height, width = size
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box.tolist()
        if x1 < x0 or y1 < y0 or x1 < 0 or y1 < 0 or x0 > width or y0 > height:
            raise DataError(
                "a box does not lie in its image.",
                where=f"prompt {index}",
                got=[x0, y0, x1, y1],
                expected=f"x0 <= x1, y0 <= y1, touching 0...{width} by 0...{height}",
                fix="boxes are x0, y0, x1, y1 in pixels of the original image, not x, y, w, h",
            )
    if prompt.points is not None:
        x, y = prompt.points.T
        if ((x < 0) | (y < 0) | (x > width) | (y > height)).any():
            raise DataError(
                "a point lies outside its image.",
                where=f"prompt {index}",
                got=prompt.points.tolist(),
                expected=f"0...{width} by 0...{height}",
                fix="points are x, y in pixels of the original image",
            )


def _array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    array = np.asarray(value, dtype=np.float32)
    if array.size == 0 and shape == (-1, 2):
        array = array.reshape(0, 2)
    fits = array.ndim == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        text = ", ".join("N" if s == -1 else str(s) for s in shape)
        raise ShapeError(
            f"{name} of a prompt has the wrong shape.", got=array.shape, expected=f"({text})"
        )
    if not np.isfinite(array).all():
        raise ConfigError(
            f"{name} of a prompt holds a number that is not finite.",
            got=array.tolist() if array.size <= 8 else f"{(~np.isfinite(array)).sum()} of them",
            expected="finite numbers",
        )
    return array
