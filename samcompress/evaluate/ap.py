"""AP and AR of masks as COCO defines them, by pycocotools' own scorer.

Our part is what goes in and what comes out: areas are those of the masks, never of a box that comes
along with a detection; ids may be texts; and the numbers say by which rules they were made.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ..core.data import Dataset, Sample, as_dataset
from ..core.data._annotation import decoder
from ..core.errors import ConfigError, DataError
from .masks import Mask, boundary, decode, encode
from .records import SIZES, Accuracy, _order

Overlap = Literal["mask", "boundary"]
Entry = dict[str, Any]


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
        n_detections: what was found, right or wrong.
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

    def __repr__(self) -> str:
        return f"<AveragePrecision {self.ap:.3f} (50: {self.ap50:.3f}) {self.protocol}>"


def average_precision(
    found: Accuracy | Iterable[Mapping[str, Any]],
    data: Dataset | Sequence[Sample],
    *,
    overlap: Overlap = "mask",
    class_agnostic: bool = False,
    max_detections: Sequence[int] = (1, 10, 100),
    source: str = "detections",
) -> AveragePrecision:
    """AP and AR of masks.

    Give the result of an `accuracy` that kept its masks: every object's mask is then a detection of
    the object's category, ranked by the model's own score. Or give detections in COCO's result
    form: ``image_id``, ``category_id``, ``score`` and ``segmentation`` (run lengths, polygons or an
    (H, W) bool array). A ``bbox`` is not looked at. Of equal scores the first counts as higher.

    Args:
        found: the masks.
        data: the images they were found in; those that cannot be read are left out.
        overlap: ``boundary`` takes for each pair the lower of mask IoU and boundary IoU.
        class_agnostic: leave categories out, for data or detections that have none.
        max_detections: how many of an image may count, best scores first; AP is that of the most.
        source: where detections come from, for the protocol id; an accuracy says it itself.

    Raises:
        ConfigError: if an argument cannot be, or the accuracy is of other data.
        DataError: if there is no object to find, an object has no category, masks were not kept, or
            a detection is damaged or of an image that is not there.

    Source:
        Lin et al. 2014, arXiv 1405.0312; for boundaries Cheng et al. 2021, arXiv 2103.16562.

    Example:
        >>> import samcompress as sc
        >>> scenes = sc.shapes(2)
        >>> boxes = sc.evaluate.accuracy(sc.build("tiny"), scenes, "box", keep_masks=True)
        >>> result = average_precision(boxes, scenes, class_agnostic=True)
        >>> 0 <= result.ap <= result.ap50 <= 1
        True
    """
    limits = sorted(set(max_detections))
    if overlap not in get_args(Overlap):
        raise ConfigError("unknown overlap.", got=overlap, expected=" | ".join(get_args(Overlap)))
    if not limits or limits[0] < 1:
        raise ConfigError(
            "max_detections is a list of counts.", got=max_detections, expected="(1, 10, 100)"
        )
    data = as_dataset(data)
    make = _Entries(overlap == "boundary", class_agnostic)
    truths, sizes = _truths(data, make)
    if isinstance(found, Accuracy):
        source, detections = _of_accuracy(found, data, make)
    else:
        detections = _of_results(found, sizes, {sample.id for sample in data}, make)
    run = _run(truths, detections, sizes, limits, rims=overlap == "boundary")
    rules = f"AP:{overlap}/categories={'no' if class_agnostic else 'yes'}"
    counts = ",".join(map(str, limits))
    return _result(f"{data.name}#{len(data)}/{source}/{rules}/max={counts}", run, limits)


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


def _truths(data: Dataset, make: _Entries) -> tuple[list[Entry], dict[Any, tuple[int, int]]]:
    """The objects of the data, and the size of every image that could be read."""
    truths, sizes = [], {}
    for sample in data.readable():
        sizes[sample.id] = sample.size
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
    return truths, sizes


def _of_accuracy(found: Accuracy, data: Dataset, make: _Entries) -> tuple[str, list[Entry]]:
    """How the accuracy asked, and its masks as detections."""
    if found.settings.data != f"{data.name}#{len(data)}":
        raise ConfigError(
            "this accuracy is of other data.",
            got=found.settings.data,
            expected=f"{data.name}#{len(data)}",
        )
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
    return found.protocol.removeprefix(f"{found.settings.data}/").rsplit("/", 1)[0], entries


def _of_results(
    found: Iterable[Mapping[str, Any]],
    sizes: Mapping[Any, tuple[int, int]],
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
        if image not in sizes:
            continue  # of an image that could not be read
        try:
            mask = shape if isinstance(shape, np.ndarray) else decoder(shape, sizes[image])()
        except DataError as err:
            err.where = where
            raise
        if mask.shape != sizes[image] or mask.dtype != bool:
            raise DataError(
                "mask does not fit its image.",
                where=where,
                got=f"{mask.shape} {mask.dtype}",
                expected=f"{sizes[image]} bool",
            )
        entries.append({**make(image, category, encode(mask), mask), "score": score})
    return entries


def _run(
    truths: list[Entry],
    detections: list[Entry],
    sizes: Mapping[Any, tuple[int, int]],
    limits: Sequence[int],
    *,
    rims: bool,
) -> Any:
    """A finished COCOeval."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Numbers for ids, which may be texts; from 1 on, as the scorer takes object 0 for none.
    numbers = {key: number for number, key in enumerate(sorted(sizes, key=_order), 1)}
    images = [{"id": n, "height": sizes[k][0], "width": sizes[k][1]} for k, n in numbers.items()]
    categories = sorted({entry["category_id"] for entry in truths})
    with redirect_stdout(io.StringIO()):  # it prints at every step
        sides = [COCO(), COCO()]
        for side, entries in zip(sides, (truths, detections), strict=True):
            side.dataset = {
                "images": images,
                "categories": [{"id": category} for category in categories],
                "annotations": [
                    {**entry, "image_id": numbers[entry["image_id"]], "id": number}
                    for number, entry in enumerate(entries, 1)
                ],
            }
            side.createIndex()
        run: Any = COCOeval(*sides, "segm")
        run.params.maxDets = list(limits)
        run.params.areaRng = [[0.0, math.inf], *map(list, SIZES.values())]
        run.params.areaRngLbl = ["all", *SIZES]
        if rims:
            run.computeIoU = _lower(run)
        run.evaluate()
        run.accumulate()
    return run


def _lower(run: Any) -> Any:
    """The scorer's overlap of an image's masks, no higher than that of their rims."""
    from pycocotools import mask as coco

    plain = run.computeIoU

    def overlap(image: int, category: int) -> Any:
        masks = plain(image, category)
        truths, found = run._gts[image, category], run._dts[image, category]
        if not truths or not found:
            return masks
        # The scorer's own order of detections.
        order = np.argsort([-d["score"] for d in found], kind="mergesort")[: len(masks)]
        rims = coco.iou(
            [found[i]["rim"] for i in order], [t["rim"] for t in truths], [0] * len(truths)
        )
        crowd = np.array([bool(t["iscrowd"]) for t in truths])
        return np.where(crowd, masks, np.minimum(masks, rims))

    return overlap


def _result(protocol: str, run: Any, limits: Sequence[int]) -> AveragePrecision:
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
    )
