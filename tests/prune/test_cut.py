"""Cuts as a whole: sizes known from arithmetic, published shapes, and torch-pruning's own cuts."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import ATTENTION, encode, gone, off, on_meta, toy
from torch import nn

from samcompress.core.sizes import parameter_count
from samcompress.evaluate.macs import macs
from samcompress.prune import _cut
from samcompress.prune._groups import KINDS, best

BLOCK = "image_encoder.blocks"


# --- sizes ----------------------------------------------------------------------------------------


def channels(sam: Any, count: int) -> None:
    _cut.keep_channels(sam.image_encoder, range(count))


def bottlenecks(sam: Any, width: int, hidden: int) -> None:
    for block in sam.image_encoder.blocks:
        _cut.keep_head_dims(block.attn, range(width))
        _cut.keep_hidden(block.mlp, range(hidden))


def slim(sam: Any, count: int, width: int, hidden: int) -> None:
    channels(sam, count)
    bottlenecks(sam, width, hidden)


def half_of_heads(sam: Any) -> None:
    for block in sam.image_encoder.blocks:
        _cut.keep_heads(block.attn, range(0, 12, 2))


def half_of_mlps(sam: Any) -> None:
    for block in sam.image_encoder.blocks:
        _cut.keep_hidden(block.mlp, range(1536))


def without(sam: Any, *indices: int) -> None:
    _cut.keep_blocks(sam.image_encoder, gone(list(indices), 12))


# Of vit_b: parameters of the encoder, GMAC of the encoder without and with attention's products.
SIZES: list[tuple[Callable[[Any], None], int, float, float]] = [
    (lambda sam: None, 89_670_912, 368.7, 486.0),
    (lambda sam: channels(sam, 576), 67_440_192, 277.1, 394.5),
    (lambda sam: channels(sam, 384), 45_209_472, 185.6, 302.9),
    (lambda sam: channels(sam, 168), 20_199_912, 82.5, 199.9),
    (lambda sam: bottlenecks(sam, 48, 2304), 68_397_952, 277.9, 365.9),
    (lambda sam: bottlenecks(sam, 32, 1536), 47_124_992, 187.2, 245.8),
    (lambda sam: bottlenecks(sam, 14, 696), 23_635_568, 86.9, 112.5),
    (lambda sam: slim(sam, 576, 48, 2304), 51_475_648, 209.1, 297.1),
    (lambda sam: slim(sam, 384, 32, 1536), 23_897_216, 94.8, 153.5),
    (lambda sam: slim(sam, 168, 14, 696), 5_658_968, 20.9, 46.6),
    (half_of_heads, 75_501_312, 303.1, 361.8),
    (half_of_mlps, 61_340_928, 252.7, 370.1),
    (lambda sam: without(sam, 3, 4, 6, 7), 61_305_600, 245.2, 356.2),
    (lambda sam: without(sam, 2, 5), 75_462_656, 310.7, 375.7),
]


@pytest.mark.parametrize(("cut", "encoder", "plain", "work"), SIZES)
def test_check6_sizes_of_vit_b(cut: Any, encoder: int, plain: float, work: float) -> None:
    sam = on_meta()
    cut(sam)
    assert parameter_count(sam.image_encoder) == encoder
    assert parameter_count(sam) == encoder + 6_220 + 4_058_340
    found = macs(sam)
    assert round(found.encoder_no_attention / 1e9, 1) == plain
    assert round(found.encoder / 1e9, 1) == work


@pytest.mark.parametrize(
    ("name", "sizes", "encoder"),
    [
        ("vit_l", (512, 32, 2048), 78_937_088),
        ("vit_l", (224, 14, 928), 16_632_704),
        ("vit_h", (640, 40, 2560), 161_522_048),
        ("vit_h", (288, 18, 1168), 34_376_928),
    ],
)
def test_check6_sizes_of_larger_models(name: str, sizes: Any, encoder: int) -> None:
    sam = on_meta(name)
    slim(sam, *sizes)
    assert parameter_count(sam.image_encoder) == encoder


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("slimsam50_uniform", (384, 32, 1536)), ("slimsam77_uniform", (168, 14, 696))],
)
def test_check6_published_weights_fit(name: str, sizes: Any, shared: Path) -> None:
    facts = json.loads((shared / "golden" / f"{name}.json").read_text())
    sam = on_meta()
    slim(sam, *sizes)
    found = {key: tuple(value.shape) for key, value in sam.state_dict().items()}
    assert found == {row[0]: tuple(row[1]) for row in facts["tensors"]}


def uneven(seed: int) -> tuple[Any, int, list[tuple[int, int, int]]]:
    """The toy with other sizes in every block: channels, and (heads, their width, hidden)."""
    sam = toy()
    drawn = torch.Generator().manual_seed(seed)
    width = 8 * int(torch.randint(1, 4, (), generator=drawn))
    sizes = []
    for block in sam.image_encoder.blocks:
        heads, dims, hidden = (int(torch.randint(2, n, (), generator=drawn)) for n in (5, 9, 97))
        _cut.keep_heads(block.attn, range(heads))
        _cut.keep_head_dims(block.attn, range(dims))
        _cut.keep_hidden(block.mlp, range(hidden))
        sizes.append((heads, dims, hidden))
    channels(sam, width)
    return sam, width, sizes


@pytest.mark.parametrize("seed", range(3))
def test_check6_formulas_for_uneven_sizes(seed: int) -> None:
    sam, e, sizes = uneven(seed)
    # Patches of 8 x 8, a grid of 8 x 8, windows of 3 on 9 x 9, 32 channels out.
    parameters = 3 * 64 * e + e + 64 * e + 32 * e + 9 * 32 * 32 + 4 * 32
    plain = 64 * (3 * 64 * e + 32 * e + 9 * 32 * 32)
    attention = 0
    for index, (heads, h, m) in enumerate(sizes):
        i = heads * h
        side, tokens, windows = (8, 64, 1) if index % 2 else (3, 81, 9)
        parameters += 4 * e + 3 * i * (e + 1) + e * (i + 1) + m * (e + 1) + e * (m + 1)
        parameters += 2 * h * (2 * side - 1)
        plain += tokens * 4 * e * i + 64 * 2 * e * m
        attention += windows * i * (2 * side**4 + 2 * side**3)
    assert parameter_count(sam.image_encoder) == parameters
    found = macs(sam)
    assert (found.encoder_no_attention, found.encoder) == (plain, plain + attention)
    assert encode(sam).isfinite().all()


# --- torch-pruning --------------------------------------------------------------------------------


def torch_pruning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_pruning")


class Traceable(nn.Module):
    """An encoder that torch-pruning can follow: a linear layer first, and no relative positions.

    Without a linear layer that gives three dimensions it takes reshapes for flattening and never
    ends; with relative positions it passes over attention.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.flat, self.encoder = nn.Linear(1, 1), encoder
        for block in encoder.blocks:
            block.attn.use_rel_pos = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.flat(torch.zeros(1, 1, 1))
        return self.encoder(x)


