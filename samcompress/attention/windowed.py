"""Global attention cut down to windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contract import embedding_shape
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._blocks import ApproximateBlock, Approximation, attention, find, joined, resized
from ._rel_pos import offsets

DEFAULT_WINDOW = 14


@register
@dataclass(frozen=True, kw_only=True)
class Windowed(Transform, family="attention", phase=30):
    """Let global blocks attend inside windows, as SAM's other blocks do.

    Use it for hardware with static graphs, such as neural processors, and where global attention
    takes the time: nothing is cheaper, and the result is SAM's own kind of block, which every other
    technique takes. Without any global block a token no longer sees what is far away, so the last
    one is kept by default. Distil afterwards.

    Args:
        window: side of a window in tokens, >= 2 and below that of the map; None takes that of the
            encoder's own windows, or 14 if it has none. 16 tiles the 64 tokens of 1024 px.
        keep: so many of the last global blocks stay as they are, >= 0.
        shift: move the windows of every other block by half a window, so that what one block cuts
            apart the next one joins. Windows at the border are cut off.
        where: blocks to take from; those with windows are left as they are.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if no global block is left to convert, or the window holds the whole map.
        ModelError: if the image encoder has no ViT block of segment_anything.

    Effect:
        The encoder of ``vit_b`` at 1024 px falls from 486 to 413 GMAC with ``window=16``, and to
        388 with ``keep=0``. Position tables lose the rows that are not needed. The state tells how
        many tokens along a side each token still sees at least.

    Composes with:
        Everything that takes SAM's blocks: prune before it, `Fused` before or after it (shifted
        blocks are done already), distillation after it, then quantisation and export.

    Source:
        Windows in a plain ViT: Li et al. 2022, ViTDet, arXiv 2203.16527. Shifted windows: Liu et
        al. 2021, Swin, arXiv 2103.14030; ours are cut at the border instead of masked. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.attention.Windowed()(sc.build("tiny"))
        >>> [block.window_size for block in small.image_encoder.blocks]
        [7, 7, 7, 0]
    """

    window: int | None = None
    keep: int = 1
    shift: bool = False
    where: Where = Where(("image_encoder.**",))

    def validate(self) -> None:
        """Check the ranges."""
        for name, value, low in (("window", self.window, 2), ("keep", self.keep, 0)):
            if value is not None and value < low:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.", got=value, expected=f">= {low}"
                )

    def check(self, model: nn.Module) -> None:
        """Find global blocks, and a window that is smaller than the map."""
        self._plan(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Convert every block found."""
        state = self.rebuild(model, self._plan(model))
        encoder: Any = model.get_submodule("image_encoder")
        _, *grid = embedding_shape(model)
        return {**state, "sees": [seen(encoder.blocks, length) for length in grid]}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same in the named blocks; their parts and weights move over."""
        _, *grid = embedding_shape(model)
        window = state["window"]
        for name in state["blocks"]:
            block: Any = model.get_submodule(name)
            centre(block.attn, grid, window)
            if name in state["shifted"]:
                attn = ShiftedAttention(block.attn, window)
                model.set_submodule(name, ApproximateBlock(block, attn))
                continue
            # SAM's own block, and a fused one, take windows by a number.
            block.window_size = window
            if hasattr(block.attn, "window_size"):
                block.attn.window_size = window
        return state

    def _plan(self, model: nn.Module) -> State:
        """Which blocks are converted, with what window, and which of them are shifted."""
        found = find(self.label, model, self.where, "global")
        encoder: Any = model.get_submodule("image_encoder")
        if not hasattr(encoder, "blocks"):
            raise ModelError(
                f"{self.label} cannot tell how many tokens a block of this encoder sees.",
                where="image_encoder",
                got=type(encoder).__name__,
                expected="a plain ViT, whose blocks all see the map of the embedding",
                fix="replace the attention otherwise, say attention.PooledKV()",
            )
        names = found[: max(0, len(found) - self.keep)]
        if not names:
            raise NoEffectError(
                f"{self.label} keeps every global block.",
                got=f"{len(found)} global, keep={self.keep}",
                expected="a block to convert",
                fix=f"keep={len(found) - 1}",
            )
        own = {getattr(block, "window_size", 0) for block in encoder.blocks}
        window = self.window or max(own) or DEFAULT_WINDOW
        _, *grid = embedding_shape(model)
        if window >= min(grid):
            raise NoEffectError(
                f"{self.label}: one window holds the whole map.",
                got=f"window {window}, {grid[0]} x {grid[1]} tokens",
                expected="a window smaller than the map",
                fix=f"window={max(2, min(grid) // 4)}",
            )
        shifted = names[1::2] if self.shift else []
        return {"blocks": names, "window": window, "shifted": shifted}


class ShiftedAttention(Approximation):
    """Attention inside windows that start half a window to the left of the map and above it.

    What lies outside the map is cut off the windows: nothing is padded, rolled or masked.

    Args:
        attn: the attention whose parts are taken over, with tables for `window`.
        window: side of a window in tokens.
    """

    def __init__(self, attn: Any, window: int) -> None:
        super().__init__(attn, 0)
        self.window = window

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend inside windows: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        down, across = (bands(length, self.window) for length in qkv.shape[1:3])
        rows = []
        for band, tall in zip(torch.split(qkv, [n for n, _ in down], 1), down, strict=True):
            found = [
                self._windows(part, tall[1], broad[1])
                for part, broad in zip(
                    torch.split(band, [n for n, _ in across], 2), across, strict=True
                )
            ]
            rows.append(torch.cat(found, 2))
        return torch.cat(rows, 1)

    def _windows(self, qkv: Tensor, tall: int, broad: int) -> Tensor:
        """Attend inside windows of `tall` by `broad`, which tile the map."""
        batch, height, width = qkv.shape[:3]
        shape = (batch, height // tall, tall, width // broad, broad)
        tiles = qkv.reshape(*shape, -1).transpose(2, 3).reshape(-1, tall, broad, qkv.shape[3])
        q, k, v = self.heads(tiles)
        sides = (tall, broad)
        rows, columns = self.terms(
            q, lambda table, axis: offsets(table, self.window)[: sides[axis], : sides[axis]]
        )
        out = joined(attention(q, k, v, rows, columns))
        out = out.reshape(batch, height // tall, width // broad, tall, broad, -1)
        return out.transpose(2, 3).reshape(batch, height, width, -1)


def bands(length: int, window: int) -> list[tuple[int, int]]:
    """Cut an axis into shifted windows: half of one, whole ones, the rest.

    Returns:
        For each of up to three bands, how long it is and how long each of its windows.

    Example:
        >>> bands(16, 7), bands(12, 4)
        ([(3, 3), (7, 7), (6, 6)], [(2, 2), (8, 4), (2, 2)])
    """
    first = min(length, window // 2)
    rest = (length - first) % window
    whole = length - first - rest
    return [(n, side) for n, side in ((first, first), (whole, window), (rest, rest)) if n]


def centre(attn: Any, grid: Any, window: int) -> None:
    """Cut tables of relative positions of a map down to the offsets inside a window, exactly.

    SAM's own rule would resize the tables, which gives every offset a wrong row.
    """
    if not attn.use_rel_pos:
        return
    for name, length in zip(("rel_pos_h", "rel_pos_w"), grid, strict=True):
        old = getattr(attn, name)
        rows = resized(old.detach(), length)[length - window : length + window - 1].clone()
        setattr(attn, name, nn.Parameter(rows, requires_grad=old.requires_grad))


def seen(blocks: Any, length: int) -> int:
    """Tokens along a side that each token's result depends on at least, after all blocks.

    A block without windows counts as one that sees the whole map.
    """
    spans = [(place, place + 1) for place in range(length)]
    for block in reversed(list(blocks)):
        shifted = isinstance(block.attn, ShiftedAttention)
        window = block.attn.window if shifted else block.window_size
        if not window:
            return length
        moved = window // 2 if shifted else 0
        spans = [_widened(span, window, moved, length) for span in spans]
    return min(high - low for low, high in spans)


def _widened(span: tuple[int, int], window: int, moved: int, length: int) -> tuple[int, int]:
    """The whole windows that a stretch of tokens touches."""
    low = (span[0] - moved) // window * window + moved
    high = -(-(span[1] - moved) // window) * window + moved
    return max(0, low), min(length, high)
