"""Eight-bit floating-point products with scales found at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import BackendError, ModelError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._choose import finite_weight, layers
from ._int8 import DEVICES, check_speed, swapped
from ._layers import Stored

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
TINY = torch.finfo(torch.float32).tiny
MULTIPLE = 16  # of both sides of a weight, which CUDA asks for


@register
@dataclass(frozen=True, kw_only=True)
class Float8Dynamic(Transform, family="quantize", phase=50):
    """Multiply float8 (E4M3) weights by tokens rounded to float8, each with a scale of its own.

    Use it on GPUs that multiply float8 (CUDA capability 8.9 and above), where tokens have outliers
    that int8 stands badly. Not on a CPU, which computes it in wider numbers, slowly; and not for
    the file alone: of weights `Int8Weights`, of the same size, loses a quarter as much.

    Args:
        where: Linears to change; by default those of the image encoder.
        force: also where the layers are slower than those of the model, or cannot be timed.

    Raises:
        NoEffectError: if no Linear matches.
        ModelError: if the matched Linears are quantized already, a weight is not finite, the device
            has no float8 product, or the layers would be slower and `force` is not set.
        BackendError: if torch multiplies float8 not at all, or wrongly, on this machine.

    Effect:
        Three bits of each number are left, whatever its size: the embedding of `mini` moves by
        2.3 %, by `Int8Dynamic` by 0.8 %. The file is that of `Int8Dynamic`. On one thread of an AMD
        EPYC half as fast as float32; not yet timed on a GPU.

    Composes with:
        As `Int8Dynamic`. `Export` to ONNX Runtime writes the rounding, with products in floating
        point; other runtimes refuse.

    Source:
        FP8 formats for deep learning, P. Micikevicius et al., 2022, arXiv 2209.05433. Own code on
        `torch._scaled_mm`.

    Example:
        >>> import samcompress as sc
        >>> small = sc.quantize.Float8Dynamic(force=True)(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].mlp.lin1.weight.dtype
        torch.float8_e4m3fn
    """

    where: Where = Where(("image_encoder.**",))
    force: bool = False

    def check(self, model: nn.Module) -> None:
        """Check that a Linear is left, and that float8 can be multiplied."""
        device = next(model.parameters()).device
        if device.type not in DEVICES:
            raise ModelError(
                f"{self.label} finds no float8 product on this device.",
                got=device.type,
                expected=" or ".join(DEVICES),
                fix="sc.quantize.Int8Weights() or sc.quantize.BFloat16()",
            )
        _check_product(str(device))
        self._layers(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Quantise layer by layer, so that no second float copy of the model exists."""
        names = self._layers(model)
        state: State = {"layers": names}
        if not self.force:
            state["speedup"] = check_speed(model, names, Float8Linear, step=self.label)
        for name in ctx.progress.track(names, label="layers"):
            weight = finite_weight(name, model.get_submodule(name), step=self.label)
            swapped(model, name, Float8Linear).fill(weight)
        return state

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty layers where `apply` put full ones."""
        for name in state["layers"]:
            swapped(model, name, Float8Linear)
        return state

    def _layers(self, model: nn.Module) -> list[str]:
        return layers(model, self.where, (nn.Linear,), step=self.label)


class Float8Linear(Stored):
    """`nn.Linear` that multiplies float8 tokens by its float8 weight; no gradient passes.

    Attributes:
        weight: (out_features, in_features) float8_e4m3fn.
        scale: (out_features,) float32.
        bias: that of the layer that it replaces.
    """

    kept: ClassVar[tuple[str, ...]] = ("weight", "scale")
    rounds_tokens = True
    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        at = layer.weight.device
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", torch.zeros(layer.weight.shape, dtype=E4M3, device=at))
        self.register_buffer("scale", torch.ones(layer.out_features, device=at))
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)

    def fill(self, weight: Tensor) -> None:
        """Store a floating-point weight with a scale for each output channel."""
        self.weight, scale = float8(weight.detach())
        self.scale = scale[:, 0]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the type of `x`."""
        codes, scale = float8(x.reshape(-1, self.in_features))
        if torch.compiler.is_exporting():
            # Runtimes round to float8, but few multiply it.
            made = (codes.float() * scale) @ (self.weight.float() * self.scale[:, None]).t()
        else:
            made = product(codes, self.weight, scale, self.scale)
        if self.bias is not None:
            made = made + self.bias.float()
        return made.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


def float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float8, and the (n, 1) float32 scale of each, by which its largest number is 448."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp_min(TINY * LARGEST) / LARGEST
    return (x / scale).to(E4M3), scale


def product(codes: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Products of scaled float8 numbers.

    Args:
        codes: (n, k) float8.
        weight: (m, k) float8.
        rows: (n, 1) float32, scales of the former.
        columns: (m,) float32, scales of the latter.

    Returns:
        (n, m) float32; on CUDA rounded to bfloat16 on the way.
    """
    n, m, kind = len(codes), len(weight), torch.float32
    if codes.device.type == "cuda":
        kind = torch.bfloat16  # the only one it gives for scales of rows
        wide, high = -codes.shape[1] % MULTIPLE, -m % MULTIPLE
        # Pads bytes: not every version pads float8.
        codes = F.pad(codes.view(torch.uint8), (0, wide)).view(E4M3)
        weight = F.pad(weight.view(torch.uint8), (0, wide, 0, high)).view(E4M3)
        columns = F.pad(columns, (0, high), value=1.0)
    found: Tensor = torch._scaled_mm(
        codes, weight.t(), scale_a=rows, scale_b=columns[None], out_dtype=kind
    )
    return found[:n, :m].float()


@functools.cache
def _check_product(device: str) -> None:
    """Older processors lack it, and so do older versions of torch on some."""
    x = torch.arange(1, 1025, device=device).view(32, 32).float().sin()
    expected = x @ x.t()
    try:
        codes, scale = float8(x)
        found = product(codes, codes, scale, scale[:, 0])
        wrong = float((found - expected).norm() / expected.norm())
        got = f"products wrong by {wrong:.1%}" if not wrong < 0.1 else None
    except (RuntimeError, NotImplementedError) as err:
        got = str(err).splitlines()[0]
    if got is not None:
        raise BackendError(
            "torch does not multiply float8 here.",
            where=f"torch._scaled_mm on {device}, torch {torch.__version__}",
            got=got,
            expected="a GPU of CUDA capability 8.9 or above",
            fix="sc.quantize.Int8Dynamic() or sc.quantize.BFloat16()",
        )
