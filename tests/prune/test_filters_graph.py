"""prune.filters: what the trace finds in each encoder of substitute, and how it is cut."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import random_sam
from encoders import ENCODERS, OUT, SIDE
from torch import Tensor, nn

import samcompress as sc
from samcompress.core.sizes import parameter_count
from samcompress.prune._filters import Part, Width, keep, silence
from samcompress.prune._importance import element_scores
from samcompress.prune._traced import _randomise, faithful, renamed, widths
from samcompress.prune.filters import Filters, _group

tp = pytest.importorskip("torch_pruning")
pytest.importorskip("timm")

IMAGE = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
SCENES = sc.shapes(1, seed=5, size=(48, 64))
# What must be found: one of the layers that make a width, and how many units it has.
FOUND: dict[str, dict[str, int]] = {
    "tiny_vit": {
        "patch_embed.conv2.conv": 16,  # what runs through the first stage, with its shortcuts
        "layers.0.blocks.0.conv1.conv": 32,  # MBConv's expansion
        "layers.1.downsample.conv1.conv": 32,
        "layers.1.blocks.0.mlp.fc1": 48,
    },
    "hq_tiny_vit": {"layers.1.blocks.0.mlp.fc1": 48},
    "rep_vit_m1": {
        "features.0.0.c": 8,
        "features.3.channel_mixer.m.0.c": 32,
        "features.1.token_mixer.1.fc1": 8,  # inside squeeze and excitation
        "features.7.channel_mixer.m.2.c": 32,  # shortcuts, branches and gates read it
    },
    "rep_vit_m2": {"features.0.2.c": 16},
    "efficient_vit": {
        "backbone.stages.0.op_list.1.main.conv1.conv": 8,
        "backbone.stages.4.op_list.1.local_module.main.inverted_conv.conv": 192,
        "backbone.stages.4.op_list.0.main.point_conv.conv": 32,  # linear attention reads it
        "neck.input_ops.0.op_list.0.conv": 16,
    },
    "res_net": {"backbone.conv1": 64, "backbone.layer4.0.conv1": 512, "up_1.4": 16, "up_1.6": 16},
    "efficient_former": {
        "stages.0.blocks.0.mlp.fc1.conv": 32,
        "stages.1.blocks.0.mlp.fc2.conv": 16,
    },
    "lite_vit": {"stages.3.1.block.mlp.lin1": 64, "stages.1.1.mlp.0.0": 32},
    "u_net": {"enlarge.0": 16, "down.2.1.0": 16, "attend.1.0.block.mlp.lin1": 64},
    "rwkv": {"blocks.0.channel.key": 32, "convolutions.1.layers.0.0": 32},
    "hiera": {"trunk.blocks.2.mlp.fc1": 256},
    "timm": {"trunk.conv_stem": 24, "trunk.blocks.4.0.se.conv_reduce": 12, "laterals.2": 16},
}
each = pytest.mark.parametrize("name", list(ENCODERS))


@lru_cache
def _made(name: str) -> nn.Module:
    """Random weights and statistics everywhere: zeros hide errors."""
    encoder = ENCODERS[name]().eval()
    _randomise(encoder, torch.Generator().manual_seed(1))
    return encoder


@lru_cache
def found_in(name: str) -> tuple[Width, ...]:
    return tuple(faithful(_made(name), widths(_made(name), "test")))


def made(name: str) -> Any:
    return copy.deepcopy(_made(name))


def halves(found: Any) -> tuple[dict[str, list[int]], dict[str, tuple[Part, ...]]]:
    drawn = torch.Generator().manual_seed(4)
    kept = {
        w.name: sorted(torch.randperm(w.units, generator=drawn)[: w.units // 2].tolist())
        for w in found
    }
    return kept, {w.name: w.parts for w in found}


def off(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def encode(model: Any) -> Tensor:
    return getattr(model, "image_encoder", model)(IMAGE)


# --- the graph ------------------------------------------------------------------------------------


@each
def test_removing_filters_is_masking_them(name: str) -> None:
    whole, small = made(name), made(name)
    encoder = made(name)
    kept, parts = halves(found_in(name))
    silence(whole, kept, parts)
    keep(small, kept, parts)
    assert off(encode(small), encode(whole)) < 1e-5
    assert off(encode(small), encode(encoder)) > 1e-3
    assert parameter_count(small) < 0.85 * parameter_count(encoder)
    for (key, old), new in zip(encoder.named_parameters(), small.parameters(), strict=True):
        assert new.shape == old.shape or new.numel() < old.numel(), key
        assert new.is_leaf
        assert new.untyped_storage().nbytes() == 4 * new.numel()


@each
def test_what_is_found(name: str) -> None:
    found = found_in(name)
    makers = {part.name: w for w in found for part in w.parts if part.side == "out"}
    for layer, units in FOUND[name].items():
        assert makers[layer].units == units, layer
    # What comes out, and the widths of attention, stay.
    assert not any(layer.endswith(("qkv", "qkv.conv", "v_local.conv")) for layer in makers)
    assert all(any(part.side == "in" for part in w.parts) for w in found)


def test_shortcuts_tie_all_that_is_added_up() -> None:
    depthwise = Part("features.2.token_mixer.0.conv.c", "out", 0)
    [stream] = [w for w in found_in("rep_vit_m1") if depthwise in w.parts]
    assert {
        Part("features.0.2.c", "out", 0),
        Part("features.1.token_mixer.1.fc1", "in", 0),
        Part("features.1.token_mixer.1.fc2", "out", 0),
        Part("features.2.token_mixer.0.conv.bn", "out", 0),
        Part("features.2.token_mixer.0.conv1.c", "out", 0),
        Part("features.2.channel_mixer.m.0.c", "in", 0),
        Part("features.2.channel_mixer.m.2.c", "out", 0),
        Part("features.3.token_mixer.2.c", "in", 0),
    } <= set(stream.parts)


def test_channels_that_are_put_together_keep_their_places() -> None:
    found = {w.name: w for w in found_in("u_net")}
    assert Part("up.0.0.0", "in", 0) in found["enlarge.0"].parts
    makers = {p.name: w for w in found.values() for p in w.parts if p.side == "out"}
    assert Part("up.1.0.0", "in", 16) in makers["down.2.1.0"].parts


@pytest.mark.parametrize("name", ["res_net", "rep_vit_m1", "efficient_vit"])
def test_groups_and_cuts_are_those_of_torch_pruning(name: str) -> None:
    theirs, ours = made(name), made(name)
    kept, parts = halves(found_in(name))
    keep(ours, kept, parts)
    graph = tp.DependencyGraph().build_dependency(theirs.requires_grad_(True), IMAGE, verbose=False)
    for width in found_in(name):
        layer = theirs.get_submodule(width.name)
        gone = sorted(set(range(width.units)) - set(kept[width.name]))
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, cut, gone).prune()
    expected = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("criterion", ["magnitude", "disturbed_taylor"])
def test_scores_are_those_of_torch_pruning(criterion: Any) -> None:
    sam = random_sam(out_chans=OUT)
    sam.image_encoder = made("res_net")
    groups = [_group(sam, renamed(width, "image_encoder.")) for width in found_in("res_net")]
    names = list(dict.fromkeys(m.weight for g in groups for m in g.members))
    options = {
        "group_reduction": "mean",
        "normalizer": None,
        "target_types": [nn.Conv2d, nn.Linear],
    }
    elements = element_scores(sam, names, criterion, SCENES)
    if criterion == "magnitude":
        importance = tp.importance.GroupMagnitudeImportance(p=2, **options)
    else:
        importance = tp.importance.GroupTaylorImportance(**options)
        for key in names:
            weight = sam.get_parameter(key)
            weight.grad = elements[key] / weight.detach().abs().clamp_min(1e-30)
    graph = tp.DependencyGraph().build_dependency(sam.image_encoder, IMAGE, verbose=False)
    for group in groups:
        layer = sam.get_submodule(group.name)
        if not isinstance(layer, nn.Conv2d):
            continue  # of transposed convolutions we take those that read them
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        expected = importance(graph.get_pruning_group(layer, cut, list(range(group.units))))
        torch.testing.assert_close(group.reduce(elements), expected, rtol=1e-4, atol=0)


class Toy(nn.Module):
    """Each branch has something that a width cannot be cut at."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.img_size = SIDE
        self.kind = kind
        self.first = nn.Conv2d(3, 16, 16, 16)
        self.group = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.gated = nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, OUT, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "groups":
            x = self.group(x)
        elif self.kind == "norm":
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.kind == "gate":
            a, b = x.chunk(2, 1)
            x = self.gated(a * b)
        elif self.kind == "shuffle":
            x = x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        elif self.kind == "softmax":
            x = x.softmax(1)
        elif self.kind == "scale":
            x = x * self.scale
        return self.last(x)


