"""Result of an accuracy: one record an object, averages, intervals, and the paired loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..core.data import Skipped
from ..core.display import Cell
from ..core.errors import DataError
from . import stats
from .masks import run_iou
from .protocol import Protocol
from .stats import Average, Interval

# Ends of COCO's size groups in pixels of annotated area; an object on a bound is in both groups.
SIZES = {"S": (0.0, 32.0**2), "M": (32.0**2, 96.0**2), "L": (96.0**2, math.inf)}


@dataclass(frozen=True)
class Record:
    """How one object was found.

    Attributes:
        image_id: id of its image.
        annotation_id: id of the object.
        category: its category, None where the data have none.
        area: the annotation's area in pixels.
        iou: IoU of the chosen mask with the truth.
        score: the model's own estimate of that IoU.
        clicks: number of points asked with.
        mask: the chosen mask as COCO run lengths, if it was kept.
    """

    image_id: int | str
    annotation_id: int | str
    category: int | None
    area: float
    iou: float
    score: float
    clicks: int
    mask: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[int | str, int | str]:
        """Image and annotation."""
        return self.image_id, self.annotation_id


@dataclass(frozen=True)
class Change:
    """IoU that one object gained, or lost where it is negative."""

    image_id: int | str
    annotation_id: int | str
    delta: float


@dataclass(frozen=True)
class Paired:
    """A model against its base on the same objects with the same prompts.

    Attributes:
        delta: difference of the means, negative for a loss.
        ci: its 95 % interval, images resampled.
        worse_share: share of objects that lost more than 0.05 IoU.
        wilcoxon_p: signed-rank test, a check that ignores that objects cluster in images.
        worst: the hundredth part of all objects that lost most, the worst first.
        agreement: mean IoU between the two models' masks; None where masks were not kept.
        n_images: images compared.
        n_instances: objects compared: those that both models have a record of.
    """

    delta: float
    ci: Interval
    worse_share: float
    wilcoxon_p: float
    worst: tuple[Change, ...]
    agreement: float | None
    n_images: int
    n_instances: int

    def verdict(self, *, margin: float = 0.01) -> Literal["not worse", "worse", "not resolved"]:
        """Whether the loss is surely below a margin, surely above it, or neither.

        Args:
            margin: the loss that would matter, in IoU.
        """
        low, high = self.ci
        if low > -margin:
            return "not worse"
        return "worse" if high < -margin else "not resolved"


@dataclass(frozen=True)
class Accuracy:
    """Result of one protocol for one model.

    Attributes:
        settings: the protocol; `protocol` is its id.
        records: one an object, ordered by image and annotation.
        skipped: what could not be scored, and why.
    """

    settings: Protocol
    records: tuple[Record, ...]
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        # In one order whatever the order of the data: sums then agree to the last bit.
        ordered = sorted(self.records, key=lambda record: [_order(part) for part in record.key])
        object.__setattr__(self, "records", tuple(ordered))
        if not ordered:
            raise DataError(
                "there is no object to score.",
                where=self.protocol,
                got="; ".join(map(str, self.skipped[:3]))
                or "no annotation that passes the filters",
                expected="one object or more",
            )

    @property
    def protocol(self) -> str:
        """The protocol id: numbers of different ids are never compared."""
        return str(self.settings)

    @property
    def data(self) -> str:
        """Name of the data and number of images, as the protocol id begins."""
        return self.settings.data

    def cells(self) -> dict[str, float | int | Cell | None]:
        """The numbers, by the names they have in tables."""
        low, high = self.ci()
        sizes = {f"mIoU {name}": part["miou"] for name, part in self.by_size().items()}
        head = {"mIoU": Cell(self.miou, (high - low) / 2)}
        return {**head, **sizes, "objects": self.n_instances}

    @property
    def n_images(self) -> int:
        """Images that hold a scored object."""
        return len({record.image_id for record in self.records})

    @property
    def n_instances(self) -> int:
        """Scored objects."""
        return len(self.records)

    @cached_property
    def miou(self) -> float:
        """Mean IoU, averaged as the protocol says."""
        return self.mean()

    def mean(self, average: Average | None = None) -> float:
        """Mean IoU.

        Args:
            average: instance, category or image; None for the protocol's own.

        Raises:
            DataError: for categories where an object has none.
        """
        return stats.mean([r.iou for r in self.records], **_columns(self, self.records, average))

    def ci(self, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
        """Interval of `miou` by resampling images; see `stats.bootstrap`."""
        return stats.bootstrap(
            [r.iou for r in self.records],
            **_columns(self, self.records),
            level=level,
            draws=draws,
            seed=seed,
        )

    def by_size(self) -> dict[str, dict[str, Any]]:
        """For S, M and L: ``miou`` (None without objects) and ``n_instances``.

        Groups are COCO's, by annotated area: up to 32², 32² to 96², from 96² pixels.
        """
        groups = {}
        for name, (low, high) in SIZES.items():
            part = [r for r in self.records if low <= r.area <= high]
            miou = stats.mean([r.iou for r in part], **_columns(self, part)) if part else None
            groups[name] = {"miou": miou, "n_instances": len(part)}
        return groups

    def against(self, base: Accuracy, *, draws: int = 10_000, seed: int = 0) -> Paired:
        """The paired difference to a base: this minus base.

        Args:
            base: the same protocol with the base model.
            draws: resamplings of the interval.
            seed: of the resampling.

        Raises:
            ConfigError: if the two followed different protocols.
            DataError: if they have no object in common.
        """
        stats.comparable({"this": self.protocol, "base": base.protocol})
        pairs = _pairs(self, base)
        mine = [record for record, _ in pairs]
        deltas = np.array([record.iou - other.iou for record, other in pairs])
        columns = _columns(self, mine)
        worst = np.argsort(deltas, kind="stable")[: math.ceil(len(deltas) / 100)]
        return Paired(
            delta=stats.mean(deltas, **columns),
            ci=stats.bootstrap(deltas, **columns, draws=draws, seed=seed),
            worse_share=stats.share_worse(deltas),
            wilcoxon_p=stats.wilcoxon(deltas),
            worst=tuple(
                Change(mine[i].image_id, mine[i].annotation_id, float(deltas[i])) for i in worst
            ),
            agreement=agreement(self, base) if all(_kept(p) for p in pairs) else None,
            n_images=len({record.image_id for record in mine}),
            n_instances=len(mine),
        )

    def to_dict(self, base: Accuracy | None = None) -> dict[str, Any]:
        """The entry of a result file.

        Args:
            base: the base's accuracy by the same protocol; without it what compares is None.
        """
        pair = None if base is None else self.against(base)
        return {
            "protocol": self.protocol,
            "prompt": self.settings.label,
            "choice": self.settings.choice,
            "miou": self.miou,
            "ci": list(self.ci()),
            "delta": pair and pair.delta,
            "delta_ci": pair and list(pair.ci),
            "worse_share": pair and pair.worse_share,
            "wilcoxon_p": pair and pair.wilcoxon_p,
            "agreement": pair and pair.agreement,
            "n_images": self.n_images,
            "n_instances": self.n_instances,
            "by_size": self.by_size(),
            "samples": [_sample(record) for record in self.records],
            "skipped": [vars(item) for item in self.skipped],
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Accuracy:
        """The accuracy of a `to_dict`; its averages are computed anew from the samples.

        Raises:
            DataError: if the entry lacks what it must have.
        """
        try:
            return cls(
                Protocol.parse(entry["protocol"]),
                tuple(Record(**sample) for sample in entry["samples"]),
                tuple(Skipped(**item) for item in entry["skipped"]),
            )
        except (KeyError, TypeError) as err:
            raise DataError(
                "this is no accuracy entry of a result file.",
                got=str(err),
                expected="protocol, samples and skipped, as Accuracy.to_dict() writes",
            ) from err

    def __repr__(self) -> str:
        count = f"{self.n_instances} objects in {self.n_images} images"
        return f"<Accuracy {self.miou:.3f} {self.protocol} {count}>"


def agreement(first: Accuracy, second: Accuracy) -> float:
    """Mean IoU between two models' masks of the same objects, averaged as the protocol says.

    Args:
        first: made with ``keep_masks=True``.
        second: the same protocol, made with ``keep_masks=True``.

    Raises:
        ConfigError: if the two followed different protocols.
        DataError: if they have no object in common, or masks were not kept.
    """
    stats.comparable({"first": first.protocol, "second": second.protocol})
    pairs = _pairs(first, second)
    values = []
    for record, other in pairs:
        if record.mask is None or other.mask is None:
            raise DataError(
                "the masks of these accuracies were not kept.",
                where=f"image {record.image_id}, annotation {record.annotation_id}",
                fix="accuracy(..., keep_masks=True)",
            )
        values.append(run_iou(record.mask, other.mask))
    return stats.mean(values, **_columns(first, [record for record, _ in pairs]))


def _columns(
    accuracy: Accuracy, records: Sequence[Record], average: Average | None = None
) -> dict[str, Any]:
    return {
        "images": [record.image_id for record in records],
        "categories": [record.category for record in records],
        "average": average or accuracy.settings.average,
    }


def _pairs(first: Accuracy, second: Accuracy) -> list[tuple[Record, Record]]:
    others = {record.key: record for record in second.records}
    pairs = [(record, others[record.key]) for record in first.records if record.key in others]
    if not pairs:
        raise DataError(
            "these accuracies have no object in common.",
            got=f"{first.n_instances} and {second.n_instances} objects of {first.settings.data}",
            expected="the same data",
        )
    return pairs


def _kept(pair: tuple[Record, Record]) -> bool:
    return all(record.mask is not None for record in pair)


def _sample(record: Record) -> dict[str, Any]:
    entry = dict(vars(record))
    return entry if record.mask is not None else {k: v for k, v in entry.items() if k != "mask"}


def _order(part: int | str) -> tuple[bool, Any]:
    return isinstance(part, str), part
