"""Modules that round what passes through them, and stay in floating point.

Each is told by a small `spec` of plain values; scales and the like are ordinary buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._uniform import TINY, Grid, through

Spec = dict[str, Any]
LEAST = 1e-20  # of what a logarithm is taken of
GELU_LEAST = 0.16997  # GELU is nowhere below minus this


class Exact(nn.Module):
    """A module whose float32 buffers stay float32 when it is moved or cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Quantizer(Exact, ABC):
    """Rounds activations; made empty from its `spec`, to be filled or poured into.

    Attributes:
        kind: name in `spec`.
        learned: the buffers that training may change.
    """

    kind: ClassVar[str]
    learned: ClassVar[tuple[str, ...]] = ("scale",)
    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.grid = Grid(bits)
        self.levels = 1 << bits
        self.register_buffer("scale", torch.ones(()))

    def spec(self) -> Spec:
        """Plain values that an empty one can be made from."""
        return {"kind": self.kind, "bits": self.grid.bits}

    def forward(self, x: Tensor) -> Tensor:
        """The numbers rounded, in the type of `x`."""
        return self.rounded(x.float()).to(x.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """What would be given if nothing were rounded."""
        return x

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """Float32 numbers rounded."""

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return ", ".join(f"{k}={v}" for k, v in self.spec().items() if k != "kind")


class Affine(Quantizer):
    """Evenly spaced levels with a zero point, one scale for the tensor."""

    kind = "affine"
    zero: Tensor

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__(bits)
        self.grid = Grid(bits, symmetric)
        self.register_buffer("zero", torch.zeros(()))

    def spec(self) -> Spec:
        """Plain values that an empty one can be made from."""
        return {**super().spec(), "symmetric": self.grid.symmetric}

    def cover(self, low: Tensor, high: Tensor) -> Affine:
        """Take the steps that a range needs; gives itself back."""
        self.scale, self.zero = self.grid.steps(low, high)
        return self

    def rounded(self, x: Tensor) -> Tensor:
        """To the nearest level."""
        return self.grid.fake(x, self.scale.abs().clamp(min=TINY), self.zero)


class Log(Quantizer):
    """Levels ``scale * 2 ** (-q / tau)``, and 0: for what is positive and mostly small.

    Decoding takes a shift and a table of `tau` entries. The relative error inside the range is at
    most ``2 ** (1 / (2 * tau)) - 1``, whatever the bits: those only lengthen the tail.
    """

    kind = "log"

    def __init__(self, bits: int, tau: int = 1) -> None:
        super().__init__(bits)
        self.tau = tau

    def spec(self) -> Spec:
        """Plain values that an empty one can be made from."""
        return {**super().spec(), "tau": self.tau}

    def rounded(self, x: Tensor) -> Tensor:
        """To the level nearest in its logarithm."""
        scale = self.scale.abs().clamp(min=TINY)
        codes = through(-self.tau * torch.log2((x / scale).clamp(min=LEAST)))
        level = scale * torch.exp2(-codes.clamp(min=0) / self.tau)
        # With many bits the code of the least number a logarithm is taken of is still in range.
        none = (codes >= self.levels) | (x < LEAST)
        return torch.where(none, torch.zeros_like(level), level)


class Hybrid(Quantizer):
    """Log levels near the least value, even ones above: for what comes out of an activation.

    With ``x' = x - low``, numbers up to `split` take ``split * 2 ** -q``, and 0; larger ones take
    ``split + q * scale``. `log_levels` of the codes belong to the first part.
    """

    kind = "hybrid"
    learned = ("split", "scale")
    low: Tensor
    split: Tensor

    def __init__(self, bits: int, log_levels: int = 2) -> None:
        super().__init__(bits)
        self.log_levels = log_levels
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("split", torch.ones(()))

    def spec(self) -> Spec:
        """Plain values that an empty one can be made from."""
        return {**super().spec(), "log_levels": self.log_levels}

    def cover(self, low: Tensor, high: Tensor, share: float) -> Hybrid:
        """Take a range, of which the log part gets a share; gives itself back."""
        whole = (high - low).clamp(min=TINY)
        self.low, self.split = low.float(), (share * whole).float()
        self.scale = ((1 - share) * whole / (self.levels - self.log_levels - 1)).float()
        return self

    def rounded(self, x: Tensor) -> Tensor:
        """Each part to its nearest level."""
        split, scale = (s.abs().clamp(min=TINY) for s in (self.split, self.scale))
        above = x - self.low
        codes = through(-torch.log2((above / split).clamp(min=LEAST))).clamp(min=0)
        small = torch.where(
            codes >= self.log_levels, torch.zeros_like(x), split * torch.exp2(-codes)
        )
        even = through((above - split) / scale).clamp(0, self.levels - self.log_levels - 1)
        return torch.where(above <= split, small, split + even * scale) + self.low


class Twin(Quantizer):
    """Two scales, of which each number uses one.

    Of softmax outputs those up to `split` use a fine step and the rest a step that reaches 1; of
    GELU outputs (`gelu`) the negative ones use the step that GELU's least value needs.
    """

    kind = "twin"

    def __init__(self, bits: int, gelu: bool = False) -> None:
        super().__init__(bits)
        self.gelu = gelu
        self.last = self.levels // 2 - 1  # code of either half

    def spec(self) -> Spec:
        """Plain values that an empty one can be made from."""
        return {**super().spec(), "gelu": self.gelu}

    def cover(self, largest: Tensor) -> Twin:
        """Take the scale with which the searched half reaches `largest`; gives itself back."""
        self.scale = (largest.float() / self.last).clamp(min=TINY)
        return self

    def rounded(self, x: Tensor) -> Tensor:
        """Either half to its own levels: never the sum of both."""
        scale = self.scale.abs().clamp(min=TINY)
        if self.gelu:
            below = GELU_LEAST / (self.last + 1)
            negative = through(x / below).clamp(-self.last - 1, 0) * below
            return torch.where(x < 0, negative, through(x / scale).clamp(0, self.last) * scale)
        low = through(x / scale).clamp(0, self.last) * scale
        high = through(x * self.last).clamp(0, self.last) / self.last
        return torch.where(x <= self.last * scale, low, high)


class Grouped(Affine):
    """Numbers clipped, each channel shifted and scaled by its group's, then rounded.

    What it gives is ``Q((x - shift) / factor)``: the layer behind it has weights and bias into
    which shift and factor are folded.
    """

    kind = "grouped"
    learned = ("scale", "shift", "factor")
    bounds: Tensor
    shift: Tensor
    factor: Tensor
    group: Tensor

    def __init__(
        self, bits: int, symmetric: bool = False, channels: int = 1, groups: int = 1
    ) -> None:
        super().__init__(bits, symmetric)
        self.register_buffer("bounds", torch.tensor([-torch.inf, torch.inf]))
        self.register_buffer("shift", torch.zeros(groups))
        self.register_buffer("factor", torch.ones(groups))
        self.register_buffer("group", torch.zeros(channels, dtype=torch.long))

    def spec(self) -> Spec:
        """Plain values that an empty one can be made from."""
        return {**super().spec(), "channels": len(self.group), "groups": len(self.shift)}

    def channels(self) -> tuple[Tensor, Tensor]:
        """Shift and factor of each channel, (C,) each."""
        return self.shift[self.group], self.factor[self.group].abs().clamp(min=TINY)

    def normal(self, x: Tensor) -> Tensor:
        """Numbers clipped, shifted and scaled, not rounded yet."""
        shift, factor = self.channels()
        return (x.clamp(self.bounds[0], self.bounds[1]) - shift) / factor

    def plain(self, x: Tensor) -> Tensor:
        """Clipped, shifted and scaled only."""
        return self.normal(x)

    def rounded(self, x: Tensor) -> Tensor:
        """``Q((x - shift) / factor)``."""
        return super().rounded(self.normal(x))


KINDS: dict[str, type[Quantizer]] = {q.kind: q for q in (Affine, Log, Hybrid, Twin, Grouped)}


def from_spec(spec: Spec) -> Quantizer:
    """An empty quantizer."""
    settings = {name: value for name, value in spec.items() if name != "kind"}
    return KINDS[spec["kind"]](**settings)
