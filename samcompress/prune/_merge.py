"""Keys of attention merged where they are most alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._attend import beside


class Kept:
    """Keys and values that are left after merging.

    First those of a regular part of the map: of each `steps` rows and columns the last. Behind them
    single ones. A merged key is where the one is that the others have joined.

    Attributes:
        keys: (B, n, K, d).
        values: (B, n, K, d).
        places: logarithms of how many each stands for, (B, 1, 1, 1, K); rows, and columns, of the
            single ones.
        steps: of the regular part.
    """

    def __init__(
        self, both: Tensor, sizes: Tensor, single: Sequence[Tensor], steps: Sequence[int]
    ) -> None:
        self.keys, self.values = both.chunk(2, -1)
        self.places = [t[:, None, None, None] for t in (sizes.log(), *single)]
        self.steps = steps

    def bias(
        self, rows: Tensor, columns: Tensor, sizes: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        """What scores get: (B, n, h, w, K).

        Args:
            rows: (B, n, h, w, h) what queries add with each row of keys.
            columns: (B, n, h, w, w) with each column.
            sizes: the first of `places`.
            row: the second.
            column: the third.
        """
        down, across = self.steps
        more = []
        if row.shape[-1]:
            shape = (*rows.shape[:4], row.shape[-1])
            more = [rows.gather(-1, row.expand(shape)) + columns.gather(-1, column.expand(shape))]
        # In place, for nothing else in a block is as large.
        found = beside(rows[..., down - 1 :: down], columns[..., across - 1 :: across], *more)
        return found.add_(sizes)


def merged(k: Tensor, v: Tensor, sizes: Tensor, gone: int) -> Kept:
    """Merge keys into those most like them, and their values alike.

    Along the longer side of the map every other key may go, each into that of the others to which
    its direction, mean of the heads, is closest. The closest go first. If all have gone and there
    are still too many, it is done again with what is left.

    Args:
        k: (B, n, h, w, d) keys.
        v: (B, n, h, w, d) values.
        sizes: (h, w) how many each stands for.
        gone: how many go, less than there are.
    """
    both = torch.cat([k, v], -1).float()
    sizes = sizes.float().expand(len(k), -1, -1)
    place = torch.zeros(len(k), 0, dtype=torch.long, device=k.device)
    single, spare, spare_sizes = [place, place], both[:, :, 0, :0], sizes[:, 0, :0]
    steps = [1, 1]
    while gone:
        axis = 1 if both.shape[3] >= both.shape[2] else 0
        (go, stay), (weights, totals) = _alternate(both, axis + 2), _alternate(sizes, axis + 1)
        width, grid = go.shape[3], stay.shape[2:4]
        go, weights = go.flatten(2, 3), weights.flatten(1)
        stay, totals = stay.flatten(2, 3), totals.flatten(1)
        target, order = matched(go, stay)
        first, last = order[:, :gone], order[:, gone:]
        both, sizes = joined(
            stay, totals, _take(go, first), weights.gather(1, first), target.gather(1, first)
        )
        both = both.reshape(*both.shape[:2], *grid, both.shape[3])
        sizes = sizes.reshape(len(sizes), *grid)
        spare, spare_sizes = _take(go, last), weights.gather(1, last)
        single = [last // width, last % width]
        single[axis] = 2 * single[axis]
        single = [(p + 1) * step - 1 for p, step in zip(single, steps, strict=True)]
        steps[axis] *= 2
        gone -= first.shape[1]
    both = torch.cat([both.flatten(2, 3), spare], 2).to(k.dtype)
    return Kept(both, torch.cat([sizes.flatten(1), spare_sizes], 1), single, steps)


def matched(go: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """For each key the closest of others, and which keys are closest to theirs.

    Args:
        go: (B, n, N, 2·d) keys and values.
        stay: (B, n, M, 2·d) others.

    Returns:
        (B, N) indices into the others, and (B, N) indices of keys, the closest first.
    """
    a, b = (F.normalize(t.chunk(2, -1)[0].mean(1), dim=-1) for t in (go, stay))
    closeness, target = (a @ b.mT).max(-1)
    return target, closeness.argsort(-1, descending=True)


def joined(
    stay: Tensor, totals: Tensor, go: Tensor, weights: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted means of tokens and of those that join them.

    Args:
        stay: (B, n, M, d) tokens.
        totals: (B, M) how many each stands for.
        go: (B, n, N, d) tokens that join them.
        weights: (B, N) how many each stands for.
        target: (B, N) which of the M each joins.

    Returns:
        (B, n, M, d), and (B, M) how many each stands for now.
    """
    index = target[:, None, :, None].expand(go.shape)
    sums = stay * totals[:, None, :, None]
    sums = sums.scatter_add(2, index, go * weights[:, None, :, None])
    sizes = totals.scatter_add(1, target, weights)
    return sums / sizes[:, None, :, None], sizes


def _alternate(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Every other slice, from the first on, and the rest."""
    first = x.transpose(0, axis)
    return first[0::2].transpose(0, axis), first[1::2].transpose(0, axis)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(B, n, N, d) at (B, K) to (B, n, K, d)."""
    shape = (*x.shape[:2], index.shape[1], x.shape[3])
    return x.gather(2, index[:, None, :, None].expand(shape))
