"""From low-resolution answers to run lengths, a few masks in full size at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops.boxes import batched_nms

from ..framing import Framing
from . import _regions, _runs
from ._decode import Decoded
from ._rounds import Accepted, Cover, Prompts
from ._shelf import Shelf
from .segments import Segments, boxes_of

if TYPE_CHECKING:
    from .generator import Everything

# Of logits in full size at a time. On a CPU they are then read while still in the cache.
CHUNK = {"cpu": 4 << 20}
CHUNK_ELSEWHERE = 256 << 20


@dataclass
class Collector:
    """Masks of one image that pass the filters.

    Args:
        settings: of the run.
        framing: the model's.
        size: height and width of the image.
        threshold: the model's, of masks.
        tau: logits above which masks cover; None for no cover.
    """

    settings: Everything
    framing: Framing
    size: tuple[int, int]
    threshold: float
    tau: float | None
    shelf: Shelf = field(default_factory=Shelf)
    masks: dict[str, int] = field(default_factory=dict)
    filtered: bool = True

    def __post_init__(self) -> None:
        self.masks = {"decoded": 0, "predicted_iou": 0, "stability": 0}
        self.cover: Cover | None = None
        if self.tau is not None:
            self.cover = np.full(self.size, np.inf, np.float32)

    @property
    def accepted(self) -> Accepted:
        """What the sampler may know."""
        return Accepted(np.empty((0, 0), np.float32) if self.cover is None else self.cover)

    def keep(self, scores: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Rows and masks whose predicted IoU is high enough, before anything is enlarged."""
        least = self.settings.min_iou if prompts.filtered else 0.0
        kept = scores > least if least > 0 else torch.ones_like(scores, dtype=torch.bool)
        rows, masks = kept.nonzero().T
        self.masks["decoded"] += scores.numel()
        self.masks["predicted_iou"] += len(rows)
        return rows, masks

    def add(
        self, low: Tensor, rows: Tensor, masks: Tensor, answers: Decoded, prompts: Prompts
    ) -> None:
        """Take masks in low resolution.

        Args:
            low: (R, 4h, 4w) logits.
            rows: (R,) which of the prompts each answers.
            masks: (R,) which of its masks each is.
            answers: to the prompts.
            prompts: in the image's pixels.
        """
        self.filtered = prompts.filtered
        most = CHUNK.get(low.device.type, CHUNK_ELSEWHERE)
        step = max(1, most // (4 * self.size[0] * self.size[1]))
        scores = answers.scores[rows, masks]
        for start in range(0, len(low), step):
            part = slice(start, start + step)
            full = self.framing.full_size(low[part, None].float(), self.size)[:, 0]
            self._take(full, rows[part], scores[part], prompts)

    def _take(self, full: Tensor, rows: Tensor, scores: Tensor, prompts: Prompts) -> None:
        settings = self.settings
        stability = _runs.overlaps(full, self.threshold, settings.stability_offset)
        if prompts.filtered and settings.min_stability > 0:
            kept = stability >= settings.min_stability
            if not kept.all():
                full, rows, scores, stability = (
                    t[kept.to(t.device)] for t in (full, rows, scores, stability)
                )
        self.masks["stability"] += len(full)
        if not len(full):
            return
        counts = _runs.encode(full > self.threshold)
        place, predicted = rows.cpu().numpy(), scores.cpu().numpy()
        self.shelf.add(
            counts,
            boxes=boxes_of(counts, self.size[0]),
            scores=predicted if prompts.scores is None else prompts.scores[place],
            predicted_iou=predicted,
            stability=stability.cpu().numpy(),
            points=np.nan if prompts.points is None else prompts.points[place],
            prompt_boxes=np.nan if prompts.boxes is None else prompts.boxes[place],
        )
        if self.cover is not None:
            self._cover(full, counts)

    def _cover(self, full: Tensor, counts: list[_runs.Counts]) -> None:
        assert self.cover is not None
        height, width = self.size
        for logits, runs in zip(full, counts, strict=True):
            share = np.float32(_runs.area(runs) / (height * width))
            certain = (logits > self.tau).cpu().numpy()
            np.minimum(self.cover, share, out=self.cover, where=certain)

    def finish(self) -> Segments:
        """All masks, without duplicates, best first."""
        found = self.shelf.segments(self.size)
        settings = self.settings
        if self.filtered and len(found):
            found = found.take(self._unlike(found, found.scores))
        elif len(found):
            found = found.take(np.argsort(-found.scores, kind="stable"))
        self.masks["nms"] = len(found)
        if settings.min_region and len(found):
            found, changed = _regions.cleaned(found, settings.min_region)
            if self.filtered:
                # Masks that needed no cleaning win.
                found = found.take(self._unlike(found, (~changed).astype(np.float32)))
            self.masks["region"] = len(found)
        if settings.max_masks is not None:
            found = found.take(np.arange(min(len(found), settings.max_masks)))
            self.masks["most"] = len(found)
        return found

    def _unlike(self, found: Segments, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        if self.settings.nms_of == "masks":
            return _regions.unlike(found, scores, self.settings.nms)
        # The very call of segment_anything, so that ties fall alike.
        kept = batched_nms(
            torch.from_numpy(found.boxes).float(),
            torch.from_numpy(scores),
            torch.zeros(len(found)),
            iou_threshold=self.settings.nms,
        )
        indices: NDArray[np.int64] = kept.numpy()
        return indices
