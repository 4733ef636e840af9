"""What techniques that set single weights to zero have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._slices import check_finite, readable
from ._sparse_choice import reconstructed
from ._sparse_inputs import products, squares, sums
from ._sparse_layers import Sparse24Linear, SparseLinear

LINEARS = (nn.Linear, SparseLinear, Sparse24Linear)


@dataclass(frozen=True, kw_only=True)
class Sparse(Transform):
    """Choose weights, set them to zero, and see that they stay zero."""

    span: ClassVar[int]  # columns that SparseGPT chooses from at a time

    criterion: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    where: Where = Where(("image_encoder.blocks.*.mlp.*",))
    images: int = 16
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at images."""
        return self.criterion != "magnitude"

    def validate(self) -> None:
        """Check ranges."""
        if self.images < 1:
            raise ConfigError(
                f"{self.label}: images is out of range.", got=self.images, expected="at least 1"
            )

    @abstractmethod
    def choose(self, scores: Tensor, start: int) -> Tensor:
        """Which weights become zero; see `Choice`."""

    @abstractmethod
    def done(self, layer: nn.Linear) -> bool:
        """Whether a layer has all the zeros already that it would get."""

    @abstractmethod
    def twin(self, layer: nn.Linear) -> SparseLinear:
        """What takes a layer's place, with its weights."""

    def check(self, model: nn.Module) -> None:
        """Check that there are weights to set to zero."""
        if all(self.done(layer) for layer in self.layers(model).values()):
            raise NoEffectError(
                f"{self.label} would set nothing to zero.",
                where=repr(self.where),
                got="layers that have as many zeros already, or so few weights that none would go",
                fix="leave this step out, or choose other layers with where=",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Judge, set to zero, and put layers in place that keep the zeros."""
        layers = self.layers(model)
        left = dict(layers)
        if self.needs_data:
            measure = products if self.criterion == "sparsegpt" else squares

            def samples() -> Iterable[Any]:
                return readable(self.label, ctx, self.images)

            for heard in sums(model.eval(), list(layers), samples, measure, self.seed):
                for name, found in heard.items():
                    self._thin(name, left.pop(name), found)
        # All layers, or those that no image reaches.
        for name in ctx.progress.track(list(left), label="layers"):
            self._thin(name, left[name], None)
        return self.rebuild(model, {"layers": list(layers)})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put layers in place that keep their zeros."""
        for name in state["layers"]:
            layer: Any = model.get_submodule(name)
            model.set_submodule(name, self.twin(layer))
        return state

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Linears to thin out, by name."""
        found = self.where.select(model, LINEARS, step=self.label)
        plain = {name: layer for name, layer in found if type(layer) in LINEARS}
        if not plain:
            raise ModelError(
                f"{self.label} met layers that were replaced.",
                where=found[0][0],
                got=type(found[0][1]).__name__,
                expected="torch.nn.Linear",
                fix="thin out before other steps replace layers, e.g. quantization",
            )
        return plain

    @torch.no_grad()
    def _thin(self, name: str, layer: nn.Linear, heard: Tensor | None) -> None:
        weight = layer.weight.float()
        check_finite(self.label, {name: weight.flatten()})
        if heard is not None:
            check_finite(self.label, {name: heard.flatten()})
        if self.criterion == "sparsegpt" and heard is not None:
            layer.weight.copy_(reconstructed(weight, heard, self.choose, self.span))
            return
        scores = weight.abs() if heard is None else weight.abs() * heard.sqrt()
        # Zeros count among the chosen, also where a weight on idle inputs scores no more.
        chosen = self.choose(scores.masked_fill(weight == 0, -1), 0)
        layer.weight.masked_fill_(chosen, 0)
