"""A U-Net in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.registry import register
from ._swap import Swap
from ._unet import CONFIGS, build


@register
@dataclass(frozen=True, kw_only=True)
class UNet(Swap, family="substitute", phase=10):
    """Put a U-Net in place of the image encoder, as SqueezeSAM does.

    Use it where plain convolutions run fast and images of half the side will do: it takes an image
    of half the side in which prompts are given, 512 pixels for 1024. Do not expect SqueezeSAM: this
    is the architecture after the paper, without its fusion of clicks into the image, and there is
    no public checkpoint. Its weights are random: train it with `distill.Encoder`.

    Args:
        fuse: fold the batch norms into the convolutions.
        seed: of the random weights.

    Raises:
        ConfigError: if half the model's image side is not a multiple of 32.
        ModelError: if the model is no SAM.

    Effect: in a frame of 1024 pixels an encoder of 16.2 million parameters and 16.4 GMAC; ``vit_b``
        has 89.7 million and 486. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.
        `attention.Fused` finds its blocks of attention.

    Source: architecture after the paper, no public checkpoint: SqueezeSAM, Varadarajan et al. 2023,
        arXiv 2312.06736. Known of it: a U-Net with batch norm, attention at the coarsest levels,
        512 pixels, 1/31.6 of SAM with ViT-H in size. Widths and depths are our choice.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.UNet()(sc.build("tiny"))
        >>> small.image_encoder.img_size
        64
    """

    fuse: bool = False

    @property
    def stride(self) -> int:
        """8 pixels a cell."""
        return 8

    @property
    def multiple(self) -> int:
        """The way down halves the grid twice more."""
        return 32

    def side(self, frame: int) -> int:
        """Half the frame."""
        return frame // 2

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        made = build(CONFIGS["squeeze"], size, channels)
        if self.fuse:
            made.eval().fuse()
        return made
