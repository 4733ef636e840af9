"""What the tests of approximate attention share: SAM's attention with a mask, and what it reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of rows and columns of query and key


def block(
    dim: int = 32,
    heads: int = 2,
    window: int = 0,
    grid: tuple[int, int] = (12, 12),
    *,
    rel_pos: bool = True,
) -> Block:
    """A block whose tables and biases are random, and whose tables fit the grid or the window."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Block(
            dim, heads, qkv_bias=True, use_rel_pos=rel_pos, window_size=window, input_size=grid
        )
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "rel_pos" in name or "bias" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=drawn))
    # Scores of several units: with flat ones a wrong mask hardly shows.
    made.attn.qkv.weight.data.mul_(3)
    return made.eval()


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column of each query, (N, 1), and of each key, (1, N)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = rows.flatten(), columns.flatten()
    return y[:, None], x[:, None], y[None], x[None]


def masked(attn: Any, x: Tensor, mask: Tensor) -> Tensor:
    """SAM's attention over a map, written down plainly, without the keys that a mask excludes.

    Args:
        attn: a segment_anything `Attention` with tables for the map.
        x: (B, h, w, C).
        mask: (N, N) or (heads, N, N), True for pairs of query and key that meet.
    """
    batch, height, width, _ = x.shape
    count = height * width
    qkv = attn.qkv(x).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if attn.use_rel_pos:
        qy, qx, ky, kx = places(height, width)
        scores = scores + torch.einsum("bnqd,qkd->bnqk", q, attn.rel_pos_h[qy - ky + height - 1])
        scores = scores + torch.einsum("bnqd,qkd->bnqk", q, attn.rel_pos_w[qx - kx + width - 1])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    weights = torch.where(mask, weights, 0)  # rows without any key give 0
    out = (weights @ v).transpose(1, 2).reshape(batch, height, width, -1)
    found: Tensor = attn.proj(out)
    return found


def reach(attn: nn.Module, height: int, width: int, dim: int = 32) -> Tensor:
    """(N, N) whether the output at a token depends on the input at another, by gradients."""
    x = tokens(1, height, width, dim).requires_grad_()
    out = attn(x).flatten(1, 2)[0].square().sum(-1)
    found = []
    for value in out:
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        found.append(gradient.flatten(1, 2)[0].abs().amax(-1) > 0)
    return torch.stack(found)
