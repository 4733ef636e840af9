"""Masks of an image in whatever form they are given: checked, encoded, the best first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from ..core.data import Sample
from ..core.data._annotation import decoder
from ..core.errors import DataError, ShapeError
from .masks import encode

Rank = Literal["score", "sam"]


def ranked(given: Any, rank: Rank | None, sample: Sample) -> list[Any]:
    """Run lengths of an image's masks, best first, equals in the given order."""
    where = f"image {sample.id}"
    try:
        if isinstance(given, (list, tuple)):
            shapes: Iterable[Any] = [item["segmentation"] for item in given]
        elif hasattr(given, "rle"):
            shapes = [given.rle(index, compressed=True) for index in range(len(given))]
        else:
            shapes = given.masks
        runs = [_run(shape, sample.size, where) for shape in shapes]
        scores = np.zeros(len(runs)) if rank is None else _scores(given, rank)
    except (AttributeError, KeyError, TypeError) as err:
        raise DataError(
            "these are no masks of an image.",
            where=where,
            got=f"{type(given).__name__}: {err}",
            expected="masks and scores, or dictionaries with segmentation and predicted_iou",
        ) from err
    if len(scores) == len(runs) and np.isnan(scores).any():
        # The stability of an empty mask is 0 / 0; it finds nothing, wherever it stands.
        scores = np.where([area(run) == 0 for run in runs], 0.0, scores)
    if len(scores) != len(runs) or not np.isfinite(scores).all():
        raise DataError(
            "scores do not fit the masks.",
            where=where,
            got=f"{len(scores)} scores, {int((~np.isfinite(scores)).sum())} not finite",
            expected=f"{len(runs)} finite scores",
        )
    return [runs[i] for i in np.argsort(-scores, kind="stable")]


def _scores(given: Any, rank: Rank) -> np.ndarray:
    if isinstance(given, (list, tuple)):
        if rank == "sam":
            found = [(item["predicted_iou"] + item["stability_score"]) / 2 for item in given]
        else:
            found = [item["score"] if "score" in item else item["predicted_iou"] for item in given]
        return np.asarray(found, dtype=float)
    if rank == "sam":
        both: np.ndarray = np.asarray(given.predicted_iou, float) + np.asarray(given.stability)
        return both / 2
    return np.asarray(given.scores, dtype=float)


def _run(shape: Any, size: tuple[int, int], where: str) -> dict[str, Any]:
    mask = decoder(shape, size)() if isinstance(shape, (dict, list)) else np.asarray(shape)
    if mask.shape != size or mask.dtype != bool:
        raise ShapeError(
            "mask does not fit its image.",
            where=where,
            got=f"{mask.shape} {mask.dtype}",
            expected=f"{size} bool",
        )
    return encode(mask)


def area(run: dict[str, Any]) -> float:
    """Pixels of a mask."""
    from pycocotools import mask as coco

    return float(coco.area(run))
