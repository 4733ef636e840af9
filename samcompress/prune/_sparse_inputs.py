"""What layers are fed, summed up image by image and block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from ..core.predict import preprocess
from ._importance import _at_points, _seed, _unpadded

Measure = Callable[[Tensor], Tensor]  # (tokens, C) -> what is added up over images


def squares(x: Tensor) -> Tensor:
    """(C,) sums of squares of (tokens, C)."""
    return x.square().sum(0)


def products(x: Tensor) -> Tensor:
    """(C, C) sums of products of (tokens, C)."""
    return x.T @ x


@torch.no_grad()
def sums(
    model: Any,
    names: Sequence[str],
    samples: Callable[[], Iterable[Any]],
    measure: Measure,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """What layers are fed, in portions: a ViT block of SAM's at a time, then all other layers.

    Layers may be changed once their portion is there: what comes later is fed by the changed ones.

    Args:
        model: a SAM in eval mode.
        names: of Linears.
        samples: gives the images, each time from the first; held are their tokens before a block.
        measure: `squares` or `products`.
        seed: of the points that a mask decoder is asked at.

    Yields:
        float32 sums over tokens and images, by name. A layer that no image reaches is left out.
    """
    encoder = model.image_encoder
    # Of another encoder's blocks we do not know that each takes what the one before it gives.
    blocks = list(encoder.blocks) if type(encoder) is ImageEncoderViT else []
    inside = [
        [n for n in names if n.startswith(f"image_encoder.blocks.{i}.")] for i in range(len(blocks))
    ]
    end = max((i for i, found in enumerate(inside, 1) if found), default=0)
    tokens = (
        [_before_blocks(encoder, preprocess(model, s.image)[0]) for s in samples()] if end else []
    )
    for block, found in zip(blocks[:end], inside, strict=False):
        if found:
            with listening(model, found, measure) as heard:
                for x in tokens:
                    block(x)
            yield heard
        for index, x in enumerate(tokens):
            tokens[index] = block(x)
    rest = [name for name in names if not any(name in found for found in inside)]
    if rest:
        with listening(model, rest, measure) as heard:
            for sample in samples():
                features = encoder(preprocess(model, sample.image)[0][None])
                if any(not name.startswith("image_encoder.") for name in rest):
                    noise = torch.Generator().manual_seed(_seed(seed, sample.id))
                    _at_points(model, features, sample.size, noise)
        yield heard


@contextmanager
def listening(model: Any, names: Iterable[str], measure: Measure) -> Iterator[dict[str, Tensor]]:
    """Add up what layers are fed, without the padding of windows.

    That padding is not zero where heads are joined, and no token comes of it.
    """
    heard: dict[str, Tensor] = {}
    inner = {b.attn.proj: b for b in model.modules() if isinstance(b, Block) and b.window_size}
    grid: dict[nn.Module, tuple[int, int]] = {}

    def before_block(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        grid[block] = (args[0].shape[1], args[0].shape[2])

    def before_layer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            if layer in inner:
                x = _unpadded(x, inner[layer].window_size, grid[inner[layer]])
            found = measure(x.flatten(0, -2))
            heard[name] = heard[name] + found if name in heard else found

        return hear

    handles = [b.register_forward_pre_hook(before_block) for b in inner.values()]
    for name in names:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(before_layer(name)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _before_blocks(encoder: Any, image: Tensor) -> Tensor:
    """(1, h, w, C) tokens of an image (3, S, S) that the first block gets."""
    x: Tensor = encoder.patch_embed(image[None])
    return x if encoder.pos_embed is None else x + encoder.pos_embed
