"""Which layers a technique of this family may act on, and what it says when it cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, NoEffectError
from ..core.where import Where
from ._fake import Rounded
from ._layers import Stored


def layers(
    model: nn.Module,
    where: Where,
    kinds: tuple[type[nn.Module], ...],
    *,
    step: str,
    least: int = 0,
) -> list[str]:
    """Names of floating-point layers of exactly these classes; integer ones are passed over.

    Args:
        model: the model searched.
        where: patterns on names.
        kinds: classes of layers; a subclass may use its weight in ways we do not know.
        step: who asks, for errors.
        least: layers of fewer weights are passed over too.

    Raises:
        NoEffectError: if nothing matches, or all that does is smaller than `least`.
        ModelError: if all that matches is integer already, or the model only simulates integers.
    """
    check_not_simulated(step, model)
    found: list[tuple[str, Any]] = where.select(model, (*kinds, Stored), step=step)
    plain = [(n, m) for n, m in found if type(m) in kinds and _zeros_around(m)]
    left = [name for name, layer in plain if layer.weight.numel() >= least]
    if left:
        return left
    if plain:
        raise NoEffectError(
            f"{step} found no layer left to quantise.",
            where=repr(where),
            got=f"{len(plain)} layers of fewer than {least} weights",
            fix="a smaller min_size=",
        )
    done = sorted({type(layer).__name__ for _, layer in found if isinstance(layer, Stored)})
    raise ModelError(
        f"{step} met layers that hold integers already.",
        where=repr(where),
        got=f"{len(found)} layers: {', '.join(done) or type(found[0][1]).__name__}",
        expected="floating-point layers: integers are not rounded twice",
        fix="start from the model before that step, or choose other layers with where=",
    )


def check_not_simulated(step: str, model: nn.Module) -> None:
    """Check that no layer computes with rounded numbers in floating point.

    Raises:
        ModelError: if one does.
    """
    done = next((name for name, layer in model.named_modules() if isinstance(layer, Rounded)), None)
    if done is not None:
        raise ModelError(
            f"{step} met a model that simulates quantization.",
            where=done,
            got=type(model.get_submodule(done)).__name__,
            expected="floating-point layers",
            fix="start from the model before the simulation",
        )


def finite_weight(name: str, layer: Any, *, step: str) -> Tensor:
    """The weight of a layer.

    Raises:
        ModelError: if it is not finite.
    """
    weight: Tensor = layer.weight.detach()
    if not torch.isfinite(weight).all():
        raise ModelError(
            f"{step} met a weight that is not finite.",
            where=f"{name}.weight",
            got=f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} values",
            expected="finite numbers",
        )
    return weight


def _zeros_around(layer: Any) -> bool:
    return getattr(layer, "padding_mode", "zeros") == "zeros"
