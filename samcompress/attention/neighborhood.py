"""Global attention cut down to the neighbourhood of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.contract import embedding_shape
from ..core.errors import ConfigError, ModelError
from ..core.registry import register
from ._blocks import Approximate, Approximation, attention, find, resized, split

TILE = 8  # side of a tile of queries: larger ones waste work, smaller ones copy more keys


@register
@dataclass(frozen=True, kw_only=True)
class Neighborhood(Approximate, family="attention", phase=30):
    """Let each token attend to the square of tokens around it.

    Use it instead of `Windowed` where borders between windows show: every token has its own window,
    and what it sees grows with each block. It costs more than windows of the same side, since
    queries are taken in tiles that share their keys. Distil afterwards.

    Args:
        size: side of a neighbourhood in tokens, odd and >= 3. At the border of the map it is moved
            inwards, so that every token has size² keys.
        blocks: "global", "windowed" or "all" blocks of the image encoder. Those with windows lose
            them, and the padding that windows need.
        where: names of blocks, of which that kind is taken.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if `where` matches no such block whose attention is SAM's.
        ModelError: if the image encoder has no ViT block of segment_anything, the map is not larger
            than a neighbourhood, or a block's tables of relative positions are too short for it.

    Effect:
        Same parameters. By default the encoder of ``vit_b`` at 1024 px falls from 486 to 392 GMAC.
        What that costs in mIoU is in the card.

    Composes with:
        After what cuts weights. `Fused` before or after it; distillation after it, then
        quantisation and export.

    Source:
        Hassani et al. 2022, arXiv 2204.07143; its library NATTEN (MIT) is not needed, nor used: it
        has no decomposed relative positions. Own code, in tiles with PyTorch's fused attention.

    Example:
        >>> import samcompress as sc
        >>> small = sc.attention.Neighborhood(size=5)(sc.build("tiny"))
        >>> small.image_encoder.blocks[1].attn.size
        5
    """

    size: int = 13

    def validate(self) -> None:
        """Check the range."""
        if self.size < 3 or self.size % 2 == 0:
            raise ConfigError(
                f"{self.label}: size is out of range.", got=self.size, expected="odd and >= 3"
            )

    def check(self, model: nn.Module) -> None:
        """Find blocks whose map is larger than a neighbourhood."""
        names = find(self.label, model, self.where, self.blocks)
        _, *grid = embedding_shape(model)
        for name in names:
            block: Any = model.get_submodule(name)
            sides = [*grid, block.window_size or min(grid)]
            if self.size >= min(grid) or self.size > min(sides):
                raise ModelError(
                    f"{self.label}: the neighbourhood is too large.",
                    where=name,
                    got=f"size {self.size}, {grid[0]} x {grid[1]} tokens, "
                    f"windows of {block.window_size}",
                    expected="less than the map, and no more than the windows there were",
                    fix=f"size={max(3, (min(sides) - 1) // 2 * 2 - 1)}",
                )

    def make(self, attn: Any, window: int) -> Approximation:
        """Neighbourhood attention."""
        return NeighborhoodAttention(attn, self.size, window)


class NeighborhoodAttention(Approximation):
    """SAM's attention to the square of tokens around each.

    Args:
        attn: the attention whose parts are taken over.
        size: side of the square.
        window: side of the window that its tables of relative positions were made for; 0 if they
            are for the whole map.
    """

    def __init__(self, attn: Any, size: int, window: int = 0) -> None:
        super().__init__(attn, 0)
        self.size = size
        self.window = window

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend around each token: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        batch, height, width = qkv.shape[:3]
        asked, others = qkv.tensor_split((self.proj.in_features,), -1)
        down, across = (tiles(length, self.size, qkv.device) for length in (height, width))
        asked = asked[:, down.queries.flatten()][:, :, across.queries.flatten()]
        others = others[:, down.keys.flatten()][:, :, across.keys.flatten()]
        shape = (batch, len(down.queries), len(across.queries))
        (q,) = self.heads(_cut(asked, *shape))
        k, v = self.heads(_cut(others, *shape))
        rows = self._terms(q, down, 0, shape)
        columns = self._terms(q, across, 1, shape)
        out = attention(q, k, v, rows, columns)
        out = split(out, 0, *shape).permute(0, 1, 4, 2, 5, 3, 6)
        return out.flatten(5).flatten(3, 4).flatten(1, 2)[:, :height, :width]

    def _terms(self, q: Tensor, axis: Tiles, number: int, shape: tuple[int, int, int]) -> Tensor:
        """What scores get for a key's row (0) or column (1): (B·tiles, n, t, t, keys)."""
        apart = axis.queries[:, :, None] - axis.keys[:, None]  # (T, t, L)
        mask = torch.zeros_like(apart, dtype=q.dtype).masked_fill(~axis.near, float("-inf"))
        mask = mask[:, None, None, :, None] if number == 0 else mask[:, None, None]
        if self.use_rel_pos:
            size = self.window or axis.length
            table = resized(self.rel_pos_h if number == 0 else self.rel_pos_w, size)
            looked = table[(apart + size - 1).clamp(0, len(table) - 1)]  # beyond it none is near
            place = "ayk" if number == 0 else "bxk"
            product = f"zabnyxd,{place}d->zabnyxk"
            terms = torch.einsum(product, split(q, 0, *shape), looked)
        else:
            terms = q.new_zeros(*shape, 1, *q.shape[2:4], 1)
        return (terms + mask).flatten(0, 2)


class Tiles(NamedTuple):
    """An axis in tiles of queries, each with the keys that any of its queries is near to.

    Attributes:
        length: of the axis.
        queries: (T, t) places; what is beyond the axis repeats its last place.
        keys: (T, L) places.
        near: (T, t, L) whether a key belongs to the neighbourhood of a query.
    """

    length: int
    queries: Tensor
    keys: Tensor
    near: Tensor


def tiles(length: int, size: int, device: torch.device) -> Tiles:
    """Cut an axis up.

    Args:
        length: of the axis.
        size: places in a neighbourhood, odd and at most `length`.
        device: where to make the places.
    """
    side = min(TILE, length)
    first = torch.arange(0, length, side, device=device)
    queries = (first[:, None] + torch.arange(side, device=device)).clamp_max(length - 1)
    seen = min(length, side + size - 1)
    start = (first - size // 2).clamp(0, length - seen)
    keys = start[:, None] + torch.arange(seen, device=device)
    low = (queries - size // 2).clamp(0, length - size)[:, :, None]
    near = (keys[:, None] >= low) & (keys[:, None] < low + size)
    return Tiles(length, queries, keys, near)


def _cut(x: Tensor, batch: int, down: int, across: int) -> Tensor:
    """(B, a·h, b·w, C) to (B·a·b, h, w, C)."""
    x = split(split(x, 2, across, -1), 1, down, -1)
    return x.transpose(2, 3).flatten(0, 2)
