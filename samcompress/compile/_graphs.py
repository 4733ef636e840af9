"""Prompt encoder and mask decoder as one graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NO_POINT = -1.0
TOP_LEFT, BOTTOM_RIGHT = 2.0, 3.0
# A label of no meaning: the point gets its position and nothing else.
PLAIN = 4.0
# Where tokens are rounded to integers, numbers that differ in their last bit may become neighbours.
ROUNDED = 1e-2


class PromptDecoder(nn.Module):
    """Points and masks to logits, in tensors only: nothing depends on values or on what is absent.

    A box is two points labelled 2 and 3. What segment_anything adds by itself, the padding point
    (0, 0) labelled -1 of a prompt without box, must be among the points. All masks are returned.

    Args:
        prompt_encoder: a segment_anything `PromptEncoder`.
        mask_decoder: a segment_anything `MaskDecoder`.
    """

    image_pe: Tensor
    labels: Tensor
    no_mask: Tensor

    def __init__(self, prompt_encoder: Any, mask_decoder: Any) -> None:
        super().__init__()
        self.pe_layer = prompt_encoder.pe_layer
        self.mask_downscaling = prompt_encoder.mask_downscaling
        self.mask_decoder = mask_decoder
        self.size = prompt_encoder.input_image_size
        embeddings = (prompt_encoder.not_a_point_embed, *prompt_encoder.point_embeddings)
        # Some runtimes misread buffers with strides, and this one is a permuted view.
        self.register_buffer("image_pe", prompt_encoder.get_dense_pe().contiguous())
        self.register_buffer("labels", torch.cat([e.weight.detach() for e in embeddings]))
        self.register_buffer(
            "no_mask", prompt_encoder.no_mask_embed.weight.detach().view(1, -1, 1, 1)
        )

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompts of N points on one image.

        Args:
            image_embeddings: (1, C, h, w).
            point_coords: (P, N, 2) x, y in the padded frame.
            point_labels: (P, N) -1 no point, 0 outside, 1 inside, 2 and 3 corners of a box.
            mask_input: (P, 1, 4h, 4w) logits; any finite numbers where there is no mask.
            has_mask_input: (1,) 1 to use the masks, 0 not to.

        Returns:
            (P, M, 4h, 4w) logits and (P, M) scores, M counting the single mask first.
        """
        sparse = self.pe_layer.forward_with_coords(point_coords + 0.5, self.size)
        label = point_labels[..., None]
        sparse = torch.where(label == NO_POINT, 0.0, sparse)
        for index, embedding in enumerate(self.labels):
            sparse = sparse + torch.where(label == index - 1, embedding, 0.0)
        dense = torch.where(
            has_mask_input.view(1, 1, 1, 1) > 0.5,
            self.mask_downscaling(mask_input),
            self.no_mask,
        )
        masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        return masks, scores


def allowed(modules: Iterable[nn.Module], usual: float) -> float:
    """How far a runtime may be from torch.

    Args:
        modules: what was exported; a layer with `rounds_tokens` rounds what it is given.
        usual: where no layer does.
    """
    every = (layer for module in modules for layer in module.modules())
    rounds = any(getattr(layer, "rounds_tokens", False) for layer in every)
    return max(usual, ROUNDED) if rounds else usual
