"""Integers where they cost least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data import Sample
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import register
from ..core.sizes import tensor_bytes
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._calibrate import check_images, encoded, evaluating, first_images
from ._choose import finite_weight, layers
from ._int8 import DynamicLinear, check_device, check_speed, swapped
from ._observe import finite


@register
@dataclass(frozen=True, kw_only=True)
class Mixed(Transform, family="quantize", phase=50):
    """Make Linears `Int8Dynamic`'s one by one, those that disturb the embedding least first.

    Use it where `Int8Dynamic` of all Linears loses too much, or to see which layers are sensitive.
    It encodes the calibration images once for each Linear: 48 times for ``vit_b``.

    Args:
        error: largest relative L2 change of the embedding; as many layers as stay below it.
        size: largest share of the model's bytes; layers by the least change for what they save,
            until it is reached. Give one of the two.
        where: Linears of the image encoder to choose from.
        images: calibration images, the first of the data.
        force: also where the layers are slower than those of the model.

    Raises:
        ConfigError: if not exactly one of `error` and `size` is given, or a number is out of range,
            or integers in all layers do not reach `size`.
        DataError: if there are no images, or an embedding is not finite.
        NoEffectError: if no Linear matches, or `error` allows none to change.
        ModelError: as `Int8Dynamic`, and if `where` reaches beyond the image encoder, as what is
            there does not change the embedding.
        BackendError: as `Int8Dynamic`.

    Effect:
        Layers that stay keep the model's type; `BFloat16` after it makes them bfloat16. The error
        and each layer's own are in the state.

    Composes with:
        As `Int8Dynamic`.

    Source:
        Greedy choice by sensitivity, as in HAWQ, Z. Dong et al., ICCV 2019, arXiv 1905.03696, with
        measured errors in place of curvature. Own code.

    Example:
        >>> import samcompress as sc
        >>> step = sc.quantize.Mixed(size=0.9, images=1, force=True)
        >>> small = step(sc.build("tiny"), data=sc.shapes(1))
        >>> 0 < len(sc.lineage(small)[-1].state["layers"]) < 16
        True
    """

    error: float | None = None
    size: float | None = None
    where: Where = Where(("image_encoder.**",))
    images: int = 4
    force: bool = False

    @property
    def needs_data(self) -> bool:
        """It measures what each layer changes."""
        return True

    def validate(self) -> None:
        """Check the budget and `images`."""
        check_images(self.label, self.images)
        if (self.error is None) == (self.size is None):
            raise ConfigError(
                f"{self.label} takes one budget.",
                got=f"error={self.error}, size={self.size}",
                expected="error= or size=",
            )
        self.between("size" if self.error is None else "error", 0, 1)

    def check(self, model: nn.Module) -> None:
        """Check that a Linear is left, and that integers can be multiplied."""
        check_device(model, step=self.label)
        self._layers(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Measure each layer alone, then choose."""
        names = self._layers(model)
        if not self.force:
            check_speed(model, names, DynamicLinear, step=self.label)
        samples = list(first_images(ctx, self.images))
        before = tensor_bytes(model)
        with torch.no_grad(), evaluating(model):
            expected = _embeddings(model, samples)
            alone: dict[str, float] = {}
            saved: dict[str, int] = {}
            for name in ctx.progress.track(names, label="layers"):
                layer: Any = model.get_submodule(name)
                finite_weight(name, layer, step=self.label)
                _integer(model, name)
                alone[name] = _change(model, samples, expected)
                saved[name] = before - tensor_bytes(model)
                model.set_submodule(name, layer)
            order = sorted(names, key=lambda name: alone[name] ** 2 / max(saved[name], 1))
            chosen = self._chosen(order, alone, saved, before)
            floats = {name: model.get_submodule(name) for name in chosen}
            for name in chosen:
                _integer(model, name)
            error = _change(model, samples, expected)
            # Errors of layers do not add up exactly, so the last ones may have to go back.
            while self.error is not None and error > self.error and chosen:
                name = chosen.pop()
                model.set_submodule(name, floats[name])
                error = _change(model, samples, expected)
        if not chosen:
            raise NoEffectError(
                f"{self.label} may change no layer.",
                where=order[0],
                got=f"an error of {alone[order[0]]:.2g} of the best layer alone",
                expected=f"at most error={self.error}",
                fix="a larger error=",
            )
        kept = [name for name in names if name in chosen]
        return {"layers": kept, "alone": alone, "error": error}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty layers where `apply` put full ones."""
        for name in state["layers"]:
            swapped(model, name, DynamicLinear)
        return state

    def _chosen(
        self, order: list[str], alone: dict[str, float], saved: dict[str, int], before: int
    ) -> list[str]:
        """The first layers of `order` that fill the budget."""
        chosen: list[str] = []
        squares, size = 0.0, before
        for name in order:
            squares += alone[name] ** 2
            if self.error is not None and squares > self.error**2:
                break
            if self.size is not None and size <= self.size * before:
                break
            chosen.append(name)
            size -= saved[name]
        if self.size is not None and size > self.size * before:
            raise ConfigError(
                f"{self.label} cannot reach the size.",
                got=f"size={self.size}",
                expected=f"at least {size / before:.3f}, with integers in all {len(order)} layers",
                fix="sc.quantize.Int8Weights() or sc.quantize.BFloat16() pack the rest",
            )
        return chosen

    def _layers(self, model: nn.Module) -> list[str]:
        names = layers(model, self.where, (nn.Linear,), step=self.label)
        beyond = next((name for name in names if not name.startswith("image_encoder.")), None)
        if beyond is not None:
            raise ModelError(
                f"{self.label} measures layers by the embedding, which this one does not change.",
                where=beyond,
                expected="layers of the image encoder",
                fix="sc.quantize.Int8Dynamic(where='mask_decoder.**') for the decoder",
            )
        return names


def _integer(model: nn.Module, name: str) -> None:
    weight = model.get_submodule(name).weight
    swapped(model, name, DynamicLinear).fill(weight)


def _embeddings(model: nn.Module, samples: list[Sample]) -> list[Tensor]:
    return [finite("image_encoder", encoded(model, sample).float()) for sample in samples]


def _change(model: nn.Module, samples: list[Sample], expected: list[Tensor]) -> float:
    """Relative L2 change of the embeddings, all images together."""
    pairs = zip(_embeddings(model, samples), expected, strict=True)
    wrong = sum(float((found - right).square().sum()) for found, right in pairs)
    whole = sum(float(right.square().sum()) for right in expected)
    return float((wrong / whole) ** 0.5)
