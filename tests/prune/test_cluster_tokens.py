"""Clusters against a naive version, and what holds for every clustering."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from segment_anything.modeling.image_encoder import Block
from tokens import embed, full_grid, graph, lives_on, relative, tokens, toy
from torch import Tensor
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core.predict import encode
from samcompress.prune._clusters import Clusters, distances, pooling, within
from samcompress.prune._token_vit import TokenViT
from samcompress.prune.cluster_tokens import ClusterTokens
from samcompress.prune.merge_tokens import MergeTokens
from samcompress.substitute.hq import HQ

HOW = Clusters(window=5, side=3, iterations=5, neighbours=4, sharpness=0.1, add=False)
same = dataclasses.replace(HOW, side=5, iterations=0, neighbours=1)
GRIDS = [(5, 5), (10, 10), (12, 11), (4, 3), (5, 1)]


def by_hand(window: Tensor, grid: tuple[int, int], how: Clusters) -> tuple[Tensor, Tensor]:
    """One window (a, b, C), token by token."""
    (tall, broad), (rows, columns) = window.shape[:2], grid
    x = {(i, j): window[i, j] for i in range(tall) for j in range(broad)}
    centres = F.adaptive_avg_pool2d(window.permute(2, 0, 1), grid).permute(1, 2, 0)
    c = {(i, j): centres[i, j] for i in range(rows) for j in range(columns)}
    for _ in range(how.iterations):
        shares = {}
        for (i, j), token in x.items():
            own = i * rows // tall, j * columns // broad
            near = [p for p in c if abs(p[0] - own[0]) <= 2 and abs(p[1] - own[1]) <= 2]
            away = torch.stack([(token - c[p]).square().sum() for p in near])
            weights = (-how.sharpness * away).softmax(0)
            shares[i, j] = dict(zip(near, weights, strict=True))
        c = {
            p: sum(s.get(p, 0) * x[t] for t, s in shares.items())
            / sum(s.get(p, 0) for s in shares.values())
            for p in c
        }
    made = torch.stack(list(c.values()))
    back = []
    for token in x.values():
        away = (token - made).square().sum(1)
        weights = torch.zeros(len(made))
        for p in away.argsort()[: how.neighbours]:
            weights[p] = torch.exp(-how.sharpness * away[p])
        back.append(weights / weights.sum())
    return made.view(rows, columns, -1), torch.stack(back)


@pytest.mark.parametrize("size", [(5, 5), (5, 2), (3, 4)])
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_a_window_equals_a_naive_version(size: tuple[int, int], iterations: int) -> None:
    how = dataclasses.replace(HOW, iterations=iterations)
    x = tokens(2, *size, 8)
    grid = tuple(band[0].clusters for band in map(how.bands, size))
    found = how(x)
    for image in range(2):
        centres, shares = by_hand(x[image], grid, how)
        torch.testing.assert_close(found.centres[image], centres, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.shares[0][image], shares, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "cells"), [(14, 9), (14, 10), (8, 5), (7, 5), (3, 3), (2, 1)])
def test_pooling_is_adaptive(length: int, cells: int) -> None:
    x = tokens(1, 3, length)
    found = x @ pooling(length, cells, x.device).T
    torch.testing.assert_close(found, F.adaptive_avg_pool1d(x, cells))


def test_only_near_clusters_count() -> None:
    found = within(14, 7, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in found[[0, 6, 13]]] == [
        [0, 1, 2],
        [1, 2, 3, 4, 5],
        [4, 5, 6],
    ]


def test_distances() -> None:
    a, b = tokens(2, 5, 8), tokens(2, 4, 8, seed=3)
    torch.testing.assert_close(distances(a, b), torch.cdist(a, b).square())


@pytest.mark.parametrize("grid", GRIDS)
def test_as_many_clusters_as_tokens_change_nothing(grid: tuple[int, int]) -> None:
    x = tokens(2, *grid, 8)
    found = same(x)
    assert torch.equal(found.centres, x)
    torch.testing.assert_close(found.back(x, found.centres), x)
    assert relative(found.back(x, 2 * x), 2 * x) < 1e-6


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sharpness", [0.0, 0.1, 1e6])
def test_shares(grid: tuple[int, int], sharpness: float) -> None:
    how = dataclasses.replace(HOW, sharpness=sharpness)
    x = tokens(2, *grid, 8)
    found = how(x)
    assert found.centres.shape == (2, *map(how.count, grid), 8)
    # Clusters are means of tokens.
    assert found.centres.amin() >= x.amin() - 1e-5
    assert found.centres.amax() <= x.amax() + 1e-5
    for shares in found.shares:
        torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))
        assert shares.amin() >= 0
        assert ((shares > 0).sum(-1) <= 4).all()
    one = torch.ones_like(found.centres)
    torch.testing.assert_close(found.back(x, one), torch.ones_like(x))


def test_a_plain_map_stays_plain() -> None:
    x = torch.full((1, 12, 12, 8), 3.0)
    found = HOW(x)
    torch.testing.assert_close(found.centres, torch.full((1, 7, 7, 8), 3.0))
    torch.testing.assert_close(found.back(x, found.centres), x)


def test_windows_at_the_edge_are_as_dense() -> None:
    how = dataclasses.replace(HOW, window=14, side=9)
    assert how.bands(64) == [(56, 14, 36, 9), (8, 8, 5, 5)]
    assert how.count(64) == 41
    assert how.count(16) == 10
    assert how.bands(1) == [(1, 1, 1, 1)]


def test_added_change() -> None:
    how = dataclasses.replace(HOW, add=True)
    x = tokens(1, 12, 12, 8)
    found = how(x)
    assert torch.equal(found.back(x, found.centres), x)
    torch.testing.assert_close(found.back(x, found.centres + 2), x + 2)


# --- the technique --------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["add", "replace"])
def test_whole_encoder(restore: Any, tmp_path: Path) -> None:
    sam = toy()
    small = ClusterTokens(restore=restore)(sam, progress=False)
    assert sc.lineage(small)[-1].state == {"start": 2, "window": 5, "side": 4}
    assert type(small.image_encoder) is TokenViT
    assert [b.window_size for b in small.image_encoder.blocks] == [5, 0, 4, 0]
    assert [b.window_size for b in sam.image_encoder.blocks] == [5, 0, 5, 0]
    assert {type(b) for b in small.image_encoder.blocks} == {Block}
    assert small.state_dict().keys() == sam.state_dict().keys()
    assert embed(small).shape == embed(sam).shape == (3, 32, 16, 16)
    assert 0.02 < relative(embed(small), embed(sam)) < 0.6
    lives_on(small, tmp_path)


def test_the_embedding_has_the_full_grid() -> None:
    assert full_grid(ClusterTokens()) == (1, 32, 64, 64)


def test_later_blocks_see_clusters() -> None:
    small: Any = ClusterTokens(ratio=0.6, start=1)(toy(), progress=False)
    seen = []
    for block in small.image_encoder.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:3])))
    with torch.no_grad():
        small.image_encoder(tokens(1, 3, 128, 128))
    assert seen == [(16, 16), (10, 10), (10, 10), (10, 10)]


def test_the_whole_is_what_its_parts_give() -> None:
    small: Any = ClusterTokens(start=1, restore="replace")(toy(), progress=False)
    vit, image = small.image_encoder, tokens(2, 3, 128, 128)
    with torch.no_grad():
        x = vit.blocks[0](vit.patch_embed(image) + vit.pos_embed)
        found = vit.clusters(x)
        y = found.centres
        for block in vit.blocks[1:]:
            y = block(y)
        expected = vit.neck(found.back(x, y).permute(0, 3, 1, 2))
        torch.testing.assert_close(vit(image), expected)


def test_blocks_that_do_nothing_lose_nothing() -> None:
    sam: Any = toy()
    for block in sam.image_encoder.blocks[2:]:
        for layer in (block.attn.proj, block.mlp.lin2):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    expected = embed(sam)
    assert relative(embed(ClusterTokens()(sam, progress=False)), expected) < 1e-6
    mixed = ClusterTokens(restore="replace")(sam, progress=False)
    assert relative(embed(mixed), expected) > 0.02


def test_graph() -> None:
    _, expected, found = graph(ClusterTokens()(toy(), progress=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_counts_less_work() -> None:
    sam = toy()
    full, half, all_ = (
        sc.evaluate.macs(model).encoder
        for model in (sam, ClusterTokens()(sam), ClusterTokens(start=0)(sam))
    )
    assert all_ < half < 0.9 * full


def test_what_was_added_is_closer_for_the_shipped_tiny(trained: Any) -> None:
    images = [scene.image for scene in sc.shapes(4, seed=1_000_007, size=128)]

    def embedding(sam: Any) -> Tensor:
        return torch.cat([found.features for found in encode(sam, images)])

    expected = embedding(trained)
    added, replaced = (
        relative(embedding(ClusterTokens(restore=r)(trained, progress=False)), expected)
        for r in ("add", "replace")
    )
    assert added < 0.18 < replaced < 0.25


@pytest.mark.parametrize(
    "chain",
    [
        sc.prune.Heads(ratio=0.5, criterion="random") | ClusterTokens() | sc.attention.Fused(),
        MergeTokens() | ClusterTokens(),
        ClusterTokens() | MergeTokens(),
        sc.prune.Channels(ratio=0.5, criterion="random", round_to=8) | ClusterTokens(),
        ClusterTokens() | sc.quantize.Int8Weights(min_size=0),
        sc.substitute.ImageSize(size=96) | ClusterTokens(),
    ],
    ids=repr,
)
def test_chains(chain: sc.Pipeline, tmp_path: Path) -> None:
    small = chain(toy(), progress=False)
    without = sc.Pipeline([s for s in chain if s != ClusterTokens()])(toy(), progress=False)
    assert 0.02 < relative(embed(small), embed(without)) < 0.4
    sc.save(small, tmp_path / "small")
    assert torch.equal(embed(sc.load(tmp_path / "small")), embed(small))


def test_order_of_techniques_for_tokens_does_not_matter() -> None:
    one, other = (
        chain(toy(), progress=False)
        for chain in (MergeTokens() | ClusterTokens(), ClusterTokens() | MergeTokens())
    )
    assert torch.equal(embed(one), embed(other))


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], technique: Any, sam: Any) -> list[str]:
    with pytest.raises(error) as caught:
        sc.Pipeline([technique], any_order=True)(sam, progress=False)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("start", -1, 0),
        ("iterations", -1, 0),
        ("neighbours", 0, 1),
        ("sharpness", -1.0, 0),
        ("sharpness", float("nan"), 0),
        ("sharpness", float("inf"), 0),
    ],
)
def test_fields_out_of_range(field: str, value: Any, least: int) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        ClusterTokens(**{field: value})
    assert str(caught.value).splitlines() == [
        f"prune.cluster_tokens: {field} is out of range.",
        f"  where     {field}",
        f"  got       {value}",
        f"  expected  {least} <= {field} < inf",
        f"  try       {field}={getattr(ClusterTokens(), field)}",
    ]


@pytest.mark.parametrize("ratio", [0.0, 1.0, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        ClusterTokens(ratio=ratio)
    assert str(caught.value).splitlines()[0] == "prune.cluster_tokens: ratio is out of range."


@pytest.mark.parametrize(("ratio", "side"), [(0.05, 5), (0.995, 0)])
def test_windows_no_smaller_or_empty(ratio: float, side: int) -> None:
    assert message(errors.ConfigError, ClusterTokens(ratio=ratio), toy()) == [
        "prune.cluster_tokens: ratio leaves windows no smaller, or empty.",
        "  where     windows of 5 x 5 tokens",
        f"  got       ratio={ratio}, so {side} x {side} clusters",
        "  expected  1 to 4 clusters along a side",
        f"  try       a {'larger' if side else 'smaller'} ratio",
    ]


def test_start_behind_the_last() -> None:
    assert message(errors.ConfigError, ClusterTokens(start=4), toy()) == [
        "prune.cluster_tokens: start is behind the last block.",
        "  where     image_encoder.blocks",
        "  got       4",
        "  expected  0 to 3",
        "  try       start=2",
    ]


def test_twice() -> None:
    small = ClusterTokens()(toy(), progress=False)
    assert message(errors.NoEffectError, ClusterTokens(), small) == [
        "prune.cluster_tokens: the tokens are clustered already.",
        "  where     image_encoder",
        "  got       clusters from block 2 on",
        "  try       leave this step out",
    ]


def test_no_windows() -> None:
    sam = toy(global_attn_indexes=(0, 1, 2, 3))
    assert message(errors.ModelError, ClusterTokens(), sam) == [
        "prune.cluster_tokens clusters inside windows of one size.",
        "  where     image_encoder.blocks",
        "  got       no windows",
        "  expected  windows of as many tokens in all blocks that have any",
    ]


def test_sam_hq_reads_the_tokens() -> None:
    sam = HQ()(toy(), progress=False)
    assert message(errors.ModelError, ClusterTokens(), sam) == [
        "prune.cluster_tokens does not know how tokens go through this image encoder.",
        "  where     image_encoder",
        "  got       HqViT",
        "  expected  ImageEncoderViT and Block of segment_anything",
        "  try       sc.prune.MergeTokens(), which changes blocks alone",
    ]


def test_another_vit() -> None:
    sam = sc.substitute.ViT()(toy(), progress=False)
    lines = message(errors.ModelError, ClusterTokens(), sam)
    assert lines[0].endswith("does not know how tokens go through this image encoder.")
    assert lines[2] == "  got       OnGrid"


def test_blocks_that_were_replaced() -> None:
    sam: Any = toy()
    fused = sc.attention.Fused()(sam, progress=False)
    fused.image_encoder.blocks[0] = sam.image_encoder.blocks[0]
    lines = message(errors.ModelError, ClusterTokens(), fused)
    assert lines[2] == "  got       ImageEncoderViT, FusedBlock"
    assert lines[4].endswith("before those that replace blocks, such as sc.attention.Fused()")


@pytest.mark.slow
def test_vit_b() -> None:
    sam = randomise(sc.build("vit_b", image_size=256))
    small = ClusterTokens()(sam, progress=False)
    image = tokens(1, 3, 256, 256)
    with torch.inference_mode():
        found, expected = small.image_encoder(image), sam.image_encoder(image)
    assert 1e-2 < relative(found, expected) < 0.6
