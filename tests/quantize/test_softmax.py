"""Levels for attention weights and activation functions."""

from __future__ import annotations

import pytest
import torch

from samcompress.quantize._quantizers import Affine, Hybrid, Log, Twin, from_spec
from samcompress.quantize._softmax import LOG_SHARES, SHARES, HybridSearch, MapSearch


def maps(rows: int, keys: int, sharp: float = 1.0, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(2, rows, keys, generator=draw)).softmax(-1)


def values(keys: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, keys, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("rows", "keys", "sharp"), [(64, 196, 1.0), (7, 7, 2.0), (40, 7, 1.0)])
def test_the_choice_is_never_worse_than_even_or_log_alone(
    bits: int, rows: int, keys: int, sharp: float
) -> None:
    both, log, even = (
        MapSearch(bits),
        MapSearch(bits, even=False),
        MapSearch(bits, log=False),
    )
    for seed in range(2):
        for search in (both, log, even):
            search.update(maps(rows, keys, sharp, seed), values(keys))
    least = float(both.losses.min())
    assert least <= float(log.losses.min())
    assert least <= float(even.losses.min())
    # Finer logs at the same bounds: never worse than the logarithm to base 2 alone.
    assert float(log.losses.min()) <= float(log.losses[log.kinds.index(1)].min())
    chosen = both.quantizer()
    row = both.kinds.index(chosen.tau if isinstance(chosen, Log) else None)
    assert float(both.losses[row].min()) == least


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("keys", [196, 1024])
def test_log_levels_beat_even_ones_on_long_rows_of_few_bits(bits: int, keys: int) -> None:
    search = MapSearch(bits)
    search.update(maps(16, keys, 2.0), values(keys))
    assert isinstance(search.quantizer(), Log)


@pytest.mark.parametrize("tau", [1, 2, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_log_levels(bits: int, tau: int) -> None:
    log = Log(bits, tau)
    log.scale = torch.tensor(0.7)
    last = (1 << bits) - 1
    least = max(0.7 * 2.0 ** (-last / tau), 1e-19)
    x = torch.logspace(
        torch.log10(torch.tensor(least)).item(), torch.log10(torch.tensor(0.7)).item(), 4000
    ).clamp(least, 0.7)
    assert ((log(x) / x - 1).abs() <= 2 ** (1 / (2 * tau)) - 1 + 1e-4).all()
    assert float(log(torch.tensor(0.0))) == 0
    assert log(torch.tensor([0.8, 5.0])).tolist() == pytest.approx([0.7, 0.7])
    dense = log(torch.linspace(0, 1, 5000))
    assert (dense.diff() >= 0).all()
    # A shift and a table of tau entries decode the same.
    codes = torch.arange(min(last, 60) + 1)
    table = 2.0 ** (-torch.arange(tau) / tau)
    decoded = 0.7 * 2.0 ** (-(codes // tau)) * table[codes % tau]
    assert torch.allclose(log(decoded), decoded, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("part", LOG_SHARES)
def test_hybrid_levels(bits: int, share: float, part: int) -> None:
    low, high = torch.tensor(-0.17), torch.tensor(6.0)
    hybrid = Hybrid(bits, max(1, (1 << bits) // part)).cover(low, high, share)
    x = torch.linspace(-0.17, 6.0, 20_001)
    found = hybrid(x)
    assert (found.diff() >= -1e-6).all()
    assert float(hybrid(high)) == pytest.approx(6.0, abs=1e-4)
    above = x + 0.17 > hybrid.split
    assert (found - x)[above].abs().max() <= hybrid.scale / 2 + 1e-5
    levels = hybrid.log_levels
    reached = ~above & (x + 0.17 >= hybrid.split * 2.0 ** -(levels - 1))
    relative = ((found - x) / (x + 0.17))[reached].abs()
    assert relative.max() <= 2**0.5 - 1 + 1e-4
    assert len(found.unique()) <= 1 << bits


def test_hybrid_search_takes_the_least_error() -> None:
    x = torch.nn.functional.gelu(
        2 * torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    )
    search = HybridSearch("lin2", 4)
    search.update(x)
    chosen = search.quantizer()
    low, high = x.min(), x.max()
    errors = [
        float((Hybrid(4, 16 // part).cover(low, high, share)(x) - x).square().mean())
        for share in SHARES
        for part in LOG_SHARES
    ]
    assert float((chosen(x) - x).square().mean()) <= min(errors) * 1.02


def test_twin_uses_one_of_two_scales() -> None:
    softmax = Twin(8).cover(torch.tensor(0.05))
    x = torch.linspace(0, 1, 4001)
    found = softmax(x)
    fine = x <= 0.05
    assert (found - x)[fine].abs().max() <= 0.05 / 127 / 2 + 1e-6
    assert (found - x)[~fine].abs().max() <= 1 / 127 / 2 + 1e-6
    gelu = Twin(8, gelu=True).cover(torch.tensor(3.0))
    y = torch.nn.functional.gelu(torch.linspace(-8, 3, 4001))
    negative = y < 0
    assert (gelu(y) - y)[negative].abs().max() <= 0.16997 / 128 / 2 + 1e-6
    assert (gelu(y) - y)[~negative].abs().max() <= 3 / 127 / 2 + 1e-6


@pytest.mark.parametrize("made", [Affine(6, True), Log(4, 2), Hybrid(5, 4), Twin(8, True)])
def test_specs_make_the_same_again(made: torch.nn.Module) -> None:
    again = from_spec(made.spec())
    assert type(again) is type(made)
    assert again.spec() == made.spec()
    again.load_state_dict(made.state_dict())


def test_steps_stay_float32() -> None:
    made = Affine(8).cover(torch.tensor(-1.3), torch.tensor(2.9))
    scale = made.scale.clone()
    half = made.bfloat16()
    assert half.scale.dtype == torch.float32
    assert torch.equal(half.scale, scale)
    assert half(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
