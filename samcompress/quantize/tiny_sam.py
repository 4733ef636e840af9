"""TinySAM's quantization: scales by what rounding does to the masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.registry import register
from ..core.transform import Context, State
from ._fake import FakeLinear, Product, Site, after_gelu, unrounded
from ._observe import MinMax, Range, weight_range
from ._quantizers import Quantizer, Twin
from ._search import gather, search
from ._simulate import Even, Fitter, Simulated
from ._uniform import Grid


class Halves:
    """A `Twin` over the largest value seen, of which softmax's fine half gets a part."""

    def __init__(self, name: str, bits: int, *, gelu: bool) -> None:
        self.observer, self.bits, self.gelu = MinMax(name), bits, gelu

    def update(self, x: Tensor, *rest: Tensor) -> None:
        """Observe."""
        self.observer.update(x)

    def quantizer(self) -> Quantizer:
        """With the scale to start from."""
        largest = self.observer.range()[1]
        return Twin(self.bits, self.gelu).cover(largest if self.gelu else largest / 4)


@register
@dataclass(frozen=True, kw_only=True)
class TinySAM(Simulated, family="quantize", phase=50):
    """Simulate quantization with scales chosen by what their errors do to masks and scores.

    Every product of two factors is looked at alone: a layer's input and weight, queries and keys,
    attention weights and values. The scale of each factor is chosen in turn from many, by the
    squared change of the product weighed by how much masks depend on it. Attention weights and
    GELU outputs get two scales each. Use it at 8 and 6 bits, for small models above all: it runs
    gradients through the model and hundreds of products a layer. It makes a model neither smaller
    nor faster.

    Args:
        weight_bits: of weights, 2 to 8, symmetric, a scale for each output channel.
        activation_bits: of activations, 2 to 8, symmetric, a scale for each tensor.
        where: see `FakeQuant`. Convolutions keep the scales of their largest values.
        products: see `FakeQuant`.
        images: at most so many images are looked at, >= 1; the paper takes 8.
        prompts: see `FakeQuant`.
        candidates: scales tried for each factor, evenly from 0.01 to 1.2 of the first, beside the
            first itself; >= 1. The first is that of the largest value, for attention weights of a
            quarter of it.
        rounds: times that each factor has its turn, >= 1.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if no layer is left to round.
        ModelError: as `FakeQuant` says.
        DataError: if there are no images, or a layer gets values that are not finite.

    Effect:
        As `FakeQuant`.

    Composes with:
        As `FakeQuant`.

    Source:
        TinySAM, H. Shu et al., 2023, arXiv 2312.13789 (Apache-2.0; only layers for inference were
        released, none used), after PTQ4ViT, Z. Yuan et al., 2021, arXiv 2111.12293. Different:
        importances are taken in the model rounded at first, as they vanish at the floating-point
        one; a number uses one of two scales, never the sum of both; weights have a scale a channel.

    Example:
        >>> import samcompress as sc
        >>> step = sc.quantize.TinySAM(candidates=4, rounds=1, images=1)
        >>> rounded = step(sc.load("tiny"), data=sc.shapes(1))
        >>> sc.lineage(rounded)[-1].transform.simulated
        True
    """

    symmetric: ClassVar[bool] = True

    images: int = 8
    candidates: int = 100
    rounds: int = 3

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        for name in ("candidates", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected=">= 1",
                )

    def fitter(self, model: nn.Module, site: Site) -> Fitter:
        """The largest value, and two scales for attention weights and after GELU."""
        assert self.activation_bits is not None
        if site.role == "softmax" or after_gelu(model, site):
            return Halves(site.tap, self.activation_bits, gelu=site.role != "softmax")
        grid = Grid(self.activation_bits, symmetric=True)
        return Even(MinMax(site.tap), grid, site.place)

    def weight_range(self, weight: Tensor, grid: Grid) -> Range:
        """All weights of a channel."""
        return weight_range(weight, grid, search=False)

    def refine(self, model: nn.Module, ctx: Context, originals: Mapping[str, nn.Module]) -> State:
        """Search the scales of every product."""
        teacher = unrounded(model, originals)
        kept = gather(model, teacher, ctx, images=self.images, prompts=self.prompts)
        weights = [sum(float(i.sum()) for i in k.importance) for k in kept.values()]
        for name in ctx.progress.track(kept, label="products"):
            layer: Any = model.get_submodule(name)
            assert isinstance(layer, (FakeLinear, Product))
            with torch.no_grad():
                search(
                    layer,
                    kept[name],
                    originals.get(name),
                    candidates=self.candidates,
                    rounds=self.rounds,
                )
        return {"searched": sum(weight > 0 for weight in weights)}
