"""AP and AR of masks as COCO and LVIS define them, by pycocotools' own scorer.

Our part is what goes in and what comes out: areas are those of the masks, never of a box that comes
along with a detection; ids may be texts; and the numbers say by which rules they were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from ..core.data import Dataset, Sample, as_dataset
from ..core.data._annotation import decoder
from ..core.display import Cell
from ..core.errors import ConfigError, DataError
from . import stats
from ._ap_draws import resampled_ap
from ._scorer import Entry, Seen, federated, score
from .detections import Detections
from .masks import Mask, boundary, decode, encode
from .protocol import Overlap
from .records import SIZES, Accuracy
from .stats import Interval

Rules = Literal["coco", "lvis"]


@dataclass(frozen=True)
class AveragePrecision:
    """AP and AR of one set of detections.

    Attributes:
        protocol: id of the rules; only numbers of the same id may be compared.
        ap: mean over IoU thresholds 0.50, 0.55, ... 0.95, recalls and categories.
        ap50: AP at IoU 0.50.
        ap75: AP at IoU 0.75.
        ar: mean of the final recalls, by the number of detections allowed in an image.
        by_size: ``ap``, ``ar`` and ``n_instances`` of S, M and L, COCO's groups by annotated area;
            None where there is no object of that size.
        n_images: images looked at.
        n_instances: objects to be found; crowds are none.
        n_detections: what was found, right or wrong; by LVIS's rules only what may be judged.
        by_group: AP of each group of categories; None where a group has no object.
        detector: hash and number of the boxes that were asked with; None where there were none.
        draws: AP of 1000 draws of as many of the images; of the same draws for every model that was
            scored on the same data.
    """

    protocol: str
    ap: float
    ap50: float
    ap75: float
    ar: dict[int, float]
    by_size: dict[str, dict[str, Any]]
    n_images: int
    n_instances: int
    n_detections: int
    by_group: dict[str, float | None] = field(default_factory=dict)
    detector: dict[str, Any] | None = None
    draws: tuple[float, ...] = field(default=(), repr=False)

    def ci(self) -> Interval:
        """95 % interval of the AP, images resampled."""
        return stats.middle(self.draws)

    def against(self, base: AveragePrecision) -> tuple[float, Interval]:
        """This AP minus a base's, and its 95 % interval, the same images resampled for both.

        Args:
            base: by the same rules on the same data.

        Raises:
            ConfigError: if the two were made by different rules.
        """
        stats.comparable({"this": self.protocol, "base": base.protocol})
        return self.ap - base.ap, stats.middle(np.subtract(self.draws, base.draws))

    def cells(self) -> dict[str, float | int | Cell | None]:
        """The numbers, by the names they have in tables."""
        low, high = self.ci()
        sizes = {f"AP {name}": part["ap"] for name, part in self.by_size.items()}
        groups = {f"AP {name}": value for name, value in self.by_group.items()}
        recalls = {f"AR@{most}": value for most, value in self.ar.items()}
        head = {"AP": Cell(self.ap, (high - low) / 2), "AP50": self.ap50, "AP75": self.ap75}
        return {**head, **sizes, **groups, **recalls, "detections": self.n_detections}

    def to_dict(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The entry of a result file.

        Args:
            base: the base's entry by the same rules; without it what compares is None.
        """
        fields = {**vars(self), "ar": {str(most): value for most, value in self.ar.items()}}
        fields |= {"ci": list(self.ci()), "delta": None, "delta_ci": None}
        fields["draws"] = [round(value, 5) for value in self.draws]
        if base is not None:
            fields["delta"] = self.ap - base["ap"]
            fields["delta_ci"] = list(stats.middle(np.subtract(fields["draws"], base["draws"])))
        fields["by_size"] = {
            name: {**part, "ar": {str(most): value for most, value in part["ar"].items()}}
            for name, part in self.by_size.items()
        }
        return fields

    def __repr__(self) -> str:
        return f"<AveragePrecision {self.ap:.3f} (50: {self.ap50:.3f}) {self.protocol}>"


