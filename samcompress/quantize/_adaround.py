"""Rounding up or down, learned: each weight goes to the neighbour that serves its unit best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._fake import Rounded
from ._quantizers import Quantizer
from ._units import Call, Inputs, channel_axis, run

STRETCH, SHIFT = 1.2, 0.1  # of the sigmoid, so that it reaches 0 and 1
SHARPEST, SOFTEST = 20.0, 2.0  # powers of the term that drives variables to 0 or 1
FREE = 0.2  # share of the steps without that term
WEIGHT = 0.01  # of that term


@dataclass(frozen=True)
class Recipe:
    """How a unit is mended; the fields are those of `Reconstruct`."""

    steps: int
    lr: float
    step_lr: float
    drop: float


class Rounding:
    """The share of a step that each weight of a layer goes up from the level below it.

    Args:
        layer: rounded.
        weight: what it was in floating point.
    """

    def __init__(self, layer: Rounded, weight: Tensor) -> None:
        self.layer = layer
        scale, self.zero = layer.along(layer.weight_scale), layer.along(layer.weight_zero)
        ratio = weight.detach().float() / scale
        self.scale, self.below = scale, ratio.floor()
        share = (ratio - self.below).clamp(0, 1)
        # So that the stretched sigmoid is the share: the weight is what it was.
        start = -torch.log(STRETCH / (share + SHIFT) - 1)
        self.variable = start.requires_grad_()

    def up(self) -> Tensor:
        """The shares, from 0 to 1."""
        return (STRETCH * self.variable.sigmoid() - SHIFT).clamp(0, 1)

    def weight(self, up: Tensor) -> Tensor:
        """The weight for such shares."""
        low, high = self.layer.grid.codes
        return self.scale * ((self.below + up + self.zero).clamp(low, high) - self.zero)

    def soft(self) -> Tensor:
        """The weight while it is being learned."""
        return self.weight(self.up())

    def hard(self) -> Tensor:
        """The weight on the grid."""
        return self.weight((self.variable.detach() >= 0).float())

    def undecided(self, power: float) -> Tensor:
        """The sum over weights of how far they are from a level."""
        return (1 - (2 * self.up() - 1).abs().pow(power)).sum()


def reconstruction(found: Tensor, wanted: Tensor, channels: int) -> Tensor:
    """Squared error, a sum over channels and a mean over the rest."""
    return (found.float() - wanted.float()).square().sum(channels).mean()


def mend(
    unit: nn.Module,
    weights: Mapping[str, Tensor],
    calls: Sequence[Call],
    recipe: Recipe,
    noise: torch.Generator,
) -> tuple[float, float]:
    """Learn the rounding of all weights of a unit, and the steps of its activations.

    Args:
        unit: rounded; changed only where that makes it better.
        weights: of its layers in floating point, by their names in the unit.
        calls: what it gets and should give.
        recipe: how.
        noise: what draws calls and drops.

    Returns:
        The error over all calls before and after.
    """
    axis = channel_axis(unit)
    before = error(unit, calls, axis)
    state = {name: value.clone() for name, value in unit.state_dict().items()}
    layers = {n: m for n, m in unit.named_modules() if isinstance(m, Rounded)}
    roundings = [Rounding(layer, weights[name]) for name, layer in layers.items()]
    with torch.enable_grad(), _soft(roundings), _learning(unit) as steps:
        _train(unit, roundings, steps, calls, recipe, noise, axis)
    with torch.no_grad():
        for rounding in roundings:
            rounding.layer.weight.copy_(rounding.hard())
    after = error(unit, calls, axis)
    if not after < before:
        unit.load_state_dict(state)
    return before, min(before, after)


@torch.no_grad()
def error(unit: nn.Module, calls: Sequence[Call], axis: int) -> float:
    """Mean error over calls, nothing dropped."""
    found = [reconstruction(run(unit, call.inputs), call.output, axis) for call in calls]
    return float(torch.stack(found).mean())


def _train(
    unit: nn.Module,
    roundings: Sequence[Rounding],
    steps: Sequence[Tensor],
    calls: Sequence[Call],
    recipe: Recipe,
    noise: torch.Generator,
    axis: int,
) -> None:
    groups: list[dict[str, Any]] = [
        {"params": [r.variable for r in roundings], "lr": recipe.lr},
        # In proportion to each step, so that one rate suits wide and narrow ranges.
        *({"params": [s], "lr": recipe.step_lr * float(s.detach().abs().mean())} for s in steps),
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        [lambda n: 1.0]
        + [lambda n: 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * n / recipe.steps)).item()]
        * len(steps),
    )
    for number in range(recipe.steps):
        call = calls[int(torch.randint(len(calls), (), generator=noise))]
        with _dropping(unit, recipe.drop, noise):
            found = run(unit, _mixed(call, recipe.drop, noise))
        loss = reconstruction(found, call.output, axis)
        done = (number / recipe.steps - FREE) / (1 - FREE)
        if done >= 0:
            power = SHARPEST + (SOFTEST - SHARPEST) * done
            loss = loss + WEIGHT * torch.stack([r.undecided(power) for r in roundings]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=[p for group in groups for p in group["params"]])
        optimizer.step()
        schedule.step()


def _mixed(call: Call, drop: float, noise: torch.Generator) -> Inputs:
    """Inputs of which each number is, by chance, what it would be without rounding."""
    return {
        key: _either(rounded, call.plain[key], drop, noise) for key, rounded in call.inputs.items()
    }


def _either(rounded: Tensor, plain: Tensor, drop: float, noise: torch.Generator) -> Tensor:
    if drop == 0:
        return rounded
    chosen = torch.rand(rounded.shape, generator=noise).to(rounded.device) < drop
    return torch.where(chosen, plain, rounded)


@contextmanager
def _dropping(unit: nn.Module, drop: float, noise: torch.Generator) -> Iterator[None]:
    """Leave numbers unrounded by chance as long as the context lasts: nothing stays behind."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _either(output, module.plain(inputs[0]), drop, noise)

    quantizers = [m for m in unit.modules() if isinstance(m, Quantizer)]
    handles = [q.register_forward_hook(hook) for q in quantizers] if drop else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _soft(roundings: Sequence[Rounding]) -> Iterator[None]:
    """Layers compute with the weights that are being learned."""
    with ExitStack() as stack:
        for rounding in roundings:
            layer: Any = rounding.layer
            layer.rounded_weight = rounding.soft
            stack.callback(delattr, layer, "rounded_weight")
        yield


@contextmanager
def _learning(unit: nn.Module) -> Iterator[list[Tensor]]:
    """The steps of activations get gradients."""
    quantizers = [m for m in unit.modules() if isinstance(m, Quantizer)]
    found = [(q, name) for q in quantizers for name in q.learned]
    for quantizer, name in found:
        # Shifts and factors are folded into a weight, which would have to follow them.
        setattr(quantizer, name, getattr(quantizer, name).clone().requires_grad_(name == "scale"))
    try:
        yield [getattr(quantizer, name) for quantizer, name in found if name == "scale"]
    finally:
        for quantizer, name in found:
            setattr(quantizer, name, getattr(quantizer, name).detach())
