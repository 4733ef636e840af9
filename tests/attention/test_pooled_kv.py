"""Fewer keys and values by pooling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from approximations import block, places, tokens
from segment_anything.modeling.transformer import Attention as TokenAttention

import samcompress as sc
from samcompress.attention.pooled_kv import (
    Cells,
    PooledAttention,
    PooledKV,
    PooledReader,
    averaged,
)
from samcompress.core.predict import preprocess

GRIDS = [(12, 12), (8, 12), (9, 13), (7, 5)]
any_grid = pytest.mark.parametrize("grid", GRIDS)


def cells(height: int, width: int, size: int) -> torch.Tensor:
    """(cells, N) how each is averaged."""
    y, x, _, _ = places(height, width)
    number = (y // size * (-(-width // size)) + x // size).flatten()
    member = number == torch.arange(int(number.max()) + 1)[:, None]
    return member / member.sum(1, keepdim=True)


def plainly(attn: Any, x: torch.Tensor, size: int) -> torch.Tensor:
    """Every token's key, value and position terms replaced by the mean of its cell's."""
    _, height, width, _ = x.shape
    mean = cells(height, width, size)
    back = (mean > 0).float().T @ mean  # (N, N)
    qkv = attn.qkv(x).flatten(1, 2).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    scores = q @ (back @ k).mT * q.shape[-1] ** -0.5
    if attn.use_rel_pos:
        qy, qx, ky, kx = places(height, width)
        bias = torch.einsum("bnqd,qkd->bnqk", q, attn.rel_pos_h[qy - ky + height - 1])
        bias = bias + torch.einsum("bnqd,qkd->bnqk", q, attn.rel_pos_w[qx - kx + width - 1])
        scores = scores + bias @ back.T
    out = scores.softmax(-1) @ (back @ v)
    return attn.proj(out.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


@any_grid
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rel_pos", [True, False])
@pytest.mark.parametrize("pool", ["avg", "conv"])
def test_equals_tokens_replaced_by_means(
    grid: tuple[int, int], size: int, rel_pos: bool, pool: Any
) -> None:
    attn = block(grid=grid, rel_pos=rel_pos).attn
    x = tokens(2, *grid, 32)
    with torch.no_grad():
        found = PooledAttention(attn, 0, size, pool)(x)
        torch.testing.assert_close(found, plainly(attn, x, size), rtol=0, atol=1e-5)
        if size == 1:
            torch.testing.assert_close(found, attn(x), rtol=0, atol=1e-5)


@any_grid
@pytest.mark.parametrize("pool", ["avg", "max", "conv"])
def test_of_equal_tokens_nothing_is_lost(grid: tuple[int, int], pool: Any) -> None:
    attn = block(grid=grid, rel_pos=False).attn
    small = tokens(1, -(-grid[0] // 3), -(-grid[1] // 3), 32)
    x = small.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : grid[0], : grid[1]]
    with torch.no_grad():
        found = PooledAttention(attn, 0, 3, pool)(x)
        torch.testing.assert_close(found, attn(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_order_inside_a_cell_does_not_matter(pool: Any) -> None:
    attn = PooledAttention(block(rel_pos=False).attn, 0, 2, pool)
    qkv = attn.qkv(tokens(1, 12, 12, 32)).detach()
    turned = qkv.clone()
    turned[:, ::2, ::2], turned[:, 1::2, 1::2] = qkv[:, 1::2, 1::2], qkv[:, ::2, ::2]
    turned[..., :32] = qkv[..., :32]  # the queries stay
    with torch.no_grad():
        torch.testing.assert_close(attn.mix(turned), attn.mix(qkv), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["avg", "max", "conv"])
def test_cells_by_hand(pool: Any) -> None:
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, -9]])[None, ..., None]
    found = Cells(1, 2, pool, like=torch.nn.Linear(1, 1))(x)[0, ..., 0].tolist()
    assert found == ([[5, 6], [8, -9]] if pool == "max" else [[3, 4.5], [7.5, -9]])


def test_cells_larger_than_the_axis() -> None:
    assert averaged(torch.tensor([1.0, 3.0]), 0, 5).tolist() == [2]
    attn = block(grid=(3, 4)).attn
    x = tokens(1, 3, 4, 32)
    with torch.no_grad():
        found = PooledAttention(attn, 0, 5)(x)
        torch.testing.assert_close(found, plainly(attn, x, 5), rtol=0, atol=1e-5)


def test_inside_windows() -> None:
    eager = block(window=5, grid=(9, 13))
    x = tokens(2, 9, 13, 32)
    small = PooledAttention(eager.attn, 5, 1)
    eager.norm1, eager.mlp, eager.norm2 = (torch.nn.Identity() for _ in range(3))
    with torch.no_grad():
        torch.testing.assert_close(small(x), eager(x) / 2 - x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
@pytest.mark.parametrize("pool", ["avg", "conv"])
def test_decoder(grid: tuple[int, int], pool: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attn = TokenAttention(32, 4, downsample_rate=2)
    q, k, v = tokens(3, 6, 32), *(tokens(3, grid[0] * grid[1], 32, seed=i) for i in (5, 6))
    with torch.no_grad():
        found = PooledReader(attn, grid, 1, pool)(q, k, v)
        torch.testing.assert_close(found, attn(q, k, v), rtol=0, atol=1e-5)
        mean = cells(*grid, 3)
        back = (mean > 0).float().T @ mean
        found = PooledReader(attn, grid, 3, pool)(q, k, v)
        torch.testing.assert_close(found, attn(q, back @ k, back @ v), rtol=0, atol=1e-5)


def test_where_reaches_the_decoder() -> None:
    sam = sc.build("tiny")
    small: Any = PooledKV(where="mask_decoder.**")(sam, progress=False)
    state = sc.lineage(small)[-1].state
    assert state["blocks"] == []
    assert state["decoder"] == [
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image",
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image",
        "mask_decoder.transformer.final_attn_token_to_image",
    ]
    assert small.state_dict().keys() == sam.state_dict().keys()
    image = sc.shapes(1, seed=3)[0].image
    prompts = [[sc.Prompt(box=[5, 8, 60, 50]), sc.Prompt(points=[[20, 30]])]]
    found, expected = (sc.predict(m, [image], prompts)[0].logits for m in (small, sam))
    assert found.isfinite().all()
    assert not torch.equal(found, expected)
    with pytest.raises(sc.errors.NoEffectError):
        PooledKV(where="mask_decoder.**")(small)


def test_counts_the_work() -> None:
    sam = sc.build("tiny")
    before = sc.evaluate.macs(sam)
    both = PooledKV(where=("image_encoder.**", "mask_decoder.**"))
    small = sc.evaluate.macs(both(sam, progress=False))
    n, c = 256, 64
    assert before.encoder - small.encoder == 2 * (2 * n * c * n * 3 // 4 + 2 * n * c * 16 // 2)
    gone, inside, asking = n * 3 // 4, c // 2, 7  # 5 tokens of output and 2 corners of a box
    assert before.decoder_per_prompt - small.decoder_per_prompt == 3 * (
        2 * gone * c * inside + 2 * asking * gone * inside
    )


def test_trained_model_hardly_changes(trained: Any) -> None:
    images = torch.stack([preprocess(trained, s.image)[0] for s in sc.shapes(2, seed=9)])
    small: Any = PooledKV()(trained, progress=False)
    with torch.no_grad():
        found, expected = small.image_encoder(images), trained.image_encoder(images)
    assert (found - expected).norm() / expected.norm() < 0.1


def test_copies_do_not_share_weights() -> None:
    small = PooledKV(pool="conv")(sc.build("tiny"), progress=False)
    twin: Any = copy.deepcopy(small)
    twin.image_encoder.blocks[1].attn.pool.weight.data.zero_()
    assert small.image_encoder.blocks[1].attn.pool.weight.detach().eq(0.25).all()


def test_errors() -> None:
    with pytest.raises(sc.errors.ConfigError) as caught:
        PooledKV(size=1)
    assert str(caught.value) == (
        "attention.pooled_kv: size is out of range.\n  got       1\n  expected  >= 2"
    )
