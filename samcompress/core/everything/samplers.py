"""Where to ask: samplers of prompts, which may look at what has been found so far.

A sampler is a small frozen dataclass. Its `rounds` yields prompts, is sent what was accepted of
them, and yields the next ones: a grid yields once, a coverage skip many times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms

from ..errors import ConfigError, DataError, ModelError, ShapeError
from ..framing import framing_of
from ._rounds import Accepted, Cover, Points, Prompts, Rounds, Sampler, Scene, lattice
from .choose import whole_frame

__all__ = [
    "Accepted",
    "Boxes",
    "CoverageSkip",
    "Grid",
    "Heat",
    "Hierarchical",
    "Prompts",
    "Rounds",
    "Sampler",
    "Scene",
    "lattice",
    "peaks",
]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of points, as `SamAutomaticMaskGenerator` has it.

    Args:
        side: points along each side of the image.

    Source:
        SAM, Kirillov et al. 2023, arXiv 2304.02643.
    """

    tau: ClassVar[float | None] = None

    side: int = 32

    def __post_init__(self) -> None:
        _at_least("Grid", "side", self.side, 1)

    def rounds(self, scene: Scene) -> Rounds:
        """All points at once."""
        yield Prompts(points=lattice(self.side, scene.size))


@dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """TinySAM's two rounds: a coarse grid, then a fine one where nothing was found for certain.

    The fine points lie half a cell off SAM's own grid, and those that would lie outside the image
    are left out, as upstream: with a width and height that `side` divides, a row and a column. The
    lattice is not symmetric.

    Args:
        side: points along each side in all; a quarter of them in the first round.
        tau: logits above which a mask of the first round covers a pixel. A number of SAM-H's own
            decoder; `Everything.calibrate_thresholds` finds that of another.

    Source:
        TinySAM, Shu et al. 2023, arXiv 2312.13789 (Apache-2.0); own code.
    """

    side: int = 32
    tau: float = 8.5

    def __post_init__(self) -> None:
        _at_least("Hierarchical", "side", self.side, 4)

    def rounds(self, scene: Scene) -> Rounds:
        """The coarse points, then the fine ones that are not covered."""
        coarse = lattice(self.side // 4, scene.size)
        accepted = yield Prompts(points=coarse)
        fine = self.fine(scene.size)
        left = fine[~np.isfinite(_at(accepted.cover, fine))]
        if len(left):
            yield Prompts(points=left)

    def fine(self, size: tuple[int, int]) -> Points:
        """All points of the second round.

        Raises:
            DataError: if the image is smaller than the grid.
        """
        height, width = size
        strides = np.array([width // self.side, height // self.side])
        if min(strides) < 1:
            raise DataError(
                "an image is too small for this sampler.",
                got=f"{width} x {height} pixels",
                expected=f"at least {self.side} each way",
                fix="sc.samplers.Grid(), or a smaller side",
            )
        offsets = np.array([(x, y) for y in range(-1, 3) for x in range(-1, 3) if x or y])
        coarse = lattice(self.side // 4, size)
        fine = (coarse[:, None] + offsets * strides).reshape(-1, 2)
        inside: Points = fine[(fine < [width, height]).all(1)]
        return inside


@dataclass(frozen=True, kw_only=True)
class CoverageSkip:
    """Grids from coarse to fine, without the points that lie on what has been found.

    Points of a level are visited in rows, `batch` at a time, and what each lot gives is known to
    the next: the result depends on `batch` by design, and on nothing else. With one level and an
    infinite `tau` it is the `Grid`.

    Parts that lie on a larger mask are lost unless its inside is visited too: see `large`.

    Args:
        levels: points along each side of the image, level by level.
        tau: logits above which an accepted mask covers a pixel, see `Hierarchical`.
        batch: points between two looks at what has been found. Fewer save more prompts; on a GPU
            they leave it idle.
        large: masks of more than this share of the image cover nothing on levels of at most
            `large_side` points; 1 for none.
        large_side: see `large`.

    Source:
        own; the two-level case is near to TinySAM's, arXiv 2312.13789.
    """

    levels: tuple[int, ...] = (4, 8, 16, 32)
    tau: float = 8.5
    batch: int = 64
    large: float = 1.0
    large_side: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        _at_least("CoverageSkip", "batch", self.batch, 1)
        for level in self.levels or (0,):
            _at_least("CoverageSkip", "levels", level, 1)

    def rounds(self, scene: Scene) -> Rounds:
        """Lot after lot."""
        cover = np.full(scene.size, np.inf, np.float32)
        for side in self.levels:
            points = lattice(side, scene.size)
            limit = self.large if side <= self.large_side else 1.0
            start = 0
            while start < len(points):
                free = np.flatnonzero(_at(cover, points[start:]) > limit)[: self.batch]
                if not len(free):
                    break
                accepted = yield Prompts(points=points[start + free])
                cover, start = accepted.cover, start + int(free[-1]) + 1


Detector = Callable[[NDArray[np.uint8]], tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The boxes of any detector, one mask each, without filters: MobileSAMv2's way.

    A mask's score is its box's. Boxes below the least score, those that overlap too much with a
    better one, and those thinner than a pixel are left out; one that is nearly the whole image
    becomes the whole image.

    Args:
        detect: from an image, (H, W, 3) uint8, to (N, 4) boxes x0, y0, x1, y1 in its pixels and
            (N,) scores.
        confidence: least score.
        nms: largest IoU of two boxes.
        most: at most so many boxes, the best.

    Source:
        MobileSAMv2, Zhang et al. 2023, arXiv 2312.09579 (Apache-2.0); own code.
    """

    tau: ClassVar[float | None] = None

    detect: Detector
    confidence: float = 0.4
    nms: float = 0.9
    most: int = 320

    def rounds(self, scene: Scene) -> Rounds:
        """All boxes at once; nothing if there is none.

        Raises:
            ShapeError: if the detector's boxes and scores do not fit together.
        """
        boxes, scores = (torch.as_tensor(a).float() for a in self.detect(scene.image))
        boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
            raise ShapeError(
                "a detector's boxes have the wrong shape.",
                got=f"boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)}",
                expected="(N, 4) and (N,)",
            )
        height, width = scene.size
        likely = scores > self.confidence
        boxes, scores = boxes[likely], scores[likely]
        kept = nms(boxes, scores, self.nms)[: self.most]
        frame = torch.tensor([width, height, width, height])
        boxes = whole_frame(boxes[kept], (height, width)).clamp(min=0).minimum(frame)
        thick = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
        if thick.any():
            yield Prompts(
                boxes=boxes[thick].double().numpy(),
                scores=scores[kept][thick].numpy(),
                multimask=False,
                filtered=False,
            )


@dataclass(frozen=True, kw_only=True)
class Heat:
    """The peaks of a heat map that a small head predicts from the embedding, strongest first.

    After Lite-SAM's point and box proposals, and AoP-SAM's rounds: each asks for peaks above a
    lower threshold that do not lie on what has been found. The model must have been trained for it,
    by `sc.distill.HeatHead`.

    Args:
        thresholds: least heat in each round; one number is Lite-SAM's single round.
        prompt: ``point``, whose three masks are looked at, ``box``, or ``both`` in one prompt.
        tau: logits above which an accepted mask covers a pixel, see `Hierarchical`.
        most: at most so many prompts in all.
        nms: largest IoU of two boxes of one round, where there are boxes.

    Source:
        after Lite-SAM, Fu et al. 2024, arXiv 2407.08965, and AoP-SAM, Chen et al. 2025, arXiv
        2505.11980, of which no code is public; own code.
    """

    thresholds: tuple[float, ...] = (0.6, 0.4, 0.2)
    prompt: Literal["point", "box", "both"] = "both"
    tau: float = 8.5
    most: int = 256
    nms: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))

    def rounds(self, scene: Scene) -> Rounds:
        """Peaks above each threshold.

        Raises:
            ModelError: if the model has no such head.
        """
        points, boxes, heat = peaks(scene)
        cover, left = np.full(scene.size, np.inf, np.float32), self.most
        fresh = np.ones(len(points), bool)
        for threshold in self.thresholds:
            open_ = fresh & (heat > threshold) & ~np.isfinite(_at(cover, points))
            chosen = np.flatnonzero(open_)
            fresh[chosen] = False
            if self.prompt != "point" and len(chosen):
                tensors = (torch.from_numpy(a[chosen]) for a in (boxes, heat))
                chosen = chosen[nms(*tensors, self.nms).numpy()]
            chosen = chosen[:left]
            left -= len(chosen)
            if len(chosen):
                accepted = yield Prompts(
                    points=None if self.prompt == "box" else points[chosen],
                    boxes=None if self.prompt == "point" else boxes[chosen],
                    multimask=self.prompt == "point",
                )
                cover = accepted.cover


def peaks(scene: Scene) -> tuple[Points, Points, NDArray[np.float64]]:
    """Local maxima of the heat map inside the image, hottest first.

    Returns:
        (K, 2) points and (K, 4) boxes in the image's pixels, and (K,) heat in 0...1.
    """
    head = getattr(scene.model, "heat_head", None)
    if head is None:
        raise ModelError(
            "this model has no head for a heat map.",
            where="heat_head",
            fix="sc.distill.HeatHead()(model, data=...) trains one",
        )
    heat, sides = head(scene.embedding.features.float())
    best = torch.nn.functional.max_pool2d(heat, 3, 1, 1)
    rows, columns = (heat == best)[0, 0].nonzero().T
    values = heat[0, 0, rows, columns]
    cell = framing_of(scene.model).frame / np.array([heat.shape[3], heat.shape[2]])
    place = (torch.stack([columns, rows], 1).double().cpu().numpy() + 0.5) * cell
    inside = (place < np.array(scene.embedding.input_size[::-1])).all(1)
    reach = sides[0, :, rows, columns].T.double().cpu().numpy() * np.tile(cell, 2)
    scale = np.array(framing_of(scene.model).scale(scene.size))
    boxes = np.concatenate([place - reach[:, :2], place + reach[:, 2:]], 1) / np.tile(scale, 2)
    edge = np.tile(np.array(scene.size[::-1], float), 2)
    boxes, points = boxes.clip(0, edge), (place / scale).clip(0, edge[:2] - 1e-3)
    found = values.double().cpu().numpy()
    order = np.flatnonzero(inside)[np.argsort(-found[inside], kind="stable")]
    return points[order], boxes[order], found[order]


def _at(cover: Cover, points: Points) -> Cover:
    """Values at points, whose coordinates are cut to whole pixels."""
    columns, rows = points.astype(np.int64).T
    found: Cover = cover[rows, columns]
    return found


def _at_least(sampler: str, name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(
            f"{sampler}: {name} is out of range.", got=value, expected=f"at least {least}"
        )
