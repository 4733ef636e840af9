"""Layers whose weights are stored as integers, in ordinary buffers of ordinary modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 127  # the range is -127...127, so that -q always exists


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of a weight with one scale for each output channel.

    Args:
        weight: (out, ...) floating point.

    Returns:
        (out, ...) int8 codes in -127...127 and (out,) float32 scales; ``codes * scale`` differs
        from the weight by at most half a scale, that is max|w| of the channel / 254.
    """
    weight = weight.detach().float()
    largest = weight.flatten(1).abs().amax(1)
    # A channel of zeros has codes 0 whatever its scale; 1 keeps the division finite. So does the
    # smallest normal number for channels so tiny that a 127th of them would be rounded away.
    scale = (largest / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    codes = (weight / _along(scale, weight)).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale`` computed in float32 and rounded once to `dtype`.

    Args:
        codes: (out, ...) int8.
        scale: (out,) float32.
        dtype: of the result.
    """
    return (codes.to(scale.dtype) * _along(scale, codes)).to(dtype)


class Stored(nn.Module):
    """A layer whose weight is integers.

    Attributes:
        kept: names of buffers that no cast may round: `.bfloat16()` leaves their type alone.
    """

    kept: ClassVar[tuple[str, ...]] = ("scale",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class _Int8(Stored):
    """An int8 `weight`, its float32 `scale` a channel, and the bias of the layer that it replaces.

    The weight starts as zeros of the right shape, for a checkpoint to be poured in.
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        at = layer.weight.device
        self.register_buffer("weight", torch.zeros(layer.weight.shape, dtype=torch.int8, device=at))
        self.register_buffer("scale", torch.ones(len(layer.weight), device=at, dtype=torch.float32))
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)

    def fill(self, weight: Tensor) -> None:
        """Store the codes and scales of a floating-point weight."""
        self.weight, self.scale = quantize_channels(weight)


class Int8Linear(_Int8):
    """`nn.Linear` with an int8 weight, made floating point again for each call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the type of `x`."""
        return F.linear(x, dequantize(self.weight, self.scale, x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class Int8Conv2d(_Int8):
    """`nn.Conv2d` (zero padding) with an int8 weight, made floating point again for each call."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding: Any = layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h', w'), in the type of `x`."""
        weight = dequantize(self.weight, self.scale, x.dtype)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


def is_linear(layer: nn.Module) -> bool:
    """Whether it is an `nn.Linear`, or a kind of it that says that it computes the same.

    Other subclasses may use their weight in ways we do not know.
    """
    return isinstance(layer, nn.Linear) and getattr(layer, "computes_as", type(layer)) is nn.Linear


def int8_twin(layer: nn.Module) -> Int8Linear | Int8Conv2d | None:
    """An int8 layer of the same shape, still of zeros; None for a layer of another kind."""
    if is_linear(layer):
        assert isinstance(layer, nn.Linear)
        return Int8Linear(layer)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return Int8Conv2d(layer)
    return None


def _along(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))
