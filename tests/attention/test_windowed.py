"""Global attention cut down to windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from approximations import block, masked, places, reach, tokens
from conftest import random_sam
from segment_anything.modeling.image_encoder import Block

import samcompress as sc
from samcompress.attention.windowed import ShiftedAttention, Windowed, bands, centre, seen
from samcompress.core.adapters import to_transformers

GRIDS = [(12, 12), (8, 12), (9, 13)]


def windows(height: int, width: int, side: int, moved: int) -> torch.Tensor:
    qy, qx, ky, kx = (
        torch.div(p - moved, side, rounding_mode="floor") for p in places(height, width)
    )
    return (qy == ky) & (qx == kx)


@pytest.mark.parametrize(("grid", "side"), [((12, 12), 4), ((12, 12), 3), ((8, 12), 4)])
def test_equals_the_original_without_other_keys(grid: tuple[int, int], side: int) -> None:
    eager = block(grid=grid)
    expected = masked(eager.attn, tokens(2, *grid, 32), windows(*grid, side, 0))
    small = copy.deepcopy(eager)
    centre(small.attn, grid, side)
    small.window_size = side
    x = tokens(2, *grid, 32)
    small.norm1, small.mlp, small.norm2 = (torch.nn.Identity() for _ in range(3))
    with torch.no_grad():
        found = small(x) / 2 - x  # x + attention, which the second half doubles
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def test_resized_tables_would_not() -> None:
    eager = block()
    small = copy.deepcopy(eager)
    small.window_size = 4
    x = tokens(1, 12, 12, 32)
    small.norm1, small.mlp, small.norm2 = (torch.nn.Identity() for _ in range(3))
    with torch.no_grad():
        found = small(x) / 2 - x
        assert (found - masked(eager.attn, x, windows(12, 12, 4, 0))).abs().max() > 1e-2


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [3, 4, 5])
@pytest.mark.parametrize("rel_pos", [True, False])
def test_shifted_windows(grid: tuple[int, int], side: int, rel_pos: bool) -> None:
    attn = block(grid=grid, rel_pos=rel_pos).attn
    x = tokens(2, *grid, 32)
    mask = windows(*grid, side, side // 2)
    expected = masked(attn, x, mask)
    centre(attn, grid, side)
    small = ShiftedAttention(attn, side)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(reach(small, *grid), mask)


def test_centre_keeps_the_rows_of_small_offsets() -> None:
    attn = block(grid=(64, 64)).attn
    rows = attn.rel_pos_h.detach().clone()
    centre(attn, (64, 64), 14)
    assert torch.equal(attn.rel_pos_h, rows[50:77])


def test_a_window_of_the_whole_map_is_the_identity() -> None:
    attn = block().attn
    before = attn.rel_pos_h.detach().clone()
    centre(attn, (12, 12), 12)
    assert torch.equal(attn.rel_pos_h, before)


def test_bands_make_up_the_axis() -> None:
    for length in range(1, 30):
        for window in range(2, 12):
            cut = bands(length, window)
            assert sum(n for n, _ in cut) == length
            assert all(n % side == 0 and side <= window for n, side in cut)


def test_a_patch_reaches_its_window_alone() -> None:
    sam = random_sam(depth=1, global_attn_indexes=(0,))
    small = Windowed(window=4, keep=0)(sam, progress=False)
    x = tokens(1, 8, 8, 32)
    y = x.clone()
    y[0, 1, 6] += 1
    layer = small.image_encoder.blocks[0]
    with torch.no_grad():
        changed = (layer(x) != layer(y)).any(-1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(changed, expected)


def test_shift_lets_sight_grow() -> None:
    sam = random_sam(depth=4, image_size=192, global_attn_indexes=(0, 1, 2, 3))
    still = Windowed(window=4, keep=0)(sam, progress=False)
    moving = Windowed(window=4, keep=0, shift=True)(sam, progress=False)
    assert sc.lineage(still)[-1].state["sees"] == [4, 4]
    assert sc.lineage(moving)[-1].state["sees"] == [8, 8]  # at the corner; 16 in the middle
    spans = [seen(moving.image_encoder.blocks[:n], 24) for n in range(1, 5)]
    assert spans == [4, 4, 6, 8] or spans == sorted(spans)
    one = Windowed(window=4, shift=True)(sam, progress=False)
    assert sc.lineage(one)[-1].state["sees"] == [24, 24]


def test_seen_by_gradients() -> None:
    sam = random_sam(depth=3, image_size=128, global_attn_indexes=(0, 1, 2))
    small: Any = Windowed(window=4, keep=0, shift=True)(sam, progress=False)
    layers = torch.nn.Sequential(*small.image_encoder.blocks)
    touched = reach(layers, 16, 16).reshape(16, 16, 16, 16)
    rows = touched.any(3).sum(2)  # rows that each token depends on
    assert int(rows.min()) == seen(small.image_encoder.blocks, 16)


def test_last_global_block_stays() -> None:
    sam = sc.build("tiny")
    small = Windowed()(sam, progress=False)
    assert [type(b) for b in small.image_encoder.blocks] == [Block] * 4
    assert [b.window_size for b in small.image_encoder.blocks] == [7, 7, 7, 0]
    assert sc.lineage(small)[-1].state == {
        "blocks": ["image_encoder.blocks.1"],
        "window": 7,
        "shifted": [],
        "sees": [16, 16],
    }


def test_with_the_own_window_it_is_a_plain_sam() -> None:
    pytest.importorskip("transformers")
    small = Windowed()(sc.build("tiny"), progress=False)
    assert to_transformers(small).config.vision_config.global_attn_indexes == [3]
    other = Windowed(window=8)(sc.build("tiny"), progress=False)
    with pytest.raises(sc.errors.ModelError, match="cannot hold this model"):
        to_transformers(other)


def test_counts_the_work() -> None:
    sam = sc.build("tiny")
    tokens_, dim, side = 256, 64, 8
    fewer = sc.evaluate.macs(sam).encoder - sc.evaluate.macs(Windowed(window=8)(sam)).encoder
    core = 2 * tokens_ * dim * (tokens_ - side**2)
    positions = 2 * tokens_ * dim * (16 - side)
    assert fewer == core + positions


def test_errors() -> None:
    for params, text in (({"window": 1}, "window"), ({"keep": -1}, "keep")):
        with pytest.raises(sc.errors.ConfigError, match=f"{text} is out of range"):
            Windowed(**params)
    sam = sc.build("tiny")
    with pytest.raises(sc.errors.NoEffectError) as caught:
        Windowed(keep=2)(sam)
    assert str(caught.value) == (
        "attention.windowed keeps every global block.\n"
        "  got       2 global, keep=2\n"
        "  expected  a block to convert\n"
        "  try       keep=1"
    )
    with pytest.raises(sc.errors.NoEffectError) as caught:
        Windowed(window=16)(sam)
    assert str(caught.value) == (
        "attention.windowed: one window holds the whole map.\n"
        "  got       window 16, 16 x 16 tokens\n"
        "  expected  a window smaller than the map\n"
        "  try       window=4"
    )
