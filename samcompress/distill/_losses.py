"""Distances between image embeddings, over the cells that show the image."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["mse", "huber", "l1", "mse+cos"]


def valid_cells(input_size: tuple[int, int], side: int, grid: tuple[int, int]) -> Tensor:
    """Cells of the embedding whose centre lies in the image, not in the padding.

    Args:
        input_size: height and width of the resized image inside the padded square.
        side: S of the square.
        grid: h, w of the embedding.

    Returns:
        (1, h, w) float32, 1 inside and 0 in the padding; never all 0.
    """
    rows, columns = (
        # Cell i has its centre at (i + 0.5) * S / h.
        max(1, math.floor(length * cells / side + 0.5))
        for length, cells in zip(input_size, grid, strict=True)
    )
    valid = torch.zeros(1, *grid)
    valid[:, :rows, :columns] = 1
    return valid


def to_grid(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w) embeddings on another grid: means of cells if coarser, bilinear if finer."""
    own = (embedding.shape[-2], embedding.shape[-1])
    return (
        embedding
        if own == tuple(grid)
        else F.interpolate(embedding, grid, mode=resizing(own, grid))
    )


def resizing(own: tuple[int, int], grid: tuple[int, int]) -> str:
    """How embeddings get from one grid to another."""
    # Plain means: a wider filter blurs, and cost more of the masks where we measured it.
    return "area" if grid[0] < own[0] else "bilinear"


def embedding_loss(student: Tensor, teacher: Tensor, valid: Tensor, kind: Kind) -> Tensor:
    """Mean over the images of the mean over their valid cells.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w).
        valid: (B, 1, h, w), 1 where a cell counts.
        kind: ``mse``, ``huber`` (quadratic up to 1) and ``l1`` are means over the channels;
            ``mse+cos`` adds one minus the cosine of the two vectors of a cell.

    Returns:
        A scalar; exactly 0 with gradient 0 for equal embeddings (``l1``: any subgradient).
    """
    if kind == "huber":
        cell = F.huber_loss(student, teacher, reduction="none").mean(1, keepdim=True)
    elif kind == "l1":
        cell = (student - teacher).abs().mean(1, keepdim=True)
    else:
        cell = (student - teacher).square().mean(1, keepdim=True)
    if kind == "mse+cos":
        # 1 - cos is half the squared distance of the unit vectors: exact at equality, unlike 1 - x.
        apart = F.normalize(student, dim=1) - F.normalize(teacher, dim=1)
        cell = cell + apart.square().sum(1, keepdim=True) / 2
    weight = valid / valid.sum((1, 2, 3), keepdim=True)
    return (cell * weight).sum((1, 2, 3)).mean()
