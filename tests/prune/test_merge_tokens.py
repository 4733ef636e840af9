"""Merged keys against a naive version, and what holds for every merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from segment_anything.modeling.image_encoder import Block, add_decomposed_rel_pos
from tokens import block, embed, full_grid, graph, lives_on, relative, tokens, toy, twins
from torch import Tensor
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core.predict import encode
from samcompress.prune import _attend, _merge
from samcompress.prune._merge import merged
from samcompress.prune._token_blocks import GlobalAttention, TokenBlock
from samcompress.prune.merge_tokens import MergeTokens
from samcompress.substitute.hq import HQ

GRIDS = [(6, 8), (5, 7), (7, 2), (1, 5)]


def merging(of: Block, ratio: float) -> TokenBlock:
    return TokenBlock(of, GlobalAttention(of.attn, ratio))


def tables(attn: Any, q: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, N, N) what segment_anything adds to scores."""
    count = grid[0] * grid[1]
    zero = torch.zeros(len(q), count, count)
    return add_decomposed_rel_pos(zero, q, attn.rel_pos_h, attn.rel_pos_w, grid, grid)


def by_hand(of: Any, x: Tensor, gone: int) -> Tensor:
    """Token by token, image by image, with a list of keys that gets shorter."""
    attn, (height, width) = of.attn, x.shape[1:3]
    count, heads = height * width, attn.num_heads
    found = []
    for image in of.norm1(x):
        q, k, v = attn.qkv(image).view(count, 3, heads, -1).permute(1, 2, 0, 3)
        keys = {
            (y, x): (k[:, y * width + x], v[:, y * width + x], 1.0)
            for y in range(height)
            for x in range(width)
        }
        rows, columns, left = list(range(height)), list(range(width)), gone
        while left:
            axis = 1 if len(columns) >= len(rows) else 0
            even = (rows, columns)[axis][::2]
            heading = {p: F.normalize(key.mean(0), dim=0) for p, (key, _, _) in keys.items()}
            stay = [p for p in keys if p[axis] not in even]
            links = []
            for p in (p for p in keys if p[axis] in even):
                closeness = torch.stack([heading[p] @ heading[s] for s in stay])
                links.append((float(closeness.max()), p, stay[int(closeness.argmax())]))
            for _, p, s in sorted(links, reverse=True)[:left]:
                (a, b, m), (c, d, n) = keys.pop(p), keys[s]
                keys[s] = ((a * m + c * n) / (m + n), (b * m + d * n) / (m + n), m + n)
            left -= min(left, len(links))
            rows, columns = (rows, columns[1::2]) if axis else (rows[1::2], columns)
        merged_k, merged_v = (torch.stack([e[i] for e in keys.values()], 1) for i in (0, 1))
        sizes = torch.tensor([e[2] for e in keys.values()])
        bias = tables(attn, q, (height, width))[:, :, [y * width + x for y, x in keys]]
        scores = attn.scale * q @ merged_k.mT + bias + sizes.log()
        out = scores.softmax(-1) @ merged_v
        found.append(attn.proj(out.transpose(0, 1).reshape(height, width, -1)))
    x = x + torch.stack(found)
    return x + of.mlp(of.norm2(x))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.65, 0.8, 0.97])
def test_equals_a_naive_version(
    grid: tuple[int, int], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, x = block(grid=grid), tokens(2, *grid, 32)
    with torch.no_grad():
        expected = by_hand(of, x, int(ratio * grid[0] * grid[1]))
        for limit in (1, 4096, 1 << 24):
            monkeypatch.setattr(_attend, "CACHED", limit)
            found = merging(of, ratio)(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1)])
@pytest.mark.parametrize(("bias", "rel_pos"), [(True, True), (False, True), (True, False)])
def test_none_merged_is_the_identity(grid: tuple[int, int], bias: bool, rel_pos: bool) -> None:
    of, x = block(bias=bias, rel_pos=rel_pos), tokens(2, *grid, 32)
    with torch.no_grad():
        assert relative(merging(of, 0.0)(x), of(x)) < 1e-6


def test_twins_merge_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x = block(rel_pos=False), twins(tokens(2, 6, 8, 32))
    small = merging(of, 8 / 48)
    with torch.no_grad():
        assert relative(small(x), of(x)) < 1e-6
        # Only because a key counts as often as what it stands for.
        whole = _merge.Kept.bias
        monkeypatch.setattr(_merge.Kept, "bias", lambda self, *a: whole(self, *a) - a[2])
        assert relative(small(x), of(x)) > 1e-3


