"""Prompts built from the ground truth, by name, and the clicks that correct an answer.

| name | the prompt |
|---|---|
| ``box`` | the annotation's box, unrounded |
| ``box-tight`` | the smallest box of whole pixels around the mask |
| ``center`` (``point``) | the pixel farthest from the boundary |
| ``com`` | the centre of mass, moved along an axis into the mask if it lies outside |
| ``random-k`` | k pixels of the mask, drawn without replacement |
| ``annotated`` | the point stored with the annotation |
| ``clicks-k`` | ``center``, then k - 1 clicks, each in the missed or the extra area |
| ``clicks-k-xor`` | the same, missed and extra area taken together |
| ``FIRST+k``, ``FIRST+k-xor`` | any of the first prompts above, then k such clicks |
| ``FIRST+k-random`` | the same, clicks drawn from the error of the low-resolution mask |

Everything is a pure function of the annotation, its mask, the answers, and (seed, image id,
annotation id).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..core.errors import ConfigError, DataError, closest
from ..core.prompt import Prompt
from .field import Field, generator
from .masks import Mask, farthest, tight_box

Clicks = Literal["dual", "xor", "random"]
NAMES = (
    *("box", "box-tight", "center", "com", "random-k", "annotated"),
    *("clicks-k", "clicks-k-xor", "box+k", "box+k-xor", "box+k-random"),
)

_ALIAS = {"point": "center"}
_PATTERN = re.compile(
    r"(?:clicks-(?P<clicks>[1-9]\d*)"
    r"|(?P<first>box|box-tight|center|com|annotated|random-(?P<random>[1-9]\d*))"
    r"(?:\+(?P<more>[1-9]\d*))?)(?:(?<=\d)-(?P<kind>xor|random))?"
)


@dataclass(frozen=True)
class Rule:
    """How an object is asked for: a first prompt, and how many clicks correct the answer.

    Attributes:
        name: canonical name, as in the protocol id.
        first: ``box``, ``box-tight``, ``center``, ``com``, ``annotated`` or ``random``.
        count: number of points of ``random``.
        clicks: number of correcting clicks.
        kind: ``dual`` clicks into the larger of missed and extra area, ``xor`` looks at both
            together, ``random`` draws a pixel of either.
    """

    name: str
    first: str
    count: int = 0
    clicks: int = 0
    kind: Clicks = "dual"

    @classmethod
    def parse(cls, name: str) -> Rule:
        """The rule of a name.

        Raises:
            ConfigError: if there is none, with the nearest names.

        Example:
            >>> Rule.parse("clicks-3").clicks, Rule.parse("point+2").name
            (2, 'clicks-3')
        """
        match = None
        if isinstance(name, str):
            first, plus, rest = name.partition("+")
            name = _ALIAS.get(first, first) + plus + rest
            match = _PATTERN.fullmatch(name)
        if match is None or (match["kind"] and not (match["clicks"] or match["more"])):
            near = closest(str(name), (*NAMES, *_ALIAS))
            raise ConfigError(
                "unknown prompt.",
                got=repr(name),
                expected=", ".join((*NAMES, *_ALIAS)) + "; k is a number from 1",
                fix=near,
            )
        kind: Any = match["kind"] or "dual"
        clicks = int(match["clicks"]) - 1 if match["clicks"] else int(match["more"] or 0)
        first = "random" if match["random"] else match["first"] or "center"
        if first == "center" and clicks and kind != "random":
            name = f"clicks-{clicks + 1}" + ("-xor" if kind == "xor" else "")
        return cls(name, first, int(match["random"] or 0), clicks, kind)

    @property
    def draws(self) -> bool:
        """Whether the seed matters."""
        return self.first == "random" or self.kind == "random"

    def start(self, instance: Any, mask: Mask, *, image_id: Any, seed: int = 0) -> Prompt:
        """The first prompt for one object.

        Args:
            instance: the annotation: its id, box and point.
            mask: (H, W) bool, its mask, not empty.
            image_id: id of its image.
            seed: of the drawing.

        Raises:
            DataError: if the annotation lacks the point, or has a box with its ends swapped.
        """
        if self.first == "box":
            return box(instance.box)
        if self.first == "annotated":
            return annotated(instance.point)
        if self.first == "random":
            return random_points(mask, self.count, generator(seed, image_id, instance.id))
        if self.first == "com":
            return center_of_mass(mask)
        return box(tight_box(mask)) if self.first == "box-tight" else center(mask)

    def correct(
        self,
        prompt: Prompt,
        mask: Mask,
        answer: Mask,
        *,
        low: Mask | None = None,
        field: Field | None = None,
    ) -> Prompt | None:
        """The prompt with one click more; None where the answer leaves no pixel to click.

        Args:
            prompt: all that was asked so far.
            mask: (H, W) bool, the truth.
            answer: (H, W) bool, what the model gave.
            low: (4h, 4w) bool, the same at low resolution; for drawn clicks only.
            field: where drawn clicks are drawn.
        """
        points = np.zeros((0, 2)) if prompt.points is None else prompt.points
        labels = np.zeros(0) if prompt.labels is None else prompt.labels
        clicked = [(int(x), int(y)) for x, y in points]
        click: tuple[float, float, int] | None
        if self.kind == "random":
            assert field is not None  # `accuracy` makes one for every rule that draws clicks
            assert low is not None
            click = field.draw(low, step=len(points))
        else:
            click = next_click(mask, answer, clicked, xor=self.kind == "xor")
        if click is None:
            return None
        x, y, label = click
        return Prompt(
            points=np.vstack([points, [x, y]]), labels=np.append(labels, label), box=prompt.box
        )


def box(corners: Sequence[float] | None) -> Prompt:
    """A box, neither rounded nor jittered.

    Raises:
        DataError: if there is none, or its ends are swapped.
    """
    if corners is None or corners[2] < corners[0] or corners[3] < corners[1]:
        raise DataError("an annotation has no usable box.", got=corners, expected="x0, y0, x1, y1")
    return Prompt(box=corners)


def center(mask: Mask) -> Prompt:
    """One click on the pixel farthest from the boundary; ties go to the first in row-major order.

    Raises:
        DataError: if the mask is empty.
    """
    found = farthest(mask)
    if found is None:
        raise DataError("an empty mask has no point.", expected="one pixel or more")
    return Prompt(points=[found[:2]])


def center_of_mass(mask: Mask) -> Prompt:
    """One click on the centre of mass, rounded down to a pixel.

    Where that lies outside the mask, the nearest pixel of the mask in its row or column; ties go
    right, left, down, up. A mask that neither meets gets `center`.

    Raises:
        DataError: if the mask is empty.

    Source:
        After segment-anything-fast's evaluation; rounding, the order of directions and the last
        resort are ours.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise DataError("an empty mask has no point.", expected="one pixel or more")
    y, x = int(rows.mean()), int(columns.mean())
    if mask[y, x]:
        return Prompt(points=[[x, y]])
    row, column = np.flatnonzero(mask[y]) - x, np.flatnonzero(mask[:, x]) - y
    steps = [(int(d), 0) for d in (*row[row > 0][:1], *row[row < 0][-1:])]
    steps += [(0, int(d)) for d in (*column[column > 0][:1], *column[column < 0][-1:])]
    if not steps:
        return center(mask)
    dx, dy = min(steps, key=lambda step: abs(step[0]) + abs(step[1]))
    return Prompt(points=[[x + dx, y + dy]])


