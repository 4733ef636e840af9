"""Linears that multiply integers: int8 tokens by int8 weights, summed in int32."""

from __future__ import annotations

import functools
import statistics
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import BackendError, ModelError
from ._layers import LEVELS, Int8Linear

# Tokens multiplied at a time on a CPU, so that int32 sums and their float32 copies stay in its
# cache, and memory below that of a float layer. Chosen by timing the Linears of vit_b.
ROWS = 512
# Where integers can be multiplied, and what CUDA asks for: multiples, and more than 16 rows.
DEVICES = ("cpu", "cuda")
MULTIPLE, LEAST_ROWS = 8, 24
# How a layer is timed: tokens in a call, calls.
TOKENS, REPEATS = 1024, 3
# Makes an empty layer of the shape of a Linear.
Kind = Callable[[Any], nn.Module]


class IntegerLinear(Int8Linear):
    """`Int8Linear` that multiplies integers; how tokens become integers is a subclass's.

    Scales and sums are float32 in a model of any type. No gradient passes.
    """

    rounds_tokens = True  # exports may differ from torch by more than rounding errors of floats

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the type of `x`."""
        tokens = x.reshape(-1, self.in_features)
        if torch.compiler.is_exporting() or x.device.type != "cpu":
            made = self.piece(tokens).to(x.dtype)
        else:
            made = tokens.new_empty(len(tokens), self.out_features)
            for rows, place in zip(torch.split(tokens, ROWS), torch.split(made, ROWS), strict=True):
                place.copy_(self.piece(rows))
        return made.view(*x.shape[:-1], self.out_features)

    @abstractmethod
    def piece(self, tokens: Tensor) -> Tensor:
        """(n, in_features) of any type to (n, out_features) float32."""

    def rescaled(self, sums: Tensor, scale: Tensor) -> Tensor:
        """Sums of products of codes as the numbers that they stand for, with the bias.

        Args:
            sums: (n, out_features) int32.
            scale: of the tokens, (n, 1) or ().
        """
        made = sums.float().mul_(scale).mul_(self.scale)
        return made if self.bias is None else made.add_(self.bias.float())


class DynamicLinear(IntegerLinear):
    """Rounds each token to int8 with a scale of its own, at run time."""

    def piece(self, tokens: Tensor) -> Tensor:
        """(n, in_features) of any type to (n, out_features) float32."""
        largest = tokens.abs().amax(1, keepdim=True).float()
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny * LEVELS) / LEVELS
        codes = (tokens.float() / scale).round_().to(torch.int8)
        return self.rescaled(product(codes, self.weight), scale)


class StaticLinear(IntegerLinear):
    """Rounds all tokens to int8 with one calibrated scale and zero point.

    Attributes:
        input_scale: () float32.
        input_zero: () int32, the code of 0.
        shift: (out_features,) int32, what the zero point adds to every sum.
    """

    kept: ClassVar[tuple[str, ...]] = ("scale", "input_scale")
    input_scale: Tensor
    input_zero: Tensor
    shift: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        at = self.weight.device
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=at))
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.int32, device=at))
        self.register_buffer("shift", torch.zeros(len(self.weight), dtype=torch.int32, device=at))

    def set_grid(self, scale: Tensor, zero: Tensor) -> None:
        """Take the grid of the tokens, codes 0 ... 255; they are kept 128 lower, as int8."""
        self.input_scale = scale.to(self.weight.device, torch.float32)
        self.input_zero = zero.to(self.weight.device, torch.int32) - 128
        self.shift = self.weight.sum(1, dtype=torch.int32) * self.input_zero

    def piece(self, tokens: Tensor) -> Tensor:
        """(n, in_features) of any type to (n, out_features) float32."""
        codes = (tokens.float() / self.input_scale).round_().add_(self.input_zero)
        codes = codes.clamp_(-LEVELS - 1, LEVELS).to(torch.int8)
        return self.rescaled(product(codes, self.weight) - self.shift, self.input_scale)


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact sums of products of integers.

    Args:
        codes: (n, k) int8.
        weight: (m, k) int8.

    Returns:
        (n, m) int32.
    """
    if torch.compiler.is_exporting():
        return _written(codes, weight)
    n, m = len(codes), len(weight)
    if codes.device.type == "cuda":
        wide = -codes.shape[1] % MULTIPLE
        codes = F.pad(codes, (0, wide, 0, max(LEAST_ROWS - n, -n % MULTIPLE)))
        weight = F.pad(weight, (0, wide, 0, -m % MULTIPLE))
    return torch._int_mm(codes, weight.t())[:n, :m]


