"""ViT blocks whose attention leaves out work: keys that are alike, tokens that are padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn

from ..core.contract import parts
from ..core.errors import ModelError
from ._attend import attend, beside, in_cache, offsets
from ._grid import bands, tile, untile
from ._merge import merged

LATER = "put this step before those that replace blocks, such as sc.attention.Fused()"


class Part(NamedTuple):
    """The upper left part of a map, which stands for all of it.

    Attributes:
        side: of the whole map.
        rows: (h,) how many rows of the map each row stands for.
        columns: (w,) how many of its columns each column stands for.
    """

    side: int
    rows: Tensor
    columns: Tensor


class TokenBlock(nn.Module):
    """A ViT block with another attention; takes over the parts of a segment_anything `Block`.

    Args:
        block: the block.
        attn: what attends instead.
    """

    def __init__(self, block: Block, attn: GlobalAttention | WindowAttention) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = attn
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.window_size: int = block.window_size
        self.training = block.training

    def forward(self, x: Tensor, part: Part | None = None) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C).

        Args:
            x: the tokens.
            part: of which map they are part, and what they stand for; None if they are all of it.
        """
        x = x + self.attn(self.norm1(x), self.window_size or part)
        x = x + self.mlp(self.norm2(x))
        return x


class _Attention(nn.Module):
    """Projections, heads and tables of a segment_anything `Attention`."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.scale: float = attn.scale
        self.qkv = attn.qkv
        self.proj = attn.proj
        self.use_rel_pos: bool = attn.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h = attn.rel_pos_h
            self.rel_pos_w = attn.rel_pos_w
        self.training = attn.training

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, h, w, 3·n·d) to queries, keys and values (B, n, h, w, d)."""
        parts = qkv.reshape(*qkv.shape[:3], 3, self.num_heads, -1)
        q, k, v = parts.permute(3, 0, 4, 1, 2, 5).unbind(0)
        return q, k, v

    def terms(self, q: Tensor, size: tuple[int, int], keys: tuple[int, int]) -> list[Tensor]:
        """What each query adds to its score with every row of keys, and with every column.

        Args:
            q: (B, n, h, w, d) queries, the upper left part of a map.
            size: of that map; it says which distance a row of the tables stands for.
            keys: height and width of the upper left part that is keys.

        Returns:
            (B, n, h, w, height) and (B, n, h, w, width).
        """
        if not self.use_rel_pos:
            return [q.new_zeros(*q.shape[:4], length) for length in keys]
        down = offsets(self.rel_pos_h, size[0])[: q.shape[2], : keys[0]]
        across = offsets(self.rel_pos_w, size[1])[: q.shape[3], : keys[1]]
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, down)
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, across)
        return [rows.contiguous(), columns.contiguous()]


class GlobalAttention(_Attention):
    """Attention over the whole map, whose keys may be merged where they are most alike.

    Args:
        attn: the segment_anything `Attention` whose parts are taken over.
        ratio: share of keys that is merged into others.
    """

    def __init__(self, attn: Attention, ratio: float = 0.0) -> None:
        super().__init__(attn)
        self.ratio = ratio

    @property
    def approximates(self) -> bool:
        """Whether it gives something else than the attention it was made of."""
        return self.ratio > 0

    def forward(self, x: Tensor, part: Part | None) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C); `part` as for `TokenBlock`."""
        height, width = x.shape[1:3]
        q, k, v = self.split(self.qkv(x))
        size = (part.side, part.side) if part else (height, width)
        terms = self.terms(q, size, (height, width))
        gone = int(self.ratio * height * width)
        if gone:
            sizes = part.rows[:, None] * part.columns if part else x.new_ones(height, width)
            kept = merged(k, v, sizes, gone)
            k, v, terms = kept.keys, kept.values, [*terms, *kept.places]
        else:
            kept = None
            k, v = k.flatten(2, 3), v.flatten(2, 3)
            if part:
                terms = [terms[0] + part.rows.log(), terms[1] + part.columns.log()]
        bias = kept.bias if kept else beside
        out = attend(q, k, v, terms, bias, scale=self.scale)
        mixed: Tensor = self.proj(out.permute(0, 2, 3, 1, 4).flatten(3))
        return mixed


class WindowAttention(_Attention):
    """Attention inside windows, which spares the padding of windows at the edge of the map.

    Padded tokens take part as keys: segment_anything fills windows up with zeros before the
    projection, so each has the projection's bias as key and value. Alike but for their places, they
    are one key whose score is the logarithm of what they would be together.
    """

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C); `side` is that of a window."""
        qkv = self.qkv(x)
        down, across = bands(x.shape[1], side), bands(x.shape[2], side)
        rows = []
        for band, (_, tall) in zip(qkv.split([n for n, _ in down], 1), down, strict=True):
            # One row of windows at a time stays in the cache.
            for row in band.split(tall if in_cache(qkv) else band.shape[1], 1):
                found = []
                for part, (_, broad) in zip(
                    row.split([n for n, _ in across], 2), across, strict=True
                ):
                    windows = self._windows(tile(part, tall, broad), side)
                    found.append(untile(windows, len(x), part.shape[1]))
                rows.append(torch.cat(found, 2))
        mixed: Tensor = self.proj(torch.cat(rows, 1))
        return mixed

    def _windows(self, qkv: Tensor, side: int) -> Tensor:
        """Attention in windows that would be of `side`: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        height, width = qkv.shape[1:3]
        q, k, v = self.split(qkv)
        rows, columns = self.terms(q, (side, side), (side, side))
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        parts = [rows[..., :height], columns[..., :width]]
        if height < side or width < side:
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), self._padding(k), strict=True))
            parts.append(log_sum(rows, columns, height, width))
        out = attend(q, k, v, parts, beside, scale=self.scale)
        return out.permute(0, 2, 3, 1, 4).flatten(3)

    def _padding(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of a token of zeros, (B, n, 1, d)."""
        shape = (*like.shape[:2], 1, like.shape[3])
        if self.qkv.bias is None:
            zero = like.new_zeros(shape)
            return zero, zero
        _, k, v = self.qkv.bias.to(like).view(3, 1, like.shape[1], 1, -1).unbind(0)
        return k.expand(shape), v.expand(shape)


def log_sum(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Logarithm of the sum of the exponentials of what queries add to scores with padding.

    Args:
        rows: (B, n, h, w, side) what they add with each row of a window.
        columns: (B, n, h, w, side) with each column.
        height: rows of the window that are no padding.
        width: columns that are none.

    Returns:
        (B, n, h, w, 1).
    """
    rows, columns = rows.float(), columns.float()

    def over(x: Tensor) -> Tensor:
        return x.logsumexp(-1, keepdim=True)

    # Below the map all columns are padding; beside it, those at the right.
    found = []
    if height < rows.shape[-1]:
        found.append(over(rows[..., height:]) + over(columns))
    if width < columns.shape[-1]:
        found.append(over(rows[..., :height]) + over(columns[..., width:]))
    return over(torch.cat(found, -1))


def check_kind(label: str, model: nn.Module) -> None:
    """Check that the image encoder has blocks of a known kind.

    Raises:
        ModelError: if it has none.
    """
    encoder = parts(model).image_encoder
    if any(type(module) in (Block, TokenBlock) for module in encoder.modules()):
        return
    blocks = {type(block).__name__ for block in getattr(encoder, "blocks", ())}
    raise ModelError(
        f"{label} finds no ViT block of segment_anything.",
        where="image_encoder",
        got=", ".join([type(encoder).__name__, *sorted(blocks)]),
        expected="an encoder made of segment_anything.modeling.image_encoder.Block",
        fix=LATER,
    )
