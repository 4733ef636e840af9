"""Batch norms that do something."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def alive(module: nn.Module, seed: int = 0) -> Any:
    """Batch norms with statistics and weights of their own: fresh ones are nearly identities."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for name, low in (("running_mean", -1.0), ("running_var", 0.2), ("weight", -1.5)):
                tensor = getattr(part, name)
                if tensor is not None:
                    tensor.data.uniform_(low, 2, generator=generator)
            if part.bias is not None:
                part.bias.data.uniform_(-1, 1, generator=generator)
    return module.eval()
