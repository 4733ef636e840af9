"""Layers and attention that compute with rounded numbers, in floating point.

They take the parts and the names of what they replace. Where activations are rounded there is a
module: `nn.Identity` until it is known how, a `Quantizer` from then on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from segment_anything.modeling import image_encoder, transformer
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import is_linear
from ._quantizers import Exact, Quantizer, Spec, from_spec
from ._uniform import Grid

AT_ONCE = 64 << 20  # bytes of one piece of an attention map
Role = Literal["input", "q", "k", "softmax", "v"]


class Rounded(Exact):
    """A layer whose weight is rounded channel by channel, and its input by what is in `input`.

    The weight itself is kept on the grid too, except while something trains it.
    """

    weight: Any
    bias: Any
    weight_scale: Tensor
    weight_zero: Tensor

    def take(self, layer: Any, grid: Grid) -> None:
        """Take over weight and bias; the steps stay empty."""
        self.grid = grid
        self.weight, self.bias = layer.weight, layer.bias
        self.input: nn.Module = nn.Identity()
        for name, fill in (("weight_scale", 1.0), ("weight_zero", 0.0)):
            steps = torch.full((len(layer.weight),), fill, device=layer.weight.device)
            self.register_buffer(name, steps)
        self.train(layer.training)

    def cover(self, low: Tensor, high: Tensor) -> None:
        """Take the steps of ranges, (out,) each, and put the weight on the grid."""
        self.weight_scale, self.weight_zero = self.grid.steps(low, high)
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Put the weight on the grid."""
        self.weight.copy_(self.rounded_weight())

    def rounded_weight(self) -> Tensor:
        """The weight on the grid, in its own type; gradients pass through to the weight."""
        scale, zero = self.along(self.weight_scale), self.along(self.weight_zero)
        rounded: Tensor = self.grid.fake(self.weight.float(), scale, zero).to(self.weight.dtype)
        return rounded

    def along(self, steps: Tensor) -> Tensor:
        """(out,) steps, shaped to be broadcast against the weight."""
        return steps.view(-1, *[1] * (self.weight.ndim - 1))


