"""Averages, intervals, frontiers: by hand, by definition, by simulation."""

from __future__ import annotations

import time

import numpy as np
import pytest

from samcompress.core.errors import ConfigError, DataError, ShapeError
from samcompress.evaluate.stats import (
    bootstrap,
    comparable,
    hypervolume,
    mean,
    pareto,
    resampled,
    share_worse,
    wilcoxon,
)

VALUES = [0.9, 0.7, 0.2, 0.4]
IMAGES = [1, 1, 1, "b"]
CATEGORIES = [5, 5, 6, 6]


def test_averages_by_hand() -> None:
    assert mean(VALUES, IMAGES) == pytest.approx(0.55)
    assert mean(VALUES, IMAGES, average="image") == pytest.approx((0.6 + 0.4) / 2)
    found = mean(VALUES, IMAGES, categories=CATEGORIES, average="category")
    assert found == pytest.approx((0.8 + 0.3) / 2)


@pytest.mark.parametrize("average", ["instance", "image", "category"])
def test_resampling_against_a_loop(average: str) -> None:
    rng = np.random.default_rng(3)
    images = np.sort(rng.integers(0, 12, 60))
    values, categories = rng.random(60), rng.integers(0, 4, 60)
    found = resampled(values, images, categories=categories, average=average, draws=50)
    names = list(dict.fromkeys(images))
    again = np.random.default_rng(0)
    for value, picked in zip(found, again.integers(len(names), size=(50, len(names))), strict=True):
        rows = np.concatenate([np.flatnonzero(images == names[i]) for i in picked])
        copies = np.concatenate([[n] * (images == names[i]).sum() for n, i in enumerate(picked)])
        part = mean(values[rows], copies, categories=categories[rows], average=average)
        assert value == pytest.approx(part)


def test_interval_of_a_constant_is_a_point() -> None:
    images = np.arange(40) // 3
    for average in ("instance", "image"):
        low, high = bootstrap(np.full(40, 0.7), images, average=average)
        assert low == pytest.approx(0.7, abs=1e-12)
        assert high == pytest.approx(0.7, abs=1e-12)
    assert bootstrap(np.zeros(40), images) == (0, 0)


def test_interval_covers_the_truth_of_clustered_data() -> None:
    rng, inside, runs = np.random.default_rng(11), 0, 600
    images = np.repeat(np.arange(100), 6)
    for _ in range(runs):
        values = 0.6 + 0.1 * rng.normal(size=100)[images] + 0.1 * rng.normal(size=600)
        low, high = bootstrap(values, images, draws=600)
        inside += low <= 0.6 <= high
    assert inside / runs == pytest.approx(0.95, abs=0.02)


def test_instances_of_one_image_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    images = np.repeat(np.arange(100), 10)
    values = 0.2 * rng.normal(size=100)[images] + 0.1 * rng.normal(size=1000)
    by_image = np.ptp(bootstrap(values, images))
    by_instance = np.ptp(bootstrap(values, np.arange(1000), draws=2000))
    assert by_image > 2 * by_instance


def test_bootstrap_is_fast_and_repeatable() -> None:
    rng = np.random.default_rng(0)
    values, images = rng.random(1000), rng.integers(0, 100, 1000)
    start = time.perf_counter()
    found = bootstrap(values, images)
    assert time.perf_counter() - start < 1
    assert found == bootstrap(values, images)
    assert found != bootstrap(values, images, seed=1)


def test_many_images_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, images = np.random.default_rng(0).random(300), np.arange(300) // 2
    whole = resampled(values, images, draws=1000)
    monkeypatch.setattr("samcompress.evaluate.stats._BLOCK", 1000)
    assert np.allclose(whole, resampled(values, images, draws=1000), rtol=1e-12, atol=0)


def test_wider_level_is_wider() -> None:
    values, images = np.random.default_rng(0).random(50), np.arange(50)
    low, high = bootstrap(values, images, level=0.9)
    lower, higher = bootstrap(values, images, level=0.99)
    assert lower < low < high < higher


