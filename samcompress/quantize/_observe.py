"""What range a tensor has, learned from one tensor at a time in constant memory.

None of these depends on the order in which images come, `AverageMinMax` to the rounding of a sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import DataError
from ._uniform import Grid

ObserverName = Literal["minmax", "avg_minmax", "percentile", "mse"]
BINS = 8192  # of a histogram, over both signs
POWER = 2.4  # of the error that `Mse` makes least
SHARES = 100  # candidates of a bound
Range = tuple[Tensor, Tensor]


class Observer(ABC):
    """Sees tensors, then tells their range.

    Args:
        name: of the module whose tensors they are, for messages.
        axis: dimension that keeps a range for each of its places; None for one range of all.
    """

    def __init__(self, name: str, axis: int | None = None) -> None:
        self.name, self.axis, self.seen = name, axis, 0

    def update(self, x: Tensor) -> None:
        """Take one more tensor into account.

        Raises:
            DataError: if it has a value that is not finite.
        """
        self.see(finite(self.name, x.detach().float()))
        self.seen += 1

    def end(self) -> None:  # noqa: B027 - most have nothing to do
        """What comes from now on is of another image."""

    def range(self) -> Range:
        """The lowest and highest value to cover: () each, or (places,) with an `axis`.

        Raises:
            DataError: if there was no tensor.
        """
        if not self.seen:
            raise DataError(
                "a layer was never reached while calibrating.",
                where=self.name,
                got="no value",
                expected="a layer that images and prompts pass through",
                fix="leave it out with where=",
            )
        return self.found()

    @abstractmethod
    def see(self, x: Tensor) -> None:
        """Take a finite float32 tensor into account."""

    @abstractmethod
    def found(self) -> Range:
        """The range of what was seen."""

    def ends(self, x: Tensor) -> Range:
        """Smallest and largest value of one tensor, along the axis if there is one."""
        if self.axis is None:
            return x.amin(), x.amax()
        flat = x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
        return flat.amin(1), flat.amax(1)


class MinMax(Observer):
    """The smallest and the largest value of all images."""

    low: Tensor
    high: Tensor

    def see(self, x: Tensor) -> None:
        """Widen the range."""
        low, high = self.ends(x)
        if self.seen:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.low, self.high = low, high

    def found(self) -> Range:
        """Both ends."""
        return self.low, self.high


class AverageMinMax(Observer):
    """The mean over the images of their smallest and of their largest values."""

    def __init__(self, name: str, axis: int | None = None) -> None:
        super().__init__(name, axis)
        self.image = MinMax(name, axis)
        self.images: list[Range] = []

    def see(self, x: Tensor) -> None:
        """Widen the range of this image, which a layer may meet in several pieces."""
        self.image.update(x)

    def end(self) -> None:
        """Put this image's range to the others."""
        if self.image.seen:
            self.images.append(self.image.found())
            self.image = MinMax(self.name, self.axis)

    def found(self) -> Range:
        """Both means."""
        self.end()
        low, high = (torch.stack(ends).double().mean(0) for ends in zip(*self.images, strict=True))
        return low.float(), high.float()


class Histogram(Observer):
    """How often values occur; subclasses read a range off that.

    The bins cover a power of 2 to either side of 0. When a larger value comes, neighbours are
    joined: the counts are then exactly those that the wider bins would have had all along.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 2.0**-20
        self.ends_seen = MinMax(name)

    def see(self, x: Tensor) -> None:
        """Count the values."""
        self.ends_seen.update(x)
        largest = float(x.abs().max())
        while self.limit < largest:
            self._widen()
        places = ((x.flatten() / self.limit + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(places, minlength=BINS).cpu()

    def _widen(self) -> None:
        joined = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : 3 * BINS // 4] = joined
        self.limit *= 2

    def values(self) -> Tensor:
        """(BINS,) centres of the bins."""
        return (torch.arange(BINS) + 0.5) * (2 * self.limit / BINS) - self.limit

    def inside(self, low: float, high: float) -> Range:
        """A range, no wider than what was seen."""
        least, most = (float(end) for end in self.ends_seen.found())
        return torch.tensor(max(low, least)), torch.tensor(min(high, most))


class Percentile(Histogram):
    """The range without a share of the values at each end.

    Args:
        name: see `Observer`.
        percent: share covered, in percent; what is left over is divided among both ends.
    """

    def __init__(self, name: str, percent: float = 99.99) -> None:
        super().__init__(name)
        self.percent = percent

    def found(self) -> Range:
        """The outer edges of the bins in which the share ends."""
        left = self.counts.cumsum(0) / self.counts.sum()
        out = (100 - self.percent) / 200
        first = int((left > out).nonzero()[0])
        last = int((left >= 1 - out - 1e-15).nonzero()[0])
        width = 2 * self.limit / BINS
        return self.inside(first * width - self.limit, (last + 1) * width - self.limit)


class Mse(Histogram):
    """The range that makes the error of rounding least, to the power of 2.4.

    Args:
        name: see `Observer`.
        grid: what is rounded to.
    """

    def __init__(self, name: str, grid: Grid) -> None:
        super().__init__(name)
        self.grid = grid

    def found(self) -> Range:
        """Both bounds shrunk together, then each alone; the whole range is a candidate."""
        low, high = (end.cpu() for end in self.ends_seen.found())
        shares = torch.linspace(1 / SHARES, 1, SHARES)
        low, high = self._least(low * shares, high * shares)
        low, high = self._least(low * shares, high.expand(SHARES))
        return self._least(low.expand(SHARES), high * shares)

    def _least(self, low: Tensor, high: Tensor) -> Range:
        used = self.counts > 0
        values, counts = self.values()[used], self.counts[used]
        scale, zero = self.grid.steps(low[:, None], high[:, None])
        error = (self.grid.fake(values, scale, zero) - values).abs().double().pow(POWER) @ counts
        # The last of equals: the widest, as the shares rise.
        best = SHARES - 1 - int(error.flip(0).argmin())
        return low[best], high[best]


def observer(kind: ObserverName, name: str, grid: Grid) -> Observer:
    """An observer of one range for all values, by its name."""
    if kind == "mse":
        return Mse(name, grid)
    kinds: dict[str, type[Observer]] = {
        "minmax": MinMax,
        "avg_minmax": AverageMinMax,
        "percentile": Percentile,
    }
    return kinds[kind](name)


def weight_range(weight: Tensor, grid: Grid, *, search: bool) -> Range:
    """The range of each output channel of a weight.

    Args:
        weight: (out, ...).
        grid: what is rounded to.
        search: shrink each range to where the error of rounding is least, to the power of 2.4;
            otherwise it covers every weight.

    Returns:
        (out,) lowest and (out,) highest values.
    """
    flat = weight.detach().float().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    if not search:
        return low, high
    best_low, best_high = low, high
    best = torch.full_like(low, torch.inf)
    for share in torch.linspace(1, 0.3, SHARES // 4).tolist():
        scale, zero = grid.steps(share * low, share * high)
        rounded = grid.fake(flat, scale[:, None], zero[:, None])
        error = (rounded - flat).abs_().pow_(POWER).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, share * low, best_low)
        best_high = torch.where(better, share * high, best_high)
    return best_low, best_high


def finite(name: str, x: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        DataError: if a value is NaN or infinite.
    """
    if not torch.isfinite(x).all():
        raise DataError(
            "a layer got values that are not finite while calibrating.",
            where=name,
            got=f"{int((~torch.isfinite(x)).sum())} of {x.numel()} values",
            expected="finite numbers",
            fix="check the model's weights, and that it computes in a type of enough range",
        )
    return x
