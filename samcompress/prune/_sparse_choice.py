"""Which weights become zero, and how the others make up for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

# (rows, n) scores of columns from the given one on -> (rows, n) bool, True for those to be zero
Choice = Callable[[Tensor, int], Tensor]
BLOCK = 128  # columns between which corrections are not put off
DAMPING = 0.01  # share of the mean of the diagonal


def two_of_four(scores: Tensor, start: int = 0) -> Tensor:
    """The two lowest in each run of four; of equals the first.

    Example:
        >>> two_of_four(torch.tensor([[3.0, 1, 2, 4, 0, 0, 0, 0]])).int()
        tensor([[0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    runs = scores.reshape(len(scores), -1, 4)
    lowest = runs.argsort(dim=-1, stable=True)[..., :2]
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, lowest, True).flatten(1)


def lowest(scores: Tensor, start: int, *, ratio: float, per: Literal["row", "layer"]) -> Tensor:
    """The lowest of each row, or of all rows together; of equals the first.

    Shares are rounded so that the columns before `start` and these together have theirs.

    Example:
        >>> lowest(torch.tensor([[3.0, 1, 2, 4], [5, 6, 7, 8]]), 0, ratio=0.5, per="row").int()
        tensor([[0, 1, 1, 0],
                [1, 1, 0, 0]], dtype=torch.int32)
    """
    pooled = scores if per == "row" else scores.reshape(1, -1)
    each = pooled.shape[1] // scores.shape[1]  # weights a column adds to what is ranked together
    count = zeros((start + scores.shape[1]) * each, ratio) - zeros(start * each, ratio)
    chosen = pooled.argsort(dim=-1, stable=True)[:, :count]
    found = torch.zeros_like(pooled, dtype=torch.bool).scatter_(-1, chosen, True)
    return found.view(scores.shape)


def zeros(weights: int, ratio: float) -> int:
    """How many of so many weights become zero."""
    return math.floor(round(weights * ratio, 6))  # 100 x 0.29 is a hair below 29 in binary


def reconstructed(weight: Tensor, gram: Tensor, choose: Choice, span: int) -> Tensor:
    """Weights with zeros whose outputs are near those of the given ones (SparseGPT).

    Column after column, what its zeros do to the outputs is undone, as well as can be, by changing
    the columns after it.

    Args:
        weight: (rows, columns).
        gram: (columns, columns), sum over tokens of the products of any two inputs.
        choose: which weights become zero, by ``w² / U_jj²``; see `Choice`.
        span: so many columns are chosen at a time; divides `BLOCK`.

    Returns:
        (rows, columns) float64 on the CPU. Weights that are zero stay zero.

    Source:
        E. Frantar and D. Alistarh, 2023, arXiv 2301.00774, algorithm 1.
    """
    w = weight.detach().double().cpu()
    upper = _inverse_root(gram.double().cpu())
    gone = w == 0
    for first in range(0, w.shape[1], BLOCK):
        after = min(first + BLOCK, w.shape[1])
        errors = torch.zeros_like(w[:, first:after])
        for j in range(first, after):
            if j % span == 0:
                part = slice(j, min(j + span, after))
                scores = (w[:, part] / upper.diagonal()[part]).square()
                gone[:, part] |= choose(scores.masked_fill(gone[:, part], -1), j)
            error = torch.where(gone[:, j], w[:, j] / upper[j, j], 0)
            w[:, j:after] -= torch.outer(error, upper[j, j:after])
            errors[:, j - first] = error
        w[:, after:] -= errors @ upper[first:after, after:]
    return w.masked_fill(gone, 0)


def _inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular U with ``Uᵀ U`` the inverse of the damped `gram`."""
    damping = DAMPING * float(gram.diagonal().mean())
    damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (damping or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root
