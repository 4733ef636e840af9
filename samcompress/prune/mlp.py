"""Hidden units of MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.registry import register
from ..core.where import Where
from ._slices import Ranked


@register
@dataclass(frozen=True, kw_only=True)
class Mlp(Ranked, family="prune", phase=20):
    """Remove the hidden units of least importance from SAM's MLPs.

    Two thirds of a ViT encoder's weights are in its MLPs, and their units hang together with
    nothing else. Use it for a moderate cut that changes no other shape. Do not expect much from it
    at large images, where attention takes the time, and plan on distillation after more than about
    a fifth.

    Args:
        ratio: share of hidden units removed, between 0 and 1.
        criterion: what is thought unimportant. "disturbed_taylor": what the embedding (or, in the
            decoder, the masks) is least sensitive to; needs images, no labels. "taylor": what the
            loss of masks is least sensitive to; needs annotated images. "activation": small weights
            on small inputs; needs images. "magnitude": small weights. "random": drawn by `seed`;
            the control that a criterion has to beat.
        where: MLPs to prune; those of the decoder are
            ``where="mask_decoder.transformer.layers.*.mlp"``.
        scope: "local" takes `ratio` of each MLP; "global" takes it of all together, more where more
            units are unimportant.
        round_to: kept units are a multiple of this, rounded down; "auto" is what suits the device
            the model is on: 64 on CUDA, 32 elsewhere, less for narrow MLPs.
        images: at most so many images are looked at.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range, or `ratio` would empty an MLP.
        NoEffectError: if `where` matches no MLP of segment_anything's kind.
        ModelError: if an MLP is of other layers than `torch.nn.Linear`, e.g. quantised already, a
            weight is not finite, or the image encoder is no ViT of segment_anything's.
        DataError: if a criterion gets no image, or "taylor" no annotated object.

    Effect:
        Parameters, multiply-accumulates, bytes and time fall; ``ratio=0.5`` on ``vit_b`` removes
        28.3 of 93.7 million parameters and 116 of 486 GMAC (29 of 114 at 512 pixels, where CPU time
        falls by 19 %). Taylor scores take about four times as long as encoding the images.

    Composes with:
        After `ImageSize`, whose input size the scores are then for; before distillation, which wins
        accuracy back, and before quantisation and export. Can be repeated.

    Source:
        Taylor scores: P. Molchanov et al., 2019, arXiv 1906.10771; disturbed target and no labels:
        Z. Chen et al. (SlimSAM), 2023, arXiv 2312.05284. We sum squared gradients over images where
        SlimSAM sums the gradients themselves, whose noise does not fall with more images, and take
        ``MLPBlock`` apart directly instead of tracing. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.Mlp(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].mlp.lin1
        Linear(in_features=64, out_features=96, bias=True)
    """

    version: ClassVar[int] = 2

    where: Where = Where(("image_encoder.blocks.*.mlp",))

    @property
    def targets(self) -> Mapping[str, Where]:
        """Hidden units of MLPs."""
        return {"mlp": self.where}

    @classmethod
    def upgrade(cls, params: dict[str, Any], version: int) -> dict[str, Any]:
        """What version 1 called "taylor" is now "disturbed_taylor"."""
        renamed = params.get("criterion") == "taylor"
        return {**params, "criterion": "disturbed_taylor"} if renamed else params
