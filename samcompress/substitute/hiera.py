"""SAM 2's Hiera in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._hiera import CONFIGS, MULTIPLE, STRIDE, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class Hiera(Swap, family="substitute", phase=10, extras=("zoo",)):
    """Put SAM 2's image encoder, Hiera, in place of the image encoder.

    Use it as a stronger encoder than a plain ViT of the same work: stages of falling resolution,
    attention mostly in windows. It gives one level of 16 pixels a cell, to a plain SAM decoder. Its
    weights are random: train it with `distill.Encoder`.

    Args:
        variant: ``tiny``, ``small``, ``base_plus`` or ``large``.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 32.
        ModelError: if the model is no SAM.
        MissingDependencyError: if timm is not installed.

    Effect: at 1024 pixels encoders of 27.2, 34.3, 69.1 and 213 million parameters and 143, 177, 320
        and 907 GMAC; ``vit_b`` has 89.7 million and 486, ``vit_h`` 637 and 2981. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: SAM 2, Ravi et al. 2024, arXiv 2408.00714; Hiera, Ryali et al. 2023, arXiv 2306.00989
        (Apache-2.0). The trunk is timm's.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.Hiera(variant="tiny")(sc.build("tiny"))
        >>> sc.lineage(small)[0].state["adapter"]
        'bilinear, 8x8 -> 16x16'
    """

    variant: Literal["tiny", "small", "base_plus", "large"] = "tiny"

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return STRIDE

    @property
    def multiple(self) -> int:
        """The last stage halves the grid once more."""
        return MULTIPLE

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        return build(CONFIGS[self.variant], size, channels)
