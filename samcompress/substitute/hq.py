"""SAM-HQ's token for fine masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder
from torch import nn

from ..core._draws import drawn as randomly
from ..core.contract import parts
from ..core.errors import ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._hq import LEVEL, HqMaskDecoder, HqTinyViT, HqViT
from ._retyped import retyped
from ._swap import OnGrid
from ._tiny_vit import TinyViT


@register
@dataclass(frozen=True, kw_only=True)
class HQ(Transform, family="substitute", phase=10):
    """Add SAM-HQ's token, whose fine mask also sees early features of the image encoder.

    Use it where outlines matter: thin parts, holes, hair. All weights of the model stay; those of
    the new parts are random and of no use before they are trained, or loaded from a SAM-HQ:
    `sc.load("sam_hq_vit_b")` and the like contain this step. On a model that has the token it
    changes `hq_token_only` alone. Not where decoding many prompts must be fast.

    Args:
        hq_token_only: give the fine mask alone, not added to SAM's own; upstream's choice for
            images of one object.
        seed: of the new parts' random weights.

    Raises:
        NoEffectError: if the model is like that already.
        ModelError: if the model is no SAM, its image encoder is neither segment_anything's ViT with
            a block of global attention nor TinyViT, or its mask decoder not segment_anything's.

    Effect: 1.07 million parameters more with ``vit_b``, 0.45 with TinyViT; a prompt costs 8.4 GMAC
        with ``vit_b`` and 5.9 with TinyViT, where SAM's decoder costs 1.8. The embedding has the
        early features as further channels: 1024 instead of 256 with ``vit_b``.

    Composes with: comes after `TinyViT` and before all other families; `ImageSize` before or after.
        `distill` leaves the further channels out where the teacher has none.

    Source: SAM-HQ, Ke et al. 2023, arXiv 2306.01567 (Apache-2.0). Own code. For ambiguous prompts
        it gives three masks, as SAM does; upstream gives the best-scored one of them.

    Example:
        >>> import samcompress as sc
        >>> fine = HQ()(sc.build("tiny"))
        >>> fine.mask_decoder.features
        64
    """

    hq_token_only: bool = False
    seed: int = 0

    def check(self, model: nn.Module) -> None:
        """Check that there is an encoder with early features, and SAM's decoder."""
        encoder, _, decoder = parts(model)
        if isinstance(decoder, HqMaskDecoder):
            if decoder.hq_token_only != self.hq_token_only:
                return
            raise NoEffectError(
                f"{self.label}: the model has the token already.",
                where="mask_decoder",
                got=f"hq_token_only={self.hq_token_only}",
                fix="leave this step out",
            )
        if type(decoder) is not MaskDecoder:
            raise self._unknown("mask_decoder", decoder, "segment_anything's own")
        if _features(encoder) is None:
            expected = "segment_anything's ViT with a block of global attention, or TinyViT"
            raise self._unknown("image_encoder", encoder, expected)

    def _unknown(self, part: str, found: nn.Module, expected: str) -> ModelError:
        return ModelError(
            f"{self.label} does not know this model's parts.",
            where=part,
            got=f"{type(found).__module__}.{type(found).__qualname__}",
            expected=expected,
            fix="put this step right after the one that made the image encoder",
        )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Let the encoder append its early features, and the decoder use them."""
        sam: Any = model
        decoder = sam.mask_decoder
        known = isinstance(decoder, HqMaskDecoder)
        features = decoder.features if known else _features(sam.image_encoder)
        return self.rebuild(model, {"features": features})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same again."""
        sam: Any = model
        if isinstance(sam.mask_decoder, HqMaskDecoder):
            sam.mask_decoder.hq_token_only = self.hq_token_only
            return state
        sam.image_encoder = _appending(sam.image_encoder)
        with randomly(torch.device("cpu"), self.seed, self.label):
            sam.mask_decoder = HqMaskDecoder(
                sam.mask_decoder, state["features"], hq_token_only=self.hq_token_only
            )
        return state


def _features(encoder: Any) -> int | None:
    """Channels of what the encoder can append; None if it is of another kind."""
    kind, found = type(encoder), None
    if kind is OnGrid:
        return _features(encoder.encoder)
    if kind is TinyViT:
        found = encoder.layers[LEVEL + 1].blocks[0].attn.qkv.in_features
    elif kind is ImageEncoderViT and _global_blocks(encoder):
        found = encoder.patch_embed.proj.out_channels
    return found


def _appending(encoder: Any) -> nn.Module:
    """The encoder, with its early features behind the embedding."""
    if type(encoder) is OnGrid:
        encoder.encoder = _appending(encoder.encoder)
        made: nn.Module = encoder
    elif type(encoder) is TinyViT:
        made = retyped(encoder, HqTinyViT)
    else:
        vit = retyped(encoder, HqViT)
        vit.tap = _global_blocks(encoder)[0]
        made = vit
    return made


def _global_blocks(encoder: Any) -> list[int]:
    return [i for i, block in enumerate(encoder.blocks) if block.window_size == 0]
