"""Attention replaced by a gated average whose weights decay with distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.registry import register
from ._blocks import Approximate, Approximation, in_full, made_like, split

LEAST = 1e-30  # sums of weights are larger by far: 0 / 0 would be NaN


@register
@dataclass(frozen=True, kw_only=True)
class RWKV(Approximate, family="attention", phase=30):
    """Replace softmax attention by RWKV's bidirectional average, linear in the number of tokens.

    Use it as research: at large images with much training, where `Linear` is not enough. A token
    gets a mean of all values, which each channel weighs by its key and by distance along the rows,
    times a gate of its own; queries and keys are not compared. Values and projection carry over,
    what queries and keys meant does not, so distillation is a must.

    Args:
        blocks: "global", "windowed" or "all" blocks of the image encoder. All of them then mix the
            whole map, also those that had windows.
        where: names of blocks, of which that kind is taken.

    Raises:
        ConfigError: if a field has a value it cannot take.
        NoEffectError: if `where` matches no such block whose attention is SAM's.
        ModelError: if the image encoder has no ViT block of segment_anything.

    Effect:
        By default the encoder of ``vit_b`` at 1024 px falls from 486 to 383 GMAC. Position tables
        go; decays, gates' offsets, and how far a token looks at its neighbours, come.

    Composes with:
        After what cuts weights. `Fused` before or after it; distillation after it, then
        quantisation and export.

    Source:
        RWKV-SAM: Yuan et al. 2024, arXiv 2406.19369; Vision-RWKV: Duan et al. 2024, arXiv
        2403.02308. Reference code: S-Lab License 1.0, of which nothing is used. Ours keeps SAM's
        projections, shifts after them instead of before, and has no channel mix: the MLP stays.

    Example:
        >>> import samcompress as sc
        >>> small = sc.attention.RWKV()(sc.build("tiny"))
        >>> small.image_encoder.blocks[1].attn.decay.shape
        torch.Size([64])
    """

    def make(self, attn: Any, window: int) -> Approximation:
        """RWKV's mixing of the whole map."""
        return RWKVAttention(attn)


class RWKVAttention(Approximation):
    """A gated average over the whole map; queries are the gate.

    Args:
        attn: the attention whose projections are taken over.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__(attn, 0, tables=False)
        width, at = self.proj.in_features, made_like(self.proj)
        # How much of a channel is the token's own; the rest is its neighbour's. None at the start.
        self.own = nn.Parameter(torch.ones(3 * width, **at))
        # Gates start open: queries were not trained to be gates.
        self.open = nn.Parameter(torch.full((width,), 4.0, **at))
        # Vision-RWKV's first values for the middle of an encoder: most channels see the whole map.
        place = torch.arange(width) / max(width - 1, 1)
        self.decay = nn.Parameter((8 * place**1.35 - 5).to(**at))
        bonus = math.log(0.3) + 0.5 * ((torch.arange(width) + 1) % 3 - 1)
        self.bonus = nn.Parameter(bonus.to(**at))

    def mix(self, qkv: Tensor) -> Tensor:
        """Average: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        near = shifted(qkv)
        gate, key, value = (near + (qkv - near) * self.own).tensor_split(3, -1)
        tokens = key.shape[1] * key.shape[2]
        # Decays over the whole map are learned, so they mean the same at every image size.
        decay, bonus = self.decay / tokens, self.bonus / tokens
        mixed = wkv(key.flatten(1, 2).mT, value.flatten(1, 2).mT, decay, bonus)
        return (gate + self.open).sigmoid() * split(mixed.mT, 1, *qkv.shape[1:3])


def shifted(x: Tensor) -> Tensor:
    """Quarters of the channels moved by a token to the right, left, down and up.

    Every fourth channel moves the same way, so each head and each of queries, keys and values has
    its share of every direction.

    Args:
        x: (B, h, w, C), C a multiple of 4; zeros enter at the borders.
    """
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    starts = ((1, 0), (1, 2), (0, 1), (2, 1))
    moved = [
        padded[:, top : top + height, left : left + width, index::4]
        for index, (top, left) in enumerate(starts)
    ]
    return torch.stack(moved, -1).flatten(-2)


def wkv(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """Weighted averages of values, seen from every token.

    With ``weight[t, i] = exp(key[i] - (|t - i| - 1) * decay)`` for other tokens and ``exp(key[t] +
    bonus)`` for the token itself, ``out[t]`` is the sum of ``weight[t, i] * value[i]`` over the sum
    of ``weight[t, i]``. Tokens are cut into pieces; what lies before and behind a piece enters as
    two sums, so all work is matrix products and no loop over tokens is in a graph.

    Args:
        key: (B, C, T). Where keys that are near differ by more than 80 from the largest, and decay
            hides that one, the average is 0.
        value: (B, C, T).
        decay: (C,) for one token's distance.
        bonus: (C,).

    Returns:
        (B, C, T) in the type of `value`, computed in float32 or wider.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    with in_full(value):
        weight = key.to(wide)
        weight = (weight - weight.detach().amax(-1, keepdim=True)).exp()
        sums = _weighed(
            torch.cat([weight * value.to(wide), weight]), decay.to(wide), bonus.to(wide)
        )
        above, below = sums.chunk(2)
        mixed = above / below.clamp_min(LEAST)
    return mixed.to(value.dtype)


def _weighed(x: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """Sums of all tokens as each sees them: (B, C, T) to the same."""
    count, tokens = len(x), x.shape[-1]
    piece = math.isqrt(tokens - 1) + 1
    pieces = -(-tokens // piece)
    x = F.pad(x, (0, pieces * piece - tokens)).transpose(0, 1)
    x = x.reshape(x.shape[0], count * pieces, piece)
    rate = decay[:, None, None]
    place = torch.arange(piece, device=x.device, dtype=x.dtype)
    apart = (place[:, None] - place).abs()
    among = torch.where(apart > 0, -(apart - 1) * rate, bonus[:, None, None]).exp()
    start = (-place * rate).exp()  # (C, 1, L) as seen from just before a piece
    end = start.flip(-1)
    # Each piece as one token for those behind it, and for those before it.
    edges = split(x @ torch.cat([end, start], 1).mT, 1, count, pieces)
    number = torch.arange(pieces, device=x.device, dtype=x.dtype)
    gap = number[:, None] - number - 1
    past = torch.where(gap >= 0, (-gap.clamp_min(0) * piece * rate).exp(), 0)  # (C, m, m)
    behind = (edges[..., 0] @ past.mT).flatten(1)[..., None]
    ahead = (edges[..., 1] @ past).flatten(1)[..., None]
    found = x @ among + behind * start + ahead * end
    return found.reshape(len(found), count, -1)[..., :tokens].transpose(0, 1)
