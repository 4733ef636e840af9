"""EfficientFormerV2 in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._efficientformer import CONFIGS, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class EfficientFormer(Swap, family="substitute", phase=10, extras=("zoo",)):
    """Put EfficientFormerV2 in place of the image encoder, as ESAM does.

    Use it for phones, at the least MACs of all encoders that attend. Do not expect ESAM: this is
    the architecture after the paper, and there is no public checkpoint. Its weights are random:
    train it with `distill.Encoder`.

    Args:
        variant: ``s0``, ``s1``, ``s2`` or ``l``, from small to large.
        fuse: fold the batch norms into the convolutions.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 32.
        ModelError: if the model is no SAM.
        MissingDependencyError: if timm is not installed.

    Effect: at 1024 pixels encoders of 4.0 to 26.4 million parameters and 19 to 75 GMAC; ``vit_b``
        has 89.7 million and 486. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: architecture after the paper, no public checkpoint. Trunk: EfficientFormerV2, Li et al.
        2022, arXiv 2212.08059 (Apache-2.0), timm's, with attention of our own. That ESAM, for
        medical images, has it as its encoder is all that is known to us; the neck is our choice.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.EfficientFormer(variant="s0")(sc.build("tiny"))
        >>> small.image_encoder.img_size
        128
    """

    variant: Literal["s0", "s1", "s2", "l"] = "s0"
    fuse: bool = False

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return 16

    @property
    def multiple(self) -> int:
        """The last stage halves the grid once more."""
        return 32

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        made = build(CONFIGS[self.variant], size, channels)
        if self.fuse:
            made.eval().fuse()
        return made
