"""Blocks of SAM's image encoder whose attention is replaced by something cheaper."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Block,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from ..core.contract import parts
from ..core.errors import ModelError, NoEffectError
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._rel_pos import attend
from ._takeover import OwnAttention, OwnBlock
from ._window import pad
from .fused import FusedBlock

Kind = Literal["global", "windowed", "all"]

# Bytes of scores made at a time, as by `Fused`: few where they stay in a CPU's cache.
CACHED = 16 << 20
AT_ONCE = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Approximate(Transform):
    """Replaces the attention of blocks; a technique says by what.

    Attributes:
        blocks: which kind of blocks.
        where: names of blocks, of which that kind is taken.
    """

    blocks: Kind = "global"
    where: Where = Where(("image_encoder.**",))

    @abstractmethod
    def make(self, attn: Any, window: int) -> Approximation:
        """What attends instead.

        Args:
            attn: the attention whose parts are taken over.
            window: side of the block's windows in tokens; 0 for the whole map.
        """

    def check(self, model: nn.Module) -> None:
        """Find blocks to replace, and try one."""
        for name in find(self.label, model, self.where, self.blocks)[:1]:
            self._made(model.get_submodule(name))

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Replace the attention of every block found."""
        names = find(self.label, model, self.where, self.blocks)
        return renamed(model, lambda: self.rebuild(model, {"blocks": names}))

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same in the named blocks; their parts and weights move over."""
        for name in state["blocks"]:
            block = model.get_submodule(name)
            model.set_submodule(name, ApproximateBlock(block, self._made(block)))
        return state

    def _made(self, block: Any) -> Approximation:
        return self.make(block.attn, block.window_size)


class ApproximateBlock(OwnBlock):
    """A ViT block whose attention is an approximation."""


class Approximation(OwnAttention):
    """What mixes tokens in place of SAM's attention, by a method of a subclass."""

    approximates = True

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C)."""
        qkv = self.qkv(x)
        if self.window_size:
            size, inner = self.window_size, tuple(x.shape[1:3])
            # Padded tokens take part, with the bias as key and value, as in SAM.
            windows, outer = window_partition(pad(qkv, size, self.qkv.bias), size)
            mixed = window_unpartition(self.mix(windows), size, outer, inner)
        else:
            mixed = self.mix(qkv)
        out: Tensor = self.proj(mixed)
        return out

    @abstractmethod
    def mix(self, qkv: Tensor) -> Tensor:
        """(B, h, w, 3·n·d) queries, keys and values to (B, h, w, n·d)."""

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(B, h, w, m·n·d), such as queries, keys and values, to m of (B, n, h, w, d)."""
        width = self.proj.in_features
        parts = split(qkv, 3, -1, self.num_heads, width // self.num_heads)
        return parts.permute(3, 0, 4, 1, 2, 5).unbind(0)

    def terms(self, q: Tensor, place: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """What each query adds to its score with every key row, and with every key column.

        Args:
            q: (B, n, h, w, d) queries, not scaled.
            place: from a table, and 0 for rows or 1 for columns, to the row of the table that
                belongs to each pair of a query and a key along that axis, (h, h', d).

        Returns:
            Two of (B, n, h, w, h') and (B, n, h, w, w'), or zeros of a shape that broadcasts to it.
        """
        if not self.use_rel_pos:
            return q.new_zeros(1), q.new_zeros(1)
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, place(self.rel_pos_h, 0))
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, place(self.rel_pos_w, 1))
        return rows, columns


def resized(table: Tensor, size: int) -> Tensor:
    """A table of relative positions with a row for each offset among `size` places.

    As segment_anything does, tables of another length are resized linearly.
    """
    length = 2 * size - 1
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T


def split(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """An axis, counted from 0, as several; one of the sizes may be -1."""
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def joined(heads: Tensor) -> Tensor:
    """(B, n, h, w, d) to (B, h, w, n·d)."""
    return heads.permute(0, 2, 3, 1, 4).flatten(3)


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Softmax attention to keys on a grid, in pieces of bounded memory.

    Args:
        q: (B, n, h, w, d) queries.
        k: (B, n, h', w', d) keys.
        v: (B, n, h', w', d) values.
        rows: what scores get for the row of a key, broadcast to (B, n, h, w, h').
        columns: what they get for its column, broadcast to (B, n, h, w, w').

    Returns:
        (B, n, h, w, d).
    """
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and q.requires_grad)
    limit = CACHED if q.device.type == "cpu" and not traced else AT_ONCE
    rows = rows.to(q.dtype).expand(*q.shape[:4], k.shape[2]).contiguous()
    columns = columns.to(q.dtype).expand(*q.shape[:4], k.shape[3]).contiguous()
    return attend(q, k.flatten(2, 3), v.flatten(2, 3), rows, columns, limit)


def in_full(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Without autocast: sums over a map are not for half precision."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def made_like(layer: Any) -> dict[str, Any]:
    """Device and floating-point type for new weights beside those of a layer."""
    tensors = [*layer.parameters(), *layer.buffers()]
    kinds = [t.dtype for t in tensors if t.is_floating_point()]
    return {"device": tensors[0].device, "dtype": kinds[0] if kinds else torch.float32}


def find(label: str, model: nn.Module, where: Where, kind: Kind) -> list[str]:
    """Names of ViT blocks that are segment_anything's or fused.

    Args:
        label: who asks, for errors.
        model: a SAM.
        where: names to take from.
        kind: of which kind; windowed blocks attend inside windows, global ones do not.

    Raises:
        ModelError: if the image encoder has no such block, nor one that was replaced.
        NoEffectError: if none is left by `where` and `kind`.
    """
    encoder = parts(model).image_encoder
    known = (Block, FusedBlock, ApproximateBlock)
    if not any(isinstance(module, known) for module in encoder.modules()):
        raise ModelError(
            f"{label} finds no ViT block of segment_anything.",
            where="image_encoder",
            got=type(encoder).__name__,
            expected="an encoder made of segment_anything.modeling.image_encoder.Block",
            fix="leave this step out for this encoder",
        )
    found: list[tuple[str, Any]] = list(where.select(model, known, step=label))
    free = [(name, block) for name, block in found if not isinstance(block, ApproximateBlock)]
    wanted = {"global": (True,), "windowed": (False,), "all": (True, False)}[kind]
    names = [name for name, block in free if (block.window_size == 0) in wanted]
    if not names:
        other = "global" if kind == "windowed" else "windowed"
        raise NoEffectError(
            f"{label} finds no attention to replace.",
            where=repr(where),
            got=f"{other} blocks alone" if free else "blocks whose attention is replaced already",
            expected=f"{'' if kind == 'all' else kind + ' '}blocks with SAM's attention",
            fix="widen where=, or leave this step out",
        )
    return names


def renamed(model: nn.Module, change: Any) -> State:
    """What a change returns, and which names of tensors it added and removed."""
    before = set(model.state_dict())
    state: State = change()
    after = set(model.state_dict())
    return {**state, "added": sorted(after - before), "removed": sorted(before - after)}
