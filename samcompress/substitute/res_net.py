"""ResNet-18 in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._resnet import CONFIGS, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class ResNet(Swap, family="substitute", phase=10):
    """Put a ResNet-18 in place of the image encoder, as NanoSAM does.

    Use it on boards with good kernels for plain convolutions, such as NVIDIA Jetson. Its weights
    are random: train it with `distill.Encoder`; NanoSAM's own teacher was MobileSAM.

    Args:
        variant: ``18``.
        fuse: fold the batch norms into the convolutions.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 32.
        ModelError: if the model is no SAM.

    Effect: at 1024 pixels an encoder of 15.8 million parameters and 43.6 GMAC; ``vit_b`` has 89.7
        million and 486. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: NanoSAM, https://github.com/NVIDIA-AI-IOT/nanosam (Apache-2.0); ResNet, He et al. 2015,
        arXiv 1512.03385, torchvision's trunk.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.ResNet()(sc.build("tiny"))
        >>> small.image_encoder.img_size
        128
    """

    variant: Literal["18"] = "18"
    fuse: bool = False

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return 16

    @property
    def multiple(self) -> int:
        """The trunk halves the grid once more."""
        return 32

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        made = build(CONFIGS[self.variant], size, channels)
        if self.fuse:
            made.eval().fuse()
        return made
