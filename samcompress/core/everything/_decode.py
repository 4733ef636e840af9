"""The mask decoder for many prompts on one image, in two halves: first scores, then masks.

`Shared` computes once what prompts have in common, and enlarges nothing until it is known which
masks are wanted. `Plain` asks any other decoder as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._shared_decoder import OneImage, sharable
from ..contract import cast, dtype_of


@dataclass(frozen=True)
class Decoded:
    """Answers to P prompts, M masks each, before anything is enlarged.

    Attributes:
        scores: (P, M) float32, the IoU the model expects of each mask.
        low: from R rows and R masks of these, index tensors, to (R, 4h, 4w) logits.
    """

    scores: Tensor
    low: Callable[[Tensor, Tensor], Tensor]


class Decoder(Protocol):
    """Decodes prompts on one image."""

    def __call__(self, sparse: Tensor, dense: Tensor, *, multimask: bool) -> Decoded:
        """Decode P prompts.

        Args:
            sparse: (P, N, C) from the prompt encoder.
            dense: (P, C, h, w) from the prompt encoder; the same for all prompts.
            multimask: the masks of an ambiguous prompt, not the single one.
        """


def decoder_for(model: Any, features: Tensor) -> Decoder:
    """The fastest decoder that gives what the model's own gives.

    Args:
        model: a SAM.
        features: (1, C, h, w) from its image encoder.
    """
    features = features.to(dtype_of(model.mask_decoder))
    position = model.prompt_encoder.get_dense_pe().to(features.dtype)
    if sharable(model.mask_decoder):
        return Shared(model.mask_decoder, features, position)
    return Plain(model.mask_decoder, features, position)


class Plain:
    """Any mask decoder, called as it is."""

    def __init__(self, decoder: Any, features: Tensor, position: Tensor) -> None:
        self.decoder, self.features, self.position = decoder, features, position

    def __call__(self, sparse: Tensor, dense: Tensor, *, multimask: bool) -> Decoded:
        """See `Decoder`."""
        logits, scores = self.decoder(
            image_embeddings=self.features,
            image_pe=self.position,
            sparse_prompt_embeddings=sparse.to(self.features.dtype),
            dense_prompt_embeddings=cast(dense, self.features.dtype),
            multimask_output=multimask,
        )
        return Decoded(scores.float(), lambda rows, masks: logits[rows, masks])


class Shared:
    """segment_anything's mask decoder; equal to rounding."""

    def __init__(self, decoder: Any, features: Tensor, position: Tensor) -> None:
        self.decoder, self.features, self.position = decoder, features, position
        self.image: OneImage | None = None

    def __call__(self, sparse: Tensor, dense: Tensor, *, multimask: bool) -> Decoded:
        """See `Decoder`."""
        if self.image is None:
            first = dense[:1].to(self.features)
            self.image = OneImage(self.decoder, self.features, self.position, first)
        image = self.image
        hidden, keys = image.transform(sparse.to(self.features))
        scores = image.scores(hidden, multimask=multimask)

        def low(rows: Tensor, masks: Tensor) -> Tensor:
            wanted, place = torch.unique(rows, return_inverse=True)
            return image.masks(hidden[wanted], keys[wanted], multimask=multimask)[place, masks]

        return Decoded(scores.float(), low)
