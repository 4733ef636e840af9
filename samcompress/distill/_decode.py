"""The mask decoder for prompts of several images in one call, with gradients and all four masks.

`segment_anything`'s own forward takes one image at a time and runs without gradients through
`Sam.forward`; this is the same arithmetic with an image's number beside every prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._clicks import Asked, embed
from ._losses import to_grid


@dataclass(frozen=True)
class Decoded:
    """What the decoder says about P prompts.

    Attributes:
        logits: (P, 4, 4h, 4w) low-resolution masks; the first is the single mask, the other three
            are those of an ambiguous prompt.
        scores: (P, 4), the IoU the model expects of each.
        tokens: (P, 5, C), outputs of the two-way transformer for its score and mask tokens.
    """

    logits: Tensor
    scores: Tensor
    tokens: Tensor

    def at(self, grid: int) -> Decoded:
        """The same with float32 logits of (P, 4, n, n), for the grid that masks are compared on."""
        return replace(self, logits=to_grid(self.logits.float(), (grid, grid)))


def decode(model: nn.Module, features: Tensor, owner: Tensor, asked: Asked) -> Decoded:
    """Decode prompts of any images of a batch.

    Args:
        model: a SAM.
        features: (B, C, h, w) image embeddings.
        owner: (P,) which image each prompt belongs to.
        asked: what the P prompts are; the answers are those of the predictor for each alone.
    """
    sam: Any = model
    decoder, count = sam.mask_decoder, len(owner)
    sparse = embed(sam.prompt_encoder, asked.points, asked.labels)
    # With no points it gives the dense part only, one a prompt or one for all.
    _, dense = sam.prompt_encoder(points=None, boxes=None, masks=asked.masks)
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(count, -1, -1), sparse.to(tokens.dtype)], 1)
    source = features.index_select(0, owner) + dense
    # In half precision positions would be off by as much as neighbouring cells differ.
    with torch.autocast(features.device.type, enabled=False):
        place = sam.prompt_encoder.get_dense_pe().expand(count, -1, -1, -1)
    hidden, keys = decoder.transformer(source, place, tokens)
    fine = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
    heads = enumerate(decoder.output_hypernetworks_mlps, 1)
    weights = torch.stack([head(hidden[:, i]) for i, head in heads], 1)
    logits = (weights @ fine.flatten(2)).unflatten(2, fine.shape[-2:])
    last = 1 + weights.shape[1]
    return Decoded(logits, decoder.iou_prediction_head(hidden[:, 0]), hidden[:, :last])
