"""RWKV in place of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ._rwkv import CONFIGS, build
from ._swap import Swap


@register
@dataclass(frozen=True, kw_only=True)
class RWKV(Swap, family="substitute", phase=10):
    """Put convolutions and RWKV blocks in place of the image encoder, as RWKV-SAM does.

    Use it for large images: every token sees the whole image, at a cost linear in their number. It
    needs no kernel of its own, but runtimes for phones have little practice with its operators. Do
    not expect RWKV-SAM: this is the architecture after the paper, and no checkpoint of its authors
    fits. The weights are random: train it with `distill.Encoder`.

    Args:
        variant: ``tiny`` or ``small``.
        fuse: fold the batch norms of the convolutional stages.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side is not a multiple of 16.
        ModelError: if the model is no SAM.

    Effect: at 1024 pixels an encoder of 5.5 million parameters and 33 GMAC (``tiny``), or of 19.7
        million and 93 (``small``); ``vit_b`` has 89.7 million and 486. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.

    Source: architecture after the paper: RWKV-SAM, Yuan et al. 2024, arXiv 2406.19369 (S-Lab
        licence, non-commercial; nothing of its code is used); blocks after Vision-RWKV, Duan et al.
        2024, arXiv 2403.02308. Known of it: widths 64, 128 and 384, an MLP ratio of 2. Numbers of
        blocks and the tiny variant are our choice; its refinement of masks is left out.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.RWKV(variant="tiny")(sc.build("tiny"))
        >>> small.image_encoder.img_size
        128
    """

    variant: Literal["tiny", "small"] = "tiny"
    fuse: bool = False

    @property
    def stride(self) -> int:
        """16 pixels a cell."""
        return 16

    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""
        made = build(CONFIGS[self.variant], size, channels)
        if self.fuse:
            made.eval().fuse()
        return made
