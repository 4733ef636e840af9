"""prune.heads: a head that is gone is a head that says nothing. Numbers of checks: prune.md, 11."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pruning import ATTENTION, encode, gone, kept_of, off, prune, toy
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.prune._cut import keep_heads
from samcompress.prune._groups import KINDS

HALF = sc.prune.Heads(ratio=0.5, criterion="magnitude")


def without_positions(sam: Any) -> Any:
    for block in sam.image_encoder.blocks:
        block.attn.use_rel_pos = False
        del block.attn.rel_pos_h, block.attn.rel_pos_w
    return sam


def silenced(sam: Any, small: Any) -> Any:
    """The model in which nothing reads the heads that the small one lost."""
    masked = copy.deepcopy(sam)
    for name, kept in kept_of(small).items():
        attn = masked.get_submodule(name)
        width = attn.qkv.out_features // 3 // attn.num_heads
        for head in gone(kept, attn.num_heads):
            attn.proj.weight.data[:, head * width : (head + 1) * width] = 0
    return masked


# --- the slice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [True, False])
def test_check3_removing_a_head_is_masking_it(positions: bool) -> None:
    sam = toy() if positions else without_positions(toy())
    small = prune(HALF, sam)
    assert list(kept_of(small)) == ATTENTION
    assert off(encode(small), encode(silenced(sam, small))) < 1e-6
    assert off(encode(small), encode(sam)) > 1e-2
    for before, after in zip(sam.image_encoder.blocks, small.image_encoder.blocks, strict=True):
        assert after.attn.num_heads == 2
        assert after.attn.qkv.out_features == 3 * 2 * 8 == len(after.attn.qkv.weight)
        assert after.attn.proj.in_features == 2 * 8 == after.attn.proj.weight.shape[1]
        assert after.attn.scale == before.attn.scale
        if positions:
            assert torch.equal(after.attn.rel_pos_h, before.attn.rel_pos_h)


def test_check3_a_wrong_count_of_heads_is_not_the_same() -> None:
    sam = toy()
    small = prune(HALF, sam)
    for block in small.image_encoder.blocks:
        block.attn.num_heads = 4
    with pytest.raises(RuntimeError):  # the tables are too wide
        encode(small)
    flat = without_positions(toy())
    narrow = prune(HALF, flat)
    expected = encode(narrow)
    for block in narrow.image_encoder.blocks:
        block.attn.num_heads = 4
    assert off(encode(narrow), expected) > 1e-2  # and without tables nothing complains


@pytest.mark.parametrize("scope", ["local", "global"])
def test_check3_every_attention_keeps_a_head(scope: Any) -> None:
    sam = toy()
    for name in ATTENTION[:2]:  # nothing in these seems to matter
        sam.get_submodule(name).qkv.weight.data *= 1e-6
        sam.get_submodule(name).proj.weight.data *= 1e-6
    small = prune(sc.prune.Heads(ratio=0.75, criterion="magnitude", scope=scope), sam)
    assert all(len(kept) >= 1 for kept in kept_of(small).values())
    assert sum(map(len, kept_of(small).values())) == 4


def test_slice_by_hand() -> None:
    attn = toy(depth=1, num_heads=2, global_attn_indexes=(0,)).image_encoder.blocks[0].attn
    qkv, bias, proj = attn.qkv.weight.clone(), attn.qkv.bias.clone(), attn.proj.weight.clone()
    keep_heads(attn, [1])
    rows = [*range(16, 32), *range(48, 64), *range(80, 96)]  # of q, k and v
    assert torch.equal(attn.qkv.weight, qkv[rows])
    assert torch.equal(attn.qkv.bias, bias[rows])
    assert torch.equal(attn.proj.weight, proj[:, 16:])
    assert attn.qkv.weight.is_contiguous()
    assert attn.proj.weight.is_contiguous()


# --- which, and how many --------------------------------------------------------------------------


def test_windows_and_whole_maps_are_ranked_apart() -> None:
    for sam in (toy(), without_positions(toy())):
        groups = [KINDS["heads"].groups(sam, name)[0] for name in ATTENTION]
        assert [group.pool for group in groups] == ["3", "0", "3", "0"]
        # However much the heads of windows matter, as many of the others stay.
        sam.get_submodule(ATTENTION[0]).proj.weight.data[:, :8] *= 100
        small = prune(sc.prune.Heads(ratio=0.5, criterion="magnitude", scope="global"), sam)
        counts = [len(kept_of(small)[name]) for name in ATTENTION]
        assert counts[0] + counts[2] == counts[1] + counts[3] == 4


def test_score_of_a_head_by_hand() -> None:
    sam = toy()
    attn = sam.get_submodule(ATTENTION[0])
    group = KINDS["heads"].groups(sam, ATTENTION[0])[0]
    elements = {
        f"{ATTENTION[0]}.{n}.weight": getattr(attn, n).weight.abs() for n in ("qkv", "proj")
    }
    parts = [*attn.qkv.weight.abs().split(32), attn.proj.weight.abs().T]
    by_hand = [sum(p[8 * a : 8 * a + 8].sum() for p in parts) / 4 for a in range(4)]
    torch.testing.assert_close(group.reduce(elements), torch.stack(by_hand))


def test_a_silent_head_goes_first() -> None:
    sam = toy()
    for name in ATTENTION:
        attn = sam.get_submodule(name)
        attn.proj.weight.data[:, 8:16] = 0  # the second says nothing, loudly
        attn.qkv.weight.data[[*range(8, 16), *range(40, 48), *range(72, 80)]] *= 5
    quarter = {"ratio": 0.25, "images": 1}
    for criterion in ("disturbed_taylor", "taylor"):
        small = prune(sc.prune.Heads(criterion=criterion, **quarter), sam)
        assert set(map(tuple, kept_of(small).values())) == {(0, 2, 3)}
    by_size = prune(sc.prune.Heads(criterion="magnitude", **quarter), sam)
    assert all(1 in kept for kept in kept_of(by_size).values())


def test_only_some_attention() -> None:
    where = sc.Where("image_encoder.blocks.*.attn", exclude="image_encoder.blocks.0.attn")
    small = prune(sc.prune.Heads(ratio=0.5, criterion="random", where=where))
    assert [b.attn.num_heads for b in small.image_encoder.blocks] == [4, 2, 2, 2]


def test_attention_of_an_encoder_without_relative_positions() -> None:
    sam = sc.substitute.ViT(variant="tiny")(toy(), progress=False)
    where = "image_encoder.encoder.blocks.*.attn"
    small = prune(sc.prune.Heads(ratio=0.3, scope="global", images=1, where=where), sam)
    assert sum(map(len, kept_of(small).values())) == 12 * 2
    assert off(encode(small), encode(silenced(sam, small))) < 1e-6


# --- what it refuses ------------------------------------------------------------------------------


def test_ratio_that_leaves_no_head() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        prune(sc.prune.Heads(ratio=0.8, criterion="magnitude"))
    assert str(caught.value).splitlines() == [
        "prune.heads: nothing of a module would be left.",
        "  where     image_encoder.blocks.0.attn with 4 units",
        "  got       ratio=0.8, round_to=1",
        "  expected  at least 1 units left",
        "  try       a smaller ratio=",
    ]


def test_after_fused_attention() -> None:
    fused = sc.attention.Fused()(toy(), progress=False)
    with pytest.raises(errors.OrderError, match=r"prune\.heads before attention\.fused"):
        prune(HALF, fused)
    with pytest.raises(errors.NoEffectError) as caught:
        prune(sc.Pipeline([HALF], any_order=True), fused)
    assert str(caught.value).splitlines() == [
        "prune.heads matched no module it can act on.",
        "  where     Where(include=('image_encoder.blocks.*.attn',), exclude=())",
        "  got       FusedAttention",
        "  expected  Attention of segment_anything",
        "  try       prune before modules are replaced; other encoders with sc.prune.Filters",
    ]


def test_replaced_layer() -> None:
    sam = toy()
    sam.image_encoder.blocks[2].attn.qkv = nn.Identity()
    with pytest.raises(errors.ModelError) as caught:
        prune(HALF, sam)
    assert str(caught.value).splitlines() == [
        "prune.heads cannot cut a layer that was replaced.",
        "  where     image_encoder.blocks.2.attn.qkv",
        "  got       Identity",
        "  expected  torch.nn.Linear or torch.nn.Conv2d",
        "  try       prune first, then quantize",
    ]


def test_fused_attention_after_it() -> None:
    small = prune(HALF)
    fused = sc.attention.Fused()(small, progress=False)
    assert off(encode(fused), encode(small)) < 1e-5
