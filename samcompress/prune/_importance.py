"""How much a unit matters: one number for each, higher is to be kept."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.predict import preprocess

POINTS = 8  # drawn in an image for the sensitivity of a decoder


def hidden_scores(lin1: Tensor, lin2: Tensor) -> Tensor:
    """Scores of an MLP's hidden units from scores of its weights.

    Args:
        lin1: (M, E), one number for each weight of the first layer.
        lin2: (E, M), the same for the second.

    Returns:
        (M,): summed over a unit's weights in each layer, averaged over the two layers.
    """
    return (lin1.sum(1) + lin2.sum(0)) / 2


def magnitude(block: Any) -> Tensor:
    """(M,) sums of squared weights of an MLP's hidden units; biases do not count."""
    weights = (block.lin1.weight, block.lin2.weight)
    return hidden_scores(*(w.detach().float().square() for w in weights))


@torch.enable_grad()
def disturbed_taylor(
    model: nn.Module, names: Iterable[str], samples: Iterable[Any], *, seed: int
) -> dict[str, Tensor]:
    """Taylor scores of hidden units, without labels.

    A model compared with itself has loss 0 and gradient 0. Disturbing the target by noise e makes
    the gradient that of ``-<e, f(x)>``, up to a factor; that is differentiated here, once an image.
    A weight's score is ``|w| sqrt(sum of squared gradients over the images)``: squared image by
    image, for the noise of different images must not cancel out.

    ``f`` is the image embedding for MLPs of the image encoder. For those of the mask decoder it is
    the low-resolution logits of all masks, at points drawn at random inside the image.

    Args:
        model: a SAM; a float32 copy is worked on, so nothing of it changes.
        names: of its `MLPBlock`s.
        samples: with ``id`` and ``image``; an image's noise depends on `seed` and its id alone, so
            the order of images does not matter.
        seed: of the noise.

    Returns:
        (M,) float32 for each name; all zeros without samples.
    """
    twin: Any = copy.deepcopy(model).float().eval().requires_grad_(False)
    blocks = {name: twin.get_submodule(name) for name in names}
    encoder = [w for n, b in blocks.items() if n.startswith("image_encoder.") for w in _weights(b)]
    decoder = [w for n, b in blocks.items() if n.startswith("mask_decoder.") for w in _weights(b)]
    squares = {w: torch.zeros_like(w) for w in encoder + decoder}
    for weight in squares:
        weight.requires_grad_(True)
    for block in twin.image_encoder.blocks:
        # The attention maps of all blocks at once would fill the memory; those of one do not.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    for sample in samples:
        noise = torch.Generator().manual_seed(_seed(seed, sample.id))
        image, size = preprocess(twin, sample.image)
        features = twin.image_encoder(image[None])
        if encoder:
            _add_squares(squares, encoder, features, noise)
        if decoder:
            _add_squares(squares, decoder, _logits(twin, features.detach(), size, noise), noise)
    return {
        name: hidden_scores(*(w.detach().abs() * squares[w].sqrt() for w in _weights(block)))
        for name, block in blocks.items()
    }


def _weights(block: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return block.lin1.weight, block.lin2.weight


def _seed(seed: int, key: object) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def _add_squares(
    squares: dict[nn.Parameter, Tensor],
    weights: list[nn.Parameter],
    output: Tensor,
    noise: torch.Generator,
) -> None:
    disturbance = torch.randn(output.shape, generator=noise).to(output.device)
    gradients = torch.autograd.grad((disturbance * output).sum(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        squares[weight] += gradient.square()


def _logits(model: Any, features: Tensor, size: tuple[int, int], noise: torch.Generator) -> Tensor:
    """(P, 4, 4h, 4w) logits of the single and the three masks of P random points."""
    height, width = size
    points = torch.rand(POINTS, 1, 2, generator=noise) * torch.tensor([width, height])
    labels = torch.ones(POINTS, 1)
    sparse, dense = model.prompt_encoder(
        points=(points.to(features.device), labels.to(features.device)), boxes=None, masks=None
    )
    logits = [
        model.mask_decoder(
            image_embeddings=features,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )[0]
        for several in (False, True)
    ]
    return torch.cat(logits, 1)
