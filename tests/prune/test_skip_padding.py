"""Padding that is not computed: of windows against segment_anything, of photos against all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from segment_anything.modeling.image_encoder import Block
from tokens import block, embed, full_grid, graph, lives_on, relative, tokens, toy, twins

import samcompress as sc
from samcompress.attention.fused import FusedBlock
from samcompress.core import errors
from samcompress.prune import _attend, _token_blocks
from samcompress.prune._token_blocks import (
    GlobalAttention,
    Part,
    TokenBlock,
    WindowAttention,
    log_sum,
)
from samcompress.prune._token_vit import TokenViT, photos, stands_for
from samcompress.prune.cluster_tokens import ClusterTokens
from samcompress.prune.merge_tokens import MergeTokens
from samcompress.prune.skip_padding import SkipPadding
from samcompress.substitute.hq import HQ

WINDOWS = [(5, (9, 13)), (7, (14, 14)), (7, (10, 14)), (7, (14, 9)), (5, (4, 3)), (6, (1, 8))]
ANY_WINDOW = pytest.mark.parametrize(("window", "grid"), WINDOWS)


def sparing(of: Block) -> TokenBlock:
    return TokenBlock(of, WindowAttention(of.attn))


# --- windows --------------------------------------------------------------------------------------


@ANY_WINDOW
@pytest.mark.parametrize(("bias", "rel_pos"), [(True, True), (False, True), (True, False)])
def test_equals_segment_anything(
    window: int, grid: tuple[int, int], bias: bool, rel_pos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = block(64, window, bias=bias, rel_pos=rel_pos)
    x = tokens(2, *grid, 64)
    with torch.no_grad():
        expected = of(x)
        for limit in (1, 4096, 1 << 24):
            monkeypatch.setattr(_attend, "CACHED", limit)
            found = sparing(of)(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert relative(found, expected) < 1e-6


@ANY_WINDOW
def test_gradients(window: int, grid: tuple[int, int]) -> None:
    eager = block(window=window)
    ours = sparing(copy.deepcopy(eager))
    inputs = [tokens(1, *grid, 32).requires_grad_() for _ in range(2)]
    for module, x in zip((eager, ours), inputs, strict=True):
        module(x).square().sum().backward()
    assert relative(inputs[1].grad, inputs[0].grad) < 1e-5
    pairs = zip(eager.named_parameters(), ours.named_parameters(), strict=True)
    for (name, p), (other, q) in pairs:
        assert name == other
        # Keys have no use for their bias but where there is padding.
        assert (p.grad - q.grad).norm() < 1e-4 * p.grad.norm() + 1e-5, name


@ANY_WINDOW
def test_bfloat16_errs_no_more_than_eager(window: int, grid: tuple[int, int]) -> None:
    exact = block(window=window)
    eager = copy.deepcopy(exact).bfloat16()
    x = tokens(1, *grid, 32)
    with torch.no_grad():
        expected = exact(x)
        error = relative(sparing(eager)(x.bfloat16()).float(), expected)
        assert error < 2e-2
        assert error < 1.5 * relative(eager(x.bfloat16()).float(), expected)


@pytest.mark.parametrize("change", ["key", "score"])
def test_padding_takes_part(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, x = block(window=5), tokens(1, 9, 13, 32)
    if change == "key":
        zero = lambda self, like: (0 * like[:, :, :1], 0 * like[:, :, :1])  # noqa: E731
        monkeypatch.setattr(WindowAttention, "_padding", zero)
    else:
        one = lambda rows, *_: torch.zeros_like(rows[..., :1])  # noqa: E731
        monkeypatch.setattr(_token_blocks, "log_sum", one)
    with torch.no_grad():
        assert (sparing(of)(x) - of(x)).abs().max() > 1e-3


def test_log_sum_by_hand() -> None:
    rows = torch.tensor([[0.0, 1.0, 2.0]]).log1p().view(1, 1, 1, 1, 3)  # 1, 2, 3
    columns = torch.tensor([[4.0, 5.0, 6.0]]).log1p().view(1, 1, 1, 1, 3)  # 5, 6, 7

    def total(height: int, width: int) -> float:
        return float(log_sum(rows, columns, height, width).exp())

    assert total(2, 3) == pytest.approx(3 * 18)
    assert total(3, 1) == pytest.approx(6 * 13)
    assert total(1, 2) == pytest.approx(6 * 18 - 1 * 11)


def test_whole_encoder_keeps_names_and_function(tmp_path: Path) -> None:
    sam = toy()
    small = SkipPadding()(sam, progress=False)
    assert sc.lineage(small)[-1].state == {
        "blocks": ["image_encoder.blocks.0", "image_encoder.blocks.2"]
    }
    assert [type(b) for b in small.image_encoder.blocks] == [TokenBlock, Block] * 2
    assert small.state_dict().keys() == sam.state_dict().keys()
    torch.testing.assert_close(embed(small), embed(sam), rtol=0, atol=1e-5)
    lives_on(small, tmp_path)


@pytest.mark.parametrize("photo", [True, False])
def test_the_embedding_has_the_full_grid(photo: bool) -> None:
    assert full_grid(SkipPadding(photo=photo)) == (1, 32, 64, 64)


def test_graph_of_windows() -> None:
    _, expected, found = graph(SkipPadding()(toy(), progress=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_spares_what_fused_attention_computes() -> None:
    sam = toy()
    fused = sc.evaluate.macs(sc.attention.Fused()(sam)).encoder
    spared = sc.evaluate.macs((SkipPadding() | sc.attention.Fused())(sam)).encoder
    # 16 tokens are three windows of 5 and one token: pairs in whole windows, at the edge, in the
    # corner. Rows and columns of positions are asked for by fewer tokens too.
    pairs = 9 * (625 - 625) + 6 * (625 - 5 * 6) + (625 - 1 * 2)
    queries = 6 * 20 + 24
    assert fused - spared == 2 * (2 * 32 * pairs + 32 * 2 * 5 * queries)


def test_equals_fused_attention() -> None:
    of, x = block(window=5), tokens(2, 9, 13, 32)
    with torch.no_grad():
        found, expected = sparing(of)(x), FusedBlock(of)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- photos ---------------------------------------------------------------------------------------


def test_where_photos_end() -> None:
    x = torch.zeros(5, 3, 32, 32)
    x[0] = 1
    x[1, :, :17] = 1
    x[2, 1, 3, 30], x[2, 2, 8, 0] = -1, 1  # zeros inside
    x[3, 0, 0, 0] = 1
    assert photos(x, 4) == [(4, 4), (3, 4), (2, 4), (1, 1), (4, 4)]


def test_stands_for() -> None:
    assert stands_for(4, 2, 8).tolist() == [1, 1, 1, 1, 2, 2]
    assert stands_for(8, 2, 8).tolist() == [1] * 8
    assert stands_for(7, 2, 8).tolist() == [1] * 8
    assert all(float(stands_for(p, m, 16).sum()) == 16 for p in (1, 5, 15, 16) for m in (1, 3, 20))


@pytest.mark.parametrize("window", [True, False])
def test_whole_encoder_without_padding_of_photos(window: bool, tmp_path: Path) -> None:
    sam = toy()
    small = SkipPadding(photo=True, window=window)(sam, progress=False)
    assert type(small.image_encoder) is TokenViT
    kinds = [TokenBlock if window else Block, TokenBlock] * 2
    assert [type(b) for b in small.image_encoder.blocks] == kinds
    assert small.state_dict().keys() == sam.state_dict().keys()
    found, expected = embed(small), embed(sam)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)  # a square photo
    assert 1e-3 < relative(found[1:], expected[1:]) < 0.6
    lives_on(small, tmp_path)


def test_all_padding_as_margin_is_exact() -> None:
    sam = toy()
    small = SkipPadding(photo=True, margin=16)(sam, progress=False)
    torch.testing.assert_close(embed(small), embed(sam), rtol=0, atol=1e-5)


def test_a_larger_margin_errs_less() -> None:
    sam = toy()
    expected = embed(sam)
    change = [
        relative(embed(SkipPadding(photo=True, margin=m)(sam, progress=False)), expected)
        for m in (1, 3, 5, 9)
    ]
    assert change == sorted(change, reverse=True)
    assert change[-1] < 0.5 * change[0]


@pytest.mark.parametrize("margin", [1, 2])
def test_padding_that_is_all_alike_is_stood_for_exactly(margin: int) -> None:
    """Without positions padding cannot be told apart: one token that counts for all is enough."""
    sam: Any = toy(global_attn_indexes=(0, 1, 2, 3))
    sam.image_encoder.pos_embed.data.zero_()
    for of in sam.image_encoder.blocks:
        of.attn.rel_pos_h.data.zero_()
        of.attn.rel_pos_w.data.zero_()
    small = SkipPadding(photo=True, margin=margin)(sam, progress=False)
    torch.testing.assert_close(embed(small), embed(sam), rtol=0, atol=1e-5)


def test_positions_are_those_of_the_whole_map() -> None:
    of, x = block(grid=(12, 12)), tokens(1, 12, 9, 32)
    attn = GlobalAttention(of.attn)
    part = Part(12, torch.ones(12), torch.ones(9))
    with torch.no_grad():
        q = tokens(1, 2, 12, 12, 16)
        full = attn.terms(q, (12, 12), (12, 12))
        rows, columns = attn.terms(q[:, :, :, :9], (12, 12), (12, 9))
        assert torch.equal(rows, full[0][:, :, :, :9])
        torch.testing.assert_close(columns, full[1][:, :, :, :9, :9])
        # segment_anything would stretch the tables to the smaller map.
        stretched = TokenBlock(of, attn)(x)
        assert relative(stretched, of(x)) < 1e-6
        assert relative(TokenBlock(of, attn)(x, part), stretched) > 1e-3


def test_merging_counts_what_keys_stand_for() -> None:
    of, x = block(rel_pos=False), twins(tokens(2, 6, 8, 32))
    part = Part(10, torch.tensor([1.0, 1, 1, 1, 3, 3]), torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 2]))
    plain, merging = (TokenBlock(of, GlobalAttention(of.attn, r)) for r in (0.0, 8 / 48))
    with torch.no_grad():
        assert relative(merging(x, part), plain(x, part)) < 1e-6
        assert relative(plain(x, part), plain(x)) > 1e-3


def test_blocks_see_less() -> None:
    small: Any = SkipPadding(photo=True, margin=1)(toy(), progress=False)
    seen: list[tuple[int, ...]] = []
    last = small.image_encoder.blocks[3]
    last.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    embed(small, batch=3)
    assert seen == [(1, 11, 16, 32), (1, 16, 7, 32), (1, 16, 16, 32)]


def test_a_graph_sees_all_padding() -> None:
    sam: Any = toy()
    image, _, found = graph(SkipPadding(photo=True)(sam, progress=False))
    with torch.no_grad():
        expected = sam.image_encoder(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_blank_image() -> None:
    sam: Any = toy()
    small: Any = SkipPadding(photo=True)(sam, progress=False)
    blank = torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        found, expected = small.image_encoder(blank), sam.image_encoder(blank)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_work_is_counted_for_a_square_photo() -> None:
    sam = toy()
    both, window = (
        sc.evaluate.macs(SkipPadding(photo=photo)(sam)).encoder for photo in (True, False)
    )
    assert both == window


def test_masks_of_the_shipped_tiny(trained: Any) -> None:
    """Photos of 3:4: the masks of objects hardly change, though `tiny` never saw padding."""
    scenes = sc.shapes(8, seed=1_000_007, size=(96, 128))
    small = SkipPadding(photo=True)(trained, progress=False)
    miou = [
        sc.evaluate.accuracy(model, scenes, "box", min_area=200).miou for model in (small, trained)
    ]
    assert miou[0] > miou[1] - 0.02


@pytest.mark.parametrize(
    "chain",
    [
        sc.prune.Heads(ratio=0.5, criterion="random") | SkipPadding() | sc.attention.Fused(),
        SkipPadding(window=False, photo=True) | sc.attention.Fused(),
        MergeTokens() | SkipPadding(photo=True),
        sc.prune.HeadDims(ratio=0.5, criterion="random", round_to=1) | SkipPadding(),
        sc.prune.Channels(ratio=0.5, criterion="random", round_to=8) | SkipPadding(photo=True),
        SkipPadding(photo=True) | sc.quantize.Int8Weights(min_size=0),
        SkipPadding(photo=True) | MergeTokens() | ClusterTokens(),
        HQ() | SkipPadding(),
    ],
    ids=repr,
)
def test_chains(chain: sc.Pipeline, tmp_path: Path) -> None:
    small = chain(toy(), progress=False)
    without = sc.Pipeline([s for s in chain if not isinstance(s, SkipPadding)])
    expected = embed(without(toy(), progress=False))[:1]
    assert relative(embed(small)[:1], expected) < 0.1  # a square photo
    sc.save(small, tmp_path / "small")
    assert torch.equal(embed(sc.load(tmp_path / "small")), embed(small))


def test_order_of_techniques_for_tokens_does_not_matter() -> None:
    steps = [SkipPadding(photo=True), MergeTokens(), ClusterTokens()]
    found = [embed(sc.Pipeline(order)(toy(), progress=False)) for order in (steps, steps[::-1])]
    assert torch.equal(*found)


def test_windows_that_fit_the_map_but_not_its_clusters() -> None:
    """Windows of 4: the map of 16 has whole ones, its 9 clusters have not."""
    skip, cluster = SkipPadding(), ClusterTokens(ratio=0.65)
    one, other = (
        chain(toy(window_size=7), progress=False) for chain in (skip | cluster, cluster | skip)
    )
    for blocks in (one.image_encoder.blocks, other.image_encoder.blocks):
        assert [type(b) for b in blocks] == [TokenBlock, Block] * 2
        assert [b.window_size for b in blocks] == [7, 0, 4, 0]
    assert torch.equal(embed(one), embed(other))


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], technique: Any, sam: Any) -> list[str]:
    with pytest.raises(error) as caught:
        sc.Pipeline([technique], any_order=True)(sam, progress=False)
    return str(caught.value).splitlines()


def test_nothing_to_do() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        SkipPadding(window=False)
    assert str(caught.value).splitlines() == [
        "prune.skip_padding: there is no padding to skip.",
        "  where     window and photo",
        "  got       window=False, photo=False",
        "  expected  one of them True",
        "  try       leave out window=False",
    ]


def test_margin_out_of_range() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        SkipPadding(photo=True, margin=0)
    assert str(caught.value).splitlines() == [
        "prune.skip_padding: margin is out of range.",
        "  where     margin",
        "  got       0",
        "  expected  at least 1",
        "  try       margin=2",
    ]


NOTHING = [
    "prune.skip_padding finds no padding to skip.",
    "  where     image_encoder",
    "  got       padding that is skipped already, or windows that fit the map",
    "  try       leave this step out",
]


def test_windows_that_fit() -> None:
    sam = toy(window_size=4)
    assert message(errors.NoEffectError, SkipPadding(), sam) == NOTHING
    both = SkipPadding(photo=True)(sam, progress=False)
    assert {type(b) for b in both.image_encoder.blocks} == {TokenBlock}


@pytest.mark.parametrize("photo", [True, False])
def test_twice(photo: bool) -> None:
    step = SkipPadding(photo=photo)
    assert message(errors.NoEffectError, step, step(toy(), progress=False)) == NOTHING


def test_after_fused_attention() -> None:
    fused = sc.attention.Fused()(toy(), progress=False)
    lines = message(errors.ModelError, SkipPadding(), fused)
    assert lines[0] == "prune.skip_padding finds no ViT block of segment_anything."


def test_sam_hq_reads_the_tokens() -> None:
    sam = HQ()(toy(), progress=False)
    lines = message(errors.ModelError, SkipPadding(photo=True), sam)
    assert lines[0] == "prune.skip_padding does not know how tokens go through this image encoder."
    assert lines[2] == "  got       HqViT"


@pytest.mark.slow
def test_vit_b() -> None:
    sam = randomise(sc.build("vit_b", image_size=256))
    small = SkipPadding()(sam, progress=False)
    image = tokens(1, 3, 256, 256)
    with torch.inference_mode():
        found, expected = small.image_encoder(image), sam.image_encoder(image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        image[:, :, 192:] = 0
        found = SkipPadding(photo=True)(sam, progress=False).image_encoder(image)
        assert 1e-3 < relative(found, sam.image_encoder(image)) < 0.6
