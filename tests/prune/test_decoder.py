"""prune.decoder: three kinds of units; whatever goes, nothing read it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pruning import SCENES, answers, encode, gone, kept_of, off, on_meta, prune, toy

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import parameter_count
from samcompress.prune._groups import KINDS
from samcompress.prune._importance import element_scores
from samcompress.substitute.hq import HQ

HALF = sc.prune.Decoder(ratio=0.5, criterion="magnitude")
IOU = "mask_decoder.iou_prediction_head"


def unread(sam: Any, small: Any) -> Any:
    """The model in which nothing reads the units that the small one lost."""
    masked = copy.deepcopy(sam)
    for name, kept in kept_of(small).items():
        path, _, layer = name.partition("@")
        module = masked.get_submodule(path)
        if layer:
            reader, units, width = (
                module.layers[int(layer) + 1],
                module.layers[int(layer)].out_features,
                1,
            )
        elif path.endswith("mlp"):
            reader, units, width = module.lin2, module.lin1.out_features, 1
        else:
            reader, units, width = (
                module.out_proj,
                module.num_heads,
                module.internal_dim // module.num_heads,
            )
        for unit in gone(kept, units):
            reader.weight.data[:, unit * width : (unit + 1) * width] = 0
    return masked


def test_removing_units_is_reading_them_no_more() -> None:
    sam = toy()
    small = prune(HALF, sam)
    assert off(answers(small), answers(unread(sam, small))) < 1e-5
    assert off(answers(small), answers(sam)) > 1e-3
    assert torch.equal(encode(small), encode(sam))


def test_sizes() -> None:
    # width 32; MLPs of 128; 4 heads; heads for masks 32, 32, 4; for scores 64, 64, 4.
    small = prune(HALF)
    decoder, kept = small.mask_decoder, kept_of(small)
    assert len(kept) == 2 + (2 * 3 + 1) + 2 * (4 + 1)
    for layer in decoder.transformer.layers:
        assert layer.mlp.lin1.weight.shape == (64, 32)
        assert layer.self_attn.q_proj.weight.shape == (16, 32)
        assert layer.cross_attn_token_to_image.out_proj.weight.shape == (32, 8)
        assert (layer.self_attn.num_heads, layer.self_attn.internal_dim) == (2, 16)
    assert [tuple(m.weight.shape) for m in decoder.output_hypernetworks_mlps[3].layers] == [
        (16, 32),
        (16, 16),
        (4, 16),
    ]
    assert [m.out_features for m in decoder.iou_prediction_head.layers] == [32, 32, 4]


def test_half_of_sams_decoder_is_what_the_docstring_says() -> None:
    sam = on_meta()
    assert parameter_count(sam.mask_decoder) == 4_058_340
    kept = {}
    for kind, where in HALF.targets.items():
        for name, _ in where.select(sam, KINDS[kind].owner):
            for group in KINDS[kind].groups(sam, name):
                kept[group.name] = list(range(group.units // 2))
    HALF.rebuild(sam, {"kept": kept})
    mlps = 2 * 1024 * (256 + 1 + 256)
    attention = 2 * 128 * (4 * 256 + 3) + 5 * 64 * (4 * 256 + 3)
    heads = 4 * (128 * (256 + 1) + 128 * (256 + 1 + 128) + 128 * 32)
    score = 128 * (256 + 1) + 128 * (256 + 1 + 128) + 128 * 4
    assert 4_058_340 - parameter_count(sam.mask_decoder) == mlps + attention + heads + score
    assert round((mlps + attention + heads + score) / 1e6, 1) == 2.1


@pytest.mark.parametrize("criterion", ["disturbed_taylor", "taylor", "activation"])
def test_every_weight_has_a_say(criterion: Any) -> None:
    """Also those of the scores, and of the masks that a single answer does not show."""
    sam = toy()
    names = [
        f"mask_decoder.{name}"
        for name in ("iou_prediction_head.layers.2.weight", "iou_prediction_head.layers.0.weight")
    ]
    names += [f"mask_decoder.output_hypernetworks_mlps.{i}.layers.2.weight" for i in range(4)]
    scores = element_scores(sam, names, criterion, SCENES)
    assert all(float(values.sum()) > 0 for values in scores.values())


def test_idle_units_of_the_scores_go_first() -> None:
    sam = toy()
    idle = [3, 17, 40, 41, 42, 60, 61, 63]
    sam.get_submodule(IOU).layers[1].weight.data[:, idle] = 0
    small = prune(sc.prune.Decoder(ratio=8 / 64, images=1), sam)
    # Units that say nothing for these prompts, after ReLU, tie with the idle.
    assert len(kept_of(small)[f"{IOU}@0"]) == 56
    scores = element_scores(
        sam, [f"{IOU}.layers.{i}.weight" for i in (0, 1)], "disturbed_taylor", SCENES
    )
    units = KINDS["head_units"].groups(sam, IOU)[0].reduce(scores)
    assert (units[idle] == 0).all()
    assert (units > 0).float().mean() > 0.3


def test_only_what_costs_the_same_is_ranked_together() -> None:
    sam = toy()
    pools = {
        group.name.removeprefix("mask_decoder."): group.pool
        for kind, where in HALF.targets.items()
        for name, _ in where.select(sam, KINDS[kind].owner)
        for group in KINDS[kind].groups(sam, name)
    }
    assert pools["transformer.layers.0.self_attn"] == "8"
    assert pools["transformer.layers.1.cross_attn_image_to_token"] == "4"
    assert pools["transformer.final_attn_token_to_image"] == "4"
    assert {pools["iou_prediction_head@0"], pools["output_hypernetworks_mlps.2@0"]} == {"0"}
    assert pools["output_hypernetworks_mlps.2@1"] == "1"


def test_global_scope() -> None:
    small = prune(sc.prune.Decoder(ratio=0.5, criterion="random", scope="global"))
    kept = kept_of(small)
    local = kept_of(prune(HALF))
    assert kept.keys() == local.keys()
    # Random scores, brought to mean 0 and deviation 1, share out unequally.
    heads = [name for name in kept if "cross_attn" in name or "final" in name]
    assert sum(len(kept[name]) for name in heads) == 2 * len(heads)
    assert all(kept.values())


def test_heads_are_counted_singly() -> None:
    few = prune(sc.prune.Decoder(ratio=0.7, criterion="random"))
    layer = few.mask_decoder.transformer.layers[0]
    assert (layer.self_attn.num_heads, layer.mlp.lin1.out_features) == (1, 32)


def test_sam_hq() -> None:
    sam = HQ()(toy(), progress=False)
    small = prune(sc.prune.Decoder(ratio=0.5, images=1), sam)
    assert off(answers(small), answers(unread(sam, small))) < 1e-5
    assert small.mask_decoder.hf_mlp.layers[0].out_features == 32  # not among its targets


# --- what it refuses ------------------------------------------------------------------------------


def test_nothing_left() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        prune(sc.prune.Decoder(ratio=0.8, criterion="random"))
    assert str(caught.value).splitlines() == [
        "prune.decoder: nothing of a module would be left.",
        "  where     mask_decoder.transformer.layers.0.self_attn with 4 units",
        "  got       ratio=0.8, round_to=1",
        "  expected  at least 1 units left",
        "  try       a smaller ratio=",
    ]


def test_replaced_layer() -> None:
    sam = toy()
    sam.get_submodule(IOU).layers[1] = torch.nn.Identity()
    with pytest.raises(errors.ModelError) as caught:
        prune(HALF, sam)
    assert str(caught.value).splitlines()[:3] == [
        "prune.decoder cannot cut a layer that was replaced.",
        f"  where     {IOU}.layers.1",
        "  got       Identity",
    ]


def test_decoder_of_other_parts() -> None:
    sam = toy()
    for index, head in enumerate(sam.mask_decoder.output_hypernetworks_mlps):
        sam.mask_decoder.output_hypernetworks_mlps[index] = torch.nn.Sequential(*head.layers)
    sam.mask_decoder.iou_prediction_head = torch.nn.Linear(32, 4)
    with pytest.raises(errors.NoEffectError) as caught:
        prune(HALF, sam)
    assert "got       Linear, Sequential" in str(caught.value)
    assert "expected  MLP of segment_anything" in str(caught.value)
