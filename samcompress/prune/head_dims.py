"""The width of attention's heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.registry import register
from ..core.where import Where
from ._slices import Ranked


@register
@dataclass(frozen=True, kw_only=True)
class HeadDims(Ranked, family="prune", phase=20):
    """Make the heads of the image encoder's attention narrower, all of a block alike.

    This is how SlimSAM slims attention. Its maps stay as many and as large, so time and memory fall
    much less than parameters do: prefer `Heads`, unless a published architecture is wanted. Plan on
    distillation afterwards.

    Args:
        ratio: share of each head's dimensions removed, between 0 and 1.
        criterion: see `Mlp`; the scores of a dimension are summed over the heads.
        where: attention to prune.
        scope: "local" takes `ratio` of each attention; "global" takes it of all windowed attention
            together, and of all global attention together.
        round_to: kept dimensions are a multiple of this, rounded down; "auto" is 8, less for narrow
            heads.
        images: at most so many images are looked at.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range, or `ratio` would leave heads without dimensions.
        NoEffectError: if `where` matches no attention of segment_anything's kind.
        ModelError: if a layer was replaced, e.g. quantised already, a weight is not finite, or
            the image encoder is no ViT of segment_anything's.
        DataError: if a criterion gets no image, or "taylor" no annotated object.

    Effect:
        Parameters and multiply-accumulates fall; ``ratio=0.5`` takes 14.2 of the 93.7 million
        parameters of ``vit_b`` and 124 of 486 GMAC. The tables of relative positions lose the same
        columns.

    Composes with:
        After `ImageSize` and `Heads`; before distillation, `attention.Fused`, quantisation and
        export. Can be repeated.

    Source:
        SlimSAM, Z. Chen et al., 2023, arXiv 2312.05284. We keep the tables of relative positions,
        and the scale of attention by folding it into the keys; the released code starts both anew.
        Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.HeadDims(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].attn.rel_pos_h.shape
        torch.Size([13, 8])
    """

    where: Where = Where(("image_encoder.blocks.*.attn",))

    @property
    def targets(self) -> Mapping[str, Where]:
        """Dimensions of the heads of the image encoder."""
        return {"head_dims": self.where}
