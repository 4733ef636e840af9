"""Integer products with scales found at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._choose import finite_weight, layers
from ._int8 import DynamicLinear, check_device, check_speed, swapped


@register
@dataclass(frozen=True, kw_only=True)
class Int8Dynamic(Transform, family="quantize", phase=50):
    """Multiply int8 weights by tokens rounded to int8, each with its own scale found at run time.

    Use it on CPUs with integer instructions (VNNI, AMX) for speed and a quarter of the file, on any
    encoder with Linears, without data. With `BFloat16` after it the rest is faster and smaller too.
    Not for encoders of convolutions, which it leaves alone, nor for models to be trained further.

    Args:
        where: Linears to change; by default those of the image encoder. The mask decoder is faster
            for few prompts and slower for many: ``where=("image_encoder.**", "mask_decoder.**")``.
        force: also where the layers are slower than those of the model, or cannot be timed.

    Raises:
        NoEffectError: if no Linear matches.
        ModelError: if the matched Linears hold integers already, a weight is not finite, the device
            has no integer product, or the layers would be slower and `force` is not set.
        BackendError: if torch multiplies integers wrongly on this machine.

    Effect:
        In a bfloat16 model the large Linears of ``vit_b`` are 1.4 times as fast as bfloat16 and 3.3
        times as float32 on one thread of an AMD EPYC with VNNI; the file is 0.32 of fp32, 0.27 with
        `BFloat16`. Its embedding with random weights moves by 1.5 %. The whole encoder
        at 1024 px, with `Fused` and `BFloat16`, is 3.6 times as fast as segment_anything's fp32.

    Composes with:
        Follows pruning, distillation, substitution and attention rewrites, or comes before `Fused`;
        `SmoothQuant` before it helps where tokens have outliers, `Int8Weights` after it packs
        convolutions and decoder. `Export` writes the products as integer products.

    Source:
        Per-token and per-channel symmetric int8 as common in toolkits: LLM.int8(), T. Dettmers et
        al., 2022, arXiv 2208.07339; ZeroQuant, Z. Yao et al., 2022, arXiv 2206.01861. Own code on
        `torch._int_mm`.

    Example:
        >>> import samcompress as sc
        >>> small = sc.quantize.Int8Dynamic(force=True)(sc.build("tiny"))
        >>> type(small.image_encoder.blocks[0].mlp.lin1).__name__
        'DynamicLinear'
    """

    where: Where = Where(("image_encoder.**",))
    force: bool = False

    def check(self, model: nn.Module) -> None:
        """Check that a Linear is left, and that integers can be multiplied."""
        check_device(model, step=self.label)
        self._layers(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Quantise layer by layer, so that no second float copy of the model exists."""
        names = self._layers(model)
        state: State = {"layers": names, "cpu": torch.backends.cpu.get_cpu_capability()}
        if not self.force:
            state["speedup"] = check_speed(model, names, DynamicLinear, step=self.label)
        for name in ctx.progress.track(names, label="layers"):
            layer = model.get_submodule(name)
            weight = finite_weight(name, layer, step=self.label)
            swapped(model, name, DynamicLinear).fill(weight)
        return state

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty layers where `apply` put full ones."""
        for name in state["layers"]:
            swapped(model, name, DynamicLinear)
        return state

    def _layers(self, model: nn.Module) -> list[str]:
        return layers(model, self.where, (nn.Linear,), step=self.label)
