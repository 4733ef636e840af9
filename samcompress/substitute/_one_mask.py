"""Conventions of decoders that give one mask where SAM has four: MobileSAMv2 and TinySAM.

MobileSAMv2 decodes many boxes at once and takes the single mask (token 0) of each. It uses SAM's
own prompt encoder and decoder; only their file has another layout. That upstream repeats the
embedding for every box before the decoder, and not in it, changes nothing.

TinySAM never uses token 0: its single mask is the one of the other three that scores best.

Source: C. Zhang et al., "MobileSAMv2", 2023, arXiv 2312.09579; H. Shu et al., "TinySAM", 2023,
arXiv 2312.13789. Official weights: Apache-2.0. Own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder
from torch import Tensor, nn

from ..core.errors import CheckpointError

# The first name is spelt as in the file.
SECTIONS = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
ENCODER = "image_encoder."


def merge(encoder: Mapping[str, Tensor], decoder: Mapping[str, Any]) -> dict[str, Tensor]:
    """MobileSAMv2's two files as the state dict of one SAM.

    Args:
        encoder: names of an image encoder, or of a whole SAM, whose other parts are then left out.
        decoder: content of ``Prompt_guided_Mask_Decoder.pt``.

    Raises:
        CheckpointError: if the second file has not the two sections.
    """
    absent = [name for name in SECTIONS if not isinstance(decoder.get(name), Mapping)]
    if absent:
        raise CheckpointError(
            "this is not the decoder file of MobileSAMv2.",
            got=", ".join(map(repr, list(decoder)[:4])) or "an empty dict",
            expected=" and ".join(map(repr, SECTIONS)),
        )
    whole = any(name.startswith(ENCODER) for name in encoder)
    found = {
        (name if whole else ENCODER + name): tensor
        for name, tensor in encoder.items()
        if name.startswith(ENCODER) or not whole
    }
    for section, prefix in SECTIONS.items():
        found |= {prefix + name: tensor for name, tensor in decoder[section].items()}
    return found


class TakenOver(MaskDecoder):  # type: ignore[misc]
    """A mask decoder of another kind with the parts of one that exists.

    Args:
        decoder: its parts move over and keep their names; do not use it afterwards.
    """

    def __init__(self, decoder: Any) -> None:
        nn.Module.__init__(self)  # no parts of its own
        self.transformer_dim = decoder.transformer_dim
        self.num_multimask_outputs = decoder.num_multimask_outputs
        self.num_mask_tokens = decoder.num_mask_tokens
        for name, part in decoder.named_children():
            self.add_module(name, part)
        self.training = decoder.training


class BestMask(TakenOver):
    """SAM's decoder, whose single mask is the one of the other three with the best score."""

    def predict_masks(self, **embeddings: Any) -> tuple[Tensor, Tensor]:
        """(P, 4, 4h, 4w) logits and (P, 4) scores; the first is one of the others."""
        masks, scores = super().predict_masks(**embeddings)
        return best_first(masks, scores)


def best_first(masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Put the best-scored mask of 1, 2, ... in place of mask 0.

    Args:
        masks: (P, M, h, w).
        scores: (P, M).
    """
    top, index = scores[:, 1:].max(1, keepdim=True)
    rows = (1 + index)[..., None, None].expand(-1, -1, *masks.shape[2:])
    masks = torch.cat([masks.gather(1, rows), masks[:, 1:]], 1)
    return masks, torch.cat([top, scores[:, 1:]], 1)
