"""Weights stored as int4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._calibrate import calibrate, check_images
from ._choose import finite_weight, layers
from ._gptq import Products, gptq
from ._int4 import group_codes, group_scale, int4_twin
from ._layers import is_linear


@register
@dataclass(frozen=True, kw_only=True)
class Int4Weights(Transform, family="quantize", phase=50):
    """Store the weights of Linears and convolutions as int4, one bfloat16 scale a group.

    Use it where disk, download or memory is shortest, with ``method="gptq"`` where images are at
    hand. Not for speed: each call makes the weight floating point again; and not where a few
    percent of error matter, for which there is `Int8Weights`.

    Args:
        where: layers to store as int4; by default all of image encoder and mask decoder.
        group_size: weights that share a scale, along the inputs of a channel; even.
        method: "rtn" rounds to nearest, without data; "gptq" makes the outputs of Linears on the
            calibration images differ least. Convolutions are rounded to nearest.
        clip_search: try smaller scales, which clip the largest weights of a group but may round
            the others better; the least squared error wins.
        min_size: layers with fewer weights than this stay as they are.
        images: calibration images of "gptq", the first of the data.

    Raises:
        ConfigError: if `group_size`, `min_size` or `images` is out of range.
        DataError: if "gptq" has no images, or a layer gets values that are not finite.
        NoEffectError: if nothing matches, or all that does is smaller than `min_size`.
        ModelError: if the layers are integer already, a weight is not finite, or the inputs of a
            Linear do not divide into groups; such convolutions stay as they are.

    Effect:
        The file of ``vit_b`` shrinks to 0.165 of fp32, and to 0.146 with `BFloat16` after it, which
        halves the position tables. Time is a few percent above that of float.

    Composes with:
        Follows pruning, distillation, and attention rewrites; `BFloat16` may follow. `Export`
        writes the weights as float again.

    Source:
        E. Frantar et al.: GPTQ, ICLR 2023, arXiv 2210.17323 (code Apache-2.0); own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.quantize.Int4Weights(group_size=32)(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].attn.qkv.weight.shape  # 192 channels, 64 weights
        torch.Size([192, 32])
    """

    where: Where = Where(("image_encoder.**", "mask_decoder.**"))
    group_size: int = 64
    method: Literal["rtn", "gptq"] = "rtn"
    clip_search: bool = True
    min_size: int = 2048
    images: int = 32

    @property
    def needs_data(self) -> bool:
        """Only "gptq" looks at images."""
        return self.method == "gptq"

    def validate(self) -> None:
        """Check the numbers."""
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(
                f"{self.label}: group_size is out of range.",
                got=self.group_size,
                expected="an even number, 2 or more: two codes share a byte",
            )
        if self.min_size < 0:
            raise ConfigError(
                f"{self.label}: min_size is negative.", got=self.min_size, expected="0 or more"
            )
        check_images(self.label, self.images)

    def check(self, model: nn.Module) -> None:
        """Check that layers are left, and divide into groups."""
        self._layers(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Quantise layer by layer, so that no second float copy of the model exists."""
        names = self._layers(model)
        products = self._products(model, names, ctx)
        for name in ctx.progress.track(names, label="layers"):
            layer = model.get_submodule(name)
            weight = finite_weight(name, layer, step=self.label).flatten(1)
            if name in products:
                codes, scale = gptq(
                    weight, products.pop(name), self.group_size, clip_search=self.clip_search
                )
            else:
                groups = weight.view(len(weight), -1, self.group_size)
                scale = group_scale(groups, clip_search=self.clip_search)
                codes = group_codes(groups, scale)
            self._swap(model, name).fill(codes, scale)
        return {"layers": names}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty int4 layers where `apply` put full ones."""
        for name in state["layers"]:
            self._swap(model, name)
        return state

    def _swap(self, model: nn.Module, name: str) -> Any:
        twin = int4_twin(model.get_submodule(name), self.group_size)
        model.set_submodule(name, twin)
        return twin

    def _products(self, model: nn.Module, names: list[str], ctx: Context) -> dict[str, Tensor]:
        if self.method != "gptq":
            return {}
        found = {n: Products(n) for n in names if isinstance(model.get_submodule(n), nn.Linear)}
        calibrate(model, {n: p.update for n, p in found.items()}, ctx, images=self.images)
        return {n: p.total for n, p in found.items() if p.total is not None}

    def _layers(self, model: nn.Module) -> list[str]:
        names = layers(
            model, self.where, (nn.Linear, nn.Conv2d), step=self.label, least=self.min_size
        )
        found: list[tuple[str, Any]] = [(name, model.get_submodule(name)) for name in names]
        wide = {name: layer.weight[0].numel() for name, layer in found}
        odd = {name for name, n in wide.items() if n % self.group_size}
        # Convolutions of few weights a channel, as depthwise ones, are a small part of a file.
        kept = [name for name, layer in found if name not in odd or is_linear(layer)]
        wrong = [name for name in kept if name in odd] or ([] if kept else names)
        if wrong:
            common = math.gcd(self.group_size, *(wide[name] for name in wrong))
            raise ModelError(
                f"{self.label} cannot divide a layer into groups.",
                where=wrong[0],
                got=f"{wide[wrong[0]]} weights a channel",
                expected=f"a multiple of group_size={self.group_size}",
                fix="leave it out with where=" if common % 2 else f"group_size={common}",
            )
        return kept