@pytest.mark.parametrize("kind", ["groups", "norm", "gate", "shuffle", "softmax"])
def test_what_is_not_the_same_for_each_unit_stays(kind: str) -> None:
    encoder = Toy(kind)
    found = {w.name for w in faithful(encoder, widths(encoder, "test"))}
    assert found == ({"gated"} if kind == "gate" else set())


def test_parameters_of_their_own_go_along() -> None:
    encoder = Toy("scale")
    [width] = faithful(encoder, widths(encoder, "test"))
    assert set(width.parts) == {
        Part("first", "out", 0),
        Part("scale", 0, 0),
        Part("last", "in", 0),
    }


def test_a_graph_that_misses_a_layer_is_noticed() -> None:
    found = list(found_in("res_net"))
    right = found[0]
    wrong = Width(right.name, right.units, right.parts[:-1])
    assert faithful(made("res_net"), [wrong, *found[1:]]) == found[1:]


# --- the cut --------------------------------------------------------------------------------------


def test_cuts_by_hand() -> None:
    net = nn.Module()
    net.conv = nn.Conv2d(3, 4, 1)
    net.deep = nn.Conv2d(4, 4, 3, groups=4)
    net.norm = nn.BatchNorm2d(4)
    net.norm.running_mean = torch.arange(4.0)
    net.back = nn.ConvTranspose2d(6, 2, 2)  # reads two others before them
    net.line = nn.Linear(4, 1)
    net.line.weight.data = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    net.scale = nn.Parameter(torch.arange(4.0).view(1, 4, 1))
    net.back.weight.data = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 2, 2).contiguous()
    width = Width(
        "conv",
        4,
        (
            Part("conv", "out", 0), Part("deep", "out", 0), Part("norm", "out", 0),
            Part("back", "in", 2), Part("line", "in", 0), Part("scale", 1, 0),
        ),
    )  # fmt: skip
    weight = net.conv.weight.detach().clone()
    keep(net, {"conv": [1, 3]}, {"conv": width.parts})
    assert torch.equal(net.conv.weight, weight[[1, 3]])
    assert (net.conv.out_channels, net.conv.in_channels, len(net.conv.bias)) == (2, 3, 2)
    assert (net.deep.in_channels, net.deep.out_channels, net.deep.groups) == (2, 2, 2)
    assert net.deep.weight.shape == (2, 1, 3, 3)
    assert net.norm.running_mean.tolist() == [1, 3]
    assert net.norm.num_features == len(net.norm.weight) == len(net.norm.running_var) == 2
    assert net.back.weight[:, 0, 0, 0].tolist() == [0, 1, 3, 5]
    assert (net.back.in_channels, net.back.out_channels) == (4, 2)
    assert net.line.weight.tolist() == [[6, 8]]
    assert net.line.in_features == 2
    assert net.scale.flatten().tolist() == [1, 3]


@pytest.mark.parametrize("variant", ["rep_vit_m1", "rep_vit_m2"])
def test_branches_are_merged_after_or_before(variant: str) -> None:
    small, fused = made(variant), made(variant)
    kept, parts = halves(found_in(variant))
    keep(small, kept, parts)
    merged = copy.deepcopy(small)
    merged.fuse()
    assert off(encode(merged), encode(small)) < 1e-5
    # The other way round: the same widths are found once branches are one convolution.
    fused.fuse()
    found = faithful(fused, widths(fused, "test"))
    assert {w.name for w in found} == set(kept)
    keep(fused, kept, {w.name: w.parts for w in found})
    assert off(encode(fused), encode(small)) < 1e-5


def test_all_that_makes_a_width_must_match() -> None:
    sam = random_sam(out_chans=OUT)
    sam.image_encoder = made("rep_vit_m1")
    where = "image_encoder.features.3.channel_mixer.**"
    small = Filters(criterion="random", ratio=0.5, where=where)(sam, progress=False)
    assert list(sc.lineage(small)[-1].state["kept"]) == [
        "image_encoder.features.3.channel_mixer.m.0.c"
    ]
