"""Global attention among tokens that lie a fixed distance apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.contract import embedding_shape
from ..core.errors import ConfigError, ModelError
from ..core.registry import register
from ._blocks import Approximate, Approximation, attention, find, joined, resized, split
from ._rel_pos import offsets

Offsets = Literal["all", "per_head"]


@register
@dataclass(frozen=True, kw_only=True)
class Dilated(Approximate, family="attention", phase=30):
    """Let each token attend to those a multiple of `rate` rows and columns away.

    Use it where global attention takes the time and SAM's windowed blocks are left: together they
    connect every token to every other in two blocks. It is plain attention on smaller maps, which
    every runtime does fast. Tokens beside each other no longer meet in these blocks, so distil
    afterwards.

    Args:
        rate: distance between tokens that meet, >= 2; the map falls into rate² sparse ones.
        offsets: "all" lets every head work on all sparse maps; "per_head" gives each head one of
            them, and tokens elsewhere get nothing from it.
        blocks: "global", "windowed" (inside windows) or "all" blocks of the image encoder.
        where: names of blocks, of which that kind is taken.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if `where` matches no such block whose attention is SAM's.
        ModelError: if the image encoder has no ViT block of segment_anything, a map or window is
            smaller than `rate`, or there are fewer than rate² heads for ``per_head``.

    Effect:
        Same parameters. By default the encoder of ``vit_b`` at 1024 px falls from 486 to 408 GMAC,
        with ``offsets="per_head"`` to 388. What that costs in mIoU is in the card.

    Composes with:
        After what cuts weights. `Fused` before or after it; distillation after it, then
        quantisation and export.

    Source:
        LongNet: Ding et al. 2023, arXiv 2307.02486, in one dimension. In SAMs: SAM-Lightening, Song
        et al. 2024, arXiv 2403.09195; FastSAM3D, Shen et al. 2024, arXiv 2403.09827 (Apache-2.0,
        nothing used). Ours is in two dimensions, leaves out no token and keeps relative positions.

    Example:
        >>> import samcompress as sc
        >>> small = sc.attention.Dilated(rate=2)(sc.build("tiny"))
        >>> small.image_encoder.blocks[1].attn.rate
        2
    """

    rate: int = 2
    offsets: Offsets = "all"

    def validate(self) -> None:
        """Check the range."""
        if self.rate < 2:
            raise ConfigError(
                f"{self.label}: rate is out of range.", got=self.rate, expected=">= 2"
            )

    def check(self, model: nn.Module) -> None:
        """Find blocks with room for sparse maps, and heads enough."""
        names = find(self.label, model, self.where, self.blocks)
        _, *grid = embedding_shape(model)
        for name in names:
            block: Any = model.get_submodule(name)
            side = block.window_size or min(grid)
            heads = block.attn.num_heads if self.offsets == "per_head" else self.rate**2
            if side < self.rate or heads < self.rate**2:
                raise ModelError(
                    f"{self.label} leaves tokens without attention.",
                    where=name,
                    got=f"{side} tokens along a side, {block.attn.num_heads} heads",
                    expected=f"{self.rate} tokens, and {self.rate**2} heads for per_head",
                    fix='a smaller rate=, or offsets="all"',
                )

    def make(self, attn: Any, window: int) -> Approximation:
        """Dilated attention."""
        return DilatedAttention(attn, window, self.rate, self.offsets)


class DilatedAttention(Approximation):
    """SAM's attention inside interleaved sparse maps.

    Args:
        attn: the attention whose parts are taken over.
        window_size: side of a window in tokens; 0 for the whole map.
        rate: distance between tokens that meet; with 1 nothing is changed.
        offsets: which sparse maps a head works on.
    """

    def __init__(self, attn: Any, window_size: int, rate: int, offsets: Offsets = "all") -> None:
        super().__init__(attn, window_size)
        self.rate = rate
        self.offsets = offsets

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend inside sparse maps: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        height, width = qkv.shape[1:3]
        sparse = self._apart(qkv)
        if self.offsets == "all":
            out = self._attend(sparse.flatten(0, 1), height, width)
            out = split(out, 0, *sparse.shape[:2])
        else:
            out = self._per_head(sparse, height, width)
        return self._together(out)[:, :height, :width]

    def _per_head(self, sparse: Tensor, height: int, width: int) -> Tensor:
        """Each head in one of the (B, r², h', w', 3·n·d) maps."""
        maps, heads = sparse.shape[1], self.num_heads
        mine = torch.arange(heads, device=sparse.device)
        each = split(sparse, 4, 3, heads, -1).permute(1, 5, 0, 2, 3, 4, 6)
        own = each[mine % maps, mine].permute(1, 2, 3, 4, 0, 5).flatten(3)
        out = split(self._attend(own, height, width), 3, heads, -1)
        turn = (mine % maps == torch.arange(maps, device=mine.device)[:, None]).to(out.dtype)
        return (out[:, None] * turn[:, None, None, :, None]).flatten(4)

    def _attend(self, qkv: Tensor, height: int, width: int) -> Tensor:
        """Attention in sparse maps of a map that is `height` by `width`."""
        q, k, v = self.heads(qkv)
        size = (height, width)

        def place(table: Tensor, axis: int) -> Tensor:
            # Every rate-th offset, among them that of a token to itself.
            kept = resized(table, size[axis])[(size[axis] - 1) % self.rate :: self.rate]
            return offsets(kept, q.shape[2 + axis])

        terms = self.terms(q, place)
        rows, columns = (
            term + self._padding(q, size[axis], axis) for axis, term in enumerate(terms)
        )
        return joined(attention(q, k, v, rows, columns))

    def _padding(self, q: Tensor, length: int, axis: int) -> Tensor:
        """What keeps padding from being a key; it broadcasts to (B, n, h, w, keys along axis).

        Args:
            q: queries, whose first axis counts images and, inside them, sparse maps.
            length: of the axis before it was cut up.
            axis: 0 for rows, 1 for columns.
        """
        if not length % self.rate:
            return q.new_zeros(1)
        first = torch.arange(self.rate, device=q.device)
        place = torch.arange(q.shape[2 + axis], device=q.device) * self.rate
        outside = first[:, None] + place >= length
        shape = (self.rate, self.rate, -1)
        mask = (outside[:, None] if axis == 0 else outside).expand(shape).flatten(0, 1)
        if self.offsets == "all":
            mask = mask.repeat(len(q) // len(mask), 1)[:, None, None, None]
        else:
            mask = mask[torch.arange(q.shape[1], device=q.device) % len(mask)][None, :, None, None]
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

    def _apart(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to its sparse maps, filled up to one size: (B, r², h', w', C)."""
        rate = self.rate
        x = F.pad(x, (0, 0, 0, -x.shape[2] % rate, 0, -x.shape[1] % rate))
        cut = split(split(x, 2, -1, rate), 1, -1, rate)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)

    def _together(self, maps: Tensor) -> Tensor:
        """The reverse of `_apart`, padding included."""
        cut = split(maps, 1, self.rate, self.rate).permute(0, 3, 1, 4, 2, 5)
        return cut.flatten(3, 4).flatten(1, 2)
