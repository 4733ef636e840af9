"""What the tests of techniques for tokens share: a block, tokens, a mixed batch of photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import random_sam
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

import samcompress as sc
from samcompress.core.predict import encode


def block(
    dim: int = 32,
    window: int = 0,
    *,
    bias: bool = True,
    rel_pos: bool = True,
    grid: tuple[int, int] = (12, 12),
) -> Block:
    """Two heads, no table of zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Block(
            dim, 2, qkv_bias=bias, use_rel_pos=rel_pos, window_size=window, input_size=grid
        )
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "rel_pos" in name or "bias" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))
    return made.eval()


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twins(x: Tensor) -> Tensor:
    """Eight tokens of even columns become those of odd columns elsewhere."""
    x = x.clone()
    for i in range(8):
        x[:, i % 6, 2 * (i % 4)] = x[:, (i + 2) % 6, 1 + 2 * ((i + 1) % 4)]
    return x


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def toy(**sizes: Any) -> Any:
    """Four blocks, two of them global; a map of 16, whose windows of 5 are padded."""
    small = {"image_size": 128, "depth": 4, "window_size": 5, "global_attn_indexes": (1, 3)}
    return random_sam(**{**small, **sizes})


# Square, wide and tall.
PHOTOS = [sc.shapes(1, seed=3, size=size)[0].image for size in ((64, 64), (48, 80), (80, 30))]


def embed(sam: nn.Module, *, batch: int = 1) -> Tensor:
    """(3, C, h, w) of the photos."""
    return torch.cat([found.features for found in encode(sam, PHOTOS, batch_size=batch)])


def lives_on(small: nn.Module, tmp_path: Path) -> None:
    """Saves and loads; deterministic; images in a batch do not see one another; trains."""
    expected = embed(small)
    assert torch.equal(embed(small), expected)
    torch.testing.assert_close(embed(small, batch=3), expected, rtol=0, atol=1e-5)
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(embed(again), expected)
    assert repr(again) == repr(small)
    sam: Any = small
    sam.image_encoder(torch.randn(2, 3, 128, 128)).square().mean().backward()
    for name, parameter in sam.image_encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        parameter.grad = None


def full_grid(technique: Any) -> tuple[int, ...]:
    """Shape of the embedding of an image of 1024 px in patches of 16."""
    sam = toy(image_size=1024, patch_size=16, depth=2, window_size=14, global_attn_indexes=(1,))
    with torch.no_grad():
        image = tokens(1, 3, 1024, 1024)
        image[:, :, 768:] = 0
        return tuple(technique(sam, progress=False).image_encoder(image).shape)


def graph(small: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An image, half of it padding; its embedding, and that by a graph of torch.export."""
    image = tokens(1, 3, 128, 128)
    image[:, :, 64:] = 0
    with torch.no_grad():
        program = torch.export.export(small.image_encoder, (image,), strict=False)
        return image, small.image_encoder(image), program.module()(image)
