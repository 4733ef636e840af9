"""Groups of channels that share a shift and a scale, and what they learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._fake import FakeLinear
from ._observe import finite
from ._quantizers import Grouped, Quantizer
from ._uniform import TINY

VALUES = 2_000_000  # kept of a layer's inputs
MOST = 32  # groups
LEAST = 0.01  # deviation of a group, of that of the tensor


class Tokens:
    """Keeps tokens of a layer's inputs, evenly spaced, then makes groups of the channels.

    Args:
        name: of the layer.
        bits: of a code.
        images: that will come at most.
        spread: how many times the distance of the quartiles a value may lie beyond them.
        share: of a channel's values that its interval leaves out, half of it at either end.
    """

    def __init__(self, name: str, bits: int, images: int, *, spread: float, share: float) -> None:
        self.name, self.bits, self.images = name, bits, images
        self.spread, self.share = spread, share
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Keep some tokens."""
        flat = finite(self.name, x.detach().float().flatten(0, -2))
        most = max(1, VALUES // (self.images * flat.shape[1]))
        count = min(most, len(flat))
        self.kept.append(flat[torch.arange(count, device=flat.device) * len(flat) // count].cpu())

    def quantizer(self) -> Quantizer:
        """Clipped or not, in groups or in one: what leaves the least squared error."""
        x = torch.cat(self.kept)
        everything = torch.stack([x.min(), x.max()])
        candidates = [
            self._made(x, bounds, grouped=grouped)
            for bounds in (everything, truncation(x, self.spread))
            for grouped in (False, True)
        ]
        errors = [float((restored(c, x) - x).square().mean()) for c in candidates]
        return candidates[errors.index(min(errors))]

    def _made(self, x: Tensor, bounds: Tensor, *, grouped: bool) -> Grouped:
        """With steps that cover every value once it is clipped, shifted and scaled."""
        x = x.clamp(bounds[0], bounds[1])
        group = groups(x, self.share) if grouped else torch.zeros(x.shape[1], dtype=torch.long)
        made = Grouped(self.bits, channels=x.shape[1], groups=int(group.max()) + 1)
        made.bounds, made.group = bounds, group
        if grouped:
            members = [x[:, group == n] for n in range(len(made.shift))]
            made.shift = torch.stack([m.mean() for m in members])
            # A group that hardly moves would be blown up, noise and all.
            least = LEAST * x.std(correction=0).clamp(min=TINY)
            made.factor = torch.stack([m.std(correction=0) for m in members]).clamp(min=least)
        normal = made.normal(x)
        made.cover(normal.min(), normal.max())
        return made


def restored(quantizer: Grouped, x: Tensor) -> Tensor:
    """What rounded numbers stand for, shift and factor undone."""
    shift, factor = quantizer.channels()
    return quantizer.rounded(x) * factor + shift


def truncation(x: Tensor, spread: float) -> Tensor:
    """(2,) bounds: the quartiles of all values, and so many times their distance beyond."""
    some = x.flatten()
    some = some[:: max(1, len(some) // VALUES)].sort().values
    first, third = some[len(some) // 4], some[3 * len(some) // 4]
    reach = spread * (third - first)
    return torch.stack([first - reach, third + reach])


def groups(x: Tensor, share: float) -> Tensor:
    """Which group each channel belongs to.

    The pooled interval of the channels that are left, without a share of their values, takes the
    channels whose own interval lies inside; where there is none, the one whose median is nearest
    its centre. The last group takes what is left.

    Args:
        x: (n, C).
        share: of the values that an interval leaves out.

    Returns:
        (C,) numbers from 0.
    """
    order = x.sort(0).values
    first = int(share / 2 * (len(x) - 1))
    low, high, middle = order[first], order[len(x) - 1 - first], order[len(x) // 2]
    group = torch.full((x.shape[1],), -1)
    number = 0
    while (left := (group < 0).nonzero().flatten()).numel():
        if number == MOST - 1:
            group[left] = number
            break
        pooled = x[:, left].flatten().sort().values
        out = int(share / 2 * (len(pooled) - 1))
        ends = pooled[out], pooled[len(pooled) - 1 - out]
        inside = left[(low[left] >= ends[0]) & (high[left] <= ends[1])]
        if not inside.numel():
            centre = (ends[0] + ends[1]) / 2
            inside = left[(middle[left] - centre).abs().argmin()][None]
        group[inside] = number
        number += 1
    return group


@torch.no_grad()
def fold(layer: nn.Linear, quantizer: Grouped) -> None:
    """Make a layer take what a `Grouped` gives: shift and factor go into bias and weight."""
    shift, factor = (steps.to(layer.weight) for steps in quantizer.channels())
    layer.bias.add_(layer.weight @ shift)
    layer.weight.mul_(factor)


@torch.enable_grad()
def learn(
    layer: FakeLinear,
    true: nn.Linear,
    x: Tensor,
    *,
    steps: int,
    lr: float,
    cover: Callable[[FakeLinear], None],
) -> tuple[float, float]:
    """Change shifts, factors and step of a layer's input until its output is nearer the true one.

    Args:
        layer: with a `Grouped` input; its weight, on the grid in the end, follows the factors.
        true: the layer in floating point.
        x: (n, C) inputs.
        steps: of Adam, whose rate falls along a cosine.
        lr: its highest rate, relative to each value.
        cover: gives the layer's weight its steps, and puts it on the grid.

    Returns:
        Mean squared error before and after; the better of both is kept.
    """
    grouped = layer.input
    assert isinstance(grouped, Grouped)
    x = x.to(true.weight)
    target = true(x).detach()
    names = ("shift", "factor", "scale")
    start = {name: getattr(grouped, name).clone() for name in names}
    # In units of the factor, a rate means the same for every group.
    change = {n: torch.zeros_like(v, requires_grad=True) for n, v in start.items()}

    def now() -> dict[str, Tensor]:
        return {
            "shift": start["shift"] + start["factor"] * change["shift"],
            "factor": start["factor"] * change["factor"].exp(),
            "scale": start["scale"] * change["scale"].exp(),
        }

    def loss(values: dict[str, Tensor]) -> Tensor:
        for name, value in values.items():
            setattr(grouped, name, value)
        return F.mse_loss(_output(layer, true, grouped, x), target)

    optimizer = torch.optim.Adam(list(change.values()), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    before = float(loss(start))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss(now()))
        optimizer.step()
        schedule.step()
    learned = {name: value.detach() for name, value in now().items()}
    after = float(loss(learned))
    kept = learned if after < before else start
    for name, value in kept.items():
        setattr(grouped, name, value)
    with torch.no_grad():
        layer.weight.copy_(true.weight)
        layer.bias.copy_(true.bias)
        fold(layer, grouped)
    cover(layer)
    return before, min(before, after)


def _output(layer: FakeLinear, true: nn.Linear, grouped: Grouped, x: Tensor) -> Tensor:
    """What a layer gives once the groups, as they are now, are folded into it."""
    shift, factor = grouped.channels()
    weight = true.weight.detach() * factor
    scale, zero = layer.grid.steps(weight.detach().amin(1), weight.detach().amax(1))
    rounded = layer.grid.fake(weight, scale[:, None], zero[:, None])
    bias = true.bias.detach() + true.weight.detach() @ shift
    return F.linear(grouped(x), rounded, bias)
