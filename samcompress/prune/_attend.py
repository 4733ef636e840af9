"""Attention with relative positions, whose keys need not be all tokens of the map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of scores made at a time. On a CPU they are read while still in the cache; elsewhere, and in
# graphs that unroll the pieces, fewer and larger ones are faster.
CACHED = 16 << 20
AT_ONCE = 256 << 20


def offsets(table: Tensor, size: int) -> Tensor:
    """Look up the row of `table` that belongs to each pair of positions along one axis.

    Args:
        table: (L, d) learned rows, of the offsets -(size-1)...size-1 where L is 2·size-1; another
            length is resized linearly first, as segment_anything does.
        size: positions along the axis.

    Returns:
        (size, size, d), indexed by query and key position.
    """
    length = 2 * size - 1
    if len(table) != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Tensor],
    bias: Callable[..., Tensor],
    *,
    scale: float,
    limit: int | None = None,
) -> Tensor:
    """Softmax attention with a bias on the scores, in bounded memory.

    The work is cut along images, then heads, then rows of queries until the scores of one piece fit
    into `limit`. Every query still meets every key, so the result does not depend on the cuts.

    Args:
        q: (B, n, h, w, d) queries of n heads.
        k: (B, n, K, d) keys.
        v: (B, n, K, d) values.
        parts: what the bias is made of, five axes each, of which the first three are those of the
            queries or 1. They are cut along.
        bias: from parts to what scores get, broadcast to (B, n, h, w, K).
        scale: factor of the product of a query and a key.
        limit: bytes that the scores of one piece may take; by default what is best for the device.
            One row of queries is always done.

    Returns:
        (B, n, h, w, d).
    """
    if limit is None:
        limit = CACHED if in_cache(q) else AT_ONCE
    whole = q[..., 0].numel() * k.shape[2] * q.element_size()
    axis = next((a for a in range(3) if q.shape[a] > 1), None)
    if whole <= limit or axis is None:
        mask = bias(*parts).to(q.dtype).expand(*q.shape[:4], k.shape[2]).flatten(2, 3)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape)
    step = max(1, limit * q.shape[axis] // whole)
    pieces = []
    for start in range(0, q.shape[axis], step):
        asked, *others = (_cut(t, axis, start, step) for t in (q, *parts))
        keys = (k, v) if axis == 2 else (_cut(k, axis, start, step), _cut(v, axis, start, step))
        pieces.append(attend(asked, *keys, others, bias, scale=scale, limit=limit))
    return torch.cat(pieces, axis)


def beside(rows: Tensor, columns: Tensor, *more: Tensor) -> Tensor:
    """Bias of keys on a map, (B, n, h, w, K), and behind them that of further ones."""
    found = (rows[..., None] + columns[..., None, :]).flatten(4)
    return torch.cat([found, *more], -1) if more else found


def in_cache(x: Tensor) -> bool:
    """Whether many small pieces are best, for a map of tokens."""
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return x.device.type == "cpu" and not traced


def _cut(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    if x.shape[axis] == 1:
        return x
    return x.narrow(axis, start, min(length, x.shape[axis] - start))
