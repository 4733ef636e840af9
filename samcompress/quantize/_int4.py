"""Layers whose weights are codes of four bits, two a byte, with a scale for each group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import Stored
from ._uniform import pack4

BITS = 4
# Shares of the largest weight that a scale may cover: the best one is taken, 1 among them.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def group_scale(weight: Tensor, *, bits: int = BITS, clip_search: bool = True) -> Tensor:
    """The scale of symmetric codes, ``-(2**(bits-1) - 1)`` and up, for the last axis.

    Args:
        weight: (..., g) floating point.
        bits: of a code.
        clip_search: try smaller scales too, and take that of least squared error; ties go to the
            largest.

    Returns:
        (...) bfloat16, which has float32's range.
    """
    weight = weight.float()
    last = (1 << (bits - 1)) - 1
    largest = weight.abs().amax(-1) / last
    whole = torch.where(largest > 0, largest, torch.ones_like(largest))
    best = whole.to(torch.bfloat16)
    if not clip_search:
        return best
    least = torch.full_like(largest, torch.inf)
    for share in CLIPS:
        scale = (share * whole).to(torch.bfloat16)
        codes = group_codes(weight, scale, bits=bits)
        error = (codes * scale.float()[..., None] - weight).square().sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def group_codes(weight: Tensor, scale: Tensor, *, bits: int = BITS) -> Tensor:
    """(..., g) nearest codes, as whole numbers in float32, of a weight with (...) scales."""
    last = (1 << (bits - 1)) - 1
    smallest = torch.finfo(torch.float32).tiny
    return (
        (weight.float() / scale.float().clamp_min(smallest)[..., None]).round().clamp(-last, last)
    )


class _Int4(Stored):
    """`weight` (out, n/2) uint8 for n weights a channel, `scale` (out, n/g) bfloat16, and the bias.

    Both start as empty codes of the right shape, for a checkpoint to be poured in.
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: Any, group: int) -> None:
        super().__init__()
        at = layer.weight.device
        self.shape, self.group = tuple(layer.weight.shape), group
        rows, wide = len(layer.weight), layer.weight[0].numel()
        codes = torch.zeros(rows, wide // 2, dtype=torch.uint8, device=at)
        self.register_buffer("weight", codes)
        scale = torch.ones(rows, wide // group, dtype=torch.bfloat16, device=at)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)

    def fill(self, codes: Tensor, scale: Tensor) -> None:
        """Store (out, n/g, g) codes and (out, n/g) scales."""
        self.weight = pack4(codes.flatten(1))
        self.scale = scale.to(torch.bfloat16)

    def floats(self, kind: torch.dtype) -> Tensor:
        """The weight in the shape of the layer that this one replaced, rounded once to `kind`."""
        # In floating point, as shifts and masks of bytes do not survive export.
        pairs = self.weight.float()
        high = (pairs / 16).floor()
        codes = torch.stack([pairs - 16 * high, high], -1)
        codes = codes - 16 * (codes > 7)  # as two's complement
        made = codes.view(*self.scale.shape, self.group) * self.scale.float()[..., None]
        return made.view(self.shape).to(kind)


class Int4Linear(_Int4):
    """`nn.Linear` with an int4 weight, made floating point again for each call."""

    def __init__(self, layer: nn.Linear, group: int) -> None:
        super().__init__(layer, group)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the type of `x`."""
        return F.linear(x, self.floats(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, g={self.group}"


class Int4Conv2d(_Int4):
    """`nn.Conv2d` (zero padding) with an int4 weight, made floating point again for each call."""

    def __init__(self, layer: nn.Conv2d, group: int) -> None:
        super().__init__(layer, group)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding: Any = layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h', w'), in the type of `x`."""
        weight = self.floats(x.dtype)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, g={self.group}"
        )


def int4_twin(layer: nn.Module, group: int) -> Int4Linear | Int4Conv2d:
    """An int4 layer of the same shape, still of zeros."""
    if isinstance(layer, nn.Linear):
        return Int4Linear(layer, group)
    assert isinstance(layer, nn.Conv2d)
    return Int4Conv2d(layer, group)