def average_precision(
    found: Accuracy | Detections | Iterable[Mapping[str, Any]],
    data: Dataset | Sequence[Sample],
    *,
    overlap: Overlap = "mask",
    class_agnostic: bool = False,
    max_detections: Sequence[int] | None = None,
    rules: Rules | None = None,
    groups: Mapping[int, str] | None = None,
    source: str = "detections",
) -> AveragePrecision:
    """AP and AR of masks.

    Give the masks of a detector's boxes, from `detections`. Or the result of an `accuracy` that
    kept its masks: every object's mask is then a detection of the object's category, ranked by the
    model's own score. Or detections in COCO's result form: ``image_id``, ``category_id``, ``score``
    and ``segmentation`` (run lengths, polygons or an (H, W) bool array). A ``bbox`` is not looked
    at. Of equal scores the first counts as higher.

    Args:
        found: the masks.
        data: the images they were found in; those that cannot be read are left out.
        overlap: ``boundary`` takes for each pair the lower of mask IoU and boundary IoU.
        class_agnostic: leave categories out, for data or detections that have none.
        max_detections: how many of an image may count, best scores first; AP is that of the most.
            1, 10 and 100 if left out, by LVIS's rules 300.
        rules: ``lvis`` judges a detection only where the image is known to hold or to lack its
            category, and takes the best 300 of an image; if left out, as the data are annotated.
        groups: a name for each category, for an AP of each group; LVIS's rare, common and frequent
            ones if left out, where the data tell.
        source: where detections come from, for the protocol id; an accuracy says it itself.

    Raises:
        ConfigError: if an argument cannot be, or the accuracy is of other data.
        DataError: if there is no object to find, an object has no category, masks were not kept, or
            a detection is damaged or of an image that is not there.

    Source:
        Lin et al. 2014, arXiv 1405.0312; for boundaries Cheng et al. 2021, arXiv 2103.16562; for
        LVIS Gupta et al. 2019, arXiv 1908.03195.

    Example:
        >>> import samcompress as sc
        >>> scenes = sc.shapes(2)
        >>> boxes = sc.evaluate.accuracy(sc.build("tiny"), scenes, "box", keep_masks=True)
        >>> result = average_precision(boxes, scenes, class_agnostic=True)
        >>> 0 <= result.ap <= result.ap50 <= 1
        True
    """
    data = as_dataset(data)
    rules = _rules(rules, data, class_agnostic)
    limits = _limits(max_detections, rules)
    if overlap not in get_args(Overlap):
        raise ConfigError("unknown overlap.", got=overlap, expected=" | ".join(get_args(Overlap)))
    make = _Entries(overlap == "boundary", class_agnostic)
    truths, images = _truths(data, make)
    detector = None
    if isinstance(found, (Accuracy, Detections)):
        _same_data(found.data, data)
    if isinstance(found, Accuracy):
        source, entries = _of_accuracy(found, make)
    elif isinstance(found, Detections):
        source, detector = found.source, found.boxes.facts()
        entries = _of_results(found.results, images, {sample.id for sample in data}, make)
    else:
        entries = _of_results(found, images, {sample.id for sample in data}, make)
    if rules == "lvis":
        entries = federated(truths, entries, images, limits[-1])
    run = score(
        truths, entries, images, limits, rims=overlap == "boundary", lenient=rules == "lvis"
    )
    categories = "no" if class_agnostic else "yes"
    name = f"{data.name}#{len(data)}/{source}/AP:{overlap}/categories={categories}"
    name += ",rules=lvis" if rules == "lvis" else ""
    counts = ",".join(map(str, limits))
    if groups is None:
        groups = {} if class_agnostic else data.groups
    return _result(f"{name}/max={counts}", run, limits, groups, detector)


def _rules(rules: Rules | None, data: Dataset, class_agnostic: bool) -> Rules:
    if rules is None:
        told = any(sample.negative or sample.not_exhaustive for sample in data)
        return "lvis" if told and not class_agnostic else "coco"
    if rules not in get_args(Rules):
        raise ConfigError("unknown rules.", got=rules, expected=" | ".join(get_args(Rules)))
    if rules == "lvis" and class_agnostic:
        raise ConfigError(
            "LVIS's rules are about categories.", got="class_agnostic=True", expected='rules="coco"'
        )
    return rules


def _limits(max_detections: Sequence[int] | None, rules: Rules) -> list[int]:
    if max_detections is None:
        return [300] if rules == "lvis" else [1, 10, 100]
    limits = sorted(set(max_detections))
    if not limits or limits[0] < 1:
        raise ConfigError(
            "max_detections is a list of counts.", got=max_detections, expected="(1, 10, 100)"
        )
    return limits


def _same_data(made_on: str, data: Dataset) -> None:
    if made_on != f"{data.name}#{len(data)}":
        raise ConfigError(
            "these masks are of other data.", got=made_on, expected=f"{data.name}#{len(data)}"
        )


@dataclass(frozen=True)
class _Entries:
    """Makes entries as pycocotools wants them; the image's id is still our own."""

    rims: bool
    class_agnostic: bool

    def __call__(self, image: Any, category: Any, run: Entry, mask: Mask | None = None) -> Entry:
        from pycocotools import mask as coco

        entry = {
            "image_id": image,
            "category_id": 1 if self.class_agnostic else category,
            "area": float(coco.area(run)),
            "iscrowd": 0,
            "segmentation": run,
        }
        if self.rims:
            entry["rim"] = encode(boundary(decode(run) if mask is None else mask))
        return entry


