"""Which units go first, and how many of them until a model costs little enough."""

from __future__ import annotations

import copy
import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ..core.budget import Limit
from ..core.devices import device
from ._groups import KINDS, Group

SLACK = 0.05  # a time this share below its limit is near enough
PROBES = 10  # sizes timed at most
Plan = Mapping[str, int]  # units left, by name of group


@dataclass(frozen=True, eq=False)
class Layer:
    """Units of one module, and how many of them may be left.

    Attributes:
        kind: as in `KINDS`.
        group: the units.
        counts: how many may be left, falling; the first is all.
    """

    kind: str
    group: Group
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    @property
    def pool(self) -> tuple[str, str]:
        """Layers whose units cost the same have the same."""
        return self.kind, self.group.pool

    def gone(self, count: int) -> float:
        """Share that is removed if so many are left."""
        return 1 - count / self.group.units


def choices(units: int, step: int, most: float) -> tuple[int, ...]:
    """How many of `units` may be left: all, or a multiple of `step`, without more than a share.

    Args:
        units: how many there are.
        step: what is left is a multiple of this.
        most: largest share removed; at least one step stays.

    Example:
        >>> choices(12, 1, 0.7), choices(100, 32, 0.7)
        ((12, 11, 10, 9, 8, 7, 6, 5, 4), (100, 96, 64, 32))
    """
    floor = max(1, math.ceil(round(units * (1 - most) / step, 6)))
    return (units, *(step * n for n in range((units - 1) // step, floor - 1, -1)))


# --- in which order -------------------------------------------------------------------------------


def by_share(layers: Sequence[Layer]) -> list[Plan]:
    """The same share of every layer: cuts in order, those of the same share together."""
    found: dict[float, dict[str, int]] = {}
    for layer in layers:
        for count in layer.counts[1:]:
            found.setdefault(round(layer.gone(count), 6), {})[layer.name] = count
    return [found[share] for share in sorted(found)]


def by_scores(layers: Sequence[Layer], scores: Mapping[str, Tensor]) -> list[Plan]:
    """The same share of all layers that are alike, more of those with more unimportant units.

    Scores of a layer are first brought to mean 0 and deviation 1; see `share_out`.
    """
    cuts: list[tuple[float, str, int]] = []
    for pool in dict.fromkeys(layer.pool for layer in layers):
        alike = [layer for layer in layers if layer.pool == pool]
        portions: list[tuple[float, str, int, int]] = []
        for layer in alike:
            values = scores[layer.name].float().cpu()
            values = (values - values.mean()) / (values.std(correction=0) + 1e-8)
            values = values.sort(descending=True).values
            for before, after in zip(layer.counts, layer.counts[1:], strict=False):
                mean = float(values[after:before].mean())
                portions.append((mean, layer.name, after, before - after))
        total, gone = sum(layer.group.units for layer in alike), 0
        for _, name, after, size in sorted(portions, key=lambda portion: portion[0]):
            gone += size
            cuts.append((gone / total, name, after))
    return _in_order(cuts)


def by_damage(
    layers: Sequence[Layer],
    damage: Mapping[str, Mapping[int, float]],
    prices: Mapping[tuple[str, str], float],
) -> list[Plan]:
    """Whatever does the least damage for what it saves goes first.

    Between the counts that were measured damage is taken to lie on the lower convex hull, so that
    the first units of a layer never wait for later ones.

    Args:
        layers: all that can be cut.
        damage: for each layer, by units left; the smallest of its counts among them.
        prices: what a unit of a pool costs.
    """
    cuts: list[tuple[float, str, int]] = []
    for layer in layers:
        units, price = layer.group.units, prices[layer.pool]
        points = {units - left: max(found, 0.0) for left, found in damage[layer.name].items()}
        removed, total = _lower_hull({0: 0.0, **points})
        for before, after in zip(layer.counts, layer.counts[1:], strict=False):
            low, high = np.interp([units - before, units - after], removed, total)
            slope = float(high - low) / (before - after)
            cuts.append((slope / price if price > 0 else math.inf, layer.name, after))
    return _in_order(cuts)


def _in_order(cuts: Iterable[tuple[float, str, int]]) -> list[Plan]:
    # The sort is stable, and of one layer the cuts come in falling order.
    return [{name: count} for _, name, count in sorted(cuts, key=lambda cut: round(cut[0], 12))]


def _lower_hull(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    hull: list[tuple[int, float]] = []
    for x, y in sorted(points.items()):
        while len(hull) > 1 and _bends_down(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull], [y for _, y in hull]


def _bends_down(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


# --- at which cost --------------------------------------------------------------------------------


def whole(layers: Iterable[Layer]) -> dict[str, int]:
    """The plan that removes nothing."""
    return {layer.name: layer.group.units for layer in layers}


def smallest(layers: Iterable[Layer]) -> dict[str, int]:
    """The plan that removes all that may go."""
    return {layer.name: layer.counts[-1] for layer in layers}


def smaller(
    model: nn.Module, layers: Iterable[Layer], kept: Mapping[str, Sequence[int]]
) -> nn.Module:
    """A cut copy of a model, which shares with it the tensors that lose nothing."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, memo)
    for layer in layers:
        if len(kept.get(layer.name, range(layer.group.units))) < layer.group.units:
            KINDS[layer.kind].cut(small, layer.name, kept[layer.name])
    return small


class Meter(Protocol):
    """Says what a model would cost.

    Attributes:
        base: what it costs as it is; may need a call of `costs` first.
    """

    base: float

    def costs(self, *plans: Plan) -> list[float]:
        """What it would cost under each plan."""


class Counter:
    """Parameters and multiply-accumulates: exact."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], limit: Limit) -> None:
        self.model, self.layers, self.limit = model, layers, limit
        self.base = limit.cost(model)

    def costs(self, *plans: Plan) -> list[float]:
        """What the model would cost under each plan."""
        return [self.limit.cost(_planned(self.model, self.layers, plan)) for plan in plans]


class Stopwatch:
    """Time, as a multiple of the base's: they take turns, so what slows one slows the other."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], limit: Limit) -> None:
        at = device(limit.place(model))
        self.device = at.name
        self.model = copy.deepcopy(model).to(at.torch_device) if limit.device else model
        self.layers, self.limit = layers, limit
        self.base = math.nan
        self.ratios: dict[tuple[tuple[str, int], ...], list[float]] = {}

    def costs(self, *plans: Plan) -> list[float]:
        """What the model would take under each plan; a plan's earlier measurements count too."""
        models = {place: _planned(self.model, self.layers, p) for place, p in enumerate(plans)}
        times = self.limit.timed({-1: self.model, **models})
        laps = times[-1].samples_ms
        if math.isnan(self.base):
            self.base = statistics.median(laps)
        found = []
        for place, plan in enumerate(plans):
            ratios = self.ratios.setdefault(tuple(sorted(plan.items())), [])
            ratios += [a / b for a, b in zip(times[place].samples_ms, laps, strict=True)]
            found.append(self.base * statistics.median(ratios))
        return found


def _planned(model: nn.Module, layers: Sequence[Layer], plan: Plan) -> nn.Module:
    # Which units go does not matter to the cost.
    return smaller(model, layers, {name: range(count) for name, count in plan.items()})


# --- how many -------------------------------------------------------------------------------------


def after(plan: Plan, cuts: Iterable[Plan]) -> dict[str, int]:
    """A plan with some more cuts."""
    found = dict(plan)
    for cut in cuts:
        found |= cut
    return found


def fewest(total: int, bound: float, cost: Callable[[int], float]) -> int:
    """The fewest of `total` cuts after which an exact cost is at most `bound`."""
    return bisect_left(range(total), True, key=lambda count: cost(count) <= bound)


def nearest(
    total: int, bound: float, cost: Callable[[int], float], base: float, least: float
) -> int:
    """A number of cuts after which a measured cost is at most `bound`, and not far below.

    The next guess lies on the line between the sizes just above and just below the bound; if twice
    in turn the same of the two moved, in their middle. What seems right is measured twice.

    Args:
        total: number of cuts.
        bound: largest cost.
        cost: measures once more after so many cuts, and gives the median of all it has seen there.
        base: cost without any cut, more than `bound`.
        least: cost after all of them, at most `bound`.
    """
    slow, quick = (0, base), (total, least)
    moved = 0
    for _ in range(PROBES):
        if quick[0] - slow[0] <= 1 or quick[1] >= bound * (1 - SLACK):
            break
        way = (slow[1] - bound * (1 - SLACK / 2)) / max(slow[1] - quick[1], 1e-9)
        way = 0.5 if abs(moved) > 1 else way
        guess = slow[0] + round(way * (quick[0] - slow[0]))
        guess = min(max(guess, slow[0] + 1), quick[0] - 1)
        found = cost(guess)
        if bound * (1 - SLACK) <= found <= bound:
            found = cost(guess)
        if found <= bound:
            quick, moved = (guess, found), max(moved, 0) + 1
        else:
            slow, moved = (guess, found), min(moved, 0) - 1
    return quick[0]
