"""Heads of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..core.registry import register
from ..core.where import Where
from ._slices import Ranked


@register
@dataclass(frozen=True, kw_only=True)
class Heads(Ranked, family="prune", phase=20):
    """Remove the heads of least importance from the image encoder's attention.

    The map of a head has a number for each pair of tokens, so heads, not their width, are what
    attention costs at large images, in time and in memory. Use it first where a SAM is to become
    faster. Without training a quarter costs `tiny` 0.02 of mIoU; plan on distillation for more.

    Args:
        ratio: share of heads removed, between 0 and 1.
        criterion: see `Mlp`; a head's score is that of its rows of queries, keys and values, and of
            the columns that read it.
        where: attention to prune.
        scope: "local" takes `ratio` of each attention; "global" takes it of all windowed attention
            together, and of all global attention together.
        round_to: kept heads are a multiple of this, rounded down; "auto" is 1.
        images: at most so many images are looked at.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range, or `ratio` would leave an attention without heads.
        NoEffectError: if `where` matches no attention of segment_anything's kind.
        ModelError: if a layer was replaced, e.g. quantised already, a weight is not finite, or
            the image encoder is no ViT of segment_anything's.
        DataError: if a criterion gets no image, or "taylor" no annotated object.

    Effect:
        Half of ``vit_b``'s heads are 14.2 of 93.7 million parameters and 124 of 486 GMAC, and half
        of the memory of its attention maps.

    Composes with:
        After `ImageSize`; before `HeadDims`, distillation, `attention.Fused`, quantisation and
        export. Can be repeated.

    Source:
        Heads that can go: P. Michel et al., 2019, arXiv 1905.10650. Scores: see `Mlp`. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.Heads(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].attn.num_heads
        2
    """

    round_to: int | Literal["auto"] = 1
    where: Where = Where(("image_encoder.blocks.*.attn",))

    @property
    def targets(self) -> Mapping[str, Where]:
        """Heads of the image encoder."""
        return {"heads": self.where}