@pytest.mark.parametrize("gone", [1, 10, 24, 31, 40, 47])
def test_bias_is_that_of_the_kept_keys(gone: int) -> None:
    of = block(grid=(6, 8))
    q, k, v = tokens(3, 2, 2, 6, 8, 16).unbind(0)
    attn = GlobalAttention(of.attn)
    kept = merged(k, v, torch.ones(6, 8), gone)
    terms = attn.terms(q, (6, 8), (6, 8))
    bias = kept.bias(*terms, *kept.places) - kept.places[0]
    assert kept.keys.shape == kept.values.shape == (2, 2, 48 - gone, 16)
    torch.testing.assert_close(kept.places[0].exp().sum(-1).flatten(), torch.tensor([48.0, 48.0]))
    for image in range(2):
        regular = torch.arange(48).view(6, 8)[kept.steps[0] - 1 :: kept.steps[0]]
        regular = regular[:, kept.steps[1] - 1 :: kept.steps[1]].flatten()
        row, column = (place[image].flatten() for place in kept.places[1:])
        places = torch.cat([regular, 8 * row + column])
        assert len(set(places.tolist())) == 48 - gone
        with torch.no_grad():
            full = tables(of.attn, q[image].flatten(1, 2), (6, 8))[:, :, places]
        torch.testing.assert_close(bias[image].flatten(1, 2), full, rtol=0, atol=1e-5)


def test_means_are_weighted() -> None:
    k = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).view(1, 1, 1, 4, 2)
    v = torch.tensor([0.0, 4.0, 1.0, 9.0]).view(1, 1, 1, 4, 1).expand(-1, -1, -1, -1, 2)
    kept = merged(k, v, torch.tensor([[3.0, 1.0, 1.0, 1.0]]), 2)
    assert kept.values[0, 0, :, 0].tolist() == [1.0, 5.0]
    torch.testing.assert_close(kept.places[0].exp().flatten(), torch.tensor([4.0, 2.0]))


def test_the_closest_go_first() -> None:
    angles = torch.tensor([0.30, 0.0, 1.60, 1.5, 3.40, 3.0])
    k = torch.stack([angles.cos(), angles.sin()], -1).view(1, 1, 1, 6, 2)
    # Of the even ones the third is closest to one that stays, then the first.
    for gone, left in ((1, [0, 4]), (2, [4])):
        kept = merged(k, k, torch.ones(1, 6), gone)
        assert kept.places[2].flatten().sort().values.tolist() == left


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_bfloat16(ratio: float) -> None:
    of, x = block(), tokens(1, 12, 12, 32)
    with torch.no_grad():
        # Other keys may merge, but not much else.
        found = merging(of, ratio).bfloat16()(x.bfloat16()).float()
        assert relative(found, merging(block(), ratio)(x)) < 3e-2


# --- the technique --------------------------------------------------------------------------------


def test_whole_encoder_keeps_names_and_grid(tmp_path: Path) -> None:
    sam = toy()
    small = MergeTokens()(sam, progress=False)
    assert sc.lineage(small)[-1].state == {
        "blocks": ["image_encoder.blocks.1", "image_encoder.blocks.3"]
    }
    assert [type(b) for b in small.image_encoder.blocks] == [Block, TokenBlock] * 2
    assert {type(b) for b in sam.image_encoder.blocks} == {Block}
    assert small.state_dict().keys() == sam.state_dict().keys()
    assert all(torch.equal(v, sam.state_dict()[k]) for k, v in small.state_dict().items())
    assert embed(small).shape == embed(sam).shape == (3, 32, 16, 16)
    assert 1e-3 < relative(embed(small), embed(sam)) < 0.1
    lives_on(small, tmp_path)


def test_the_embedding_has_the_full_grid() -> None:
    assert full_grid(MergeTokens()) == (1, 32, 64, 64)


def test_graph() -> None:
    for ratio in (0.5, 0.7):
        _, expected, found = graph(MergeTokens(ratio=ratio)(toy(), progress=False))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_counts_less_work() -> None:
    sam = toy()
    fewer = sc.evaluate.macs(sam).encoder - sc.evaluate.macs(MergeTokens()(sam)).encoder
    products, matching = 2 * 256 * 128 * 32, 128 * 128 * 16
    assert fewer == 2 * (products - matching)  # two blocks


def test_where() -> None:
    small = MergeTokens(where="image_encoder.blocks.3")(toy(), progress=False)
    assert [type(b) for b in small.image_encoder.blocks] == [Block, Block, Block, TokenBlock]


