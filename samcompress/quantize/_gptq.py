"""Rounding that makes up for itself: each column's error moves the columns not yet rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ._int4 import BITS, group_codes, group_scale
from ._observe import finite

DAMPING = 0.01  # of the mean of the diagonal
TOKENS = 4096  # of an image


class Products:
    """Sum of x xᵀ over the tokens that a layer gets; one image at a time.

    Args:
        name: of the layer, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add (..., n) tokens, at most `TOKENS` of them, evenly drawn.

        Raises:
            DataError: if one is not finite.
        """
        tokens = finite(self.name, x.detach().flatten(0, -2).float())
        tokens = tokens[:: -(-len(tokens) // TOKENS)]
        added = tokens.T @ tokens
        self.total = added if self.total is None else self.total.add_(added)


def gptq(
    weight: Tensor, products: Tensor, group: int, *, bits: int = BITS, clip_search: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes of a weight that keep its outputs rather than its numbers.

    Args:
        weight: (out, n).
        products: (n, n) sum of x xᵀ of the inputs; any multiple.
        group: weights of a scale, dividing n.
        bits: of a code.
        clip_search: see `group_scale`.

    Returns:
        (out, n/g, g) codes, whole numbers in float32, and (out, n/g) scales.
    """
    left = weight.detach().double()
    hessian = products.double()
    damp = DAMPING * hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    inverse = torch.linalg.inv(hessian + damp * eye)
    spread = torch.linalg.cholesky(inverse, upper=True)
    left, codes, scales = left.clone(), [], []
    for start in range(0, left.shape[1], group):
        end = start + group
        part = left[:, start:end]
        scale = group_scale(part, bits=bits, clip_search=clip_search)
        errors = torch.zeros_like(part)
        found = torch.zeros_like(part, dtype=torch.float32)
        for column in range(group):
            at = start + column
            code = group_codes(part[:, column : column + 1], scale, bits=bits)
            rounded = code.double() * scale.double()[:, None]
            error = (part[:, column : column + 1] - rounded) / spread[at, at]
            part[:, column:] -= error * spread[at, at:end]
            errors[:, column : column + 1] = error
            found[:, column : column + 1] = code
        left[:, end:] -= errors @ spread[start:end, end:]
        codes.append(found)
        scales.append(scale)
    return torch.stack(codes, 1), torch.stack(scales, 1)
