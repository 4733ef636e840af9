"""Attention without softmax, whose cost is linear in the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..core.errors import ConfigError
from ..core.registry import register
from ._blocks import Approximate, Approximation, in_full, joined, made_like, split

# Sums of weights are larger by far: 0 / 0 would be NaN. Adding it is what exporters optimise away.
LEAST = 1e-15


@register
@dataclass(frozen=True, kw_only=True)
class Linear(Approximate, family="attention", phase=30):
    """Replace softmax attention by ReLU linear attention at one or several scales.

    Use it at large images with time for training: its cost does not grow with the square of the
    number of tokens, and it is made of matrix products and convolutions alone. It starts far from
    the original, since softmax and relative positions have no linear counterpart, so distillation
    is a must.

    Args:
        scales: sides of the neighbourhoods, odd and >= 3, from which further queries, keys and
            values are gathered by depthwise convolutions; () for none.
        blocks: "global", "windowed" or "all" blocks of the image encoder. All of them then mix the
            whole map, also those that had windows.
        where: names of blocks, of which that kind is taken.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if `where` matches no such block whose attention is SAM's.
        ModelError: if the image encoder has no ViT block of segment_anything.

    Effect:
        By default the encoder of ``vit_b`` at 1024 px falls from 486 to 398 GMAC, and memory no
        longer grows with the square of the tokens. Position tables go; each scale brings its
        convolutions and a projection, which start so that they change nothing.

    Composes with:
        After what cuts weights. `Fused` before or after it; distillation after it, then
        quantisation and export.

    Source:
        EfficientViT: Cai et al. 2022, arXiv 2205.14756; EfficientViT-SAM: Zhang et al. 2024, arXiv
        2402.05008; reference code efficientvit, Apache-2.0, of which nothing is used. Ours keeps
        SAM's heads and projections, adds up projections of scales instead of joining them (the
        same function), and sums in float32.

    Example:
        >>> import samcompress as sc
        >>> small = sc.attention.Linear()(sc.build("tiny"))
        >>> hasattr(small.image_encoder.blocks[1].attn, "rel_pos_h")
        False
    """

    scales: tuple[int, ...] = (5,)

    def validate(self) -> None:
        """Check the range."""
        whole = isinstance(self.scales, tuple) and all(
            isinstance(side, int) and side >= 3 and side % 2 for side in self.scales
        )
        if not whole:
            raise ConfigError(
                f"{self.label}: scales is out of range.",
                got=self.scales,
                expected="odd numbers of 3 or more, e.g. (5,)",
            )

    def make(self, attn: Any, window: int) -> Approximation:
        """Linear attention over the whole map."""
        return LinearAttention(attn, self.scales)


class LinearAttention(Approximation):
    """ReLU linear attention of the tokens, and of what is gathered around them.

    Args:
        attn: the attention whose projections are taken over.
        scales: sides of neighbourhoods.
    """

    def __init__(self, attn: Any, scales: tuple[int, ...]) -> None:
        super().__init__(attn, 0, tables=False)
        width = self.proj.in_features
        self.gather = nn.ModuleList(
            Gather(3 * width, 3 * self.num_heads, side, made_like(self.proj)) for side in scales
        )
        self.proj_scales = nn.ModuleList(
            _blank(nn.Linear, width, self.proj.out_features, **made_like(self.proj)) for _ in scales
        )
        for parameter in self.proj_scales.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C)."""
        qkv = self.qkv(x)
        out: Tensor = self.proj(self.mix(qkv))
        for gather, proj in zip(self.gather, self.proj_scales, strict=True):
            out = out + proj(self.mix(gather(qkv)))
        return out

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        q, k, v = (part.flatten(2, 3) for part in self.heads(qkv))
        out = linear_attention(q.relu(), k.relu(), v)
        return joined(split(out, 2, *qkv.shape[1:3]))


class Gather(nn.Module):
    """A depthwise convolution and one inside each head, which start as the identity.

    Args:
        channels: of the map.
        groups: heads, each of queries, keys and values.
        side: of the neighbourhood.
        at: device and type of the weights.
    """

    def __init__(self, channels: int, groups: int, side: int, at: dict[str, Any]) -> None:
        super().__init__()
        sizes = (channels, channels)
        self.near = _blank(nn.Conv2d, *sizes, side, padding=side // 2, groups=channels, **at)
        self.inside = _blank(nn.Conv2d, *sizes, 1, groups=groups, **at)
        nn.init.dirac_(self.near.weight, groups=channels)
        nn.init.dirac_(self.inside.weight, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C)."""
        out: Tensor = self.inside(self.near(x.permute(0, 3, 1, 2)))
        return out.permute(0, 2, 3, 1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means of values weighted by products of queries and keys, without making those products.

    Args:
        q: (B, n, N, d) queries, none below 0.
        k: (B, n, K, d) keys, none below 0.
        v: (B, n, K, d) values.

    Returns:
        (B, n, N, d) in the type of `v`, computed in float32 or wider; 0 where all weights are 0.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    with in_full(v):
        asked, keys, values = (x.to(wide) for x in (q, k, v))
        above = asked @ (keys.mT @ values)
        below = asked @ keys.sum(2, keepdim=True).mT
        mixed = above / below.clamp_min(LEAST)
    return mixed.to(v.dtype)


def _blank(kind: Any, *sizes: int, **options: Any) -> Any:
    """A layer without bias, whose weights are to be filled: none are drawn."""
    return skip_init(kind, *sizes, bias=False, **options)  # type: ignore[no-untyped-call]