def theirs(sam: Any, importance: Any, whole_heads: bool) -> tuple[Any, dict[str, list[int]]]:
    """Half of the hidden units and half of the heads or their width, by torch-pruning alone."""
    tp = torch_pruning()
    traced = Traceable(copy.deepcopy(sam.image_encoder))
    encoder = traced.encoder
    attention = {block.attn.qkv: 4 for block in encoder.blocks}
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if importance is None:
        traced(images).square().sum().backward()
        importance = tp.importance.GroupTaylorImportance(
            group_reduction="mean", normalizer=None, bias=False, target_types=[nn.Linear]
        )
    pruner = tp.pruner.BasePruner(
        traced,
        images,
        importance,
        pruning_ratio=0.5,
        num_heads=attention,
        prune_num_heads=whole_heads,
        prune_head_dims=not whole_heads,
        head_pruning_ratio=0.5 if whole_heads else 0.0,
        ignored_layers=[traced.flat, encoder.patch_embed, encoder.neck],
    )
    removed: dict[str, list[int]] = {}
    names = {module: name for name, module in traced.named_modules()}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            name = names.get(dependency.target.module, "")
            if (
                name.endswith(("qkv", "lin1"))
                and dependency.handler.__name__ == "prune_out_channels"
            ):
                removed[f"image_{name}"] = sorted(indices)
        group.prune()
    for block in encoder.blocks:
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
    return encoder, removed


