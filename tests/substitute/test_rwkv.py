"""RWKV's operators: the WKV average against the quadratic formula, and the shift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samcompress.substitute._rwkv import RWKVConfig, SpatialMix, build, shift
from samcompress.substitute._wkv import wkv


def numbers(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quadratic(key: Tensor, value: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """The formula, token by token."""
    place = torch.arange(key.shape[-1])
    apart = (place[:, None] - place).abs() - 1
    exponent = -apart * decay[:, None, None] + key[:, :, None]
    own = key + bonus[:, None]
    exponent = torch.where(apart < 0, own[..., None], exponent)
    return (exponent.softmax(-1) @ value[..., None]).squeeze(-1)


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 600])
@pytest.mark.parametrize("spread", [1, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_equals_the_quadratic_formula(tokens: int, spread: int, sign: int) -> None:
    key, value = spread * numbers(2, 5, tokens), numbers(2, 5, tokens, seed=2)
    # From a decay of 8 over all tokens, as in Vision-RWKV, to one of a quarter at each.
    decay = sign * torch.tensor([8 / tokens, 0.02, 0.1, 0.25, 0.0], dtype=torch.float64)
    bonus = numbers(5, seed=3)
    expected = quadratic(key, value, decay, bonus)
    found = wkv(*(x.float() for x in (key, value, decay, bonus)))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5
    for chunk in (4, 64):
        exact = wkv(key, value, decay, bonus, chunk)
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    key = torch.tensor([[[0.0, 1.0, 2.0]]]).log1p()  # weights 1, 2, 3
    value = torch.tensor([[[10.0, 20.0, 60.0]]])
    found = wkv(key, value, torch.tensor([0.5]).log().neg(), torch.tensor([4.0]).log())
    # A neighbour counts fully, the one after it a half, the token itself four times.
    expected = [
        (4 * 10 + 2 * 20 + 1.5 * 60) / (4 + 2 + 1.5),
        (10 + 8 * 20 + 3 * 60) / (1 + 8 + 3),
        (0.5 * 10 + 2 * 20 + 12 * 60) / (0.5 + 2 + 12),
    ]
    torch.testing.assert_close(found[0, 0], torch.tensor(expected))


@pytest.mark.parametrize("size", [1e3, 1e4, -1e4])
def test_keys_and_decays_of_any_size(size: float) -> None:
    tokens = 200
    key = (size * numbers(1, 4, tokens)).float().requires_grad_()
    value = numbers(1, 4, tokens, seed=2).float().requires_grad_()
    decay = torch.tensor([1e-3, 0.5, 20.0, 1e4], requires_grad=True)
    out = wkv(key, value, decay, torch.zeros(4))
    assert out.isfinite().all()
    assert out.min() >= value.min() - 1e-4
    assert out.max() <= value.max() + 1e-4
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (key, value, decay))


def test_a_great_decay_leaves_the_neighbours() -> None:
    value = numbers(1, 1, 100).float()
    out = wkv(torch.zeros(1, 1, 100), value, torch.tensor([1e4]), torch.zeros(1))
    three = (value[..., :-2] + value[..., 1:-1] + value[..., 2:]) / 3
    torch.testing.assert_close(out[..., 1:-1], three)


def test_the_first_token_depends_on_the_last() -> None:
    key, value = torch.zeros(1, 1, 200), torch.zeros(1, 1, 200)
    value[..., -1] = 1
    out = wkv(key, value, torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(out, torch.full_like(out, 1 / 200))


def test_gradient() -> None:
    inputs = [3 * numbers(1, 2, 11), numbers(1, 2, 11, seed=2), numbers(2), numbers(2, seed=4)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: wkv(*x, chunk=4), inputs)
    long = [numbers(1, 1, 21), numbers(1, 1, 21), 0.1 * numbers(1), numbers(1)]
    long = [x.requires_grad_() for x in long]  # 11 chunks, so that chunks are summed up twice
    assert torch.autograd.gradcheck(lambda *x: wkv(*x, chunk=2), long)


def test_work_is_linear_in_the_tokens() -> None:
    def work(tokens: int) -> int:
        x = torch.empty(1, 8, tokens, device="meta")
        with FlopCounterMode(display=False) as counter:
            wkv(x, x, torch.empty(8, device="meta"), torch.empty(8, device="meta"))
        return counter.get_total_flops()

    assert work(16384) == 4 * work(4096) == 16 * work(1024)


@torch.no_grad()
def test_half_precision_and_autocast() -> None:
    key, value = numbers(1, 4, 130).float(), numbers(1, 4, 130, seed=2).float()
    decay, bonus = torch.full((4,), 0.05), torch.zeros(4)
    expected = wkv(key, value, decay, bonus)
    half = wkv(key.bfloat16(), value.bfloat16(), decay, bonus)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wkv(key, value, decay, bonus), expected)


def test_shift_by_hand() -> None:
    x = torch.zeros(1, 3, 3, 5)
    x[0, 1, 1] = torch.arange(1.0, 6)
    moved = shift(x)
    # To the right, left, down, up; the fifth channel stays.
    for channel, (y, x_) in enumerate([(1, 2), (1, 0), (2, 1), (0, 1), (1, 1)]):
        expected = torch.zeros(3, 3)
        expected[y, x_] = channel + 1
        assert torch.equal(moved[0, :, :, channel], expected)
    assert torch.equal(
        shift(torch.ones(1, 2, 1, 4))[0, :, 0], torch.tensor([[0.0, 0, 0, 1], [0, 0, 1, 0]])
    )


@torch.no_grad()
def test_a_shut_gate_passes_nothing() -> None:
    mix: Any = SpatialMix(8, 0.5)
    mix.mix_gate.fill_(1.0)
    mix.gate.weight.zero_().fill_diagonal_(-1e4)
    assert torch.equal(mix(torch.ones(1, 3, 3, 8)), torch.zeros(1, 3, 3, 8))


def test_first_values() -> None:
    encoder = build(RWKVConfig(width=16, depth=2, channels=(8, 8), blocks=(1, 1)), 32, 8)
    first, second = (block.spatial for block in encoder.blocks)
    assert first.decay[0] == second.decay[0] == -5
    assert first.decay[-1] == second.decay[-1] == 3
    assert (second.decay[1:-1] < first.decay[1:-1]).all()
    assert first.mix_key[0] == 0
    assert 0 < second.mix_key[8] < 1