class FakeLinear(Rounded, nn.Linear):
    """`nn.Linear` of rounded numbers."""

    def __init__(self, layer: nn.Linear, grid: Grid) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.take(layer, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(self.input(x), self.rounded_weight(), self.bias)


class FakeConv2d(Rounded, nn.Conv2d):
    """`nn.Conv2d` (zero padding) of rounded numbers."""

    def __init__(self, layer: nn.Conv2d, grid: Grid) -> None:
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.take(layer, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h', w')."""
        out: Tensor = self._conv_forward(self.input(x), self.rounded_weight(), self.bias)
        return out


class Product(nn.Module):
    """A matrix product of two activations, each rounded first."""

    def __init__(self) -> None:
        super().__init__()
        self.left: nn.Module = nn.Identity()
        self.right: nn.Module = nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(..., n, m) and (..., m, k) to (..., n, k)."""
        product: Tensor = self.left(a) @ self.right(b)
        return product


class FakeEncoderAttention(image_encoder.Attention):  # type: ignore[misc]
    """Attention of the image encoder with rounded queries, keys, weights and values.

    Relative positions meet queries that are not rounded.
    """

    def __init__(self, attn: image_encoder.Attention) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.scale, self.use_rel_pos = attn.num_heads, attn.scale, attn.use_rel_pos
        self.qkv, self.proj = attn.qkv, attn.proj
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = attn.rel_pos_h, attn.rel_pos_w
        self.dot, self.mix = Product(), Product()
        self.train(attn.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C)."""
        count, height, width, _ = x.shape
        split = self.qkv(x).reshape(count, height * width, 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        # One map at a time of global attention; rounding needs several copies.
        step = max(1, AT_ONCE // (4 * q.shape[1] ** 2))
        parts = zip(q.split(step), k.split(step), v.split(step), strict=True)
        mixed = torch.cat([self._attend(*part, (height, width)) for part in parts])
        heads = mixed.view(count, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        out: Tensor = self.proj(heads.flatten(3))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        scores = self.scale * self.dot(q, k.transpose(-2, -1))
        if self.use_rel_pos:
            scores = image_encoder.add_decomposed_rel_pos(
                scores, q, self.rel_pos_h, self.rel_pos_w, size, size
            )
        mixed: Tensor = self.mix(scores.softmax(-1), v)
        return mixed


class FakeDecoderAttention(transformer.Attention):  # type: ignore[misc]
    """Attention of the mask decoder with rounded queries, keys, weights and values."""

    def __init__(self, attn: transformer.Attention) -> None:
        nn.Module.__init__(self)
        self.embedding_dim, self.internal_dim = attn.embedding_dim, attn.internal_dim
        self.num_heads = attn.num_heads
        self.q_proj, self.k_proj, self.v_proj = attn.q_proj, attn.k_proj, attn.v_proj
        self.out_proj = attn.out_proj
        self.dot, self.mix = Product(), Product()
        self.train(attn.training)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(P, n, C) queries, (P, m, C) keys and values to (P, n, C)."""
        q, k, v = (
            self._separate_heads(x, self.num_heads)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        scores = self.dot(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        out: Tensor = self.out_proj(self._recombine_heads(self.mix(scores.softmax(-1), v)))
        return out


@dataclass(frozen=True)
class Site:
    """A place where activations are rounded.

    Attributes:
        name: of the module there.
        role: what they are.
        tap: the module that gets them as an input,
        place: and as which of its inputs.
    """

    name: str
    role: Role
    tap: str
    place: int = 0


def after_gelu(model: nn.Module, site: Site) -> bool:
    """Whether what comes to a place is what the GELU of an MLP gives."""
    owner, _, last = site.tap.rpartition(".")
    curve = getattr(model.get_submodule(owner), "act", None)
    return site.role == "input" and last in ("lin2", "fc2") and isinstance(curve, nn.GELU)


def fakeable(layer: nn.Module) -> bool:
    """Whether a layer can be replaced: exact classes only, and not what reads the pixels."""
    if is_linear(layer):
        return True
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.in_channels != 3


def attentions(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """SAM's own attentions, all of whose Linears are among some layers."""
    kinds = (image_encoder.Attention, transformer.Attention)
    chosen = set(layers)
    return [
        name
        for name, module in model.named_modules()
        if type(module) in kinds
        and all(
            f"{name}.{part}" in chosen
            for part, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        )
    ]


def replace(
    model: nn.Module,
    layers: Mapping[str, int],
    attention: Iterable[str],
    *,
    symmetric: bool = False,
) -> None:
    """Put fake layers of so many bits a weight, and fake attentions, in place of the true ones."""
    for name in attention:
        old: Any = model.get_submodule(name)
        inside = isinstance(old, image_encoder.Attention)
        model.set_submodule(name, (FakeEncoderAttention if inside else FakeDecoderAttention)(old))
    for name, bits in layers.items():
        layer: Any = model.get_submodule(name)
        kind = FakeLinear if isinstance(layer, nn.Linear) else FakeConv2d
        model.set_submodule(name, kind(layer, Grid(bits, symmetric)))


def sites(layers: Iterable[str], attention: Iterable[str]) -> list[Site]:
    """Every place where fake layers and attentions can round activations."""
    found = [Site(f"{name}.input", "input", name) for name in layers]
    for name in attention:
        found += [
            Site(f"{name}.dot.left", "q", f"{name}.dot"),
            Site(f"{name}.dot.right", "k", f"{name}.dot", 1),
            Site(f"{name}.mix.left", "softmax", f"{name}.mix"),
            Site(f"{name}.mix.right", "v", f"{name}.mix", 1),
        ]
    return found


def install(model: nn.Module, quantizers: Mapping[str, Quantizer | Spec]) -> None:
    """Put quantizers, or empty ones after their specs, where activations are rounded."""
    for name, found in quantizers.items():
        quantizer = found if isinstance(found, Quantizer) else from_spec(found)
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        at = next((p.device for p in owner.parameters()), torch.device("cpu"))
        model.set_submodule(name, quantizer.to(at).train(owner.training))


def unrounded(model: nn.Module, originals: Mapping[str, nn.Module]) -> nn.Module:
    """A copy that computes with float layers and rounds no activation."""
    twin = copy.deepcopy(model)
    for name, layer in originals.items():
        twin.set_submodule(name, copy.deepcopy(layer))
    for name, module in list(twin.named_modules()):
        if isinstance(module, Quantizer):
            twin.set_submodule(name, nn.Identity())
    return twin
