"""Rounding learned unit by unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._adaround import Recipe, mend
from ._calibrate import Prompts, check_images
from ._fake import Rounded
from ._quantizers import Grouped
from ._units import calls, units

FAR = 0.01  # of a layer's weights may lie further than a step from the teacher's


@register
@dataclass(frozen=True, kw_only=True)
class Reconstruct(Transform, family="quantize", phase=50):
    """Mend a simulated model unit by unit: learn which weights are better rounded up or down.

    Each attention, each MLP and the neck learns to give what it gave in floating point, from what
    it gets in the rounded model, one after the other in order of execution. Each weight may go to
    either neighbour on its grid, and the steps of activations change a little. A unit that got no
    better stays as it was. Use it after `FakeQuant`, `PTQ4SAM`, `TinySAM` or `PQSAM` at 4 to 6
    bits, where rounding to the nearest costs most; at 8 bits there is little to mend.

    Args:
        steps: of Adam for each unit, >= 1; papers take 20 000.
        lr: of the variables that say up or down, > 0.
        step_lr: of the steps of activations, relative to each, >= 0; 0 leaves them.
        drop: share of a unit's inputs, and of the activations rounded in it, that are left
            unrounded by chance while it learns, in [0, 1). Nothing is dropped afterwards.
        images: at most so many images, >= 1; a unit's inputs for all of them are in memory.
        prompts: what the decoder is asked, see `FakeQuant`.
        seed: of what is drawn by chance.

    Raises:
        ConfigError: if a field is out of range.
        ModelError: if the model is not simulated, or the teacher not what it was made from.
        DataError: if there are no images.

    Effect:
        Weights stay on their grids; size and speed are those of the simulation. The state has the
        error of each unit before and after.

    Composes with:
        After a simulation, whose input is the teacher: in one chain the model that came in. After
        pruning or `SmoothQuant` in the same chain give ``teacher=``, the model from before the
        simulation.

    Source:
        AdaRound, M. Nagel et al., 2020, arXiv 2004.10568; BRECQ, Y. Li et al., 2021, arXiv
        2102.05426; QDrop, X. Wei et al., 2022, arXiv 2203.05740; units as in PTQ4SAM, arXiv
        2405.03144. No code used. Different from PTQ4SAM's release: nothing is dropped at
        evaluation, all layers of a unit are rounded in the end, and errors are summed over
        channels whatever the layout.

    Example:
        >>> import samcompress as sc
        >>> recipe = sc.quantize.FakeQuant(weight_bits=4, images=1)
        >>> recipe |= sc.quantize.Reconstruct(steps=2, images=1)
        >>> mended = recipe(sc.load("tiny"), data=sc.shapes(1))
        >>> errors = sc.lineage(mended)[-1].state["units"].values()
        >>> all(after <= before for before, after in errors)
        True
    """

    simulated: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    steps: int = 500
    lr: float = 1e-2
    step_lr: float = 1e-3
    drop: float = 0.5
    images: int = 32
    prompts: Prompts = "mixed"
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def validate(self) -> None:
        """Check the fields."""
        self.between("lr", 0, math.inf)
        self.between("step_lr", 0, math.inf, closed=True)
        if not 0 <= self.drop < 1:
            raise ConfigError(
                f"{self.label}: drop is out of range.", got=self.drop, expected="0 <= drop < 1"
            )
        if self.steps < 1:
            raise ConfigError(
                f"{self.label}: steps is out of range.", got=self.steps, expected=">= 1"
            )
        check_images(self.label, self.images)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Mend unit after unit."""
        teacher = ctx.original
        weights = true_weights(self.label, model, teacher)
        recipe = Recipe(self.steps, self.lr, self.step_lr, self.drop)
        noise = torch.Generator().manual_seed(self.seed)
        errors = {}
        names = units(model, ctx, self.prompts)
        for name in ctx.progress.track(names, label="units"):
            unit = model.get_submodule(name)
            seen = calls(model, teacher, name, ctx, images=self.images, prompts=self.prompts)
            own = {
                inner: weights[f"{name}.{inner}".strip(".")]
                for inner, layer in unit.named_modules()
                if isinstance(layer, Rounded)
            }
            errors[name] = [float(f"{e:.6g}") for e in mend(unit, own, seen, recipe, noise)]
        return {"units": errors}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Nothing to do: no shape has changed."""
        return state


def check_simulated(label: str, model: nn.Module) -> None:
    """Check that a model has simulated layers.

    Raises:
        ModelError: if not.
    """
    if not any(isinstance(m, Rounded) for m in model.modules()):
        raise ModelError(
            f"{label} mends simulated models, and this one is not quantized.",
            expected="a model after sc.quantize.FakeQuant, PTQ4SAM, TinySAM or PQSAM",
            fix=f"sc.quantize.FakeQuant(weight_bits=4, activation_bits=4) | {label}",
        )


def true_weights(label: str, model: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """What the weights of rounded layers were, from the teacher's.

    Signs that were turned and factors that were folded in are taken from the rounded layer.

    Raises:
        ModelError: if the model is not simulated, or the teacher's weights are others.
    """
    check_simulated(label, model)
    modules = dict(teacher.named_modules())
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Rounded):
            continue
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != layer.weight.shape:
            raise _other(label, name, "a layer of another shape, or none")
        found[name] = _aligned(layer, weight.detach().to(layer.weight))
        away = _away(layer, found[name])
        if away > FAR:
            raise _other(label, name, f"{away:.1%} of the weights more than a step away")
    return found


def _aligned(layer: Any, weight: Tensor) -> Tensor:
    if isinstance(layer.input, Grouped):
        weight = weight * layer.input.channels()[1].to(weight)
    same = (weight * layer.weight.detach()).flatten(1).sum(1)
    signs: Tensor = layer.along(torch.where(same < 0, -1.0, 1.0).to(weight))
    return weight * signs


def _away(layer: Any, weight: Tensor) -> float:
    """The share of weights that no rounding up or down, nor clipping, brings to the layer's."""
    scale, zero = layer.along(layer.weight_scale), layer.along(layer.weight_zero)
    low, high = (scale * (code - zero) for code in layer.grid.codes)
    inside = torch.minimum(torch.maximum(weight.float(), low), high)
    return float(((inside - layer.weight.detach().float()).abs() > 1.01 * scale).float().mean())


def _other(label: str, name: str, got: str) -> ModelError:
    return ModelError(
        f"{label}: the teacher is not the model that was rounded.",
        where=name,
        got=got,
        expected="the floating-point model from before the simulation",
        fix="run the steps before the simulation in a call of their own, or pass teacher=",
    )