def test_wilcoxon_and_share() -> None:
    assert wilcoxon([0.0, 0.0]) == 1
    assert wilcoxon(np.linspace(-0.09, -0.01, 30)) < 1e-6
    assert wilcoxon([0.01, -0.011, 0.02, -0.019, 0.005, -0.006]) > 0.3
    assert share_worse([-0.2, -0.05, -0.01, 0.3]) == 0.25


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (DataError, "there is no value to average.", ([], [])),
        (ShapeError, "values and images differ in number.\n  got       2 and 1", ([1, 2], [1])),
    ],
)
def test_bad_values(error: type[Exception], text: str, arguments: tuple[list, list]) -> None:
    with pytest.raises(error) as err:
        mean(*arguments)
    assert text in str(err.value)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="unknown average") as err:
        mean([1], [1], average="weighted")  # type: ignore[arg-type]
    assert "instance | category | image" in str(err.value)
    for categories in (None, [3, None]):
        with pytest.raises(DataError, match="these instances have no category"):
            mean([1, 2], [1, 2], categories=categories, average="category")
    for bad in ({"draws": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ConfigError, match="expected  draws >= 1, 0 < level < 1"):
            bootstrap([1], [1], **bad)  # type: ignore[arg-type]


def test_pareto_by_hand() -> None:
    costs = [1.0, 2.0, 2.0, 3.0, 3.0, np.nan]
    gains = [0.5, 0.6, 0.55, 0.6, 0.9, 1.0]
    assert pareto(costs, gains).tolist() == [True, True, False, False, True, False]
    assert pareto([1, 1], [0.5, 0.5]).tolist() == [True, True]  # equal rows both stay
    # A second cost brings a row back.
    both = [[1, 9], [2, 1], [3, 0]]
    assert pareto(both, [0.5, 0.5, 0.5]).all()
    assert pareto([], []).shape == (0,)


def test_pareto_by_definition() -> None:
    rng = np.random.default_rng(2)
    costs, gains = rng.integers(0, 6, (60, 2)), rng.integers(0, 6, 60)
    front = pareto(costs, gains)
    for i in range(60):
        beaten = any(
            (costs[j] <= costs[i]).all()
            and gains[j] >= gains[i]
            and ((costs[j] < costs[i]).any() or gains[j] > gains[i])
            for j in range(60)
        )
        assert front[i] == (not beaten)


def test_a_beaten_row_changes_nothing() -> None:
    costs, gains = [1.0, 2.0, 4.0], [0.3, 0.5, 0.8]
    area = hypervolume(costs, gains, reference=(5, 0))
    assert area == pytest.approx(4 * 0.3 + 3 * 0.2 + 1 * 0.3)
    assert hypervolume([*costs, 3.0], [*gains, 0.4], reference=(5, 0)) == area
    assert pareto([*costs, 3.0], [*gains, 0.4]).tolist() == [True, True, True, False]


def test_hypervolume_of_one_point_and_beyond_the_reference() -> None:
    assert hypervolume([2.0], [0.6], reference=(10, 0.1)) == pytest.approx(8 * 0.5)
    assert hypervolume([12.0, np.nan], [0.6, 0.9], reference=(10, 0)) == 0
    assert hypervolume([2.0], [0.05], reference=(10, 0.1)) == 0
    assert hypervolume([], [], reference=(10, 0.1)) == 0


def test_pareto_refuses_ragged_rows() -> None:
    with pytest.raises(ShapeError, match="got       2 costs, 1 gains"):
        pareto([1, 2], [1])


def test_rows_of_different_protocols_do_not_mix() -> None:
    assert comparable({"a": "x", "b": "x"}) == "x"
    with pytest.raises(ConfigError) as err:
        comparable({"base": "x", "small": "x", "tiny": "y"})
    assert str(err.value) == (
        "rows of different protocol id do not belong in one table.\n"
        "  where     'base' and 'tiny'\n"
        "  got       x and y\n"
        "  expected  one protocol id\n"
        "  try       make one table for each"
    )
    with pytest.raises(ConfigError, match="rows of different device"):
        comparable({"base": "cpu", "small": "cuda"}, what="device")
    with pytest.raises(DataError, match="there are no rows to compare"):
        comparable({})
