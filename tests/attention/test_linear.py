"""ReLU linear attention."""

from __future__ import annotations

import pytest
import torch
from approximations import block, tokens
from conftest import random_sam

import samcompress as sc
from samcompress.attention.linear import Linear, LinearAttention, linear_attention


def test_equals_its_quadratic_form() -> None:
    q, k, v = (tokens(2, 3, 20, 8, seed=i) for i in range(3))
    q, k = q.relu(), k.relu()
    weights = q.double() @ k.double().mT
    expected = (weights / weights.sum(-1, keepdim=True)) @ v.double()
    torch.testing.assert_close(linear_attention(q, k, v).double(), expected, rtol=0, atol=1e-6)


def test_by_hand() -> None:
    q = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    k = torch.tensor([[[[3.0, 5.0], [1.0, 0.0]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    assert linear_attention(q, k, v).flatten().tolist() == [5.0, 0.0]  # (3·4 + 1·8) / 4; none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_at_all_is_zero(dtype: torch.dtype) -> None:
    q, v = torch.zeros(1, 1, 5, 4, dtype=dtype), torch.ones(1, 1, 5, 4, dtype=dtype)
    for k in (q, v):
        assert torch.equal(linear_attention(q, k, v), q)


def test_sums_that_half_precision_cannot_hold() -> None:
    q, k = torch.full((1, 1, 4096, 4), 30.0), torch.full((1, 1, 4096, 4), 30.0)
    v = tokens(1, 1, 4096, 4)
    found = linear_attention(q.half(), k.half(), v.half())
    assert found.isfinite().all()
    torch.testing.assert_close(
        found.float(), v.mean(2, keepdim=True).expand_as(v), rtol=0, atol=1e-3
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v), linear_attention(q, k, v))
        assert linear_attention(q, k, v).dtype == torch.float32


def test_scales_change_nothing_at_the_start() -> None:
    attn = block(grid=(9, 13)).attn
    x = tokens(2, 9, 13, 32)
    with torch.no_grad():
        plain, several = LinearAttention(attn, ())(x), LinearAttention(attn, (3, 5))(x)
        assert torch.equal(plain, several)
        layer = LinearAttention(attn, (5,))
        torch.testing.assert_close(layer.gather[0](layer.qkv(x)), layer.qkv(x), rtol=0, atol=0)


def test_order_of_tokens_does_not_matter() -> None:
    attn = LinearAttention(block(grid=(6, 6)).attn, ())
    x = tokens(1, 6, 6, 32)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = attn(x.flatten(1, 2)[:, order].unflatten(1, (6, 6)))
        expected = attn(x).flatten(1, 2)[:, order].unflatten(1, (6, 6))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_scales_learn() -> None:
    attn = LinearAttention(block().attn, (3,))
    optimiser = torch.optim.SGD(attn.parameters(), lr=0.1)
    x, near = tokens(1, 12, 12, 32), attn.gather[0].near.weight.detach().clone()
    for _ in range(2):
        optimiser.zero_grad()
        attn(x).square().sum().mul(1e-3).backward()
        optimiser.step()
    assert attn.proj_scales[0].weight.any()
    assert not torch.equal(attn.gather[0].near.weight, near)


def test_counts_the_work() -> None:
    sam = sc.build("tiny")
    before = sc.evaluate.macs(sam).encoder
    n, c, d = 256, 64, 16
    softmax = 2 * n * n * c + 2 * n * 16 * c
    core = 2 * n * d * c + n * c  # and the sums of weights
    for scales, more in (((), 0), ((5,), 25 * 3 * c * n + 3 * c * d * n + core + c * c * n)):
        found = sc.evaluate.macs(Linear(scales=scales)(sam, progress=False)).encoder
        assert found == before - 2 * softmax + 2 * (core + more)


def test_work_grows_with_the_number_of_tokens() -> None:
    found = []
    for size in (128, 256):
        sam = sc.build("tiny", image_size=size)
        found.append(sc.evaluate.macs(Linear(blocks="all")(sam, progress=False)).encoder)
    assert found[1] == 4 * found[0]


def test_projections_of_tables_are_dropped() -> None:
    sam = random_sam()
    small = Linear()(sam, progress=False)
    state = sc.lineage(small)[-1].state
    assert state["removed"] == [f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"]
    assert state["added"] == [
        "image_encoder.blocks.1.attn.gather.0.inside.weight",
        "image_encoder.blocks.1.attn.gather.0.near.weight",
        "image_encoder.blocks.1.attn.proj_scales.0.weight",
    ]


def test_errors() -> None:
    for scales, text, expected in (
        ((4,), "scales is out of range", "odd numbers of 3 or more, e.g. (5,)"),
        ((1,), "scales is out of range", "odd numbers of 3 or more, e.g. (5,)"),
        ((3, "five"), "scales has a value it cannot take", "a whole number"),
    ):
        with pytest.raises(sc.errors.ConfigError, match=text) as caught:
            Linear(scales=scales)
        assert f"expected  {expected}" in str(caught.value)
