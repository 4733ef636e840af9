"""A ViT block and its attention, made from the parts of those that they replace."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class OwnAttention(nn.Module):
    """Projections, heads and tables of SAM's attention; a subclass mixes tokens its way.

    Args:
        attn: the attention whose parts are taken over.
        window_size: side of a window in tokens; 0 to mix tokens of the whole map.
        tables: whether tables of relative positions, if there are any, are taken over too.
    """

    def __init__(self, attn: Any, window_size: int, *, tables: bool = True) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.window_size = window_size
        self.qkv = attn.qkv
        self.proj = attn.proj
        self.use_rel_pos: bool = attn.use_rel_pos and tables
        if self.use_rel_pos:
            self.rel_pos_h = attn.rel_pos_h
            self.rel_pos_w = attn.rel_pos_w
        self.training = attn.training


class OwnBlock(nn.Module):
    """A ViT block with another attention; takes over the other parts of the block it replaces."""

    def __init__(self, block: Any, attn: OwnAttention) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = attn
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.window_size = attn.window_size
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x
