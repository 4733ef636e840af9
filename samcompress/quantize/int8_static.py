"""Integer products with scales found beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._calibrate import calibrate, check_images, observe
from ._choose import finite_weight, layers
from ._int8 import StaticLinear, check_device, check_speed, swapped
from ._observe import ObserverName, observer
from ._simulate import WORST
from ._uniform import Grid


@register
@dataclass(frozen=True, kw_only=True)
class Int8Static(Transform, family="quantize", phase=50):
    """Multiply int8 weights by tokens rounded to int8 with one scale a layer, found on images.

    Use it where a runtime or chip wants fixed scales, and after `SmoothQuant`. In torch on a CPU it
    is as fast as `Int8Dynamic`, which needs no images and is more accurate: take that first.

    Args:
        where: Linears to change; by default those of the image encoder.
        observer: what range the tokens of a layer are given: "mse", that of least error;
            "percentile", 99.99 percent; "avg_minmax", the mean of the images' ends; "minmax", the
            widest.
        images: calibration images, the first of the data.
        force: also where the layers are slower than those of the model.

    Raises:
        ConfigError: if `images` is out of range.
        DataError: if there are no images, a layer meets values that are not finite, or none at all.
        NoEffectError: if no Linear matches.
        ModelError: if the matched Linears hold integers already, a weight is not finite, the device
            has no integer product, or the layers would be slower and `force` is not set.
        BackendError: if torch multiplies integers wrongly on this machine.

    Effect:
        File and speed as `Int8Dynamic`. Tokens have 256 levels between the ends of the range,
        whatever their size, so outliers cost accuracy.

    Composes with:
        As `Int8Dynamic`; the ranges hold for images like those seen.

    Source:
        B. Jacob et al.: Quantization and Training of Neural Networks, CVPR 2018, arXiv 1712.05877.
        Own code on `torch._int_mm`; the zero point is taken out through sums of weights.

    Example:
        >>> import samcompress as sc
        >>> step = sc.quantize.Int8Static(images=2, force=True)
        >>> small = step(sc.build("tiny"), data=sc.shapes(2))
        >>> small.image_encoder.blocks[0].mlp.lin1.input_scale.shape
        torch.Size([])
    """

    where: Where = Where(("image_encoder.**",))
    observer: ObserverName = "mse"
    images: int = 32
    force: bool = False

    @property
    def needs_data(self) -> bool:
        """It looks at the ranges of tokens."""
        return True

    def validate(self) -> None:
        """Check `images`."""
        check_images(self.label, self.images)

    def check(self, model: nn.Module) -> None:
        """Check that a Linear is left, and that integers can be multiplied."""
        check_device(model, step=self.label)
        self._layers(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Find ranges, make integer layers, compare their outputs on one image, put them in."""
        names, grid = self._layers(model), Grid(8)
        state: State = {"layers": names, "cpu": torch.backends.cpu.get_cpu_capability()}
        if not self.force:
            state["speedup"] = check_speed(model, names, StaticLinear, step=self.label)
        observers = {name: observer(self.observer, name, grid) for name in names}
        ranges = observe(model, observers, ctx, images=self.images)
        made: dict[str, StaticLinear] = {}
        for name in names:
            layer: Any = model.get_submodule(name)
            made[name] = StaticLinear(layer)
            made[name].fill(finite_weight(name, layer, step=self.label))
            made[name].set_grid(*grid.steps(*ranges[name]))
        state["worst"] = _worst(model, made, ctx)
        for name, layer in made.items():
            model.set_submodule(name, layer)
        return state

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty layers where `apply` put full ones."""
        for name in state["layers"]:
            swapped(model, name, StaticLinear)
        return state

    def _layers(self, model: nn.Module) -> list[str]:
        return layers(model, self.where, (nn.Linear,), step=self.label)


def _worst(model: nn.Module, made: dict[str, StaticLinear], ctx: Context) -> dict[str, float]:
    """The layers whose outputs differ most on the first image, relative L2, largest first."""
    errors: dict[str, float] = {}

    def tap(name: str) -> Callable[[Tensor], None]:
        layer: Any = model.get_submodule(name)

        def compare(x: Tensor) -> None:
            # Not through the layer itself, whose hook this is.
            expected = nn.functional.linear(x, layer.weight, layer.bias).float()
            error = (made[name](x).float() - expected).norm() / expected.norm().clamp_min(1e-30)
            errors[name] = max(errors.get(name, 0.0), round(float(error), 6))

        return compare

    calibrate(model, {name: tap(name) for name in made}, ctx, images=1)
    return dict(sorted(errors.items(), key=lambda item: -item[1])[:WORST])
