"""PQ-SAM: inputs of layers clipped, and shifted and scaled by groups of channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import register
from ..core.transform import Context, State
from ._calibrate import calibrate
from ._fake import FakeLinear, Site
from ._grouping import Tokens, fold, learn
from ._observe import AverageMinMax, Range, weight_range
from ._quantizers import Grouped
from ._simulate import Even, Fitter, Simulated
from ._uniform import Grid

LEARNED = 4096  # tokens that a layer learns from, evenly drawn


@register
@dataclass(frozen=True, kw_only=True)
class PQSAM(Simulated, family="quantize", phase=50):
    """Simulate quantization with inputs brought to one distribution by groups of channels.

    Far outliers of a layer's input are clipped, channels of like range form groups, and each group
    gets a shift and a scale, so that one step fits all channels. Shift and scale are folded into
    the layer behind, then learned together with the step. Use it where single channels are far
    wider than the others. It makes a model neither smaller nor faster.

    Args:
        weight_bits: see `FakeQuant`; like all that is not said here.
        activation_bits: see `FakeQuant`.
        where: see `FakeQuant`. Convolutions, and Linears without bias, have one group.
        products: see `FakeQuant`.
        images: see `FakeQuant`; the paper takes 100.
        prompts: see `FakeQuant`.
        spread: values are clipped so many times the distance of the quartiles beyond them, > 0,
            where that leaves less error than not to clip. So do groups count only where they help.
        share: of the values that a channel's interval leaves out when groups are made, in [0, 1).
        steps: of learning for each layer, by the error of its own output; 0 for none.
        lr: of learning, relative to each value, > 0.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if no layer is left to round.
        ModelError: as `FakeQuant` says.
        DataError: if there are no images, or a layer gets values that are not finite.

    Effect:
        As `FakeQuant`. The state names the groups of each layer and the error of its output before
        and after learning, which is kept only where it is less.

    Composes with:
        As `FakeQuant`. `SmoothQuant` before it does part of the same.

    Source:
        PQ-SAM, X. Liu et al., 2024, ECCV; no official code. A comparison exists in
        https://github.com/Wenlun-Zhang/AHCQ-SAM; none of it is used. Different: clipping and
        groups are used where they lower the squared error of an input, not everywhere; layers
        learn one by one from their own outputs, not together from the model's; weights are
        rounded after the fold.

    Example:
        >>> import samcompress as sc
        >>> step = sc.quantize.PQSAM(images=1, steps=1)
        >>> rounded = step(sc.load("tiny"), data=sc.shapes(1))
        >>> type(rounded.image_encoder.blocks[0].mlp.lin1.input).__name__
        'Grouped'
    """

    spread: float = 10.0
    share: float = 0.2
    steps: int = 100
    lr: float = 1e-3

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        self.between("spread", 0, math.inf)
        self.between("lr", 0, math.inf)
        if not 0 <= self.share < 1:
            raise ConfigError(
                f"{self.label}: share is out of range.", got=self.share, expected="0 <= share < 1"
            )
        if self.steps < 0:
            raise ConfigError(
                f"{self.label}: steps is out of range.", got=self.steps, expected=">= 0"
            )

    def fitter(self, model: nn.Module, site: Site) -> Fitter:
        """Groups for inputs of Linears, one range elsewhere."""
        assert self.activation_bits is not None
        layer: Any = model.get_submodule(site.tap)
        if site.role == "input" and isinstance(layer, nn.Linear) and layer.bias is not None:
            return Tokens(
                site.tap, self.activation_bits, self.images, spread=self.spread, share=self.share
            )
        return Even(AverageMinMax(site.tap), Grid(self.activation_bits), site.place)

    def weight_range(self, weight: Tensor, grid: Grid) -> Range:
        """All weights of a channel."""
        return weight_range(weight, grid, search=False)

    def refine(self, model: nn.Module, ctx: Context, originals: Mapping[str, nn.Module]) -> State:
        """Fold each layer's groups into it and let them learn."""
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, FakeLinear) and isinstance(layer.input, Grouped)
        }
        for name, layer in layers.items():
            self._fold(layer, originals[name])
        inputs = self._inputs(model, layers, ctx) if self.steps else {}
        errors = {}
        for name in ctx.progress.track(inputs, label="layers"):
            true: Any = originals[name]
            before, after = learn(
                layers[name],
                true,
                inputs[name],
                steps=self.steps,
                lr=self.lr,
                cover=self._cover,
            )
            errors[name] = [float(f"{e:.6g}") for e in (before, after)]
        groups = {name: _groups(layer) for name, layer in layers.items()}
        return {"groups": groups, "learned": errors}

    def _fold(self, layer: FakeLinear, true: Any) -> None:
        assert isinstance(layer.input, Grouped)
        with torch.no_grad():
            layer.weight.copy_(true.weight)
        fold(layer, layer.input)
        self._cover(layer)

    def _cover(self, layer: FakeLinear) -> None:
        layer.cover(*self.weight_range(layer.weight, layer.grid))

    def _inputs(
        self, model: nn.Module, layers: Mapping[str, FakeLinear], ctx: Context
    ) -> dict[str, Tensor]:
        """Tokens that layers get in the rounded model."""
        kept = {n: Tokens(n, 8, self.images, spread=1, share=0) for n in layers}
        taps = {name: tokens.update for name, tokens in kept.items()}
        calibrate(model, taps, ctx, images=self.images, prompts=self.prompts)
        found = {}
        for name, tokens in kept.items():
            every = torch.cat(tokens.kept)
            found[name] = every[:: -(-len(every) // LEARNED)]
        return found


def _groups(layer: FakeLinear) -> int:
    assert isinstance(layer.input, Grouped)
    return len(layer.input.shift)
