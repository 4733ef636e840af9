"""How much of what is in an image a set of masks finds, whatever made them.

Categories are left out: all objects of an image are one pool. Crowds are neither to be found nor
counted against a mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from ..core._progress import Progress, ProgressLike
from ..core.data import Dataset, Sample, Skipped, as_dataset
from ..core.display import Cell
from ..core.errors import ConfigError, DataError
from . import stats
from ._ranked import Rank, area, ranked
from ._reading import ahead
from .masks import encode
from .records import SIZES, _order
from .stats import Interval

Source = Mapping[Any, Any] | Callable[[np.ndarray], Any]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Share of the objects with a mask of at least this IoU.
SHARES = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Found:
    """How one object was found.

    Attributes:
        image_id: id of its image.
        annotation_id: id of the object.
        area: the annotation's area in pixels.
        iou: the best IoU of any mask; 0 where there is none.
        ranks: by group of sizes (``all``, and the object's own), for each IoU from 0.50 to 0.95:
            how many masks stand before the one matched with this object, best scores first; -1
            where none was.
    """

    image_id: int | str
    annotation_id: int | str
    area: float
    iou: float
    ranks: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recall:
    """What a set of masks found.

    Attributes:
        protocol: id of the rules; only numbers of the same id may be compared.
        limits: how many masks of an image may count for AR.
        records: one an object, ordered by image and annotation.
        n_masks: masks in all images.
        n_images: images looked at.
        n_prompts: prompts that were decoded for them; None where that was not told.
        skipped: what could not be looked at, and why.
    """

    protocol: str
    limits: tuple[int, ...]
    records: tuple[Found, ...] = field(repr=False)
    n_masks: int
    n_images: int
    n_prompts: int | None = None
    skipped: tuple[Skipped, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.records:
            raise DataError(
                "there is no object to find.",
                where=self.protocol,
                got="; ".join(map(str, self.skipped[:3])) or "no object that is no crowd",
                expected="one object or more",
            )

    @property
    def ar(self) -> dict[int, float]:
        """Mean recall over IoU thresholds 0.50, 0.55, ... 0.95, by the masks that may count."""
        return {most: _recall(self.records, most) for most in self.limits}

    @property
    def shares(self) -> dict[float, float]:
        """Share of the objects that some mask has with an IoU of at least 0.5, 0.75, 0.9."""
        return {least: _share(self.records, least) for least in SHARES}

    @property
    def miou(self) -> float:
        """Mean over the objects of the best IoU of any mask."""
        return float(np.mean([record.iou for record in self.records]))

    def by_size(self) -> dict[str, dict[str, Any]]:
        """For S, M and L: ``ar``, ``shares``, ``miou`` (None without objects), ``n_instances``."""
        groups = {}
        for name, (low, high) in SIZES.items():
            part = [r for r in self.records if low <= r.area <= high]
            groups[name] = {
                "ar": {most: _recall(part, most, name) if part else None for most in self.limits},
                "shares": {least: _share(part, least) if part else None for least in SHARES},
                "miou": float(np.mean([r.iou for r in part])) if part else None,
                "n_instances": len(part),
            }
        return groups

    def ci(self, *, draws: int = 10_000, seed: int = 0) -> Interval:
        """95 % interval of the AR of the most masks, images resampled."""
        values = [_recall([record], self.limits[-1]) for record in self.records]
        images = [record.image_id for record in self.records]
        return stats.bootstrap(values, images, draws=draws, seed=seed)

    def against(self, base: Recall) -> tuple[float, Interval]:
        """This AR of the most masks minus a base's, and its 95 % interval, images resampled.

        Args:
            base: by the same rules on the same data.

        Raises:
            ConfigError: if the two were made by different rules.
            DataError: if they have no object in common.
        """
        stats.comparable({"this": self.protocol, "base": base.protocol})
        return _gap(self.records, base.records, self.limits[-1])

    def cells(self) -> dict[str, float | int | Cell | None]:
        """The numbers, by the names they have in tables."""
        low, high = self.ci()
        most = self.limits[-1]
        sizes = {f"AR {name}": part["ar"][most] for name, part in self.by_size().items()}
        return {
            **{f"AR@{k}": value for k, value in self.ar.items()},
            f"AR@{most}": Cell(self.ar[most], (high - low) / 2),
            **sizes,
            **{f"recall@{least:g}": value for least, value in self.shares.items()},
            "best IoU": self.miou,
            "masks an image": self.n_masks / self.n_images,
            "prompts an image": None if self.n_prompts is None else self.n_prompts / self.n_images,
        }

    def to_dict(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The entry of a result file.

        Args:
            base: the base's entry by the same rules; without it what compares is None.

        Raises:
            DataError: if they have no object in common.
        """
        delta, ends = None, None
        if base is not None:
            others = [Found(**sample) for sample in base["samples"]]
            delta, ends = _gap(self.records, others, self.limits[-1])
        return {
            "protocol": self.protocol,
            "ar": {str(most): value for most, value in self.ar.items()},
            "ci": list(self.ci()),
            "delta": delta,
            "delta_ci": ends and list(ends),
            "shares": {str(least): value for least, value in self.shares.items()},
            "miou": self.miou,
            "by_size": {
                name: {
                    **part,
                    "ar": {str(most): value for most, value in part["ar"].items()},
                    "shares": {str(least): value for least, value in part["shares"].items()},
                }
                for name, part in self.by_size().items()
            },
            "n_images": self.n_images,
            "n_instances": len(self.records),
            "n_masks": self.n_masks,
            "n_prompts": self.n_prompts,
            "samples": [vars(record) for record in self.records],
            "skipped": [vars(item) for item in self.skipped],
        }

    def __repr__(self) -> str:
        most = self.limits[-1]
        return f"<Recall AR@{most} {self.ar[most]:.3f} {self.protocol}>"


def recall(
    found: Source,
    data: Dataset | Sequence[Sample],
    *,
    references: Source | None = None,
    max_masks: Sequence[int] = (10, 100, 1000),
    rank: Rank = "score",
    source: str = "proposals",
    workers: int = 0,
    progress: ProgressLike = False,
) -> Recall:
    """AR, mask recall and best IoU of any masks: of a generator, a detector, a file.

    Masks of one image are an object with ``masks`` (R, H, W) and ``scores`` (R,), such as
    `sc.Everything` gives, or the list of dictionaries of `SamAutomaticMaskGenerator`.

    Args:
        found: a function from an image, (H, W, 3) uint8, to its masks, called image by image; or
            the masks by image id.
        data: the images, and the objects to be found.
        references: what is to be found instead of the annotated objects, in the same forms: the
            masks of a teacher, for the agreement of two generators.
        max_masks: how many masks of an image may count for AR, best first.
        rank: ``score`` takes the masks' ``scores``, of dictionaries ``score`` or
            ``predicted_iou``; ``sam`` the mean of predicted IoU and stability, as SAM's paper.
        source: where the masks come from, for the protocol id.
        workers: threads that read images ahead.
        progress: True for a bar, or a callable that receives events.

    Raises:
        ConfigError: if an argument cannot be.
        DataError: if there is no object to find, masks of an image are missing or damaged, or a
            score is not a number.

    Source:
        AR: Hosang et al. 2015, arXiv 1502.05082, as COCO and Segment Anything, arXiv 2304.02643,
        appendix D.3, have it.

    Example:
        >>> import samcompress as sc
        >>> scenes = sc.shapes(2)
        >>> masks = {s.id: [{"segmentation": m, "score": 1.0} for m in s.masks()] for s in scenes}
        >>> recall(masks, scenes).ar[1000]
        1.0
    """
    if rank not in get_args(Rank):
        raise ConfigError("unknown rank.", got=rank, expected=" | ".join(get_args(Rank)))
    limits = tuple(sorted(set(max_masks)))
    if not limits or limits[0] < 1:
        raise ConfigError(
            "max_masks is a list of counts.", got=max_masks, expected="(10, 100, 1000)"
        )
    data = as_dataset(data)
    records: list[Found] = []
    n_images = n_masks = n_prompts = 0
    told, digest = True, hashlib.sha256()
    for sample in Progress(progress, "recall").track(
        ahead(data, workers), label="images", total=len(data)
    ):
        given = _of_image(found, sample)
        runs = ranked(given, rank, sample)
        asked = getattr(getattr(given, "stats", None), "prompts", None)
        told = told and asked is not None
        n_images, n_masks, n_prompts = n_images + 1, n_masks + len(runs), n_prompts + (asked or 0)
        if references is None:
            truths = [(i.id, i.area, encode(i.mask)) for i in sample.instances if not i.crowd]
        else:
            wanted = ranked(_of_image(references, sample), None, sample)
            truths = [(number, area(run), run) for number, run in enumerate(wanted)]
            digest.update(json.dumps([str(sample.id), wanted]).encode())
        records += _records(sample.id, runs, truths, limits[-1])
    against = "" if references is None else f",references={digest.hexdigest()[:12]}"
    counts = ",".join(map(str, limits))
    return Recall(
        f"{data.name}#{len(data)}/{source}{against}/AR:mask/rank={rank}/max={counts}",
        limits,
        tuple(sorted(records, key=lambda r: (_order(r.image_id), _order(r.annotation_id)))),
        n_masks=n_masks,
        n_images=n_images,
        n_prompts=n_prompts if told else None,
        skipped=data.skipped,
    )


def _of_image(source: Source, sample: Sample) -> Any:
    if callable(source):
        return source(sample.image)
    if sample.id not in source:
        raise DataError(
            "there are no masks of an image.",
            where=f"image {sample.id}",
            got=f"masks of {len(source)} images",
            expected="an entry for every image, an empty list where nothing was found",
        )
    return source[sample.id]


def _records(
    image: Any, runs: list[Any], truths: list[tuple[Any, float, Any]], most: int
) -> list[Found]:
    """What the masks, best first, found of an image's objects."""
    from pycocotools import mask as coco

    if not truths:
        return []
    overlaps = np.zeros((len(runs), len(truths)))
    if runs:
        overlaps[:] = coco.iou(runs, [run for _, _, run in truths], [0] * len(truths))
    best = overlaps.max(0, initial=0)
    groups = {"all": (0.0, np.inf), **SIZES}
    ranks: list[dict[str, tuple[int, ...]]] = [{} for _ in truths]
    for name, (low, high) in groups.items():
        inside = [i for i, (_, area, _) in enumerate(truths) if low <= area <= high]
        matched = _matches(overlaps[:most, inside])
        for column, index in enumerate(inside):
            ranks[index][name] = tuple(matched[:, column].tolist())
    return [
        Found(image, key, area, float(best[index]), ranks[index])
        for index, (key, area, _) in enumerate(truths)
    ]


def _matches(overlaps: np.ndarray) -> np.ndarray:
    """Greedy matching, as COCO's scorer does it with the objects that count.

    A mask that finds no free object is a mistake or matches one that does not count; neither
    changes what is found, so that only this is looked at.

    Args:
        overlaps: (R, G) IoU of masks, best scores first, with objects.

    Returns:
        (10, G) which mask was matched at each threshold; -1 for none.
    """
    found = np.full((len(THRESHOLDS), overlaps.shape[1]), -1)
    near = np.flatnonzero((overlaps >= THRESHOLDS[0] - 1e-9).any(1))
    for taken, threshold in zip(found, THRESHOLDS, strict=True):
        for row in near:
            free = np.where(taken < 0, overlaps[row], -1.0)
            # The last of equals, as the scorer goes on from one object to an equal one.
            column = free.size - 1 - int(free[::-1].argmax())
            if free[column] >= min(threshold, 1 - 1e-10):
                taken[column] = row
    return found


def _recall(records: Sequence[Found], most: int, group: str = "all") -> float:
    ranks = np.array([record.ranks[group] for record in records])
    return float(((ranks >= 0) & (ranks < most)).mean(0).mean())


def _gap(records: Sequence[Found], others: Sequence[Found], most: int) -> tuple[float, Interval]:
    """Difference of two recalls over the objects that both have, and its interval."""
    found = {(other.image_id, other.annotation_id): other for other in others}
    pairs = [(r, found[key]) for r in records if (key := (r.image_id, r.annotation_id)) in found]
    if not pairs:
        raise DataError("the two recalls have no object in common.", expected="the same data")
    gaps = [_recall([record], most) - _recall([other], most) for record, other in pairs]
    ends = stats.bootstrap(gaps, [record.image_id for record, _ in pairs])
    return float(np.mean(gaps)), ends


def _share(records: Sequence[Found], least: float) -> float:
    return float(np.mean([record.iou >= least for record in records]))
