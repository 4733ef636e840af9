"""prune.slim_sam: published sizes to the last parameter, our own geometry, which units stay."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import copied, scenes
from slimming import (
    BLIND,
    BLOCKS,
    SHORT,
    encode,
    geometry,
    lopsided,
    meta,
    part,
    run,
    slimmable,
    slimmed,
    state_of,
)

import samcompress as sc
from samcompress.core.data import Dataset
from samcompress.core.sizes import parameter_count
from samcompress.evaluate.macs import macs
from samcompress.prune import slim_sam
from samcompress.prune._groups import KINDS, kept_count
from samcompress.prune._importance import element_scores
from samcompress.prune._slim import fewest_heads, of_heads, places, tied
from samcompress.prune.slim_sam import SlimSAM


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "widths", "whole", "encoder", "gmac", "layers"),
    [
        (50, (384, 12, 32, 1536), 27_961_776, 23_897_216, 153.46, 94.8),
        (77, (168, 12, 14, 696), 9_723_528, 5_658_968, 46.56, 20.9),
    ],
)
def test_published_sizes(
    percent: int, widths: tuple[int, ...], whole: int, encoder: int, gmac: float, layers: float
) -> None:
    sam = slimmed(SlimSAM.published(percent))
    assert all(geometry(sam, block) == widths for block in range(12))
    assert (parameter_count(sam), parameter_count(sam.image_encoder)) == (whole, encoder)
    found = macs(sam)
    assert round(found.encoder / 1e9, 2) == gmac
    assert round(found.encoder_no_attention / 1e9, 1) == layers
    for block in sam.image_encoder.blocks:
        assert block.attn.scale == widths[2] ** -0.5


@pytest.mark.parametrize(
    ("name", "percent", "widths", "encoder"),
    [
        ("vit_l", 50, (512, 16, 32, 2048), 78_937_088),
        ("vit_l", 77, (224, 16, 14, 928), 16_632_704),
        ("vit_h", 50, (640, 16, 40, 2560), 161_522_048),
        ("vit_h", 77, (288, 16, 18, 1168), 34_376_928),
    ],
)
def test_the_same_recipe_on_larger_models(
    name: str, percent: int, widths: tuple[int, ...], encoder: int
) -> None:
    sam = slimmed(SlimSAM.published(percent, round_to=16), name)
    assert geometry(sam) == widths
    assert parameter_count(sam.image_encoder) == encoder


@pytest.mark.parametrize(
    ("name", "ratio", "widths", "whole"),
    [
        ("vit_b", 0.25, (576, 9, 64, 2304), 55_563_376),
        ("vit_b", 0.5, (384, 6, 64, 1536), 28_008_112),
        ("vit_b", 0.77, (160, 4, 40, 704), 9_490_576),
        ("vit_l", 0.77, (224, 4, 56, 928), None),
        ("vit_h", 0.77, (288, 4, 72, 1152), None),
        ("mini", 0.5, (96, 3, 32, 288), None),
        ("tiny", 0.5, (32, 2, 16, 96), None),
    ],
)
def test_our_own_sizes(name: str, ratio: float, widths: tuple[int, ...], whole: int | None) -> None:
    sam = slimmed(SlimSAM(ratio=ratio), name)
    assert geometry(sam) == widths
    # As wide inside as outside, so that every format of SAM can hold it.
    assert widths[1] * widths[2] == widths[0]
    if whole is not None:
        assert parameter_count(sam) == whole
    if ratio == 0.77 and name == "vit_b":
        published = slimmed(SlimSAM.published(77))
        assert parameter_count(sam) <= parameter_count(published)
        assert macs(sam).encoder <= macs(published).encoder


@pytest.mark.parametrize(
    ("cut", "encoder"),
    [
        ({"kept": {"image_encoder": 576}}, 67_440_192),
        ({"kept": {"image_encoder": 168}}, 20_199_912),
        ({"head_dims": 48, "mlp": 2304}, 68_397_952),
        ({"head_dims": 14, "mlp": 696}, 23_635_568),
        ({"kept": {"image_encoder": 576}, "head_dims": 48, "mlp": 2304}, 51_475_648),
        ({"heads": 6}, 75_501_312),
        ({"mlp": 1536}, 61_340_928),
    ],
    ids=str,
)
def test_sizes_known_from_arithmetic(cut: dict[str, Any], encoder: int) -> None:
    sam = meta(sc.SamConfig())
    state: dict[str, Any] = {"kept": {}, "heads": {}, "head_dims": {}}
    for name, count in cut.get("kept", {}).items():
        state["kept"][name] = list(range(count))
    for index in range(12):
        if "mlp" in cut:
            state["kept"][f"{BLOCKS}.{index}.mlp"] = list(range(cut["mlp"]))
        for kind in ("heads", "head_dims"):
            if kind in cut:
                state[kind][f"{BLOCKS}.{index}.attn"] = list(range(cut[kind]))
    SlimSAM().rebuild(sam, state)
    assert parameter_count(sam.image_encoder) == encoder


@pytest.mark.parametrize("seed", range(4))
def test_formula_equals_what_is_counted(seed: int) -> None:
    """Any width in any block, of any units."""
    drawn, sam = random.Random(seed), meta(sc.SamConfig())

    def some(count: int) -> list[int]:
        # A product over one number is no matrix product, so it would not be counted.
        return sorted(drawn.sample(range(count), drawn.randint(2, count)))

    kept = {"image_encoder": some(768)}
    kept |= {f"{BLOCKS}.{i}.mlp": some(3072) for i in range(12)}
    heads = {f"{BLOCKS}.{i}.attn": some(12) for i in range(12)}
    dims = {f"{BLOCKS}.{i}.attn": some(64) for i in range(12)}
    SlimSAM().rebuild(sam, {"kept": kept, "heads": heads, "head_dims": dims})
    e = len(kept["image_encoder"])
    total = 768 * e + e + 4096 * e + 256 * e + 512 + 9 * 65536 + 512
    linear, attention = 4096 * 768 * e + 4096 * (256 * e + 9 * 65536), 0
    for i in range(12):
        name, side = f"{BLOCKS}.{i}.attn", 64 if i in (2, 5, 8, 11) else 14
        h, m = len(dims[name]), len(kept[f"{BLOCKS}.{i}.mlp"])
        inner = len(heads[name]) * h
        total += 4 * e + 3 * inner * (e + 1) + inner * e + e + m * (e + 1) + e * (m + 1)
        total += 2 * h * (2 * side - 1)
        windows, tokens = (1, 4096) if side == 64 else (25, 196)
        linear += windows * tokens * 4 * e * inner + 4096 * 2 * e * m
        attention += windows * inner * (2 * tokens**2 + 2 * tokens * side)
    assert parameter_count(sam.image_encoder) == total
    found = macs(sam)
    assert (found.encoder_no_attention, found.encoder) == (linear, linear + attention)


def test_fewest_heads() -> None:
    for width, way in {
        768: (12, 64),
        608: (9, 64),
        480: (7, 64),
        352: (5, 64),
        288: (6, 48),
        160: (4, 40),
        64: (1, 64),
        32: (1, 32),
        16: None,
    }.items():
        assert fewest_heads(12, 64, width, 32) == way
    assert fewest_heads(4, 12, 24, 4) == (2, 12)  # all of a head, or a multiple of 8
    assert fewest_heads(4, 12, 16, 4) == (2, 8)
    drawn = random.Random(0)
    for _ in range(200):
        heads, dims = drawn.randint(1, 16), drawn.choice((16, 24, 32, 64, 80))
        width, step = drawn.randint(8, heads * dims), drawn.choice((1, 8, 32))
        way = fewest_heads(heads, dims, width, step)
        if way is not None:
            assert way[0] * way[1] <= width
            assert way[0] * way[1] % step == 0
            assert way[0] <= min(heads, math.ceil(width / dims) + 1)
            assert way[1] <= dims
            assert way[1] % 8 == 0


@pytest.mark.parametrize(
    ("attention", "heads", "dims"), [("both", 2, 16), ("heads", 1, 24), ("head_dims", 4, 8)]
)
def test_three_ways_to_slim_attention(attention: str, heads: int, dims: int) -> None:
    """Of 4 heads of 24 dimensions at a ratio of 0.6: 38 are wanted, and multiples of 8."""
    small = run(ratio=0.6, attention=attention, **BLIND)
    assert geometry(small) == (32, heads, dims, 112)
    found = state_of(small)
    assert bool(found["heads"]) == (heads < 4)
    assert bool(found["head_dims"]) == (dims < 24)


# --- which units ----------------------------------------------------------------------------------


def elements(sam: Any, criterion: str = "random", **how: Any) -> dict[str, torch.Tensor]:
    names = [n for n, p in sam.named_parameters() if n.startswith("image_encoder.") and p.ndim > 1]
    return element_scores(sam, names, criterion, **how)


def test_channels_one_by_one_or_tied() -> None:
    sam = slimmable()
    (group,) = KINDS["channels"].groups(sam, "image_encoder")
    scores = group.reduce(elements(sam, "magnitude"))
    fields = {**BLIND, "criterion": "magnitude"}
    free = state_of(run(sam, **fields))["kept"]["image_encoder"]
    assert free == sorted(scores.argsort(descending=True)[:48].tolist())
    # 4 heads: channel c goes with c + 24, c + 48, c + 72.
    found = state_of(run(sam, **fields, tie="heads"))["kept"]["image_encoder"]
    residues = sorted(scores.view(4, 24).sum(0).argsort(descending=True)[:12].tolist())
    assert found == [24 * head + place for head in range(4) for place in residues]
    assert found != free


def test_tied_of_vit_b_is_modulo_64() -> None:
    (group,) = KINDS["channels"].groups(meta(sc.SamConfig()), "image_encoder")
    units = tied("prune.slim_sam", group, 12)
    assert units.units == 64
    assert places(units, [0, 63]) == sorted(64 * head + d for head in range(12) for d in (0, 63))
    assert kept_count(64, 0.77, 1) * 12 == 168


def test_dimensions_are_judged_by_the_heads_that_stay() -> None:
    sam = slimmable()
    small = run(sam, ratio=0.6, **{**BLIND, "criterion": "magnitude"})
    found, name = state_of(small), f"{BLOCKS}.0.attn"
    between = copy.deepcopy(sam)
    SlimSAM().rebuild(between, {"kept": part(found, "image_encoder"), "heads": {}, "head_dims": {}})
    attn = between.get_submodule(name)
    rows = attn.qkv.weight.detach().square().sum(1).view(3, 4, 24)
    columns = attn.proj.weight.detach().square().sum(0).view(1, 4, 24)
    each = torch.cat([rows, columns]).sum(0)  # (heads, dimensions)
    heads = found["heads"][name]
    assert heads == sorted(each.sum(1).argsort(descending=True)[:2].tolist())
    dims = each[heads].sum(0).argsort(descending=True)[:16]
    assert found["head_dims"][name] == sorted(dims.tolist())


def test_of_heads_by_hand() -> None:
    sam = random_sam()  # 2 heads of 16
    (group,) = KINDS["head_dims"].groups(sam, f"{BLOCKS}.0.attn")
    only = of_heads(group, [1])
    scores = {
        member.weight: torch.ones(sam.get_parameter(member.weight).shape)
        for member in group.members
    }
    proj = scores[f"{BLOCKS}.0.attn.proj.weight"]
    proj[:, 3] = 100  # dimension 3 of head 0
    proj[:, 16 + 5] = 10  # dimension 5 of head 1
    assert group.reduce(scores).argsort(descending=True)[:2].tolist() == [3, 5]
    assert only.reduce(scores).argmax() == 5
    assert only.reduce(scores)[3] == only.reduce(scores)[4]


@pytest.mark.parametrize("accumulate", ["rms", "sum"])
def test_gradients_of_images_are_accumulated(accumulate: Any, data: Dataset) -> None:
    sam = random_sam()
    step = SlimSAM(accumulate=accumulate, align=False, round_to=8, images=3, seed=4)
    found = state_of(step(sam, data=data, progress=False))["kept"]["image_encoder"]
    (group,) = KINDS["channels"].groups(sam, "image_encoder")
    how = {"samples": list(data)[:3], "seed": 4, "accumulate": accumulate}
    scores = group.reduce(elements(sam, "disturbed_taylor", **how))
    assert found == sorted(scores.argsort(descending=True)[:16].tolist())


def test_second_cut_looks_at_the_result_of_the_first(data: Dataset, monkeypatch: Any) -> None:
    seen = []

    def watched(model: Any, names: Any, *args: Any, **how: Any) -> Any:
        seen.append((copied(model), len(names)))
        return element_scores(model, names, *args, **how)

    monkeypatch.setattr(slim_sam, "element_scores", watched)
    sam = random_sam()
    small = run(sam, data, **SHORT)
    (first, many), (second, few) = seen
    assert (many, few) == (2 + 4 * 2, 4 * 2)
    assert first.keys() == second.keys()
    assert first["image_encoder.pos_embed"].shape[-1] == 32
    assert second["image_encoder.pos_embed"].shape[-1] == 16
    # It was trained between the two.
    channels = state_of(small)["kept"]["image_encoder"]
    name = f"{BLOCKS}.0.norm1.weight"
    assert not torch.equal(second[name], first[name][channels])


@pytest.mark.parametrize("attention", ["both", "heads", "head_dims"])
def test_global_shares_one_total(attention: Any) -> None:
    sam = lopsided()
    fields = {**BLIND, "criterion": "magnitude", "attention": attention}
    local, shared = (run(sam, ratio=0.6, scope=s, **fields) for s in ("local", "global"))
    sizes = [[geometry(model, block) for block in range(4)] for model in (local, shared)]
    assert len(set(sizes[0])) == 1
    assert len({size[3] for size in sizes[1]}) > 1
    for place in (1, 2, 3):
        totals = [sum(size[place] for size in found) for found in sizes]
        assert totals[0] == totals[1]
    assert all(min(size) >= 1 for size in sizes[1])
    if attention == "both":
        assert {size[2] for size in sizes[1]} == {16}  # heads are shared, their width is not


# --- what a cut leaves ----------------------------------------------------------------------------


def masked(sam: Any, state: dict[str, Any]) -> Any:
    """Everything that the second cut removes, set to zero instead."""
    sam = copy.deepcopy(sam)
    for index, block in enumerate(sam.image_encoder.blocks):
        name = f"{BLOCKS}.{index}"
        hidden = torch.ones(block.mlp.lin1.out_features)
        hidden[state["kept"][f"{name}.mlp"]] = 0
        block.mlp.lin2.weight.data[:, hidden.bool()] = 0
        inner = torch.ones(
            3, block.attn.num_heads, block.attn.qkv.out_features // 3 // block.attn.num_heads
        )
        heads = state["heads"].get(f"{name}.attn", range(inner.shape[1]))
        dims = state["head_dims"].get(f"{name}.attn", range(inner.shape[2]))
        for head in heads:
            inner[:, head, list(dims)] = 0
        gone = inner.flatten().bool()
        block.attn.qkv.weight.data[gone] = 0
        block.attn.qkv.bias.data[gone] = 0
        block.attn.proj.weight.data[:, gone[: len(gone) // 3]] = 0
    return sam


@pytest.mark.parametrize("attention", ["both", "heads", "head_dims"])
def test_second_cut_is_masking(attention: Any) -> None:
    sam = slimmable()
    state = state_of(run(sam, ratio=0.6, attention=attention, **BLIND))
    state = {**state, "kept": {n: k for n, k in state["kept"].items() if n != "image_encoder"}}
    kept, reset = copy.deepcopy(sam), copy.deepcopy(sam)
    SlimSAM().rebuild(kept, state)
    expected = encode(masked(sam, state))
    torch.testing.assert_close(encode(kept), expected, rtol=0, atol=1e-5)
    SlimSAM(scale="reset").rebuild(reset, state)
    apart = (encode(reset) - expected).abs().max()
    assert apart > 1e-2 if state["head_dims"] else apart < 1e-5


def test_scale_is_that_of_the_width_either_way() -> None:
    """So a model can be built from its sizes alone, whichever was chosen."""
    sam = slimmable()
    fields = {**BLIND, "ratio": 0.6, "attention": "head_dims"}
    kept, reset = run(sam, **fields), run(sam, **fields, scale="reset")
    for one, two in zip(kept.image_encoder.blocks, reset.image_encoder.blocks, strict=True):
        assert one.attn.scale == two.attn.scale == 8**-0.5
        ours, theirs = (b.attn.qkv.weight.detach().view(3, 32, 32) for b in (one, two))
        torch.testing.assert_close(ours[1], theirs[1] * (8 / 24) ** 0.5)
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


def test_relative_positions() -> None:
    sam = slimmable()
    kept, zero = (run(sam, ratio=0.6, rel_pos=rule, **BLIND) for rule in ("keep", "zero"))
    dims = state_of(kept)["head_dims"][f"{BLOCKS}.1.attn"]
    assert 0 < len(dims) < 24
    for name in ("rel_pos_h", "rel_pos_w"):
        before, after, none = (
            getattr(m.image_encoder.blocks[1].attn, name) for m in (sam, kept, zero)
        )
        assert torch.equal(after, before[:, dims])
        assert none.shape == after.shape
        assert not none.any()


def test_no_switch_changes_the_rest() -> None:
    """Everything but channels, heads and hidden units of the encoder is as it was."""
    sam = slimmable()
    small = run(sam, ratio=0.6, **BLIND)
    for name, tensor in sam.state_dict().items():
        if not name.startswith("image_encoder.") or (".neck." in name and ".neck.0." not in name):
            assert torch.equal(small.state_dict()[name], tensor), name
