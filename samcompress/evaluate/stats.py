"""Statistics of per-instance values that cluster in images; frontiers of cost and gain.

Instances of one image resemble each other, so images are resampled, never instances: an interval
over instances would be too narrow, by a factor of 1.6 on COCO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from ..core.errors import ConfigError, DataError, ShapeError

Average = Literal["instance", "category", "image"]
Interval = tuple[float, float]

# A block of resampled weights holds at most this many numbers (32 MB).
_BLOCK = 4_000_000


def mean(
    values: Sequence[float] | np.ndarray,
    images: Sequence[Any],
    *,
    categories: Sequence[Any] | None = None,
    average: Average = "instance",
) -> float:
    """Mean over instances, mean of category means, or mean of image means.

    Args:
        values: one number an instance.
        images: the image each instance lies in.
        categories: the category of each instance; needed for ``average="category"``.
        average: what weighs the same.

    Raises:
        DataError: if there is no value, or categories are needed and absent.
        ShapeError: if the lists differ in length.
        ConfigError: if the average is unknown.

    Example:
        >>> mean([1.0, 1.0, 0.0], ["a", "a", "b"]), mean([1, 1, 0], "aab", average="image")
        (0.6666666666666666, 0.5)
    """
    sums, counts = _table(values, images, categories, average)
    return float((sums.sum(0) / counts.sum(0)).mean())


def bootstrap(
    values: Sequence[float] | np.ndarray,
    images: Sequence[Any],
    *,
    categories: Sequence[Any] | None = None,
    average: Average = "instance",
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `mean`, resampling whole images with replacement.

    Give differences between two models on the same instances for a paired interval; it is several
    times narrower than two separate ones.

    Args:
        values: one number an instance.
        images: the image each instance lies in.
        categories: the category of each instance; needed for ``average="category"``.
        average: as in `mean`.
        draws: number of resamplings.
        level: share of the resampled means inside the interval.
        seed: of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        DataError: if there is no value, or categories are needed and absent.
        ShapeError: if the lists differ in length.
        ConfigError: if draws, level or average cannot be.

    Example:
        >>> bootstrap([0.5, 0.5, 0.5], ["a", "a", "b"])
        (0.5, 0.5)
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(
            "the bootstrap cannot run with these settings.",
            got=f"draws={draws}, level={level}",
            expected="draws >= 1, 0 < level < 1",
        )
    means = resampled(
        values, images, categories=categories, average=average, draws=draws, seed=seed
    )
    return middle(means, level)


def middle(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """The middle part of resampled values: the same share is below it and above it."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def resampled(
    values: Sequence[float] | np.ndarray,
    images: Sequence[Any],
    *,
    categories: Sequence[Any] | None = None,
    average: Average = "instance",
    draws: int = 10_000,
    seed: int = 0,
) -> np.ndarray:
    """(draws,) means of resampled images; arguments and errors as for `bootstrap`."""
    sums, counts = _table(values, images, categories, average)
    means = []
    for weight in weights(len(sums), draws=draws, seed=seed):
        total, count = weight @ sums, weight @ counts
        present = count > 0  # a category may be absent from a draw: the others make its mean
        ratio = np.divide(total, count, out=np.zeros_like(total), where=present)
        means.append(ratio.sum(1) / present.sum(1))
    return np.concatenate(means)


