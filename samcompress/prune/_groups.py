"""Coupled slices: which tensors lose what when a unit goes, and how many units may stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn


def keep_hidden(block: MLPBlock, kept: Sequence[int]) -> None:
    """Remove the hidden units of an MLP that are not in `kept`.

    A unit is a row of ``lin1.weight`` (M, E), an element of ``lin1.bias`` (M,) and a column of
    ``lin2.weight`` (E, M). It hangs together with nothing else, so the output is exactly that of
    the whole block with those columns set to zero.
    """
    index = torch.as_tensor(kept, device=block.lin1.weight.device)
    keep_outputs(block.lin1, index)
    keep_inputs(block.lin2, index)


def keep_outputs(linear: nn.Linear, index: Tensor) -> None:
    """Keep only the outputs at `index` (n,) of a linear layer, bias included."""
    linear.weight = _cut(linear.weight, 0, index)
    if linear.bias is not None:
        linear.bias = _cut(linear.bias, 0, index)
    linear.out_features = len(index)


def keep_inputs(linear: nn.Linear, index: Tensor) -> None:
    """Keep only the inputs at `index` (n,) of a linear layer."""
    linear.weight = _cut(linear.weight, 1, index)
    linear.in_features = len(index)


def kept_count(units: int, ratio: float, round_to: int) -> int:
    """How many of `units` stay: ``units x (1 - ratio)``, down to a multiple of `round_to`.

    Example:
        >>> kept_count(3072, 0.25, 8), kept_count(100, 0.5, 8), kept_count(10, 0.9, 1)
        (2304, 48, 1)
    """
    # Rounded first, for 10 x (1 - 0.9) is a hair below 1 in binary.
    return math.floor(round(units * (1 - ratio), 6)) // round_to * round_to


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest of scores (n,), in ascending order; of equals the first."""
    order = torch.sort(scores.float().cpu(), descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def share_out(scores: Mapping[str, Tensor], total: int, round_to: int) -> dict[str, int]:
    """Divide `total` units among layers by their scores.

    Scores of a layer, (n,), are first brought to mean 0 and deviation 1. Units come in portions of
    `round_to`, best first; each layer keeps its best portion, the others go to whoever has the
    portion of the highest mean, until `total` is reached.

    Args:
        scores: for each layer, higher is more important.
        total: units to keep in all layers together.
        round_to: units of a portion.

    Returns:
        Units to keep in each layer; their sum is at most `total`, unless each keeps one portion.
    """
    counts, queue = {}, []
    for name, values in scores.items():
        values = values.float().cpu()
        values = (values - values.mean()) / (values.std(correction=0) + 1e-8)
        portions = torch.split(values.sort(descending=True).values, round_to)
        counts[name] = len(portions[0])
        queue += [(float(p.mean()), name, len(p)) for p in portions[1:]]
    # The sort is stable and a layer's portions are in falling order, so each layer gives its best.
    left = total - sum(counts.values())
    for _, name, size in sorted(queue, key=lambda portion: -portion[0]):
        if size > left:
            break
        counts[name] += size
        left -= size
    return counts


def _cut(tensor: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    values = tensor.detach().index_select(axis, index)
    return nn.Parameter(values, requires_grad=tensor.requires_grad)
