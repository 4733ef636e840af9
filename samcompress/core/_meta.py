"""Modules without storage: shapes without numbers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def without_storage(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying a weight; the module is not touched."""
    meta: dict[int, Any] = {}
    for parameter in module.parameters():
        meta[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        meta[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, meta)
