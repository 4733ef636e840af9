"""Simulated quantization by plain statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..core.registry import register
from ._fake import Site, after_gelu
from ._observe import ObserverName, Range, observer, weight_range
from ._simulate import Even, Fitter, Simulated
from ._softmax import HybridSearch, MapSearch
from ._uniform import Grid


@register
@dataclass(frozen=True, kw_only=True)
class FakeQuant(Simulated, family="quantize", phase=50):
    """Simulate quantization of any width, to see what it would do to the masks.

    Use it to learn which bits a model stands before looking for hardware that has them. Do not use
    it to make a model smaller or faster: it computes in floating point, in more steps than before,
    so its file is as large and its time longer. `sc.evaluate` gives its accuracy and refuses to
    time it.

    Args:
        weight_bits: of weights, 2 to 8, affine, a range for each output channel.
        activation_bits: of inputs of layers and of products in attention, 2 to 8, affine, a range
            for each tensor; None leaves activations alone, which needs no data.
        where: layers to round; by default all of the image encoder but what reads the pixels, and
            the transformer of the mask decoder. The decoder's heads, norms, position tables and
            the prompt encoder stay floating point.
        products: whether queries, keys, attention weights and values are rounded too, in attention
            of SAM's own kind all of whose layers are.
        observer: how the range of activations is found. "minmax" covers all values of all images,
            "avg_minmax" the mean of each image's ends, "percentile" 99.99 % of the values, and
            "mse" makes the error of rounding least, to the power of 2.4.
        weight_search: shrink the range of each output channel to where the error of rounding is
            least, to the power of 2.4.
        softmax: levels of attention weights. "uniform" spaces them evenly, "log" logarithmically
            by 2, its root or its fourth root; "auto" takes what leaves the least error in the
            product with the values, for each attention.
        gelu: levels of what the GELU of an MLP gives. "hybrid" takes logarithmic levels near the
            least value and even ones above.
        images: at most so many images are looked at, >= 1.
        prompts: what the decoder is asked meanwhile: boxes, points, or both in turn.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if no layer is left to round.
        ModelError: if a layer is quantized already, attention was rewritten, or a weight is not
            finite.
        DataError: if there are no images, or a layer gets values that are not finite.

    Effect:
        Weights move to the nearest of ``2**weight_bits`` values of their channel; bytes and
        parameters stay. `tiny` on drawn scenes: see the method's card.

    Composes with:
        Follows every step that leaves Linears and convolutions, and `Bimodal` and `SmoothQuant`;
        `attention.Fused` before it only with ``products=False``. `Reconstruct` and `QAT` mend what
        it broke. Quantizing its result again is refused.

    Source:
        Affine fake quantization: B. Jacob et al., 2018, arXiv 1712.05877. Observers and what is
        rounded as in PTQ4SAM, C. Lv et al., 2024, arXiv 2405.03144 (no licence file that we know
        of; no code used). Hybrid levels: AHCPTQ, 2025, arXiv 2503.03088; ours are chosen by the
        error of what is rounded. Own code.

    Example:
        >>> import samcompress as sc
        >>> rounded = sc.quantize.FakeQuant(weight_bits=4, activation_bits=None)(sc.build("tiny"))
        >>> len(rounded.image_encoder.blocks[0].mlp.lin1.weight[0].unique()) <= 16
        True
    """

    observer: ObserverName = "avg_minmax"
    weight_search: bool = False
    softmax: Literal["uniform", "log", "auto"] = "uniform"
    gelu: Literal["uniform", "hybrid"] = "uniform"

    def fitter(self, model: nn.Module, site: Site) -> Fitter:
        """Even levels over the observed range, unless attention or GELU get their own."""
        assert self.activation_bits is not None
        grid = Grid(self.activation_bits)
        if site.role == "softmax" and self.softmax != "uniform":
            return MapSearch(grid.bits, even=self.softmax == "auto")
        if self.gelu == "hybrid" and after_gelu(model, site):
            return HybridSearch(site.tap, grid.bits)
        return Even(observer(self.observer, site.tap, grid), grid, site.place)

    def weight_range(self, weight: Tensor, grid: Grid) -> Range:
        """All weights of a channel, or fewer where that is the smaller error."""
        return weight_range(weight, grid, search=self.weight_search)
