"""The width of the image encoder's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.registry import register
from ..core.where import Where
from ._slices import Slices, check_blocks


@register
@dataclass(frozen=True, kw_only=True)
class Channels(Slices, family="prune", phase=20):
    """Remove channels of the tokens that run through all blocks of the image encoder.

    Every layer of the encoder reads or writes them, so this is the deepest cut: parameters of all
    layers fall together, and accuracy with them. Always distil afterwards. SlimSAM does it first.

    Args:
        ratio: share of channels removed, between 0 and 1.
        criterion: see `Mlp`; the scores of a channel are averaged over all layers.
        round_to: kept channels are a multiple of this, rounded down; "auto" is 64 on CUDA and 32
            elsewhere, less for narrow models.
        images: at most so many images are looked at.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range, or `ratio` would leave no channels.
        ModelError: if the image encoder is not made of segment_anything's ViT blocks, a layer was
            replaced, e.g. quantised already, a weight is not finite, or the decoder reads the
            tokens too, as in SAM-HQ.
        DataError: if a criterion gets no image, or "taylor" no annotated object.

    Effect:
        Parameters and multiply-accumulates fall; ``ratio=0.5`` takes 44.5 of the 93.7 million
        parameters of ``vit_b`` and 183 of 486 GMAC. The products of attention stay.

    Composes with:
        After `ImageSize`; before distillation, `attention.Fused`, quantisation and export.

    Source:
        Slimming of the embedding: SlimSAM, Z. Chen et al., 2023, arXiv 2312.05284. The released
        code ties channels that are 64 apart, as if they had heads; ours are free. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.Channels(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
        >>> small.image_encoder.pos_embed.shape
        torch.Size([1, 16, 16, 32])
    """

    round_to: int | Literal["auto"] = 32

    @property
    def targets(self) -> Mapping[str, Where]:
        """The image encoder."""
        return {"channels": Where(("image_encoder",))}

    def check(self, model: nn.Module) -> None:
        """Check as `Slices` does, and that only the blocks read the tokens."""
        check_blocks(self.label, model)
        super().check(model)
