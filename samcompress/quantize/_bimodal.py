"""Keys with two peaks: found by their density, folded into one by signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.transform import Context
from ._calibrate import Prompts, calibrate
from ._observe import finite

PLACE = "token_to_image"
BINS = 4096  # the values are counted before they are smoothed


def crossings(model: nn.Module) -> list[str]:
    """Attentions in which tokens look at the image: the only ones whose keys are known to split."""
    return [
        name
        for name, module in model.named_modules()
        if PLACE in name.rpartition(".")[2]
        and all(hasattr(module, p) for p in ("q_proj", "k_proj"))
    ]


def fold(
    model: nn.Module,
    ctx: Context,
    *,
    grid: int,
    peak_height: float,
    peak_distance: int,
    prompts: Prompts,
) -> dict[str, list[int]]:
    """Turn the sign of channels of keys, and of the queries they meet, where keys have two peaks.

    Products of queries and keys stay as they are, bit for bit.

    Returns:
        The channels turned, by attention; an attention that is absent has not two peaks.
    """
    seen: dict[str, Tensor] = {}
    outputs = {f"{name}.k_proj": _keep(seen, f"{name}.k_proj") for name in crossings(model)}
    calibrate(model, {}, ctx, outputs=outputs, images=1, prompts=prompts)
    turned: dict[str, list[int]] = {}
    for name in crossings(model):
        keys = seen[f"{name}.k_proj"]
        if peaks(keys[0].flatten(), grid, peak_height, peak_distance) != 2:
            continue
        signs = channel_signs(keys)
        attn: Any = model.get_submodule(name)
        for layer in (attn.q_proj, attn.k_proj):
            turn(layer, signs)
        turned[name] = (signs < 0).nonzero().flatten().tolist()
    return turned


def peaks(values: Tensor, grid: int, height: float, distance: int) -> int:
    """How many peaks the density of values has.

    Args:
        values: (n,).
        grid: points from the smallest to the largest value at which the density is known.
        height: of a peak at least, over the sum of the density at all points.
        distance: points between two peaks at least; of two that are closer the higher counts.
    """
    from scipy.signal import find_peaks

    values = values.double().cpu()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return 1
    counts = torch.histc(values, BINS, low, high)
    centres = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (high - low) / BINS
    width = float(values.std()) * len(values) ** -0.2  # Scott's rule
    points = torch.linspace(low, high, grid, dtype=torch.float64)
    density = torch.exp(-0.5 * ((points[:, None] - centres) / width) ** 2) @ counts
    found, _ = find_peaks(density.numpy(), height=height * float(density.sum()), distance=distance)
    return len(found)


def channel_signs(keys: Tensor) -> Tensor:
    """(C,) 1 or -1: the sign of each channel's mean over (P, n, C); 1 where that is 0."""
    means = keys.double().mean((0, 1))
    return torch.where(means < 0, -1.0, 1.0).float()


@torch.no_grad()
def turn(layer: Any, signs: Tensor) -> None:
    """Multiply the outputs of a Linear by signs, through its weight and bias."""
    signs = signs.to(layer.weight)
    layer.weight.mul_(signs[:, None])
    if layer.bias is not None:
        layer.bias.mul_(signs)


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(output: Tensor) -> None:
        # The first call is that of the first prompt's kind.
        seen.setdefault(name, finite(name, output.detach().float()))

    return keep
