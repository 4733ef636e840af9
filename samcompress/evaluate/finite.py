"""Finds the layer at which a model's numbers stop being numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.predict import decode, encode
from ..core.prompt import Prompt


def first_nonfinite(model: nn.Module, image: np.ndarray) -> str | None:
    """Name of the first module whose output is infinite or not a number; None if all are finite.

    Args:
        model: a SAM; run on the image with a box and with a point.
        image: (H, W, 3) uint8.

    Example:
        >>> from samcompress.core.build import build
        >>> sam = build("tiny")
        >>> _ = sam.image_encoder.blocks[1].mlp.lin2.bias.data.fill_(float("inf"))
        >>> first_nonfinite(sam, np.zeros((8, 8, 3), np.uint8))
        'image_encoder.blocks.1.mlp.lin2'
    """
    height, width = image.shape[:2]
    box = [width * 0.25, height * 0.25, width * 0.75, height * 0.75]
    asked = [Prompt(box=box), Prompt(points=[[width / 2, height / 2]])]
    with _watching(model) as found:
        (embedding,) = encode(model, [image])
        decode(model, embedding, asked, full_size=False)
    return found[0] if found else None


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    found: list[str] = []
    modes = [(module, module.training) for module in model.modules()]
    # A module's hook runs when it is done, so an inner layer is named before those around it.
    hooks = [m.register_forward_hook(partial(_look, found, n)) for n, m in model.named_modules()]
    model.eval()
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


def _look(found: list[str], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    outputs = output if isinstance(output, (tuple, list)) else [output]
    tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
    if not found and not all(torch.isfinite(t).all() for t in tensors):
        found.append(name)
