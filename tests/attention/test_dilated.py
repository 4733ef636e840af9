"""Global attention among tokens that lie a fixed distance apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from approximations import block, masked, places, reach, tokens
from conftest import random_sam

import samcompress as sc
from samcompress.attention.dilated import Dilated, DilatedAttention

GRIDS = [(12, 12), (8, 12), (9, 13), (7, 5)]
any_grid = pytest.mark.parametrize("grid", GRIDS)


def alike(height: int, width: int, rate: int) -> torch.Tensor:
    qy, qx, ky, kx = places(height, width)
    return ((qy - ky) % rate == 0) & ((qx - kx) % rate == 0)


@any_grid
@pytest.mark.parametrize("rate", [1, 2, 3, 5])
@pytest.mark.parametrize("rel_pos", [True, False])
def test_equals_the_original_among_like_places(
    grid: tuple[int, int], rate: int, rel_pos: bool
) -> None:
    attn = block(grid=grid, rel_pos=rel_pos).attn
    x = tokens(2, *grid, 32)
    with torch.no_grad():
        found = DilatedAttention(attn, 0, rate)(x)
        expected = masked(attn, x, alike(*grid, rate))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        if rate == 1:
            torch.testing.assert_close(found, attn(x), rtol=0, atol=1e-5)


@any_grid
@pytest.mark.parametrize("rate", [1, 2])
def test_a_sparse_map_a_head(grid: tuple[int, int], rate: int) -> None:
    attn = block(grid=grid, heads=8).attn
    x = tokens(2, *grid, 32)
    qy, qx, _, _ = places(*grid)
    turn = (qy % rate * rate + qx % rate == torch.arange(8)[:, None, None] % rate**2).expand(
        8, -1, grid[0] * grid[1]
    )
    with torch.no_grad():
        found = DilatedAttention(attn, 0, rate, "per_head")(x)
        expected = masked(attn, x, alike(*grid, rate) & turn)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_reach_is_the_class_of_like_places(grid: tuple[int, int]) -> None:
    small = DilatedAttention(block(grid=grid).attn, 0, 2)
    assert torch.equal(reach(small, *grid), alike(*grid, 2))


def test_every_token_is_in_one_map() -> None:
    small = DilatedAttention(block().attn, 0, 3)
    numbers = torch.arange(1, 9 * 13 + 1.0).reshape(1, 9, 13, 1)
    sparse = small._apart(numbers)
    held = sparse[sparse > 0]
    assert sorted(held.tolist()) == list(range(1, 9 * 13 + 1))
    assert torch.equal(small._together(sparse)[:, :9, :13], numbers)


@pytest.mark.parametrize(("window", "grid"), [(6, (12, 12)), (5, (9, 13))])
def test_inside_windows(window: int, grid: tuple[int, int]) -> None:
    eager = block(window=window, grid=grid)
    x = tokens(2, *grid, 32)
    with torch.no_grad():
        # Norms and MLP are in the way of a whole block, so attention is compared in its place.
        small = DilatedAttention(eager.attn, window, 1)
        eager.norm1, eager.mlp, eager.norm2 = (torch.nn.Identity() for _ in range(3))
        torch.testing.assert_close(small(x), eager(x) / 2 - x, rtol=0, atol=1e-5)


def test_counts_the_work() -> None:
    sam = sc.build("tiny")
    before = sc.evaluate.macs(sam)
    for rate, offsets, share in ((2, "all", 4), (4, "all", 16), (2, "per_head", 16)):
        small = sc.evaluate.macs(Dilated(rate=rate, offsets=offsets)(sam, progress=False))
        core = 2 * 256 * 256 * 64
        positions = 2 * 256 * 16 * 64
        less = positions / rate / (1 if offsets == "all" else rate**2)
        expected = before.encoder - 2 * (core * (1 - 1 / share) + positions - less)
        assert small.encoder == pytest.approx(expected, rel=1e-6)


def test_windows_between_connect_everything() -> None:
    sam: Any = random_sam(image_size=128, window_size=4, depth=2, global_attn_indexes=(1,))
    small: Any = Dilated(rate=4)(sam, progress=False)
    layers = torch.nn.Sequential(*small.image_encoder.blocks)
    assert reach(layers, 16, 16).all()


def test_errors() -> None:
    with pytest.raises(sc.errors.ConfigError) as caught:
        Dilated(rate=1)
    assert str(caught.value) == (
        "attention.dilated: rate is out of range.\n  got       1\n  expected  >= 2"
    )
    sam = sc.build("tiny")
    with pytest.raises(sc.errors.ModelError) as caught:
        Dilated(rate=3, offsets="per_head")(sam)
    assert str(caught.value) == (
        "attention.dilated leaves tokens without attention.\n"
        "  where     image_encoder.blocks.1\n"
        "  got       16 tokens along a side, 4 heads\n"
        "  expected  3 tokens, and 9 heads for per_head\n"
        '  try       a smaller rate=, or offsets="all"'
    )
    with pytest.raises(sc.errors.ModelError, match="leaves tokens without attention"):
        Dilated(rate=17)(sam)
