"""Attention to the square of tokens around each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from approximations import block, masked, places, reach, tokens
from conftest import random_sam

import samcompress as sc
from samcompress.attention.neighborhood import TILE, Neighborhood, NeighborhoodAttention, tiles

GRIDS = [(12, 12), (8, 16), (9, 13), (10, 17), (7, 5)]
any_grid = pytest.mark.parametrize("grid", GRIDS)


def around(height: int, width: int, size: int) -> torch.Tensor:
    """Neighbourhoods that are moved inwards at the border."""
    qy, qx, ky, kx = places(height, width)
    top, left = ((q - size // 2).clamp(0, n - size) for q, n in ((qy, height), (qx, width)))
    return (ky >= top) & (ky < top + size) & (kx >= left) & (kx < left + size)


@any_grid
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("rel_pos", [True, False])
def test_equals_the_original_without_other_keys(
    grid: tuple[int, int], size: int, rel_pos: bool
) -> None:
    attn = block(grid=grid, rel_pos=rel_pos).attn
    x = tokens(2, *grid, 32)
    mask = around(*grid, size)
    assert mask.sum(1).eq(size**2).all()
    with torch.no_grad():
        found = NeighborhoodAttention(attn, size)(x)
        torch.testing.assert_close(found, masked(attn, x, mask), rtol=0, atol=1e-5)


def test_of_the_whole_map_it_is_the_original() -> None:
    attn = block(grid=(11, 11)).attn
    x = tokens(2, 11, 11, 32)
    with torch.no_grad():
        found = NeighborhoodAttention(attn, 11)(x)
        torch.testing.assert_close(found, attn(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6), (5, 10)])
def test_reach(grid: tuple[int, int]) -> None:
    small = NeighborhoodAttention(block(grid=grid).attn, 3)
    assert torch.equal(reach(small, *grid), around(*grid, 3))


def test_tables_of_windows() -> None:
    """Rows of a table for windows of 5 belong to the same offsets in one for the map."""
    attn = block(grid=(12, 12)).attn
    x = tokens(1, 12, 12, 32)
    with torch.no_grad():
        expected = NeighborhoodAttention(attn, 5)(x)
        for name in ("rel_pos_h", "rel_pos_w"):
            setattr(attn, name, torch.nn.Parameter(getattr(attn, name)[7:16].clone()))
        found = NeighborhoodAttention(attn, 5, window=5)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_tiles_cover_the_axis() -> None:
    for length in range(3, 40):
        cut = tiles(length, 3, torch.device("cpu"))
        assert sorted(set(cut.queries.flatten().tolist())) == list(range(length))
        assert cut.near.sum(-1).eq(3).all()
        assert int(cut.keys.min()) >= 0
        assert int(cut.keys.max()) < length


def test_counts_the_work() -> None:
    sam = sc.build("tiny", image_size=256)
    before = sc.evaluate.macs(sam)
    small = sc.evaluate.macs(Neighborhood(size=5)(sam, progress=False))
    n, c, seen = 1024, 64, TILE + 4
    softmax = 2 * n * n * c + 2 * n * 32 * c
    core = 2 * n * seen**2 * c + 2 * n * seen * c
    assert small.encoder == before.encoder - 2 * (softmax - core)


def test_windows_and_their_padding_go() -> None:
    sam: Any = sc.build("tiny")
    small: Any = Neighborhood(size=5, blocks="windowed")(sam, progress=False)
    assert [block.window_size for block in small.image_encoder.blocks] == [0, 0, 0, 0]
    padding = 21 * 21 - 16 * 16
    fewer = (
        sc.evaluate.macs(sam).encoder_no_attention - sc.evaluate.macs(small).encoder_no_attention
    )
    assert fewer == 2 * 4 * 64 * 64 * padding


def test_errors() -> None:
    for size in (1, 4):
        with pytest.raises(sc.errors.ConfigError) as caught:
            Neighborhood(size=size)
        assert str(caught.value) == (
            "attention.neighborhood: size is out of range.\n"
            f"  got       {size}\n  expected  odd and >= 3"
        )
    sam = random_sam()
    with pytest.raises(sc.errors.ModelError) as caught:
        Neighborhood(size=9)(sam)
    assert str(caught.value) == (
        "attention.neighborhood: the neighbourhood is too large.\n"
        "  where     image_encoder.blocks.1\n"
        "  got       size 9, 8 x 8 tokens, windows of 0\n"
        "  expected  less than the map, and no more than the windows there were\n"
        "  try       size=5"
    )
    with pytest.raises(sc.errors.ModelError, match=r"windows of 3"):
        Neighborhood(size=5, blocks="windowed")(sam)
