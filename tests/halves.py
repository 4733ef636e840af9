"""The two halves of a SAM, with inputs, as runtimes get them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from samcompress.compile._graphs import PromptDecoder
from samcompress.compile.backends import Options

ENCODER = Options(inputs=("image",), outputs=("image_embeddings",))
DECODER = Options(
    inputs=("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"),
    outputs=("masks", "iou"),
)


def encoder_half(sam: Any, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The image encoder and an image."""
    side = sam.image_encoder.img_size
    generator = torch.Generator().manual_seed(seed)
    encoder = sam.image_encoder.eval().requires_grad_(False)
    return encoder, (torch.randn(1, 3, side, side, generator=generator),)


def decoder_half(
    sam: Any, prompts: int, points: int, *, mask: bool = False, seed: int = 0
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The prompt decoder and prompts whose last point is padding."""
    generator = torch.Generator().manual_seed(seed)
    decoder = PromptDecoder(sam.prompt_encoder, sam.mask_decoder).eval().requires_grad_(False)
    h, w = sam.prompt_encoder.image_embedding_size
    labels = torch.randint(0, 4, (prompts, points), generator=generator).float()
    labels[:, -1] = -1
    return decoder, (
        torch.randn(1, sam.prompt_encoder.embed_dim, h, w, generator=generator),
        sam.image_encoder.img_size * torch.rand(prompts, points, 2, generator=generator),
        labels,
        8 * torch.randn(prompts, 1, 4 * h, 4 * w, generator=generator),
        torch.tensor([float(mask)]),
    )


def furthest(found: tuple[Tensor, ...], module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference from torch, over the largest number of torch's where that is above 1."""
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1))
        for a, b in zip(found, expected, strict=True)
    )
