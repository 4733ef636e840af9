"""EfficientViT in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._efficientvit import CONFIGS, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class EfficientViT(Swap, family="substitute", phase=10, extras=("zoo",)):
    """Put EfficientViT-SAM's encoder in place of the image encoder.

    Use it for high throughput on GPUs, and for accuracy near that of ViT-H at a fraction of its
    work. The L variants take an image of half the side in which prompts are given. Its weights are
    random: train it with `distill.Encoder`.

    Args:
        variant: ``l0``, ``l1``, ``l2``, ``xl0`` or ``xl1``, from small to large; or
            ``mobilesamv2_l2``, MobileSAMv2's: ``l2`` that takes the whole frame and scales it down.
        seed: of the random weights.

    Raises:
        ConfigError: if the image side is not a multiple of 8 (L) or 16 (the others).
        ModelError: if the model is no SAM.
        MissingDependencyError: if timm is not installed.

    Effect: in a frame of 1024 pixels encoders of 30.7 to 199 million parameters and 34.8 to 322
        GMAC; ``vit_h`` has 637 million and 2981. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: EfficientViT-SAM, Zhang et al. 2024, arXiv 2402.05008 (Apache-2.0). Blocks are timm's;
        the sums of its linear attention are computed in float32, as half precision overflows.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.EfficientViT(variant="l0")(sc.build("tiny"))
        >>> small.image_encoder.img_size
        64
    """

    variant: Literal["l0", "l1", "l2", "xl0", "xl1", "mobilesamv2_l2"] = "l0"

    @property
    def stride(self) -> int:
        """8 or 16 pixels a cell."""
        return CONFIGS[self.variant].stride

    def side(self, frame: int) -> int:
        """Half the frame for the L variants."""
        return frame * self.stride // 16

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        return build(CONFIGS[self.variant], size, channels)
