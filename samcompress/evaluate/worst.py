"""The objects on which a compressed model lost most: found in a report, drawn as masks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.data import as_dataset
from ..core.display import number
from ..core.errors import DataError
from ..core.figures import axes
from ..core.predict import decode, encode
from ..core.prompt import Prompt
from .accuracy import aim
from .masks import boundary
from .measures import Row, accuracy_of
from .plots import BLUE, ORANGE, PINK, SKY
from .protocol import Protocol, Target, rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn


@dataclass(frozen=True)
class Worst:
    """One object on which a compressed model lost against the base.

    Attributes:
        name: the model.
        protocol: how the object was asked for and scored.
        image_id: its image.
        annotation_id: the object.
        area: of the annotation, in pixels; None where the data have none.
        base_iou: IoU of the base's mask with the truth.
        iou: IoU of the model's mask with the truth.
    """

    name: str
    protocol: str
    image_id: int | str
    annotation_id: int | str
    area: float | None
    base_iou: float
    iou: float

    @property
    def loss(self) -> float:
        """What was lost against the base."""
        return self.base_iou - self.iou


def losses(row: Row, base: Row) -> list[Worst]:
    """Every object of a row beside the base's result on the same object, in the row's order."""
    found = []
    for entry in row.get("accuracy") or ():
        other = accuracy_of(base, (entry["prompt"], entry["choice"])) or {"samples": ()}
        before = {(s["image_id"], s["annotation_id"]): s["iou"] for s in other["samples"]}
        found += [
            Worst(row["name"], entry["protocol"], *key, s.get("area"), before[key], s["iou"])
            for s in entry["samples"]
            if (key := (s["image_id"], s["annotation_id"])) in before
        ]
    return found


@dataclass(frozen=True)
class Case:
    """One object in the eyes of two models.

    Attributes:
        image: (H, W, 3) uint8.
        truth: (H, W) bool.
        base: (H, W) bool, mask of the base.
        small: (H, W) bool, mask of the compressed model.
        prompt: what was asked.
        label: one or two lines beside the pictures.
    """

    image: np.ndarray
    truth: np.ndarray
    base: np.ndarray
    small: np.ndarray
    prompt: Prompt
    label: str = ""


def mask_grid(cases: Sequence[Case], *, tile: int = 220, ax: Axes | None = None) -> Figure:
    """Masks side by side: base, compressed, difference; one object a row.

    Both masks are blue, the outline of the truth is white, the prompt is pink. In the difference,
    what only the base has is orange and what only the compressed model has is sky blue.

    Args:
        cases: the objects.
        tile: side of one picture in pixels; each shows the object and its surroundings.
        ax: axes to draw into.

    Raises:
        DataError: if there is no case.
    """
    if not cases:
        raise DataError("there is no mask to draw.", got="no case")
    gap = 8
    step = tile + gap
    mosaic = np.zeros((len(cases) * step - gap, 3 * step - gap, 4), np.uint8)
    figure, ax = axes(ax, (9.0, 0.45 + 2.25 * len(cases)))
    for r, case in enumerate(cases):
        window = _window(case)
        picture = _crop(case.image, window, tile).astype(float)
        truth, base, small = (_crop(m, window, tile) for m in (case.truth, case.base, case.small))
        pictures = (
            _paint(picture, [(base, BLUE)], truth),
            _paint(picture, [(small, BLUE)], truth),
            _paint(picture, [(base & ~small, ORANGE), (small & ~base, SKY)], truth),
        )
        for c, painted in enumerate(pictures):
            place = np.s_[r * step : r * step + tile, c * step : c * step + tile]
            mosaic[place] = np.dstack([painted, np.full((tile, tile), 255, np.uint8)])
            _draw_prompt(ax, case.prompt, window, tile, (c * step, r * step))
        ax.text(3 * step, r * step + tile / 2, case.label, va="center", fontsize=10)
    for c, title in enumerate(("base", "compressed", "difference")):
        ax.text(c * step + tile / 2, -gap, title, ha="center", va="bottom")
    ax.imshow(mosaic, interpolation="none", aspect="equal")
    ax.set_xlim(-0.5, mosaic.shape[1] - 0.5)
    ax.set_ylim(mosaic.shape[0] - 0.5, -0.5)
    ax.set_axis_off()
    return figure


def cases(
    worst: Sequence[Worst], data: Any, models: Mapping[str, nn.Module], *, base: str
) -> list[Case]:
    """Ask base and compressed models for the same objects again.

    Args:
        worst: from `Report.worst`.
        data: the samples that were measured.
        models: the models by name, the base among them.
        base: its name.

    Returns:
        One case for each object that the data hold and whose models were given.

    Raises:
        DataError: if none of them can be drawn.
    """
    samples = {sample.id: sample for sample in as_dataset(data)}
    found = []
    for item in worst:
        sample = samples.get(item.image_id)
        instances = sample.instances if sample else ()
        instance = next((i for i in instances if i.id == item.annotation_id), None)
        if sample is None or instance is None or not {item.name, base} <= models.keys():
            continue
        protocol = Protocol.parse(item.protocol)
        image, truth = sample.image, instance.mask
        asked = {
            m: aim(models[m], protocol, instance, truth, image_id=sample.id)
            for m in (base, item.name)
        }
        answers = [_answer(models[m], image, protocol, asked[m]) for m in (base, item.name)]
        name = "\n".join(textwrap.wrap(f"{item.name}, {protocol.prompt}", 26))
        label = f"{name}\nimage {item.image_id}\nobject {instance.id}\n"
        label += f"IoU {number(item.base_iou)}\nnow {number(item.iou)}"
        found.append(Case(image, truth, answers[0].mask, answers[1].mask, answers[1].prompt, label))
    if not found:
        raise DataError(
            "none of the worst objects can be drawn.",
            got=f"images {', '.join(str(w.image_id) for w in worst)}; models {', '.join(models)}",
            expected="the data and the models that were measured",
        )
    return found


def _answer(model: nn.Module, image: np.ndarray, protocol: Protocol, target: Target) -> Any:
    (embedding,) = encode(model, [image])

    def ask(prompts: list[Prompt], multimask: bool) -> Any:
        return decode(model, embedding, prompts, multimask=multimask)

    *_, (answer,) = rounds(protocol, [target], ask)
    return answer


def _window(case: Case) -> tuple[int, int, int]:
    """x0, y0, side of a square around all masks and the prompt."""
    seen = np.argwhere(case.truth | case.base | case.small)
    spots = [seen[:, ::-1]] if len(seen) else []
    if case.prompt.points is not None:
        spots.append(case.prompt.points)
    if case.prompt.box is not None:
        spots.append(np.reshape(case.prompt.box, (2, 2)))
    spot = np.concatenate(spots)
    low, high = spot.min(0), spot.max(0)
    side = int(min(max(1.4 * (high - low).max(), 48), max(case.image.shape[:2])))
    x0, y0 = ((low + high - side) / 2).round().astype(int).tolist()
    return x0, y0, side


def _crop(array: np.ndarray, window: tuple[int, int, int], tile: int) -> np.ndarray:
    """The window at tile x tile pixels, nearest neighbour; black beyond the image."""
    x0, y0, side = window
    steps = ((np.arange(tile) + 0.5) * side / tile).astype(int)
    rows, columns = y0 + steps, x0 + steps
    height, width = array.shape[:2]
    picked = array[np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)].copy()
    picked[(rows < 0) | (rows >= height)] = 0
    picked[:, (columns < 0) | (columns >= width)] = 0
    return np.asarray(picked)


def _paint(
    picture: np.ndarray, layers: list[tuple[np.ndarray, str]], truth: np.ndarray
) -> np.ndarray:
    painted = picture.copy()
    for mask, colour in layers:
        tone = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        painted[mask] = 0.35 * painted[mask] + 0.65 * np.array(tone)
    painted[boundary(truth, ratio=2 / math.hypot(*truth.shape))] = 255  # two pixels wide
    return np.asarray(painted, np.uint8)


def _draw_prompt(
    ax: Axes,
    prompt: Prompt,
    window: tuple[int, int, int],
    tile: int,
    corner: tuple[int, int],
) -> None:
    def place(points: np.ndarray) -> np.ndarray:
        return np.asarray((points.reshape(-1, 2) - window[:2]) * tile / window[2] + corner)

    if prompt.box is not None:
        (x0, y0), (x1, y1) = place(prompt.box)
        ax.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=PINK, linewidth=1.4)
    if prompt.points is not None:
        for (x, y), label in zip(place(prompt.points), prompt.labels, strict=True):
            marker = "o" if label else "X"
            ax.plot(x, y, marker, color=PINK, markersize=7, markeredgecolor="white")
