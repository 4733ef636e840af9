"""What segmenting everything gives: masks of one image, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .._require import require
from ..display import Column, Table
from ..errors import ConfigError
from . import _runs, choose

Form = Literal["binary_mask", "uncompressed_rle", "coco_rle"]


@dataclass(frozen=True)
class EverythingStats:
    """What one image cost.

    Attributes:
        prompts: decoded.
        decoder_calls: in which they were.
        rounds: after which the sampler looked at what had been found.
        masks: left after each filter, in their order: ``decoded``, ``predicted_iou``,
            ``stability``, ``nms`` and, where they were asked for, ``region`` and ``most``.
        encoder_s: seconds of the image encoder, preprocessing included.
        sampling_s: seconds in which prompts were chosen.
        decoding_s: seconds of prompt encoder and mask decoder.
        post_s: seconds of what follows: full size, filters, run lengths, suppression.
        total_s: seconds in all.
        peak_bytes: memory beyond what was held at the start, at most: of the device's allocator, on
            the CPU of the whole process; None where the system does not tell.
    """

    prompts: int
    decoder_calls: int
    rounds: int
    masks: dict[str, int]
    encoder_s: float
    sampling_s: float
    decoding_s: float
    post_s: float
    total_s: float
    peak_bytes: int | None

    def table(self) -> Table:
        """All of it, for people."""
        rows: list[tuple[str, Any, str]] = [
            ("prompts", self.prompts, ""),
            ("decoder calls", self.decoder_calls, ""),
            *((f"masks: {name}", count, "") for name, count in self.masks.items()),
            *((n, getattr(self, f"{n}_s"), "s") for n in ("encoder", "sampling", "decoding")),
            ("filters and run lengths", self.post_s, "s"),
            ("total", self.total_s, "s"),
        ]
        if self.peak_bytes is not None:
            rows.append(("peak memory", self.peak_bytes / 2**20, "MiB"))
        columns = (
            Column("what", align="left"),
            Column("value"),
            Column("unit", align="left"),
        )
        return Table(columns, rows)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()


@dataclass(frozen=True, eq=False)
class Segments:
    """R masks of one image, best first, kept as run lengths.

    Attributes:
        size: height H and width W of the image.
        counts: R arrays of run lengths: zeros, ones, ... down the columns, as in COCO.
        boxes: (R, 4) int64, first and last column and row: x0, y0, x1, y1, all inside the mask.
        scores: (R,) float32 that the order and suppression follow: the predicted IoU, or the
            detector's score where boxes of a detector were asked.
        predicted_iou: (R,) float32, the model's own estimate.
        stability: (R,) float32, IoU of the mask cut above and below its threshold; NaN if not
            asked for.
        points: (R, 2) x, y in the image's pixels; NaN for a prompt without a point.
        prompt_boxes: (R, 4) x0, y0, x1, y1 of prompts; NaN for a prompt without a box.
        stats: what it cost; None if the masks come from elsewhere.
    """

    size: tuple[int, int]
    counts: tuple[_runs.Counts, ...] = field(repr=False)
    boxes: NDArray[np.int64] = field(repr=False)
    scores: NDArray[np.float32] = field(repr=False)
    predicted_iou: NDArray[np.float32] = field(repr=False)
    stability: NDArray[np.float32] = field(repr=False)
    points: NDArray[np.float64] = field(repr=False)
    prompt_boxes: NDArray[np.float64] = field(repr=False)
    stats: EverythingStats | None = field(default=None, repr=False)

    @classmethod
    def of(cls, proposals: Any) -> Segments:
        """Masks of another model.

        Args:
            proposals: anything with ``masks`` (R, H, W) bool and ``scores`` (R,), as FastSAM's
                ``propose`` gives; put in order of the scores.
        """
        masks, scores = np.asarray(proposals.masks, bool), np.asarray(proposals.scores, np.float32)
        order = np.argsort(-scores, kind="stable")
        counts = tuple(_runs.encode_array(masks[i]) for i in order)
        nothing = np.full(len(order), np.nan)
        return cls(
            size=(masks.shape[1], masks.shape[2]),
            counts=counts,
            boxes=boxes_of(counts, masks.shape[1]),
            scores=scores[order],
            predicted_iou=nothing.astype(np.float32),
            stability=nothing.astype(np.float32),
            points=np.stack([nothing] * 2, 1),
            prompt_boxes=np.stack([nothing] * 4, 1),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"<Segments: {len(self)} masks of {self.size[1]} x {self.size[0]}>"

    def mask(self, index: int) -> NDArray[np.bool_]:
        """One mask, (H, W) bool, unpacked now."""
        return _runs.decode(self.counts[index], self.size)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """All masks, (R, H, W) bool, unpacked now: R times the image's pixels in bytes."""
        found = np.zeros((len(self), *self.size), bool)
        for index in range(len(self)):
            found[index] = self.mask(index)
        return found

    @property
    def areas(self) -> NDArray[np.int64]:
        """(R,) pixels of each mask."""
        return np.array([_runs.area(c) for c in self.counts], np.int64)

    def rle(self, index: int, *, compressed: bool = False) -> dict[str, Any]:
        """One mask in COCO's form.

        Args:
            index: of the mask.
            compressed: as pycocotools packs it; else a list of numbers.

        Raises:
            MissingDependencyError: if it is to be compressed and pycocotools is not installed.
        """
        plain = _runs.coco(self.counts[index], self.size)
        if not compressed:
            return plain
        packed: dict[str, Any] = require(
            "pycocotools.mask", purpose="compressed run lengths"
        ).frPyObjects(plain, *self.size)
        return {**packed, "counts": packed["counts"].decode()}

    def take(self, indices: Sequence[int] | NDArray[Any]) -> Segments:
        """Some of the masks, in this order."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        arrays = ("boxes", "scores", "predicted_iou", "stability", "points", "prompt_boxes")
        return replace(
            self,
            counts=tuple(self.counts[i] for i in chosen),
            **{name: getattr(self, name)[chosen] for name in arrays},
        )

    def by_box(self, box: Sequence[float]) -> int | None:
        """Index of the mask that a box means, by FastSAM's rule: see `choose.by_box`."""
        return choose.by_box(self, box)

    def by_points(
        self, points: Sequence[Sequence[float]], labels: Sequence[int]
    ) -> NDArray[np.bool_]:
        """The mask that points mean, by FastSAM's rule: see `choose.by_points`."""
        return choose.by_points(self, points, labels)

    def to_sam(self, form: Form = "binary_mask") -> list[dict[str, Any]]:
        """The same as a list of dictionaries, as `SamAutomaticMaskGenerator.generate` gives it.

        Args:
            form: of the masks: ``binary_mask``, ``uncompressed_rle`` or ``coco_rle``.

        Raises:
            ConfigError: if there is no such form.
        """
        forms: dict[str, Callable[[int], Any]] = {
            "binary_mask": self.mask,
            "uncompressed_rle": self.rle,
            "coco_rle": lambda i: self.rle(i, compressed=True),
        }
        if form not in forms:
            raise ConfigError(
                "there is no such form of masks.", got=form, expected=", ".join(forms)
            )
        height, width = self.size
        return [
            {
                "segmentation": forms[form](i),
                "area": _runs.area(counts),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "predicted_iou": float(self.predicted_iou[i]),
                "point_coords": [self.points[i].tolist()],
                "stability_score": float(self.stability[i]),
                "crop_box": [0, 0, width, height],
            }
            for i, (counts, (x0, y0, x1, y1)) in enumerate(
                zip(self.counts, self.boxes.tolist(), strict=True)
            )
        ]


def boxes_of(counts: Sequence[_runs.Counts], height: int) -> NDArray[np.int64]:
    """(R, 4) boxes of run lengths."""
    return np.array([_runs.box(c, height) for c in counts], np.int64).reshape(-1, 4)
