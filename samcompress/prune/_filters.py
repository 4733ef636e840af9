"""Cutting filters out of convolutional networks: which tensors of a layer lose what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Part:
    """Where the units of a width are in one layer or parameter.

    Attributes:
        name: of the layer, or of a parameter that is multiplied with or added to the units.
        side: "out" or "in" of a layer; of a parameter the axis. Batch norms and depthwise
            convolutions have one side, "out".
        start: the place of the first unit; the others follow in order.
    """

    name: str
    side: Literal["out", "in"] | int
    start: int

    def plain(self) -> list[Any]:
        """As JSON values, which `Part` can be made of again."""
        return [self.name, self.side, self.start]


@dataclass(frozen=True)
class Width:
    """Units that run through layers together: channels of a map, or hidden units.

    Attributes:
        name: of one of the layers that make the units.
        units: how many there are.
        parts: every layer and parameter that has a row or column for each unit.
    """

    name: str
    units: int
    parts: tuple[Part, ...]


Kept = Mapping[str, Sequence[int]]
Parts = Mapping[str, Iterable[Part]]


def depthwise(layer: nn.Module) -> bool:
    """Whether a layer filters each channel by itself."""
    found: Any = layer
    return isinstance(layer, CONVOLUTIONS) and (
        1 < found.groups == found.in_channels == found.out_channels
    )


def dense(layer: nn.Module) -> bool:
    """Whether each output of a layer is made of all its inputs."""
    found: Any = layer
    return isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and found.groups == 1)


def axes(layer: Any, side: str) -> dict[str, int]:
    """Tensors of a layer that have a row for each unit of a side, with the axis."""
    if isinstance(layer, NORM):
        found = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
    elif depthwise(layer):
        found = {"weight": 0, "bias": 0}
    else:
        across = getattr(layer, "transposed", False)
        found = {"weight": int((side == "in") != across)} | ({"bias": 0} if side == "out" else {})
    return {name: axis for name, axis in found.items() if getattr(layer, name) is not None}


def size(model: nn.Module, part: Part) -> int:
    """Units that a side of a layer, or an axis of a parameter, has in all."""
    if isinstance(part.side, int):
        return model.get_parameter(part.name).shape[part.side]
    layer: Any = model.get_submodule(part.name)
    tensor, axis = next(iter(axes(layer, part.side).items()))
    return int(getattr(layer, tensor).shape[axis])


def keep(model: nn.Module, kept: Kept, parts: Parts) -> None:
    """Cut all units out of a model that are not kept.

    Args:
        model: changed in place; tensors are new and whole.
        kept: for each width the units that stay, in ascending order.
        parts: of the same widths. Where a layer reads several widths, places are those before.
    """
    staying: dict[tuple[str, Any], Tensor] = {}
    for width, units in kept.items():
        total = size(model, Part(width, "out", 0))
        for part in parts[width]:
            mask = staying.setdefault(
                (part.name, part.side), torch.ones(size(model, part), dtype=torch.bool)
            )
            mask[part.start : part.start + total] = False
            mask[torch.tensor(units) + part.start] = True
    for (name, side), mask in staying.items():
        owner, _, parameter = name.rpartition(".")
        index = mask.nonzero().flatten()
        if isinstance(side, int):
            _cut(model.get_submodule(owner), parameter, side, index)
        else:
            _narrow(model.get_submodule(name), side, index)


def silence(model: nn.Module, kept: Kept, parts: Parts) -> None:
    """Let nothing read the units that are not kept: the whole model that a cut one must equal."""
    for width, units in kept.items():
        total = size(model, Part(width, "out", 0))
        gone = torch.tensor(sorted(set(range(total)) - set(units)), dtype=torch.long)
        for part in parts[width]:
            if part.side == "in":
                layer: Any = model.get_submodule(part.name)
                axis = axes(layer, "in")["weight"]
                layer.weight.data.index_fill_(axis, (gone + part.start).to(layer.weight.device), 0)


def _narrow(layer: Any, side: str, index: Tensor) -> None:
    for name, axis in axes(layer, side).items():
        _cut(layer, name, axis, index)
    if isinstance(layer, NORM):
        layer.num_features = len(index)
    elif depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = len(index)
    else:
        setattr(
            layer,
            f"{side}_{'features' if isinstance(layer, nn.Linear) else 'channels'}",
            len(index),
        )


def _cut(owner: nn.Module, name: str, axis: int, index: Tensor) -> None:
    old: Tensor = getattr(owner, name)
    values = old.detach().index_select(axis, index.to(old.device))
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(values, requires_grad=old.requires_grad))
    else:
        setattr(owner, name, values)