def weights(n: int, *, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each image stands in each draw of as many images, with replacement.

    The same for all that is measured on the same number of images, so that two models' values of a
    draw belong together.

    Args:
        n: images.
        draws: number of resamplings.
        seed: of the resampling.

    Yields:
        (rows, n) float, the draws in blocks.
    """
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // n)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        picked = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def wilcoxon(differences: Sequence[float] | np.ndarray) -> float:
    """p-value of Wilcoxon's signed-rank test that differences centre on zero; 1 if all are zero.

    It takes instances for independent, which they are not: a check beside the interval, no proof.
    """
    from scipy import stats

    differences = np.asarray(differences, dtype=float)
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def share_worse(differences: Sequence[float] | np.ndarray, *, margin: float = 0.05) -> float:
    """Share of instances that lost more than a margin."""
    return float((np.asarray(differences, dtype=float) < -margin).mean())


def pareto(costs: Any, gains: Any) -> np.ndarray:
    """Which rows no other row beats.

    A row is beaten by one that costs no more, gains no less, and differs. Equal rows stay together.

    Args:
        costs: (R,) or (R, K): the less the better, e.g. latency and size.
        gains: (R,) or (R, L): the more the better, e.g. mIoU.

    Returns:
        (R,) bool. A row with a missing value (NaN) is never on the frontier and beats none.

    Raises:
        ShapeError: if the two differ in rows.

    Example:
        >>> pareto([1.0, 2.0, 3.0], [0.5, 0.4, 0.6]).tolist()
        [True, False, True]
    """
    if len(costs) != len(gains):
        raise ShapeError(
            "costs and gains differ in rows.", got=f"{len(costs)} costs, {len(gains)} gains"
        )
    worse = np.column_stack([np.asarray(costs, dtype=float), -np.asarray(gains, dtype=float)])
    other, row = worse[:, None], worse[None]
    beats = (other <= row).all(-1) & (other < row).any(-1)
    front: np.ndarray = ~beats.any(0) & ~np.isnan(worse).any(-1)
    return front


def hypervolume(costs: Any, gains: Any, *, reference: tuple[float, float]) -> float:
    """Area between the frontier of one cost and one gain and a reference point.

    Args:
        costs: (R,) the less the better.
        gains: (R,) the more the better.
        reference: the highest cost and the lowest gain that count: the base's latency and 0, say.

    Returns:
        The area. Rows beyond the reference, or with a missing value, add nothing.

    Raises:
        ShapeError: if the two differ in rows.

    Example:
        >>> hypervolume([2.0], [0.5], reference=(10.0, 0.0))
        4.0
    """
    front = pareto(costs, gains)
    costs, gains = (np.asarray(x, dtype=float)[front] for x in (costs, gains))
    most, floor = reference
    area = 0.0
    for cost, gain in sorted(zip(costs.tolist(), gains.tolist(), strict=True)):
        if cost < most and gain > floor:
            area += (most - cost) * (gain - floor)
            floor = gain
    return area


def comparable(rows: Mapping[str, str], *, what: str = "protocol id") -> str:
    """The one value that all rows of a table share.

    Args:
        rows: name of each row and its protocol id, device, or hash of detector boxes.
        what: what the values are, for the error.

    Raises:
        DataError: if there is no row.
        ConfigError: if two rows differ.

    Example:
        >>> comparable({"base": "cpu", "small": "cpu"}, what="device")
        'cpu'
    """
    values = list(dict.fromkeys(rows.values()))
    if not values:
        raise DataError("there are no rows to compare.", expected="one row or more")
    if len(values) > 1:
        first, second = (next(k for k, v in rows.items() if v == value) for value in values[:2])
        raise ConfigError(
            f"rows of different {what} do not belong in one table.",
            where=f"{first!r} and {second!r}",
            got=f"{values[0]} and {values[1]}",
            expected=f"one {what}",
            fix="make one table for each",
        )
    return values[0]


def _table(
    values: Sequence[float] | np.ndarray,
    images: Sequence[Any],
    categories: Sequence[Any] | None,
    average: Average,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts, (images, columns): the mean is the mean over columns of sum / count."""
    values = np.asarray(values, dtype=float)
    if average not in get_args(Average):
        raise ConfigError("unknown average.", got=average, expected=" | ".join(get_args(Average)))
    if len(values) == 0:
        raise DataError("there is no value to average.", expected="one instance or more")
    if len(values) != len(images):
        raise ShapeError(
            "values and images differ in number.", got=f"{len(values)} and {len(images)}"
        )
    columns = np.zeros(len(values), dtype=int)
    if average == "category":
        if categories is None or len(categories) != len(values) or None in list(categories):
            raise DataError(
                "these instances have no category.",
                expected="a category for every instance",
                fix='average="instance" or average="image"',
            )
        columns = _codes(categories)
    rows = _codes(images)
    shape = (rows.max() + 1, columns.max() + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (rows, columns), values)
    np.add.at(counts, (rows, columns), 1)
    if average == "image":
        return sums / counts, np.ones(shape)
    return sums, counts


def _codes(names: Sequence[Any]) -> np.ndarray:
    """A number for every distinct name, in order of appearance; ids may be numbers or text."""
    known: dict[Any, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names])