def random_points(mask: Mask, k: int, generator: np.random.Generator) -> Prompt:
    """Some pixels of a mask, uniform and without replacement; all of them if there are fewer.

    Raises:
        DataError: if the mask is empty.
    """
    inside = np.flatnonzero(mask)
    if not len(inside):
        raise DataError("an empty mask has no point.", expected="one pixel or more")
    y, x = np.divmod(generator.choice(inside, min(k, len(inside)), replace=False), mask.shape[1])
    return Prompt(points=np.stack([x, y], axis=1))


def annotated(point: Sequence[float] | None) -> Prompt:
    """The point that an annotation of SA-1B carries.

    Raises:
        DataError: if it carries none.
    """
    if point is None:
        raise DataError(
            "an annotation has no point.",
            expected="point_coords, as SA-1B has",
            fix='prompts="center"',
        )
    return Prompt(points=[point])


def next_click(
    mask: Mask,
    answer: Mask,
    clicked: Sequence[tuple[int, int]] = (),
    *,
    xor: bool = False,
) -> tuple[int, int, int] | None:
    """Where a patient user clicks next: the middle of the error.

    Args:
        mask: (H, W) bool, the truth.
        answer: (H, W) bool, what the model gave.
        clicked: x, y of earlier clicks, not clicked again.
        xor: look at missed and extra area together instead of at the larger of the two.

    Returns:
        x, y, and 1 for a missed or 0 for an extra pixel; None where no pixel is left.

    Source:
        Two areas: RITM, arXiv 2102.06583, and EfficientViT-SAM, arXiv 2402.05008. One area:
        Segment Anything, arXiv 2304.02643, appendix D.1.
    """
    if xor:
        found = farthest(mask ^ answer, without=clicked)
        return None if found is None else (*found[:2], int(mask[found[1], found[0]]))
    missed = farthest(mask & ~answer, without=clicked)
    extra = farthest(answer & ~mask, without=clicked)
    if missed is not None and (extra is None or missed[2] > extra[2]):
        return (*missed[:2], 1)
    return None if extra is None else (*extra[:2], 0)
