"""RWKV's bidirectional average."""

from __future__ import annotations

import pytest
import torch
from approximations import block, reach, tokens
from torch import Tensor

import samcompress as sc
from samcompress.attention.rwkv import RWKV, RWKVAttention, shifted, wkv


def plain(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """The formula, with every pair of tokens."""
    key, value, decay, bonus = (x.double() for x in (key, value, decay, bonus))
    place = torch.arange(key.shape[-1])
    apart = (place[:, None] - place).abs()
    exponent = torch.where(apart > 0, -(apart - 1) * decay[:, None, None], bonus[:, None, None])
    weights = (key[:, :, None] + exponent).softmax(-1)
    return (weights @ value[..., None])[..., 0]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 37, 144])
@pytest.mark.parametrize("speed", [-0.02, 0.0, 0.05, 3.0])
def test_equals_every_pair(count: int, speed: float) -> None:
    key, value = tokens(2, 5, count, seed=0), tokens(2, 5, count, seed=1)
    decay, bonus = speed * torch.linspace(0.5, 1, 5), torch.linspace(-1, 1, 5)
    found = wkv(key, value, decay, bonus).double()
    torch.testing.assert_close(found, plain(key, value, decay, bonus), rtol=0, atol=2e-6)


def test_strong_decay_leaves_neighbours() -> None:
    key, value = torch.zeros(1, 1, 30), tokens(1, 1, 30)
    found = wkv(key, value, torch.tensor([40.0]), torch.tensor([-60.0]))[0, 0]
    expected = (value[0, 0, :-2] + value[0, 0, 2:]) / 2
    torch.testing.assert_close(found[1:-1], expected, rtol=0, atol=1e-5)


def test_large_keys() -> None:
    key, value = 1e4 + 20 * tokens(1, 3, 50), tokens(1, 3, 50, seed=1)
    decay, bonus = torch.full((3,), 0.01), torch.zeros(3)
    found = wkv(key, value, decay, bonus).double()
    torch.testing.assert_close(found, plain(key, value, decay, bonus), rtol=0, atol=1e-4)
    assert wkv(100 * tokens(1, 3, 50), value, decay, bonus).isfinite().all()


def test_half_precision_is_summed_in_full() -> None:
    key, value = tokens(1, 4, 400), tokens(1, 4, 400, seed=1)
    decay, bonus = torch.full((4,), 0.001), torch.zeros(4)
    found = wkv(key.bfloat16(), value.bfloat16(), decay, bonus)
    assert found.dtype == torch.bfloat16
    exact = wkv(key.bfloat16().float(), value.bfloat16().float(), decay, bonus)
    assert torch.equal(found, exact.bfloat16())


def test_every_token_depends_on_every_other() -> None:
    small = RWKVAttention(block(grid=(5, 7)).attn)
    assert reach(small, 5, 7).all()


def test_a_closed_gate_gives_the_bias() -> None:
    small = RWKVAttention(block(grid=(5, 7)).attn)
    with torch.no_grad():
        small.open.fill_(-1e4)
        found = small(tokens(1, 5, 7, 32))
    torch.testing.assert_close(found, small.proj.bias.expand_as(found), rtol=0, atol=0)


def test_shift_by_hand() -> None:
    x = torch.arange(1, 10.0).reshape(1, 3, 3, 1).expand(1, 3, 3, 4)
    found = shifted(x)[0]
    assert found[..., 0].tolist() == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]  # to the right
    assert found[..., 1].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]  # to the left
    assert found[..., 2].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]  # down
    assert found[..., 3].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]  # up


def test_starts_without_shift() -> None:
    small = RWKVAttention(block(grid=(5, 7)).attn)
    x = tokens(1, 5, 7, 32)
    with torch.no_grad():
        gate, key, value = small.qkv(x).flatten(1, 2).mT.chunk(3, 1)
        mixed = plain(key, value, small.decay / 35, small.bonus / 35).float()
        expected = small.proj(((gate + 4).sigmoid() * mixed).mT.unflatten(1, (5, 7)))
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5)


def test_first_values() -> None:
    small = RWKVAttention(block().attn)
    assert small.decay[0] == -5
    assert float(small.decay[-1].detach()) == pytest.approx(3)
    assert small.own.eq(1).all()


def test_work_grows_slower_than_attention() -> None:
    few, many = (sc.build("tiny", image_size=size) for size in (128, 512))
    core = []
    for sam in (few, many):
        small = sc.evaluate.macs(RWKV(blocks="all")(sam, progress=False))
        core.append(small.encoder - small.encoder_no_attention)
    assert core[1] < 80 * core[0]  # 16 times the tokens in pieces 4 times as long; softmax: 256


def test_blocks_is_checked() -> None:
    with pytest.raises(sc.errors.ConfigError, match="blocks has a value it cannot take"):
        RWKV(blocks="some")