@pytest.mark.parametrize("whole_heads", [True, False], ids=["heads", "head_dims"])
@pytest.mark.parametrize("by", ["magnitude", "taylor"])
def test_check17_torch_pruning_cuts_the_same(whole_heads: bool, by: str) -> None:
    tp = torch_pruning()
    sam = toy()
    size = None
    if by == "magnitude":
        size = tp.importance.GroupMagnitudeImportance(
            p=2, group_reduction="mean", normalizer=None, bias=False, target_types=[nn.Linear]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder, removed = theirs(sam, size, whole_heads)
    if by == "magnitude":
        elements = {name: p.detach().square() for name, p in sam.named_parameters()}
    else:
        plain = copy.deepcopy(sam)
        for block in plain.image_encoder.blocks:
            block.attn.use_rel_pos = False
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        plain.image_encoder(images).square().sum().backward()
        elements = {
            name: (p * p.grad).abs().detach()
            for name, p in plain.named_parameters()
            if p.grad is not None
        }
    kind = "heads" if whole_heads else "head_dims"
    for index in range(4):
        attn, mlp = f"{BLOCK}.{index}.attn", f"{BLOCK}.{index}.mlp"
        (group,) = KINDS[kind].groups(sam, attn)
        kept = best(group.reduce(elements), group.units // 2)
        unit = group.members[-1].unit
        rows = [place for place in range(32) if int(unit[place]) not in kept]
        assert [place for place in removed[f"{attn}.qkv"] if place < 32] == rows
        KINDS[kind].cut(sam, attn, kept)
        (group,) = KINDS["mlp"].groups(sam, mlp)
        kept = best(group.reduce(elements), 48)
        assert removed[f"{mlp}.lin1"] == gone(kept, 96)
        KINDS["mlp"].cut(sam, mlp, kept)
    expected = encoder.state_dict()
    for name, tensor in sam.image_encoder.state_dict().items():
        if "rel_pos" in name:
            continue  # theirs are not cut: they were not part of what was traced
        if not whole_heads and "qkv" in name:
            tensor = torch.cat(
                [t * s for t, s in zip(tensor.chunk(3), (1, 0.5**-0.5, 1), strict=True)]
            )
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("by", ["magnitude", "taylor"])
def test_check17_torch_pruning_scores_the_same(by: str) -> None:
    tp = torch_pruning()
    sam = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = Traceable(copy.deepcopy(sam.image_encoder))
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        traced(images).square().sum().backward()
        graph = tp.DependencyGraph().build_dependency(traced, images)
        settings = {"group_reduction": "mean", "normalizer": None, "bias": False}
        settings["target_types"] = [nn.Linear]
        if by == "magnitude":
            importance = tp.importance.GroupMagnitudeImportance(p=2, **settings)
        else:
            importance = tp.importance.GroupTaylorImportance(**settings)
        block = traced.encoder.blocks[1]
        hidden = graph.get_pruning_group(
            block.mlp.lin1, tp.prune_linear_out_channels, list(range(96))
        )
        parts = graph.get_pruning_group(
            block.attn.proj, tp.prune_linear_in_channels, list(range(32))
        )
        hidden, parts = importance(hidden).detach(), importance(parts).detach()
    elements = {}
    for name, p in traced.encoder.named_parameters():
        if by == "magnitude" or p.grad is not None:
            elements[f"image_encoder.{name}"] = (
                (p * (p if by == "magnitude" else p.grad)).abs().detach()
            )
    (group,) = KINDS["mlp"].groups(sam, f"{BLOCK}.1.mlp")
    torch.testing.assert_close(group.reduce(elements), hidden)
    # Theirs is one number for each of the 32 parts, which we add up.
    for kind, axis in (("heads", 1), ("head_dims", 0)):
        (group,) = KINDS[kind].groups(sam, ATTENTION[1])
        found, summed = group.reduce(elements), parts.view(4, 8).sum(axis)
        assert off(found / found.sum(), summed / summed.sum()) < 1e-5
