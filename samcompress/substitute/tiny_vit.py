"""TinyViT in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.registry import register
from ._swap import Swap
from ._tiny_vit import CONFIGS, STRIDE, build


@register
@dataclass(frozen=True, kw_only=True)
class TinyViT(Swap, family="substitute", phase=10, extras=("zoo",)):
    """Put TinyViT-5M in place of the image encoder, as MobileSAM and TinySAM do.

    Use it for a phone or a browser, or where a SAM must be small and fast and there is data to
    distil it on. Its weights are random: train it with `distill.Encoder` towards the original.
    Before that it is of use for times and sizes only.

    Args:
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 16.
        ModelError: if the model is no SAM.
        MissingDependencyError: if timm is not installed.

    Effect: at 1024 pixels an encoder of 5.7 million parameters and 38.8 GMAC; ``vit_b`` has 89.7
        million and 486. Prompt encoder and decoder stay.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: TinyViT, Wu et al. 2022, arXiv 2207.10666; MobileSAM, Zhang et al. 2023, arXiv
        2306.14289 (Apache-2.0). Convolutions and MLPs are timm's.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.TinyViT()(sc.build("tiny"))
        >>> sc.lineage(small)[0].state["adapter"]
        'bilinear, 8x8 -> 16x16'
    """

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return STRIDE

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        return build(CONFIGS["5m"], size, channels)
