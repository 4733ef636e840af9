"""The mask decoder for prompts of several images in one call, with gradients and all four masks.

`segment_anything`'s own forward takes one image at a time and runs without gradients through
`Sam.forward`; this is the same arithmetic with an image's number beside every prompt. A model whose
prompt encoder or mask decoder does anything else is asked image by image, by its own modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from ..core.contract import parts
from ..core.errors import ModelError
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
    if plain(model):
        return _together(model, features, owner, asked)
    # Prompts of one image that begin alike have equally many tokens, whatever the model adds.
    kinds = 2 * owner + asked.boxed
    groups = [(kinds == kind).nonzero()[:, 0] for kind in sorted(set(kinds.tolist()))]
    found = [
        _alone(model, features[owner[rows[:1]]], asked.rows(rows), boxed=bool(asked.boxed[rows[0]]))
        for rows in groups
    ]
    order = torch.cat(groups).argsort()
    logits, scores, tokens = (torch.cat(each)[order] for each in zip(*found, strict=True))
    return Decoded(logits, scores, tokens)


def plain(model: nn.Module) -> bool:
    """Whether prompts are encoded and decoded exactly as segment_anything does it."""
    _, prompts, decoder = parts(model)
    if type(prompts) is not PromptEncoder or not isinstance(decoder, MaskDecoder):
        return False
    return type(decoder).predict_masks is MaskDecoder.predict_masks


def check_decoder(label: str, model: nn.Module, *, masks: bool = False) -> None:
    """Check that prompts can be decoded with gradients.

    Args:
        label: the technique's, for messages.
        model: a SAM.
        masks: whether a prompt may contain a mask.

    Raises:
        ModelError: naming the part that cannot.
    """
    _, prompts, decoder = parts(model)
    lacking = [
        f"mask_decoder.{name}"
        for name in ("predict_masks", "transformer", "num_mask_tokens")
        if not hasattr(decoder, name)
    ]
    if lacking:
        raise ModelError(
            f"{label} cannot decode prompts with this mask decoder.",
            where=", ".join(lacking),
            got=f"{type(decoder).__module__}.{type(decoder).__qualname__}",
            expected="a decoder with the parts of segment_anything's",
            fix="sc.distill.Encoder(), which compares embeddings only",
        )
    if masks and not hasattr(prompts, "mask_downscaling"):
        raise ModelError(
            f"{label} feeds masks back, which this prompt encoder does not take.",
            where="prompt_encoder.mask_downscaling",
            got=f"{type(prompts).__module__}.{type(prompts).__qualname__}",
            expected="a prompt encoder that takes masks, as SAM's",
            fix="feed=0 and at most 10 rounds, or sc.distill.PromptLoop(), which feeds none",
        )


def _alone(
    model: Any, embedding: Tensor, asked: Asked, *, boxed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, scores and tokens for prompts of one image, of which all or none begin with a box."""
    prompts, decoder = model.prompt_encoder, model.mask_decoder
    boxes = asked.points[:, :2].flatten(1) if boxed else None
    # Without a box the second token is the padding, which the prompt encoder adds itself.
    kept = [n for n in range(asked.labels.shape[1]) if n > 1 or (n == 0 and not boxed)]
    points = (asked.points[:, kept], asked.labels[:, kept]) if kept else None
    states: list[Tensor] = []
    handle = decoder.transformer.register_forward_hook(
        lambda module, inputs, output: states.append(output[0])
    )
    try:
        # In half precision positions would be off by as much as neighbouring cells differ.
        with torch.autocast(embedding.device.type, enabled=False):
            sparse, dense = prompts(points=points, boxes=boxes, masks=asked.masks)
            place = prompts.get_dense_pe()
        masks, scores = decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=place,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
    finally:
        handle.remove()
    first = getattr(decoder, "score_token", 0)
    return masks, scores, states[0][:, first : first + 1 + decoder.num_mask_tokens]


def _together(model: nn.Module, features: Tensor, owner: Tensor, asked: Asked) -> Decoded:
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
