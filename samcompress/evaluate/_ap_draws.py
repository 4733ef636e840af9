"""AP of resampled images: its interval, and whether two models differ by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import stats

DRAWS = 1000


def resampled_ap(run: Any, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """AP of each draw of as many images, with replacement.

    An image that is drawn twice counts twice, with its objects and its detections: what the scorer
    matched in each image stays, and only its sums are made again.

    Args:
        run: a finished COCOeval.
        draws: number of resamplings.
        seed: of the resampling.

    Returns:
        (draws,) AP over all areas, of the most detections; draws without any object are left out,
        for every model on the same images the same ones.
    """
    categories = np.array(run.evalImgs, dtype=object).reshape(
        len(run.params.catIds), len(run.params.areaRng), len(run.params.imgIds)
    )[:, 0]
    curves = [_Curve(images, run.params.maxDets[-1]) for images in categories]
    found = []
    for weight in stats.weights(len(run.params.imgIds), draws=draws, seed=seed):
        parts = [curve.ap(weight, run.params.recThrs) for curve in curves]
        total = np.sum([ap for ap, _ in parts], 0)
        present = np.sum([there for _, there in parts], 0)
        found.append(total[present > 0] / present[present > 0])
    return np.concatenate(found)


class _Curve:
    """A category's detections in all images, best scores first.

    Args:
        images: the scorer's findings in each image; None where it holds nothing of the category.
        most: how many detections of an image count.
    """

    def __init__(self, images: Sequence[Any], most: int) -> None:
        held = [(index, found) for index, found in enumerate(images) if found is not None]
        self.truths = np.zeros(len(images))
        for index, found in held:
            self.truths[index] = np.sum(np.asarray(found["gtIgnore"]) == 0)

        def all_of(key: str) -> np.ndarray:
            return np.concatenate([np.atleast_2d(f[key])[:, :most] for _, f in held], 1)

        scores = all_of("dtScores")[0]
        order = np.argsort(-scores, kind="mergesort")
        counts = [min(len(found["dtScores"]), most) for _, found in held]
        self.image = np.repeat([index for index, _ in held], counts)[order].astype(int)
        matched, ignored = (all_of(key)[:, order].astype(bool) for key in ("dtMatches", "dtIgnore"))
        self.hits, self.misses = matched & ~ignored, ~matched & ~ignored

    def ap(self, weight: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AP in each draw, 0 where it has no object of the category; and where it has one."""
        truths = weight @ self.truths
        present = truths > 0
        total, drawn = np.zeros(len(weight)), weight[:, self.image]
        for hits, misses in zip(self.hits, self.misses, strict=True):
            if not hits.any():
                continue
            right, wrong = (drawn * hits).cumsum(1), (drawn * misses).cumsum(1)
            precision = right / (right + wrong + np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            recall = right / np.maximum(truths, 1)[:, None]
            # At each detection: how many of the asked recalls are reached there first.
            reached = np.searchsorted(recalls, recall, side="right")
            total += (np.diff(reached, axis=1, prepend=0) * precision).sum(1)
        return total / (len(self.hits) * len(recalls)), present
