"""pycocotools' scorer on entries of ours, with LVIS's rules where they are asked for."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from .records import SIZES, _order

Entry = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What is known of one image.

    Attributes:
        size: height H and width W.
        negative: categories known to be absent.
        not_exhaustive: categories of which objects may be missing in the annotation.
    """

    size: tuple[int, int]
    negative: frozenset[Any] = frozenset()
    not_exhaustive: frozenset[Any] = frozenset()


def federated(
    truths: Sequence[Entry], found: Sequence[Entry], images: Mapping[Any, Seen], most: int
) -> list[Entry]:
    """Detections that LVIS looks at.

    Args:
        truths: the objects.
        found: detections, in their file's order.
        images: all images.
        most: so many of an image, best scores first, before anything else is left out.

    Returns:
        Those of categories that the image is known to hold or to lack.
    """
    by_image: defaultdict[Any, list[Entry]] = defaultdict(list)
    for entry in found:
        by_image[entry["image_id"]].append(entry)
    known = {key: set(seen.negative) for key, seen in images.items()}
    for truth in truths:
        known[truth["image_id"]].add(truth["category_id"])
    return [
        entry
        for key, entries in by_image.items()
        for entry in (
            entries if len(entries) <= most else sorted(entries, key=lambda e: -e["score"])[:most]
        )
        if entry["category_id"] in known[key]
    ]


def score(
    truths: list[Entry],
    detections: list[Entry],
    images: Mapping[Any, Seen],
    limits: Sequence[int],
    *,
    kind: str = "segm",
    rims: bool = False,
    lenient: bool = False,
) -> Any:
    """A finished COCOeval.

    Args:
        truths: entries with ``area`` and ``iscrowd``.
        detections: entries with ``area`` and ``score``.
        images: all images; an image without entries counts too.
        limits: how many detections of an image and category may count.
        kind: ``segm`` or ``bbox``.
        rims: entries have a ``rim``, and a pair overlaps by the lower of masks and rims.
        lenient: LVIS's rule that what matches nothing is no mistake where the annotation of its
            category is not exhaustive.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Numbers for ids, which may be texts; from 1 on, as the scorer takes object 0 for none.
    numbers = {key: number for number, key in enumerate(sorted(images, key=_order), 1)}
    listed = [
        {"id": n, "height": images[k].size[0], "width": images[k].size[1]}
        for k, n in numbers.items()
    ]
    categories = sorted({entry["category_id"] for entry in truths})
    with redirect_stdout(io.StringIO()):  # it prints at every step
        sides = [COCO(), COCO()]
        for side, entries in zip(sides, (truths, detections), strict=True):
            side.dataset = {
                "images": listed,
                "categories": [{"id": category} for category in categories],
                "annotations": [
                    {**entry, "image_id": numbers[entry["image_id"]], "id": number}
                    for number, entry in enumerate(entries, 1)
                ],
            }
            side.createIndex()
        run: Any = COCOeval(*sides, kind)
        run.params.maxDets = list(limits)
        run.params.areaRng = [[0.0, math.inf], *map(list, SIZES.values())]
        run.params.areaRngLbl = ["all", *SIZES]
        if rims:
            run.computeIoU = _lower(run)
        run.evaluate()
        if lenient:
            open_ends = {(numbers[k], c) for k, s in images.items() for c in s.not_exhaustive}
            for cell in run.evalImgs:
                if cell is not None and (cell["image_id"], cell["category_id"]) in open_ends:
                    cell["dtIgnore"] = cell["dtIgnore"].astype(bool) | (cell["dtMatches"] == 0)
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
