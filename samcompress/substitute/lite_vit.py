"""LiteViT in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.registry import register
from ._litevit import CONFIGS, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class LiteViT(Swap, family="substitute", phase=10):
    """Put a very small encoder of pools and attention in place of the image encoder.

    Use it where the encoder must be as small as the decoder or smaller: it has the fewest
    parameters of all encoders here. Do not expect Lite-SAM: this is the architecture after the
    paper, and there is no public checkpoint. Its weights are random: train it with
    `distill.Encoder`.

    Args:
        fuse: make the pools of each block one convolution, and fold the batch norms.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 32.
        ModelError: if the model is no SAM.

    Effect: at 1024 pixels an encoder of 1.16 million parameters and 6 GMAC; ``vit_b`` has 89.7
        million and 486. The decoder, of 4.06 million, stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.
        `attention.Fused` finds its one block of attention.

    Source: architecture after the paper, no public checkpoint: Lite-SAM, Fu et al. 2024, arXiv
        2407.08965. Known of it: multi-scale pooling, attention, 1.16 million parameters. All sizes
        are our choice.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.LiteViT()(sc.build("tiny"))
        >>> small.image_encoder.img_size
        128
    """

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
        made = build(CONFIGS["lite"], size, channels)
        if self.fuse:
            made.eval().fuse()
        return made
