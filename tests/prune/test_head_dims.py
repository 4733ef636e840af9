"""prune.head_dims: the tables lose the same columns, and attention keeps its scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruning import ATTENTION, encode, gone, kept_of, off, prune, toy

import samcompress as sc
from samcompress.core import errors
from samcompress.prune._cut import keep_head_dims
from samcompress.prune._groups import KINDS

HALF = sc.prune.HeadDims(ratio=0.5, criterion="magnitude", round_to=1)


@pytest.fixture(scope="module")
def sam() -> Any:
    return toy()


@pytest.fixture(scope="module")
def small(sam: Any) -> Any:
    return prune(HALF, sam)


def attentions(model: Any) -> list[Any]:
    return [model.get_submodule(name) for name in ATTENTION]


def unfolded(model: Any) -> Any:
    """The small model with keys as they were; what scales them is left to the caller."""
    model = copy.deepcopy(model)
    for attn in attentions(model):
        keys = slice(attn.proj.in_features, 2 * attn.proj.in_features)
        attn.qkv.weight.data[keys] /= (8 / 4) ** -0.5
        attn.qkv.bias.data[keys] /= (8 / 4) ** -0.5
    return model


# --- the slice ------------------------------------------------------------------------------------


def test_check2_removing_dimensions_is_masking_them(sam: Any, small: Any) -> None:
    masked = copy.deepcopy(sam)
    for name, kept in kept_of(small).items():
        attn = masked.get_submodule(name)
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            tensor.data.view(3, 4, 8, -1)[:, :, gone(kept, 8)] = 0
    assert off(encode(small), encode(masked)) < 1e-5
    assert off(encode(small), encode(sam)) > 1e-2


def test_check2_folding_the_scale_is_keeping_it(small: Any) -> None:
    kept_scale = unfolded(small)
    for attn in attentions(kept_scale):
        attn.scale = 8**-0.5
    assert off(encode(kept_scale), encode(small)) < 1e-5
    assert all(attn.scale == 4**-0.5 for attn in attentions(small))


def test_check2_whoever_computes_the_scale_itself_agrees(small: Any) -> None:
    fused = sc.attention.Fused()(small, progress=False)
    assert off(encode(fused), encode(small)) < 1e-5


def reset_scale(sam: Any, small: Any) -> Any:
    return unfolded(small)  # whose scale is that of the new width


def zero_tables(sam: Any, small: Any) -> Any:
    small = copy.deepcopy(small)
    for attn in attentions(small):
        attn.rel_pos_h.data.zero_()
        attn.rel_pos_w.data.zero_()
    return small


def first_columns(sam: Any, small: Any) -> Any:
    small = copy.deepcopy(small)
    for full, attn in zip(attentions(sam), attentions(small), strict=True):
        attn.rel_pos_h.data = full.rel_pos_h.data[:, :4].clone()
        attn.rel_pos_w.data = full.rel_pos_w.data[:, :4].clone()
    return small


def folded_into_queries(sam: Any, small: Any) -> Any:
    small = unfolded(small)
    for attn in attentions(small):
        queries = slice(0, attn.proj.in_features)
        attn.qkv.weight.data[queries] *= (8 / 4) ** -0.5
        attn.qkv.bias.data[queries] *= (8 / 4) ** -0.5
    return small


@pytest.mark.parametrize("mistake", [reset_scale, zero_tables, first_columns, folded_into_queries])
def test_check2_mistakes_show(mistake: Callable[..., Any], sam: Any, small: Any) -> None:
    assert off(encode(mistake(sam, small)), encode(small)) > 1e-2


def test_slice_by_hand() -> None:
    attn = (
        toy(depth=1, num_heads=2, embed_dim=8, global_attn_indexes=(0,))
        .image_encoder.blocks[0]
        .attn
    )
    before = copy.deepcopy(attn)
    keep_head_dims(attn, [1, 2])
    rows = [1, 2, 5, 6]  # of two heads of four
    parts = before.qkv.weight.split(8)
    torch.testing.assert_close(
        attn.qkv.weight, torch.cat([parts[0][rows], parts[1][rows] * 0.5**0.5, parts[2][rows]])
    )
    assert torch.equal(attn.proj.weight, before.proj.weight[:, rows])
    assert torch.equal(attn.rel_pos_h, before.rel_pos_h[:, [1, 2]])
    assert torch.equal(attn.rel_pos_w, before.rel_pos_w[:, [1, 2]])
    assert (attn.num_heads, attn.qkv.out_features, attn.proj.in_features) == (2, 12, 4)


def test_twice_is_once(sam: Any) -> None:
    twice = copy.deepcopy(sam)
    for attn in attentions(twice):
        keep_head_dims(attn, [0, 2, 3, 5, 6, 7])
        keep_head_dims(attn, [1, 2, 4])
    once = copy.deepcopy(sam)
    for attn in attentions(once):
        keep_head_dims(attn, [2, 3, 6])
    assert off(encode(twice), encode(once)) < 1e-5


def test_without_relative_positions() -> None:
    sam = toy()
    for attn in attentions(sam):
        attn.use_rel_pos = False
        del attn.rel_pos_h, attn.rel_pos_w
    small = prune(HALF, sam)
    masked = copy.deepcopy(sam)
    for name, kept in kept_of(small).items():
        attn = masked.get_submodule(name)
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            tensor.data.view(3, 4, 8, -1)[:, :, gone(kept, 8)] = 0
    assert off(encode(small), encode(masked)) < 1e-5


def test_heads_first_then_their_width(sam: Any) -> None:
    pipe = sc.prune.Heads(ratio=0.5, criterion="magnitude") | HALF
    small = prune(pipe, sam)
    for attn in attentions(small):
        assert (attn.num_heads, attn.proj.in_features, attn.rel_pos_h.shape[1]) == (2, 8, 4)


# --- which, and how many --------------------------------------------------------------------------


def test_score_of_a_dimension_is_summed_over_the_heads(sam: Any) -> None:
    group = KINDS["head_dims"].groups(sam, ATTENTION[1])[0]
    attn = sam.get_submodule(ATTENTION[1])
    elements = {
        f"{ATTENTION[1]}.{n}.weight": getattr(attn, n).weight.abs() for n in ("qkv", "proj")
    }
    rows = attn.qkv.weight.abs().view(3, 4, 8, 32).sum((0, 1, 3))
    columns = attn.proj.weight.abs().view(32, 4, 8).sum((0, 1))
    torch.testing.assert_close(group.reduce(elements), (rows + columns) / 4)


def test_rounding() -> None:
    counts = kept_of(prune(sc.prune.HeadDims(ratio=0.4, criterion="random", round_to=4)))
    assert {len(kept) for kept in counts.values()} == {4}  # 4.8, down to a multiple of 4
    with pytest.raises(errors.ConfigError, match="at least 8 units left"):
        prune(sc.prune.HeadDims(criterion="random"))  # heads of 8 would keep none of 8


def test_after_fused_attention() -> None:
    fused = sc.attention.Fused()(toy(), progress=False)
    with pytest.raises(errors.NoEffectError) as caught:
        prune(sc.Pipeline([HALF], any_order=True), fused)
    assert "got       FusedAttention" in str(caught.value)
    assert "prune before modules are replaced" in str(caught.value)
