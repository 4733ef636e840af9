"""Low-rank updates of the mask decoder's attention, which training adds and then adds in.

While they are attached, the query and value projections of every attention compute with W + B A,
where B and A are thin; only those train. Afterwards W + B A is W, and the decoder has the modules
and shapes it had before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core._draws import generator

PROJECTIONS = ("q_proj", "v_proj")


class LowRank(nn.Module):
    """A product of two thin matrices, 0 at first.

    Args:
        rows: of the weight.
        columns: of the weight.
        rank: columns of B and rows of A.
        scale: factor of the product.
        g: draws A.
    """

    def __init__(
        self, rows: int, columns: int, rank: int, scale: float, g: torch.Generator
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(columns)  # as nn.Linear begins
        self.a = nn.Parameter((2 * torch.rand(rank, columns, generator=g) - 1) * bound)
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.scale = scale

    def forward(self) -> Tensor:
        """(rows, columns)."""
        return self.scale * (self.b @ self.a)


class _Added(nn.Module):
    """The update as a parametrization of the weight; its matrices are a module of another tree."""

    def __init__(self, update: LowRank) -> None:
        super().__init__()
        self._update = (update,)

    def forward(self, weight: Tensor) -> Tensor:
        update: Tensor = self._update[0]()
        return weight + update


def attach(decoder: nn.Module, rank: int, *, scale: float = 1.0, seed: int = 0) -> nn.ModuleList:
    """Put an update on both projections of every attention; the outputs stay what they are.

    Args:
        decoder: a mask decoder, changed until `merge`.
        rank: of the updates, >= 1.
        scale: factor of the updates.
        seed: of their first matrices.

    Returns:
        The updates, which are no submodules of the decoder: a part of their own to train.

    Source:
        LoRA, Hu et al. 2021, arXiv 2106.09685; on queries and values of SAM's decoder: EdgeSAM,
        arXiv 2312.06660.
    """
    updates = nn.ModuleList()
    for name, linear in _projections(decoder):
        g = generator(seed, "low rank", name)
        update = LowRank(linear.out_features, linear.in_features, rank, scale, g)
        updates.append(update.to(linear.weight))
        parametrize.register_parametrization(linear, "weight", _Added(update))
    return updates


def merge(decoder: nn.Module) -> None:
    """Add the updates to the weights for good: plain layers again, with the same outputs."""
    for _, linear in _projections(decoder):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def _projections(decoder: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS
    ]
