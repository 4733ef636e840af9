"""The mask decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.registry import register
from ..core.where import Where
from ._groups import Group
from ._slices import Ranked

MLPS = Where(("mask_decoder.transformer.layers.*.mlp",))
ATTENTION = Where(
    (
        "mask_decoder.transformer.layers.*.self_attn",
        "mask_decoder.transformer.layers.*.cross_attn_*",
        "mask_decoder.transformer.final_attn_token_to_image",
    )
)
HEADS = Where(("mask_decoder.output_hypernetworks_mlps.*", "mask_decoder.iou_prediction_head"))


@register
@dataclass(frozen=True, kw_only=True)
class Decoder(Ranked, family="prune", phase=20):
    """Make the mask decoder narrower inside: its MLPs, its attention's heads, its output heads.

    The decoder is 4 % of ``vit_b``, but four tenths of a model of ten million parameters, and it
    runs once a prompt. Channels between its layers stay, so it fits any image encoder. It bears
    little without training: follow it with `PromptLoop` or `Supervised`.

    Args:
        ratio: share removed of the hidden units of each MLP, of the heads of each attention, and of
            the hidden units of the heads that make masks and scores; between 0 and 1.
        criterion: see `Mlp`; "disturbed_taylor" asks what masks and scores are least sensitive to.
        scope: "local" takes `ratio` of each module; "global" takes it of all modules together whose
            units are alike in kind and cost.
        round_to: kept hidden units are a multiple of this, rounded down; "auto" as in `Mlp`. Heads
            are counted singly.
        images: at most so many images are looked at.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range, or `ratio` would leave nothing of a module.
        NoEffectError: if the decoder is not made of segment_anything's modules.
        ModelError: if a layer was replaced, e.g. quantised already, or a weight is not finite.
        DataError: if a criterion gets no image, or "taylor" no annotated object.

    Effect:
        ``ratio=0.5`` takes 2.1 of the 4.1 million parameters of SAM's decoder, and 0.7 of the 1.8
        GMAC of a prompt.

    Composes with:
        After `ImageSize`; before distillation, quantisation and export. `Encoder` does not train
        decoders.

    Source:
        Own design. Scores: see `Mlp`, P. Molchanov et al., 2019, arXiv 1906.10771.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.Decoder(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
        >>> small.mask_decoder.transformer.layers[0].mlp.lin1
        Linear(in_features=64, out_features=64, bias=True)
    """

    @property
    def targets(self) -> Mapping[str, Where]:
        """All that can be narrowed inside."""
        return {"mlp": MLPS, "token_heads": ATTENTION, "head_units": HEADS}

    def granularity(self, kind: str, groups: Sequence[Group]) -> int:
        """Heads are counted one by one."""
        return 1 if kind == "token_heads" else super().granularity(kind, groups)
