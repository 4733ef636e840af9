"""COCO's way of writing an object down, which LVIS and SA-1B share: polygons and run lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ._sample import Instance, Mask

Size = tuple[int, int]


def instances_of(
    records: Sequence[Any], size: Size
) -> tuple[tuple[Instance, ...], list[tuple[str, str]]]:
    """The objects of one image in ascending id, and what was left out as (what, reason).

    Only what can be told without decoding a mask is looked at.
    """
    found: dict[Any, Instance] = {}
    problems = []
    for number, record in enumerate(records):
        name = record.get("id") if isinstance(record, dict) else None
        what = f"annotation {name}" if name is not None else f"annotation number {number}"
        try:
            instance = _instance(record, size)
        except DataError as err:
            problems.append((what, reason_of(err)))
        else:
            if instance.id in found:
                problems.append((what, "id is used twice in this image"))
            found.setdefault(instance.id, instance)
    ordered = sorted(found.values(), key=lambda i: (isinstance(i.id, str), i.id))
    return tuple(ordered), problems


def reason_of(err: DataError) -> str:
    """What went wrong, in one line."""
    parts = [err.what.rstrip(".")]
    parts += [str(err.got)] if err.got is not None else []
    parts += [f"expected {err.expected}"] if err.expected is not None else []
    return parts[0] + (": " + ", ".join(parts[1:]) if parts[1:] else "")


def _instance(record: Any, size: Size) -> Instance:
    try:
        key, area = record["id"], float(record["area"])
        x, y, width, height = (float(v) for v in record["bbox"])
        segmentation = record["segmentation"]
        points = record.get("point_coords") or []
        point = (float(points[0][0]), float(points[0][1])) if points else None
    except KeyError as err:
        raise DataError(f"annotation has no {err}.") from err
    except (TypeError, ValueError, IndexError, AttributeError) as err:
        raise DataError("annotation is malformed.", got=str(err)) from err
    if not isinstance(key, (int, str)):
        raise DataError("annotation has no usable id.", got=repr(key))
    numbers = (x, y, width, height, area)
    if not all(map(math.isfinite, numbers)) or width < 0 or height < 0:
        raise DataError("bbox or area is not usable.", got=f"{record['bbox']}, {area}")
    return Instance(
        key,
        record.get("category_id"),
        area,
        (x, y, x + width, y + height),
        bool(record.get("iscrowd", 0)),
        point,
        source=decoder(segmentation, size),
    )


def decoder(segmentation: Any, size: Size) -> Callable[[], Mask]:
    """What decodes this segmentation.

    Args:
        segmentation: polygons [[x, y, x, y, …], …], or {"size": [H, W], "counts": …} with a list
            of runs or a COCO string.
        size: (H, W) of the image.

    Raises:
        DataError: if it is empty, of another form, or of another size than the image.
    """
    if not segmentation:
        raise DataError("segmentation is empty.")
    if isinstance(segmentation, dict):
        own = segmentation.get("size")
        if not isinstance(own, list) or tuple(own) != size:
            raise DataError("mask has another size than its image.", got=own, expected=list(size))
        counts = segmentation.get("counts")
        if not isinstance(counts, (str, list)):
            raise DataError("segmentation has no counts.", got=type(counts).__name__)
        return Runs(size, counts)
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        raise DataError("segmentation is neither polygons nor run lengths.")
    polygons = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    if not polygons:  # two points make no area; beside real polygons they are passed over
        raise DataError("no polygon has three points.")
    return Polygons(size, polygons)


@dataclass(frozen=True)
class Runs:
    """Column-major run lengths, the first of zeros."""

    size: Size
    counts: str | list[int]

    def __call__(self) -> Mask:
        # pycocotools trusts the runs and, where they do not fill the image, returns whatever was
        # in memory; so they are checked here, and once they are numbers nothing is left to do.
        runs = unpack(self.counts) if isinstance(self.counts, str) else _numbers(self.counts)
        height, width = self.size
        if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
            raise DataError("run lengths do not fill the mask.", expected=height * width)
        values = np.arange(len(runs)) % 2 == 1
        return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


@dataclass(frozen=True)
class Polygons:
    """Polygons, filled by pycocotools and united."""

    size: Size
    polygons: list[list[float]]

    def __call__(self) -> Mask:
        from pycocotools import mask

        height, width = self.size
        for polygon in self.polygons:
            # pycocotools walks every edge: NaN or a far away corner would take all memory.
            corners = _numbers(polygon, float)
            if not (np.abs(corners) <= 4 * max(height, width) + 16).all():
                raise DataError("polygon leaves the image by far.")
        runs = mask.merge(mask.frPyObjects(self.polygons, height, width))
        return Runs(self.size, runs["counts"].decode())()


def _numbers(values: Sequence[Any], kind: type = int) -> NDArray[Any]:
    if not all(isinstance(v, (int, kind)) and not isinstance(v, bool) for v in values):
        raise DataError("segmentation holds something other than numbers.")
    try:
        return np.array(values, np.int64 if kind is int else np.float64)
    except OverflowError as err:
        raise DataError("segmentation holds a number out of range.") from err


def unpack(text: str) -> NDArray[np.int64]:
    """Run lengths out of a COCO string.

    Each character carries five bits, low ones first, and a sixth that says whether more follow;
    the top bit of the last group is the sign; from the fourth on, a run is written as the
    difference to the one two places before.

    Raises:
        DataError: if this is no such string.
    """
    groups = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if not groups.size or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise DataError("counts are no COCO string.", got=repr(text[:20]))
    last = (groups & 32) == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:
        raise DataError("counts are no COCO string.", got="a run of more than 35 bits")
    runs = np.add.reduceat((groups & 31) << (5 * place), starts)
    negative = (groups[ends] & 16) != 0
    runs -= negative.astype(np.int64) << (5 * (ends - starts + 1))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
