"""Prompts as training draws them: jittered boxes, first points, then clicks where masks are wrong.

A prompt is kept as a row of tokens, all of them points with a label: 1 in the object, 0 outside of
it, 2 and 3 the corners of a box, -1 SAM's "not a point". A box is its two corners; a first point is
the point and the one -1 that SAM itself appends to points without a box. So prompts with and
without a box have equally many tokens in every round, one call of the decoder takes both, and its
answer is that of SAM's own call for each (the decoder does not see the order of tokens).

A click is ignored (label -1) where the masks agree but for a few cells. One more token would change
the answer, since it takes part in attention. Therefore `rounds` asks such a prompt no further, and
its last losses stand for the rounds that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core._draws import generator

if TYPE_CHECKING:
    from ._samples import Batch

Policy = Literal["fp_fn", "fn_only"]

JITTER = 0.1  # of a box's side, the standard deviation, as in SAM
MOST = 20 / 1024  # of the frame's side, the largest shift of a box's corner
BOX_CORNER = 2  # label of a prompt's first token if the prompt is a box
STEPS = 256  # places along the side of a cell where a click may fall: exact in float32


@dataclass(frozen=True, eq=False)
class Asked:
    """What P prompts have asked so far.

    Attributes:
        points: (P, N, 2), x, y in the frame; pixel centres are whole numbers.
        labels: (P, N) int64. The first two tokens are a box's corners, or a point and a -1.
        masks: (P, 1, 4h, 4w) logits as a further prompt, or None.
    """

    points: Tensor
    labels: Tensor
    masks: Tensor | None = None

    @classmethod
    def begin(cls, boxes: Tensor, points: Tensor, labels: Tensor, boxed: Tensor) -> Asked:
        """Boxes (P, 4) where `boxed` (P,), else points (P, 2) with their labels (P,)."""
        none = torch.zeros_like(points)
        single = torch.stack([labels, torch.full_like(labels, -1)], 1)
        corners = torch.tensor([2, 3], device=labels.device).expand_as(single)
        return cls(
            torch.where(
                boxed[:, None, None],
                boxes.view(-1, 2, 2),
                torch.stack([points, none], 1),
            ),
            torch.where(boxed[:, None], corners, single),
        )

    @property
    def going(self) -> Tensor:
        """(P,) bool: the last click, if there is one, was not ignored."""
        return (self.labels[:, 2:] >= 0).all(1)

    @property
    def boxed(self) -> Tensor:
        """(P,) bool: it began with a box."""
        return self.labels[:, 0] == BOX_CORNER

    @property
    def ambiguous(self) -> Tensor:
        """(P,) bool: nothing but one point, for which SAM offers three masks."""
        return (self.labels >= 0).sum(1) == 1

    def grown(self, points: Tensor, labels: Tensor) -> Asked:
        """One click more each: points (P, 2), labels (P,)."""
        return Asked(
            torch.cat([self.points, points[:, None]], 1),
            torch.cat([self.labels, labels[:, None]], 1),
            self.masks,
        )

    def rows(self, chosen: Tensor) -> Asked:
        """Some of the prompts, by index or by bool."""
        masks = None if self.masks is None else self.masks[chosen]
        return Asked(self.points[chosen], self.labels[chosen], masks)

    def scaled(self, ratio: float) -> Asked:
        """The same places in a frame `ratio` times as large: both models see equal positions."""
        return replace(self, points=(self.points + 0.5) * ratio - 0.5)


def embed(encoder: Any, points: Tensor, labels: Tensor) -> Tensor:
    """Tokens of prompts, as SAM's prompt encoder makes them, in float32.

    Args:
        encoder: SAM's prompt encoder.
        points: (P, N, 2).
        labels: (P, N), -1 to 3; nothing is appended.

    Returns:
        (P, N, C), bit for bit those of a plain call.
    """
    # Half precision would move a click by pixels.
    with torch.autocast(points.device.type, enabled=False):
        place = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
        kinds = (encoder.not_a_point_embed, *encoder.point_embeddings)
        kind = F.embedding(labels + 1, torch.cat([k.weight for k in kinds]))
        return torch.where(labels[..., None] < 0, 0, place) + kind


Answer = Callable[[Asked, Tensor, int], tuple[dict[str, Tensor], Asked]]


class Clicks:
    """Draws the prompts of one batch, or of a part of one.

    What a prompt gets depends on the seed, the step, the round, the place of its image in the whole
    batch and its own place among that image's prompts; not on the process or micro-batch it is in.
    Nothing here is part of an autograd graph.

    Args:
        owner: (P,) int64, which of the B images a prompt belongs to, in any order.
        places: of the B images in the whole batch.
        valid: (B, h, w), share of each cell that shows the image. Clicks fall in cells shown by
            half or more.
        sizes: height and width of each image inside the frame.
        side: S of the frame.
        seed: of all draws.
        step: of training.
        spread: click anywhere in a cell, not in its centre only.
    """

    def __init__(
        self,
        owner: Tensor,
        places: Sequence[int],
        valid: Tensor,
        sizes: Sequence[tuple[int, int]],
        side: int,
        *,
        seed: int,
        step: int,
        spread: bool = True,
    ) -> None:
        self.places, self.side, self.seed, self.step = places, side, seed, step
        self.spread, self.device = spread, valid.device
        self.ratio = side / valid.shape[-1]
        self.owner = owner.to(valid.device)
        self.shown = valid >= 0.5
        self.sizes = torch.tensor(sizes, device=valid.device)
        on_cpu = owner.cpu()
        self._counts = torch.bincount(on_cpu, minlength=len(places)).tolist()
        self._rank = on_cpu.argsort(stable=True).argsort()

    @classmethod
    def of(cls, batch: Batch, side: int, *, seed: int, step: int) -> Clicks:
        """Those of a batch drawn by `Samples` for a frame of side S."""
        return cls(batch.owner, batch.places, batch.valid, batch.sizes, side, seed=seed, step=step)

    def numbers(self, width: int, name: str, number: int = 0) -> Tensor:
        """(P, width) uniform in [0, 1), for one purpose and round."""
        rows = torch.cat(
            [
                torch.rand(n, width, generator=generator(self.seed, name, self.step, p, number))
                for n, p in zip(self._counts, self.places, strict=True)
            ]
        )
        return rows[self._rank].to(self.device)

    @torch.no_grad()
    def begin(
        self, boxes: Tensor, target: Tensor, *, box_share: float = 0.5, jitter: float = JITTER
    ) -> Asked:
        """The first prompt of each: a jittered box, or a point in the object.

        Args:
            boxes: (P, 4).
            target: (P, h, w), share of each cell that the object covers.
            box_share: how often it is a box, 0 to 1.
            jitter: of a box, see `boxes`.
        """
        boxed = self.numbers(1, "kind")[:, 0] < box_share
        return Asked.begin(self.boxes(boxes, jitter), *self.first(target), boxed)

    @torch.no_grad()
    def boxes(self, boxes: Tensor, jitter: float = JITTER) -> Tensor:
        """(P, 4) boxes with noise of a tenth of each side, at most 20 pixels in 1024.

        They stay inside the image, and are never turned inside out.

        Args:
            boxes: (P, 4).
            jitter: deviation of the noise over a side.

        Source:
            Segment Anything, arXiv 2304.02643, appendix A.
        """
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        noise = torch.special.ndtri(self.numbers(4, "box").clamp(min=2**-25)) * jitter * size
        most = (0.45 * size).clamp(max=MOST * self.side)
        noise = torch.minimum(torch.maximum(noise, -most), most)
        height, width = self.sizes[self.owner].T
        ends = torch.stack([width, height, width, height], 1)
        return torch.minimum((boxes + noise).clamp(min=0), ends)

    @torch.no_grad()
    def first(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """A point in each object, uniform over the cells that it covers by half.

        Args:
            target: (P, h, w), share of each cell that the object covers. Of an object that covers
                no cell by half, the fullest cells count.

        Returns:
            Points (P, 2) and labels (P,): 1, or -1 for an empty target.
        """
        inside = (target > 0) & (target >= target.amax((1, 2), keepdim=True).clamp(max=0.5))
        points, _, count = self._drawn(inside, "first", 0)
        return _ignored(points, torch.ones_like(self.owner), count < 1)

    @torch.no_grad()
    def errors(
        self,
        answer: Tensor,
        truth: Tensor,
        number: int,
        *,
        rows: Tensor | None = None,
        policy: Policy = "fp_fn",
        ignore_below: int = 10,
    ) -> tuple[Tensor, Tensor]:
        """A click on each error, uniform over its cells.

        Args:
            answer: (P, h, w) bool.
            truth: (P, h, w) bool.
            number: of the round.
            rows: (P,) int64, which of all prompts these P are; None for all.
            policy: ``fp_fn`` clicks where the masks differ, ``fn_only`` what is missed.
            ignore_below: errors of fewer cells are ignored.

        Returns:
            Points (P, 2) and labels (P,): 1 on what is missed, 0 on what is too much, -1 (and
            coordinates 0) if ignored.

        Source:
            ``fp_fn``: Segment Anything, arXiv 2304.02643; EdgeSAM, arXiv 2312.06660.
            ``fn_only``: TinySAM, arXiv 2312.13789.
        """
        wrong = truth & ~answer if policy == "fn_only" else truth ^ answer
        points, cell, count = self._drawn(wrong, "click", number, rows)
        labels = truth.flatten(1).gather(1, cell[:, None])[:, 0].long()
        return _ignored(points, labels, count < max(ignore_below, 1))

    def _drawn(
        self, allowed: Tensor, name: str, number: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points (P, 2), their cells (P,), and how many cells there were to choose from (P,)."""
        u, owner = self.numbers(3, name, number), self.owner
        if rows is not None:
            u, owner = u[rows], owner[rows]
        cell, count = pick(allowed & self.shown[owner], u[:, 0])
        columns = allowed.shape[-1]
        place = torch.stack([cell % columns, cell // columns], 1)
        within = ((u[:, 1:] * STEPS).floor() + 0.5) / STEPS if self.spread else 0.5
        return to_frame(place, self.ratio, within), cell, count


def rounds(asked: Asked, count: int, answer: Answer) -> dict[str, Tensor]:
    """Ask, click where the answer is wrong, ask again.

    Args:
        asked: the first prompts.
        count: how many answers.
        answer: given what P prompts ask, which of all prompts these are (P,) and the number of the
            round, it returns losses by name (P,) and the prompts to go on with; of these, prompts
            whose last label is -1 are asked no further.

    Returns:
        Each loss as a mean over prompts and rounds.
    """
    rows = torch.arange(len(asked.labels), device=asked.labels.device)
    latest: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for number in range(count):
        if len(rows):
            terms, asked = answer(asked, rows, number)
            for name, value in terms.items():
                old = latest.get(name)
                latest[name] = value if old is None else old.index_put((rows,), value)
            keep = asked.going
            asked, rows = asked.rows(keep), rows[keep]
        for name, value in latest.items():
            total[name] = total.get(name, 0) + value.mean() / count
    return total


def pick(allowed: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One of the allowed cells each, by inverse distribution; exact, as it counts in integers.

    Args:
        allowed: (P, h, w) bool.
        u: (P,) uniform in [0, 1).

    Returns:
        Index into the flattened cells (P,), 0 if none is allowed, and how many are (P,).
    """
    upto = allowed.flatten(1).cumsum(1, dtype=torch.int32)
    count = upto[:, -1]
    # u * count may round up to count itself.
    wanted = torch.minimum((u * count).int(), count - 1) + 1
    return torch.searchsorted(upto, wanted[:, None])[:, 0], count


def to_frame(cell: Tensor, ratio: float, within: Tensor | float = 0.5) -> Tensor:
    """Frame coordinates of cells x, y that are `ratio` pixels wide; `within` 0.5 is the centre."""
    return (cell + within) * ratio - 0.5


def to_cell(point: Tensor, ratio: float) -> Tensor:
    """The cell x, y that shows a point of the frame."""
    return ((point + 0.5) / ratio).floor().long()


def _ignored(points: Tensor, labels: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor]:
    return points.masked_fill(ignore[:, None], 0), labels.masked_fill(ignore, -1)