def _truths(data: Dataset, make: _Entries) -> tuple[list[Entry], dict[Any, Seen]]:
    """The objects of the data, and every image that could be read."""
    truths, images = [], {}
    for sample in data.readable():
        unsure = frozenset(sample.negative), frozenset(sample.not_exhaustive)
        images[sample.id] = Seen(sample.size, *unsure)
        for instance in sample.instances:
            if instance.category is None and not make.class_agnostic:
                raise DataError(
                    "an object has no category.",
                    where=f"image {sample.id}, annotation {instance.id}",
                    fix="average_precision(..., class_agnostic=True)",
                )
            mask = instance.mask
            entry = make(sample.id, instance.category, encode(mask), mask)
            truths.append({**entry, "area": instance.area, "iscrowd": int(instance.crowd)})
    if all(entry["iscrowd"] for entry in truths):
        raise DataError("there is no object to find.", where=data.name, expected="one or more")
    return truths, images


def _of_accuracy(found: Accuracy, make: _Entries) -> tuple[str, list[Entry]]:
    """How the accuracy asked, and its masks as detections."""
    entries = []
    for record in found.records:
        if record.mask is None:
            raise DataError(
                "the masks of this accuracy were not kept.",
                where=f"image {record.image_id}, annotation {record.annotation_id}",
                fix="accuracy(..., keep_masks=True)",
            )
        entry = make(record.image_id, record.category, record.mask)
        entries.append({**entry, "score": record.score})
    # Without the name of the data, which stands first anyway, and the average, which AP has not.
    return found.protocol.removeprefix(f"{found.data}/").rsplit("/", 1)[0], entries


def _of_results(
    found: Iterable[Mapping[str, Any]],
    images: Mapping[Any, Seen],
    known: set[Any],
    make: _Entries,
) -> list[Entry]:
    """Detections in COCO's result form, each mask decoded, as the scorer would trust a bad one."""
    entries = []
    for number, item in enumerate(found):
        where = f"detection {number}"
        try:
            image, score, shape = item["image_id"], float(item["score"]), item["segmentation"]
            category = None if make.class_agnostic else item["category_id"]
        except (KeyError, TypeError, ValueError) as err:
            raise DataError(
                "this is no detection.",
                where=where,
                got=f"{type(err).__name__}: {err}",
                expected="image_id, category_id, score, segmentation",
            ) from err
        if not math.isfinite(score):
            raise DataError("score is not finite.", where=where, got=score)
        if image not in known:
            raise DataError("there is no such image in the data.", where=where, got=repr(image))
        if image not in images:
            continue  # of an image that could not be read
        size = images[image].size
        try:
            mask = shape if isinstance(shape, np.ndarray) else decoder(shape, size)()
        except DataError as err:
            err.where = where
            raise
        if mask.shape != size or mask.dtype != bool:
            raise DataError(
                "mask does not fit its image.",
                where=where,
                got=f"{mask.shape} {mask.dtype}",
                expected=f"{size} bool",
            )
        entries.append({**make(image, category, encode(mask), mask), "score": score})
    return entries


def _result(
    protocol: str,
    run: Any,
    limits: Sequence[int],
    groups: Mapping[int, str],
    detector: dict[str, Any] | None,
) -> AveragePrecision:
    """Numbers out of the scorer's arrays: -1 there stands for "no object"."""
    precision, recall = run.eval["precision"], run.eval["recall"]
    truths = [t for t in run.cocoGt.dataset["annotations"] if not t["iscrowd"]]

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    def recalls(size: int) -> dict[int, Any]:
        return {most: mean(recall[:, :, size, m]) for m, most in enumerate(limits)}

    def at(threshold: float) -> Any:
        chosen = np.isclose(run.params.iouThrs, threshold)
        return mean(precision[chosen, :, :, 0, -1])

    by_size = {
        name: {
            "ap": mean(precision[:, :, :, k, -1]),
            "ar": recalls(k),
            "n_instances": sum(low <= truth["area"] <= high for truth in truths),
        }
        for k, (name, (low, high)) in enumerate(SIZES.items(), 1)
    }
    by_group = {
        name: mean(precision[:, :, [groups.get(c) == name for c in run.params.catIds], 0, -1])
        for name in dict.fromkeys(groups.values())
    }
    ap: Any = mean(precision[:, :, :, 0, -1])
    return AveragePrecision(
        protocol=protocol,
        ap=ap,
        ap50=at(0.5),
        ap75=at(0.75),
        ar=recalls(0),
        by_size=by_size,
        n_images=len(run.params.imgIds),
        n_instances=len(truths),
        n_detections=len(run.cocoDt.dataset["annotations"]),
        by_group=by_group,
        detector=detector,
        draws=tuple(resampled_ap(run).tolist()),
    )
