"""Decomposed relative positions: two terms added to scores, and attention with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    if table.shape[0] != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps + size - 1]


def terms(q: Tensor, table_h: Tensor, table_w: Tensor) -> tuple[Tensor, Tensor]:
    """What each query adds to its score with every key row, and with every key column.

    Args:
        q: (B, n, h, w, d) queries of n heads, not scaled.
        table_h: (L, d) rows for vertical offsets.
        table_w: (L, d) rows for horizontal offsets.

    Returns:
        (B, n, h, w, h) and (B, n, h, w, w), contiguous: their broadcast sum is written in one pass.
    """
    rows = torch.einsum("bnhwd,hkd->bnhwk", q, offsets(table_h, q.shape[2]))
    columns = torch.einsum("bnhwd,wkd->bnhwk", q, offsets(table_w, q.shape[3]))
    return rows.contiguous(), columns.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, limit: int) -> Tensor:
    """Softmax attention whose scores get a row term and a column term, in bounded memory.

    The work is cut along images, then heads, then rows of queries until the scores of one piece fit
    into `limit`. Every query still meets every key, so the result does not depend on the cuts.

    Args:
        q: (B, n, h, w, d) queries.
        k: (B, n, h·w, d) keys.
        v: (B, n, h·w, d) values.
        rows: (B, n, h, w, h) from `terms`.
        columns: (B, n, h, w, w) from `terms`.
        limit: bytes that the scores of one piece may take; one row of queries is always done.

    Returns:
        (B, n, h, w, d).
    """
    whole = q[..., 0].numel() * k.shape[2] * q.element_size()
    axis = next((a for a in range(3) if q.shape[a] > 1), None)
    if whole <= limit or axis is None:
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        return _scored(q.flatten(2, 3), k, v, bias).reshape(q.shape)
    step = max(1, limit * q.shape[axis] // whole)
    pieces = []
    for start in range(0, q.shape[axis], step):
        asked, across, down = (_cut(t, axis, start, step) for t in (q, rows, columns))
        keys = (k, v) if axis == 2 else (_cut(k, axis, start, step), _cut(v, axis, start, step))
        pieces.append(attend(asked, *keys, across, down, limit))
    return torch.cat(pieces, axis)


def _scored(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # On a CPU that kernel computes scores in float32; products in bfloat16 take two thirds as long.
    q, k, v, bias = (x.flatten(0, 1) for x in (q, k, v, bias))
    scores = torch.baddbmm(bias, q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    return scores.softmax(-1) @ v


def _cut(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    return x.narrow(axis, start, min(length, x.shape[axis] - start))
