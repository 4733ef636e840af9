"""Which weights train, while all else is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .errors import ModelError, NoEffectError


def trainable(model: nn.Module, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The floating-point parameters of submodules, by name.

    Raises:
        NoEffectError: if there are none.
        ModelError: if they are not float32.
    """
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if inside(name, parts) and parameter.is_floating_point()
    }
    if not chosen:
        raise NoEffectError(
            "there is nothing to train.", where=", ".join(parts), got="no floating-point weights"
        )
    odd = next((name for name, p in chosen.items() if p.dtype != torch.float32), None)
    if odd is not None:
        raise ModelError(
            "weights can only be trained in float32.",
            where=odd,
            got=chosen[odd].dtype,
            fix="model.float() first; reduce the precision afterwards",
        )
    return chosen


@contextmanager
def training(model: nn.Module, parts: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Let only the named submodules train, all else frozen and in eval mode; restored afterwards.

    Args:
        model: the model.
        parts: dotted names of submodules; ``""`` is the whole model.

    Yields:
        The parameters that train, by name.

    Raises:
        NoEffectError, ModelError: see `trainable`.
    """
    chosen = trainable(model, parts)
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for part in parts:
            model.get_submodule(part).train()
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def inside(name: str, parts: Sequence[str]) -> bool:
    """Whether a parameter or buffer belongs to one of the submodules."""
    return any(not part or name == part or name.startswith(f"{part}.") for part in parts)
