"""Quantizers of what a softmax or an activation function gives: the choice among several kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from ._observe import POWER, Histogram
from ._quantizers import Affine, Hybrid, Log, Quantizer

ROWS = 8  # of each map, evenly spaced
SAMPLED = 1 << 16  # numbers of the maps looked at in one call
BOUNDS = 25  # candidates of a bound, half octaves from 1 down: few weights are below 1/4096
SHARES = (0.1, 0.3, 0.5)  # of the range, that the log part of a `Hybrid` may get
LOG_SHARES = (8, 4, 2)  # one over the share of its levels


class MapSearch:
    """Chooses kind and scale for attention weights by what is left of their product with values.

    All candidates are judged on the same maps, so the choice is no worse than any of them there.

    Args:
        bits: of a code.
        log: whether logarithmic levels are candidates,
        even: and evenly spaced ones.
    """

    def __init__(self, bits: int, *, log: bool = True, even: bool = True) -> None:
        taus = ((1, 2, 4, 8, 16) if bits >= 8 else (1, 2, 4)) if log else ()
        self.bits = bits
        self.kinds: tuple[int | None, ...] = ((None,) if even else ()) + taus
        self.bounds = 2.0 ** (-0.5 * torch.arange(BOUNDS))
        self.losses = torch.zeros(len(self.kinds), BOUNDS, dtype=torch.float64)

    def update(self, weights: Tensor, values: Tensor) -> None:
        """Judge the candidates by (..., n, m) attention weights and (..., m, d) values."""
        weights, values = _sampled(weights.detach().float(), values.detach().float())
        for row, kind in enumerate(self.kinds):
            for column, bound in enumerate(self.bounds):
                candidate = self.candidate(kind, bound).to(weights.device)
                error = (candidate(weights) - weights) @ values
                self.losses[row, column] += float(error.abs().pow(POWER).mean())

    def candidate(self, kind: int | None, bound: Tensor) -> Quantizer:
        """Even levels up to a bound, or logarithmic ones down from it."""
        if kind is None:
            return Affine(self.bits).cover(torch.zeros(()), bound)
        log = Log(self.bits, kind)
        log.scale = bound.clone()
        return log

    def quantizer(self) -> Quantizer:
        """The candidate of least loss; of equals the first."""
        row, column = divmod(int(self.losses.argmin()), BOUNDS)
        return self.candidate(self.kinds[row], self.bounds[column])


class HybridSearch:
    """Chooses how a `Hybrid` divides range and levels, by the squared error of what it rounds."""

    def __init__(self, name: str, bits: int) -> None:
        self.bits, self.histogram = bits, Ends(name)

    def update(self, x: Tensor, *rest: Tensor) -> None:
        """Count the values."""
        self.histogram.update(x)

    def quantizer(self) -> Quantizer:
        """The division of least error."""
        low, high = (end.cpu() for end in self.histogram.range())
        used = self.histogram.counts > 0
        values = self.histogram.values()[used].clamp(low, high)
        counts = self.histogram.counts[used]
        candidates = [
            Hybrid(self.bits, max(1, (1 << self.bits) // part)).cover(low, high, share)
            for share in SHARES
            for part in LOG_SHARES
        ]
        errors = [float((c(values) - values).double().square() @ counts) for c in candidates]
        return candidates[errors.index(min(errors))]


class Ends(Histogram):
    """A histogram whose range is all that was seen."""

    def found(self) -> tuple[Tensor, Tensor]:
        """Both ends."""
        return self.ends_seen.found()


def _sampled(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of some maps, evenly spaced, with the values of those maps."""
    maps, rows, keys = weights.flatten(0, -3).shape
    weights, values = weights.reshape(maps, rows, keys), values.reshape(maps, keys, -1)
    fewer = min(rows, ROWS)
    some = max(1, min(maps, SAMPLED // (fewer * keys)))
    chosen = torch.arange(some) * maps // some
    kept = torch.arange(fewer) * rows // fewer
    return weights[chosen][:, kept], values[chosen]