def _written(codes: Tensor, weight: Tensor) -> Tensor:
    """The product as a node of an ONNX graph, which other runtimes multiply as integers too."""
    made: Tensor = torch.onnx.ops.symbolic(
        "MatMulInteger",
        (codes, weight.t()),
        dtype=torch.int32,
        shape=(codes.shape[0], weight.shape[0]),
        version=20,
    )
    return made


def check_device(model: nn.Module, *, step: str) -> None:
    """Check that integers can be multiplied, and rightly, where a model is.

    Raises:
        ModelError: if there is no integer product on the device.
        BackendError: if products are wrong there.
    """
    device: Any = next(model.parameters()).device
    if device.type not in DEVICES:
        raise ModelError(
            f"{step} finds no integer product on this device.",
            got=device.type,
            expected=" or ".join(DEVICES),
            fix="sc.quantize.Int8Weights() has the same file, and sc.quantize.BFloat16() speed",
        )
    _check_product(device.type)


@functools.cache
def _check_product(kind: str) -> None:
    """Some processors add pairs of products in 16 bits, which overflow at the largest codes."""
    codes = torch.full((32, 256), LEVELS, dtype=torch.int8, device=kind)
    codes[1::2] = -LEVELS
    codes[:, ::3] = 1
    found = product(codes, codes[:16])
    expected = codes.cpu().long() @ codes[:16].cpu().long().t()
    if not torch.equal(found.cpu().long(), expected):
        raise BackendError(
            "torch multiplies integers wrongly here.",
            where=f"torch._int_mm on {kind}, torch {torch.__version__}",
            got=f"sums wrong by up to {int((found.cpu() - expected).abs().max())}",
            expected="exact sums",
            fix="another version of torch, or sc.quantize.Int8Weights(), which multiplies floats",
        )


def swapped(model: nn.Module, name: str, kind: Kind) -> Any:
    """Put an empty layer in place of a Linear and return it."""
    layer: Any = model.get_submodule(name)
    made = kind(layer)
    model.set_submodule(name, made)
    return made


def check_speed(model: nn.Module, names: list[str], kind: Kind, *, step: str) -> float:
    """How many times as fast as the named Linears those of another kind are here.

    Raises:
        ModelError: if they are slower.
    """
    found = round(speedup(model, names, kind), 2)
    if found < 1:
        raise ModelError(
            f"{step} would make the layers slower on this machine.",
            where=f"{len(names)} Linears, {TOKENS} tokens",
            got=f"{found} times the speed of {next(model.parameters()).dtype}",
            expected="more than 1",
            fix="sc.quantize.Int8Weights() for the file alone, or force=True",
        )
    return found


def speedup(model: nn.Module, names: list[str], kind: Kind) -> float:
    """Time of Linears of the shapes of the named ones, divided by that of the other kind."""
    kinds = Counter(_shape(model.get_submodule(name)) for name in names)
    own_ms = other_ms = 0.0
    with torch.no_grad():
        for (wide, high, dtype, device), count in kinds.items():
            layer = nn.Linear(wide, high, device=device, dtype=dtype)
            x = torch.ones(TOKENS, wide, device=device, dtype=dtype)
            pair = [_median_ms(made, x) for made in (layer, kind(layer))]
            own_ms, other_ms = own_ms + count * pair[0], other_ms + count * pair[1]
    return own_ms / other_ms


def _shape(layer: Any) -> tuple[int, int, torch.dtype, torch.device]:
    return layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.device


def _median_ms(layer: nn.Module, x: Tensor) -> float:
    def once() -> float:
        start = time.perf_counter()
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start

    return statistics.median([once() for _ in range(REPEATS + 1)][1:])
