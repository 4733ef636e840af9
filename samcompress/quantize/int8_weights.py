"""Weights stored as int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import ConfigError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._choose import check_not_simulated, finite_weight
from ._layers import Int8Conv2d, Int8Linear, int8_twin

KINDS = (nn.Linear, nn.Conv2d, Int8Linear, Int8Conv2d)


@register
@dataclass(frozen=True, kw_only=True)
class Int8Weights(Transform, family="quantize", phase=50):
    """Store the weights of Linears and convolutions as int8 with one float32 scale a channel.

    Use it where disk, download or memory is short: no data, a second of work, errors of about a
    percent. Do not use it for speed: each call makes the weight floating point again, so time
    stays about equal.

    Args:
        where: layers to store as int8; by default all of image encoder and mask decoder. Leave the
            decoder out with ``where="image_encoder.**"``.
        min_size: layers with fewer weights than this stay as they are; they save next to nothing.

    Raises:
        NoEffectError: if all matched layers are int8 already, or smaller than `min_size`.
        ModelError: if a weight is NaN or infinite, or the model only simulates integers.
        ConfigError: if `min_size` is negative.

    Effect:
        A ``vit_b`` file shrinks to 0.279 of fp32 (position tables, norms, biases and the prompt
        encoder stay float). Each weight moves by at most 1/254 of the largest of its channel; the
        embedding of ``vit_b`` with random weights moves by 1.0 %. Multiply-accumulates and
        parameters are as before, time within a few percent.

    Composes with:
        Follows pruning, distillation, and attention rewrites, whose weights it packs; `Export` may
        follow. Pruning after it is refused.

    Source:
        Round to nearest, symmetric, per output channel, as common in all toolkits; see
        B. Jacob et al., 2018, arXiv 1712.05877. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.quantize.Int8Weights()(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].attn.qkv.weight.dtype
        torch.int8
    """

    where: Where = Where(("image_encoder.**", "mask_decoder.**"))
    min_size: int = 2048

    def validate(self) -> None:
        """Check `min_size`."""
        if self.min_size < 0:
            raise ConfigError(
                f"{self.label}: min_size is negative.", got=self.min_size, expected="0 or more"
            )

    def check(self, model: nn.Module) -> None:
        """Check that a layer is left to quantise."""
        self._layers(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Quantise layer by layer, so that no second float copy of the model exists."""
        names = self._layers(model)
        for name in ctx.progress.track(names, label="layers"):
            weight = finite_weight(name, model.get_submodule(name), step=self.label)
            _swap(model, name).fill(weight)
        return {"layers": names}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty int8 layers where `apply` put full ones."""
        for name in state["layers"]:
            _swap(model, name)
        return state

    def _layers(self, model: nn.Module) -> list[str]:
        check_not_simulated(self.label, model)
        found: list[tuple[str, Any]] = self.where.select(model, KINDS, step=self.label)
        done = [name for name, layer in found if isinstance(layer, (Int8Linear, Int8Conv2d))]
        left = [
            name
            for name, layer in found
            if int8_twin(layer) is not None and layer.weight.numel() >= self.min_size
        ]
        if not left:
            raise NoEffectError(
                f"{self.label} found no layer left to quantise.",
                where=repr(self.where),
                got=f"{len(done)} layers that are int8 already"
                if done
                else f"{len(found)} layers of fewer than {self.min_size} weights",
                fix="leave this step out" if done else "a smaller min_size=",
            )
        return left


def _swap(model: nn.Module, name: str) -> Int8Linear | Int8Conv2d:
    twin = int8_twin(model.get_submodule(name))
    assert twin is not None
    model.set_submodule(name, twin)
    return twin
