"""A small head on the embedding that says where to ask: a heat map of points, and boxes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HOT = 0.5  # heat of the cells that say where the box is
REACH = 4.0  # logarithm of the largest distance to a box's side, in cells: limits the exponential


class HeatMap(nn.Module):
    """Embeddings to the heat of each cell, and the distances to its object's sides.

    Args:
        channels: C of the embedding.
        width: inside.

    Source:
        after Lite-SAM's AutoPPN, Fu et al. 2024, arXiv 2407.08965, of which no code is public; the
        layers are our choice.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(1, width), nn.GELU()
        )
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GELU(), nn.Conv2d(width, 5, 1)
        )
        self.channels = channels

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See above.

        Args:
            features: (B, C or more, h, w); what follows the first C channels is not looked at.

        Returns:
            (B, 1, h, w) heat in 0...1, 1 at the middle of an object and 0 outside all, and
            (B, 4, h, w) distances to left, top, right and bottom, in cells.
        """
        found = self.branch(self.stem(features[:, : self.channels]))
        return found[:, :1].sigmoid(), found[:, 1:].clamp(max=REACH).exp()


def targets(masks: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the head should say of an image.

    The heat of a mask is how many times it can be shrunk by a pixel before a place is lost, over
    the largest such number; an object too small for the grid still has heat 1 in one cell. Where
    masks overlap the hottest one counts.

    Args:
        masks: (A, n, m) shares in 0...1, on a grid that is a multiple of the cells'.
        grid: h, w, the cells.

    Returns:
        (h, w) heat, and (4, h, w) distances in cells to the sides of the hottest mask's box.
    """
    h, w = grid
    if not len(masks):
        return masks.new_zeros(h, w), masks.new_ones(4, h, w)
    depth = _depth(masks >= 0.5)
    heat = F.adaptive_max_pool2d(depth[:, None], grid)[:, 0]
    heat = heat / heat.flatten(1).amax(1).clamp(min=1e-6)[:, None, None]
    # A mask of less than half of every place: the cell that it covers most.
    thin = heat.flatten(1).amax(1) == 0
    share = F.adaptive_avg_pool2d(masks[thin][:, None], grid)[:, 0].flatten(1)
    heat[thin] = F.one_hot(share.argmax(1), h * w).view(-1, h, w).to(heat)
    best, owner = heat.max(0)
    sides = torch.stack([_sides(mask, grid) for mask in masks])
    return best, sides.permute(1, 0, 2, 3).gather(1, owner.expand(4, 1, h, w))[:, 0]


def _depth(masks: Tensor) -> Tensor:
    """How often each place survives that its mask loses its border; the frame is a border too."""
    left, total = F.pad(masks.float(), (1, 1, 1, 1))[:, None], 0.0
    found = torch.zeros_like(left)
    while left.any() and total < max(masks.shape[-2:]):
        found += left
        left = -F.max_pool2d(F.pad(-left, (1, 1, 1, 1)), 3, 1)
        total += 1
    return found[:, 0, 1:-1, 1:-1]


def _sides(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(4, h, w) distances of cell centres to the sides of a mask's box, in cells."""
    n, m = mask.shape
    rows, columns = mask.amax(1) >= 0.5, mask.amax(0) >= 0.5
    if not rows.any():
        rows, columns = mask.amax(1) > 0, mask.amax(0) > 0
    ys, xs = rows.nonzero()[:, 0], columns.nonzero()[:, 0]
    ends = [float(v) for v in (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)] if len(ys) else [0, 0, m, n]
    x = torch.arange(grid[1], device=mask.device) + 0.5
    y = (torch.arange(grid[0], device=mask.device) + 0.5)[:, None]
    x0, y0, x1, y1 = (v * g / s for v, g, s in zip(ends, grid[::-1] * 2, (m, n) * 2, strict=True))
    wide = torch.ones(grid, device=mask.device)
    return torch.stack([(x - x0) * wide, (y - y0) * wide, (x1 - x) * wide, (y1 - y) * wide])


def losses(
    heat: Tensor, sides: Tensor, wanted: Tensor, reach: Tensor, valid: Tensor
) -> dict[str, Tensor]:
    """Squared error of the heat on hot cells and the hardest cold ones; 1 - IoU of boxes.

    Args:
        heat: (B, h, w) in 0...1.
        sides: (B, 4, h, w) in cells.
        wanted: (B, h, w) target heat.
        reach: (B, 4, h, w) target distances.
        valid: (B, h, w) cells that show the image.
    """
    error = (heat - wanted).square()
    hot = (wanted > 0.3) & valid
    cold = valid & ~hot
    count = min(int(cold.sum()), 3 * max(1, int(hot.sum())))
    hardest = error[cold].topk(count).values
    chosen = torch.cat([error[hot], hardest])
    boxed = (wanted > HOT) & valid
    mine, theirs = (s.permute(0, 2, 3, 1)[boxed].clamp(min=1e-3) for s in (sides, reach))
    inner = torch.minimum(mine, theirs)
    inside = (inner[:, 0] + inner[:, 2]) * (inner[:, 1] + inner[:, 3])
    areas = [(s[:, 0] + s[:, 2]) * (s[:, 1] + s[:, 3]) for s in (mine, theirs)]
    overlap = inside / (areas[0] + areas[1] - inside)
    # Means over nothing would be NaN.
    return {
        "heat": chosen.sum() / max(1, len(chosen)),
        "boxes": (1 - overlap).sum() / max(1, len(overlap)),
    }
