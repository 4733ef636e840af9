"""Padding of maps to whole windows, after the projection instead of before it."""

from __future__ import annotations

import torch
from torch import Tensor


def pad(x: Tensor, size: int, bias: Tensor | None) -> Tensor:
    """Pad a projected map at the bottom and right so that windows of `size` tile it.

    segment_anything pads the input of the projection with zeros; a zero projects to the bias, so
    padding its output with the bias is the same map without projecting the padding.

    Args:
        x: (B, h, w, C) output of the projection.
        size: side of a window.
        bias: (C,) bias of the projection, None if it has none.

    Returns:
        (B, h', w', C) with h' and w' multiples of `size`.
    """
    fill = x.new_zeros(1) if bias is None else bias.to(x)
    for axis in (2, 1):
        missing = -x.shape[axis] % size
        if missing:
            shape = [missing if a == axis else n for a, n in enumerate(x.shape)]
            x = torch.cat([x, fill.expand(shape)], axis)
    return x
