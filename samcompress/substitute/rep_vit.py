"""RepViT in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._repvit import CONFIGS, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class RepViT(Swap, family="substitute", phase=10, extras=("zoo",)):
    """Put RepViT in place of the image encoder, as EdgeSAM and RepViT-SAM do.

    Use it where only convolutions run fast: phones, neural processors, Edge TPU. In training every
    block has branches; ``fuse=True`` makes them one convolution each and folds the batch norms,
    after which it is faster and still trains, though less well. Its weights are random: train it
    with `distill.Encoder`.

    Args:
        variant: ``m1``, EdgeSAM's with features of two stages, or ``m2.3``, RepViT-SAM's.
        fuse: make the branches of each block one convolution, and fold the batch norms.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 32 (``m1``) or 16 (``m2.3``).
        ModelError: if the model is no SAM.
        MissingDependencyError: if timm is not installed.

    Effect: at 1024 pixels an encoder of 5.5 million parameters and 20 GMAC (``m1``), or of 23.2
        million and 113 (``m2.3``); ``vit_b`` has 89.7 million and 486. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: RepViT-SAM, Wang et al. 2023, arXiv 2312.05760 (Apache-2.0); EdgeSAM, Zhou et al. 2023,
        arXiv 2312.06660 (S-Lab licence, non-commercial; nothing of its code is used). Blocks are
        timm's.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.RepViT(variant="m1")(sc.build("tiny"))
        >>> small.image_encoder.img_size
        128
    """

    variant: Literal["m1", "m2.3"] = "m1"
    fuse: bool = False

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return 16

    @property
    def multiple(self) -> int:
        """The last stage of ``m1`` halves the grid once more."""
        return 16 * CONFIGS[self.variant].last_stride

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        made = build(CONFIGS[self.variant], size, channels)
        if self.fuse:
            made.eval().fuse()
        return made
