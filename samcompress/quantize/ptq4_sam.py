"""PTQ4SAM: one peak of keys, and softmax levels of the granularity that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ..core.transform import Context, State
from ._bimodal import fold
from .bimodal import Bimodal, check_crossings
from .fake_quant import FakeQuant


@register
@dataclass(frozen=True, kw_only=True)
class PTQ4SAM(FakeQuant, family="quantize", phase=50):
    """Simulate quantization with PTQ4SAM's two answers to SAM's distributions.

    Keys of the decoder with two peaks are folded into one first, exactly, as `Bimodal` does. Then
    each softmax gets even levels or logarithmic ones, by whichever leaves the least error in its
    product with the values. Use it to study 4 to 6 bits. Like all simulations it makes a model
    neither smaller nor faster. Follow with `Reconstruct` for what the paper calls PTQ4SAM-L.

    Args:
        weight_bits: see `FakeQuant`; like all that is not said here.
        activation_bits: see `FakeQuant`.
        where: see `FakeQuant`.
        products: see `FakeQuant`.
        observer: see `FakeQuant`.
        weight_search: see `FakeQuant`; here on by default.
        softmax: "auto" chooses among even levels and logarithms to the bases 2, its root and its
            fourth root (from 8 bits on finer ones too); "log" leaves the even ones out, as the
            paper does, and loses to them at 8 bits and on maps of few keys.
        gelu: see `FakeQuant`.
        images: see `FakeQuant`.
        prompts: see `FakeQuant`.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if no layer is left to round.
        ModelError: as `FakeQuant` and `Bimodal` say.
        DataError: if there are no images, or a layer gets values that are not finite.

    Effect:
        As `FakeQuant`; the state names the channels turned and the kind of each softmax.

    Composes with:
        As `FakeQuant`. `Bimodal` before it is not needed and does no harm.

    Source:
        PTQ4SAM, C. Lv et al., 2024, arXiv 2405.03144; no code used. Different: even levels are
        among the candidates; scales come from one search over all images, not from the mean of
        searches for each; the encoder is quantized unless `where` says otherwise.

    Example:
        >>> import samcompress as sc
        >>> step = sc.quantize.PTQ4SAM(weight_bits=6, activation_bits=6, images=1)
        >>> rounded = step(sc.load("tiny"), data=sc.shapes(1))
        >>> len(sc.lineage(rounded)[-1].state["attentions"])
        11
    """

    weight_search: bool = True
    softmax: Literal["uniform", "log", "auto"] = "auto"

    @property
    def needs_data(self) -> bool:
        """Always: to look at keys."""
        return True

    def check(self, model: nn.Module) -> None:
        """Check layers and keys."""
        super().check(model)
        check_crossings(self.label, model)

    def prepare(self, model: nn.Module, ctx: Context) -> State:
        """Fold the keys."""
        return {"turned": fold(model, ctx, **Bimodal(prompts=self.prompts).params())}
