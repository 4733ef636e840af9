"""Fewer, larger tokens: soft clusters inside windows, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._grid import bands, tile, untile
from ._token_blocks import Part

REACH = 2  # steps of the smaller grid from a token's own cell to the clusters it may belong to


class Band(NamedTuple):
    """Windows side by side along an axis of a map.

    Attributes:
        tokens: along all of them.
        side: tokens along one.
        clusters: along all of them.
        cells: clusters along one.
    """

    tokens: int
    side: int
    clusters: int
    cells: int


@dataclass(frozen=True)
class Clusters:
    """How a map is clustered.

    Attributes:
        window: side of the windows that are clustered, in tokens.
        side: clusters along the side of such a window.
        iterations: of soft k-means.
        neighbours: clusters that count for a token on the way back.
        sharpness: how fast the share of a cluster falls with the squared distance.
        add: give each token what has changed in its clusters; else make it of them alone.
    """

    window: int
    side: int
    iterations: int
    neighbours: int
    sharpness: float
    add: bool

    def bands(self, length: int) -> list[Band]:
        """Cut one side of a map into its windows; those at the edge have clusters as dense."""
        found = []
        for tokens, side in bands(length, self.window):
            cells = max(1, round(side * self.side / self.window))
            found.append(Band(tokens, side, tokens // side * cells, cells))
        return found

    def count(self, length: int) -> int:
        """Clusters along a side of a map."""
        return sum(band.clusters for band in self.bands(length))

    def part(self, part: Part) -> Part:
        """What the clusters of part of a map stand for: as much as the tokens of their cells do."""
        return Part(self.count(part.side), self._pooled(part.rows), self._pooled(part.columns))

    def _pooled(self, counts: Tensor) -> Tensor:
        """Means over the cells along one side of a map, (h,) to (h',)."""
        found, cut = [], self.bands(len(counts))
        for band, piece in zip(cut, torch.split(counts, [b.tokens for b in cut]), strict=True):
            pool = pooling(band.side, band.cells, piece.device).to(piece)
            found.append((piece.view(-1, band.side) @ pool.T).flatten())
        return torch.cat(found)

    def __call__(self, x: Tensor) -> Clustered:
        """Cluster a map (B, h, w, C), window by window."""
        down, across = self.bands(x.shape[1]), self.bands(x.shape[2])
        rows, shares = [], []
        for tall, row in zip(down, torch.split(x, [b.tokens for b in down], 1), strict=True):
            found = []
            for broad, part in zip(
                across, torch.split(row, [b.tokens for b in across], 2), strict=True
            ):
                windows = tile(part, tall.side, broad.side)
                centres, share = self._cluster(windows, (tall.cells, broad.cells))
                found.append(untile(centres, len(x), tall.clusters))
                shares.append(share)
            rows.append(torch.cat(found, 2))
        return Clustered(self, torch.cat(rows, 1), shares)

    def _cluster(self, windows: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cluster windows.

        Args:
            windows: (W, a, b, C).
            grid: clusters along height and width.

        Returns:
            (W, a', b', C) means, and (W, a·b, a'·b') the share of each in each token.
        """
        size, at = windows.shape[1:3], windows.device
        near = torch.kron(*(within(n, m, at) for n, m in zip(size, grid, strict=True))) > 0
        pool = torch.kron(*(pooling(n, m, at) for n, m in zip(size, grid, strict=True)))
        tokens = windows.flatten(1, 2).float()
        centres = pool @ tokens
        for _ in range(self.iterations):
            closeness = -self.sharpness * distances(tokens, centres)
            share = closeness.masked_fill(~near, -torch.inf).softmax(-1).mT
            total = share.sum(-1, keepdim=True)
            # A cluster to which nothing belongs stays where it is.
            means = share @ tokens / total.clamp_min(torch.finfo(total.dtype).tiny)
            centres = torch.where(total > 0, means, centres)
        apart = distances(tokens, centres)
        nearest = apart.topk(min(self.neighbours, apart.shape[-1]), -1, largest=False)
        closeness = torch.full_like(apart, -torch.inf)
        closeness = closeness.scatter(-1, nearest.indices, -self.sharpness * nearest.values)
        share = closeness.softmax(-1)
        return centres.reshape(len(windows), *grid, -1).to(windows.dtype), share.to(windows.dtype)


@dataclass(frozen=True)
class Clustered:
    """A clustered map.

    Attributes:
        how: it was clustered.
        centres: (B, h', w', C) clusters.
        shares: of each cluster in each token, (W, tokens, clusters) of each part of the map.
    """

    how: Clusters
    centres: Tensor
    shares: list[Tensor]

    def back(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Make tokens of clusters.

        Args:
            tokens: (B, h, w, C) that were clustered.
            x: (B, h', w', C) what became of the clusters.

        Returns:
            (B, h, w, C).
        """
        x = x - self.centres if self.how.add else x
        down, across = (self.how.bands(length) for length in tokens.shape[1:3])
        rows, shares = [], iter(self.shares)
        for tall, row in zip(down, torch.split(x, [b.clusters for b in down], 1), strict=True):
            found = []
            for broad, part in zip(
                across, torch.split(row, [b.clusters for b in across], 2), strict=True
            ):
                whole = next(shares) @ tile(part, tall.cells, broad.cells).flatten(1, 2)
                windows = whole.reshape(-1, tall.side, broad.side, x.shape[3])
                found.append(untile(windows, len(x), tall.tokens))
            rows.append(torch.cat(found, 2))
        made = torch.cat(rows, 1)
        return tokens + made if self.how.add else made


def distances(tokens: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (W, N, M) of tokens (W, N, C) and centres (W, M, C)."""
    squares = tokens.square().sum(-1)[..., None] + centres.square().sum(-1)[:, None]
    return (squares - 2 * tokens @ centres.mT).clamp_min(0)


def pooling(length: int, cells: int, device: torch.device) -> Tensor:
    """(cells, length) weights of adaptive average pooling: those of a cell are alike, sum 1."""
    place, cell = torch.arange(length, device=device), torch.arange(cells, device=device)[:, None]
    start = cell * length // cells
    end = ((cell + 1) * length + cells - 1) // cells
    inside = ((place >= start) & (place < end)).float()
    return inside / inside.sum(-1, keepdim=True)


def within(length: int, cells: int, device: torch.device) -> Tensor:
    """(length, cells) 1 where a cell is at most `REACH` from the place's own, else 0."""
    own = torch.arange(length, device=device)[:, None] * cells // length
    return ((own - torch.arange(cells, device=device)).abs() <= REACH).float()
