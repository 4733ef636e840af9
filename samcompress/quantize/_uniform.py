"""Evenly spaced levels: how a range becomes a step, and numbers become the nearest level.

With L = 2**bits, codes run over 0 ... L - 1 with a zero point where the grid is affine, and over
-(L/2 - 1) ... L/2 - 1 where it is symmetric, so that every code has its negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError

TINY = 1e-8  # the least step: a tensor of zeros must not be divided by none


@dataclass(frozen=True)
class Grid:
    """How finely and how symmetrically numbers are rounded.

    Attributes:
        bits: of a code, 2 to 16.
        symmetric: whether the range is centred on 0 and has no zero point.

    Example:
        >>> Grid(4).codes, Grid(4, symmetric=True).codes
        ((0, 15), (-7, 7))
    """

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ConfigError(
                "numbers cannot be quantized to so many bits.",
                got=f"{self.bits} bits",
                expected="2 to 16",
                fix="leave out layers that stay floating point with where=",
            )

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        half = 1 << (self.bits - 1)
        return (1 - half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def steps(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for ranges: of any shape, that of the result."""
        if self.symmetric:
            scale = symmetric_range(torch.maximum(low.abs(), high.abs()), self.bits)
            return scale, torch.zeros_like(scale)
        return affine_range(low, high, self.bits)

    def fake(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Numbers on the nearest level; see `fake`."""
        return fake(x, scale, zero, *self.codes)


def affine_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which codes ``0 ... 2**bits - 1`` cover ranges and 0 exactly.

    Args:
        low: smallest values, any shape.
        high: largest values, the same shape.
        bits: of a code.

    Returns:
        Scale, > 0, and zero point, a whole number among the codes; float32.
    """
    last = (1 << bits) - 1
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = ((high - low) / last).clamp(min=TINY)
    return scale, (-(low / scale).round()).clamp(0, last)


def symmetric_range(largest: Tensor, bits: int) -> Tensor:
    """The scale with which codes ``-(2**(bits-1) - 1) ... 2**(bits-1) - 1`` reach `largest`."""
    return (largest.float() / ((1 << (bits - 1)) - 1)).clamp(min=TINY)


def fake(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Round to the nearest level, half to even, and stay in floating point.

    Gradients are those of learned step sizes: that of rounding is 1 inside the range and 0 beyond
    it, and the scale's is divided by the root of how many numbers share it times the codes.

    Args:
        x: numbers, any shape.
        scale: > 0, broadcast against `x`.
        zero: zero points, whole numbers, broadcast against `x`.
        low: lowest code.
        high: highest code.

    Returns:
        ``scale * (clip(round(x / scale) + zero, low, high) - zero)``.
    """
    if scale.requires_grad:
        scale = _damped(scale, (x.numel() / scale.numel() * max(high, 1)) ** -0.5)
    codes = (through(x / scale) + zero).clamp(low, high)
    return (codes - zero) * scale


def through(x: Tensor) -> Tensor:
    """The nearest whole number, half to even, with a gradient of 1."""
    # The difference is exactly 0, so the sum is exactly the whole number.
    return x.round() + (x - x.detach()) if x.requires_grad else x.round()


def pack4(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two a byte, the first in the lower half.

    Args:
        codes: (..., n) whole numbers in -8 ... 7, n even.

    Returns:
        (..., n / 2) uint8.
    """
    pairs = (codes.to(torch.int16) & 15).reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8)


def _damped(x: Tensor, factor: float) -> Tensor:
    """`x` with a gradient `factor` times as large."""
    return x.detach() + (x - x.detach()) * factor
