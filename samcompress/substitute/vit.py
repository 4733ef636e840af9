"""A plain small ViT in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._efficientsam import CONFIGS, PATCH, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class ViT(Swap, family="substitute", phase=10):
    """Put EfficientSAM's plain ViT in place of the image encoder.

    Use it where pretraining with `distill.Sami` or plain attention kernels matter: every block
    attends to the whole image, without windows and relative positions. It is small in parameters,
    not in work. Its weights are random: train it with `distill.Sami`, then `distill.Encoder`.

    Args:
        variant: ``tiny`` or ``small``.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 16.
        ModelError: if the model is no SAM.

    Effect: at 1024 pixels an encoder of 6.2 million parameters and 102 GMAC (``tiny``), or of 22.4
        million and 246 (``small``); ``vit_b`` has 89.7 million and 486. The decoder stays.

    Composes with: comes before everything else; `attention.Fused` halves its time; `distill` after.

    Source: EfficientSAM, Xiong et al. 2023, arXiv 2312.00863 (Apache-2.0). Blocks are
        segment_anything's.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.ViT(variant="tiny")(sc.build("tiny"))
        >>> len(small.image_encoder.encoder.blocks)
        12
    """

    variant: Literal["tiny", "small"] = "tiny"

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return PATCH

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        return build(CONFIGS[self.variant], size, channels)