def test_blocks_of_another_vit() -> None:
    sam = sc.substitute.ViT()(toy(), progress=False)
    small: Any = MergeTokens()(sam, progress=False)
    found = sc.lineage(small)[-1].state["blocks"]
    assert len(found) == 12
    assert all(type(small.get_submodule(name)) is TokenBlock for name in found)
    assert relative(embed(small), embed(sam)) < 0.1


def test_the_shipped_tiny_hardly_changes(trained: Any) -> None:
    images = [scene.image for scene in sc.shapes(4, seed=1_000_007, size=128)]

    def embedding(sam: Any) -> Tensor:
        return torch.cat([found.features for found in encode(sam, images)])

    half, tenth = (MergeTokens(ratio=r)(trained, progress=False) for r in (0.5, 0.9))
    expected = embedding(trained)
    assert relative(embedding(half), expected) < 0.06
    assert 0.06 < relative(embedding(tenth), expected) < 0.2


@pytest.mark.parametrize(
    "chain",
    [
        sc.prune.Heads(ratio=0.5, criterion="random") | MergeTokens() | sc.attention.Fused(),
        sc.prune.HeadDims(ratio=0.5, criterion="random", round_to=1) | MergeTokens(),
        sc.prune.Channels(ratio=0.5, criterion="random", round_to=8) | MergeTokens(),
        MergeTokens() | sc.quantize.Int8Weights(min_size=0),
        HQ() | MergeTokens(),
    ],
    ids=repr,
)
def test_chains(chain: sc.Pipeline, tmp_path: Path) -> None:
    small = chain(toy(), progress=False)
    without = sc.Pipeline([s for s in chain if s != MergeTokens()])(toy(), progress=False)
    assert relative(embed(small), embed(without)) < 0.1
    sc.save(small, tmp_path / "small")
    assert torch.equal(embed(sc.load(tmp_path / "small")), embed(small))


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], technique: Any, sam: Any) -> list[str]:
    with pytest.raises(error) as caught:
        sc.Pipeline([technique], any_order=True)(sam, progress=False)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("ratio", [0.0, 1.0, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        MergeTokens(ratio=ratio)
    assert str(caught.value).splitlines() == [
        "prune.merge_tokens: ratio is out of range.",
        f"  got       {ratio}",
        "  expected  0 < ratio < 1",
    ]


def test_twice() -> None:
    small = MergeTokens(where="image_encoder.blocks.1")(toy(), progress=False)
    both = MergeTokens()(small, progress=False)
    assert sc.lineage(both)[-1].state == {"blocks": ["image_encoder.blocks.3"]}
    assert message(errors.NoEffectError, MergeTokens(), both) == [
        "prune.merge_tokens finds no keys to merge.",
        "  where     Where(include=('image_encoder.**',), exclude=())",
        "  got       keys that are merged already",
        "  expected  blocks with attention over the whole map",
        "  try       leave this step out",
    ]


def test_windows_alone() -> None:
    lines = message(errors.NoEffectError, MergeTokens(where="image_encoder.blocks.0"), toy())
    assert lines[2] == "  got       blocks with windows alone"
    assert lines[4] == "  try       widen where="
    assert "matched no module" in message(errors.NoEffectError, MergeTokens(where="x"), toy())[0]


def test_after_fused_attention() -> None:
    fused = sc.attention.Fused()(toy(), progress=False)
    with pytest.raises(errors.OrderError):
        MergeTokens()(fused)
    assert message(errors.ModelError, MergeTokens(), fused) == [
        "prune.merge_tokens finds no ViT block of segment_anything.",
        "  where     image_encoder",
        "  got       ImageEncoderViT, FusedBlock",
        "  expected  an encoder made of segment_anything.modeling.image_encoder.Block",
        "  try       put this step before those that replace blocks, such as sc.attention.Fused()",
    ]


def test_other_encoders() -> None:
    pytest.importorskip("timm")
    lines = message(
        errors.ModelError, MergeTokens(), sc.substitute.TinyViT()(toy(), progress=False)
    )
    assert lines[0] == "prune.merge_tokens finds no ViT block of segment_anything."


@pytest.mark.slow
def test_vit_b() -> None:
    sam = randomise(sc.build("vit_b", image_size=256))
    small = MergeTokens()(sam, progress=False)
    image = tokens(1, 3, 256, 256)
    with torch.inference_mode():
        found, expected = small.image_encoder(image), sam.image_encoder(image)
    assert 1e-3 < relative(found, expected) < 0.2
