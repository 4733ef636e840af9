"""LiteViT's pools."""

from __future__ import annotations

import copy

import torch
from norms import alive
from torch import Tensor, nn

from samcompress.substitute._litevit import CONFIGS, Pools, build


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_pools_by_hand() -> None:
    pools = Pools(2).eval()
    pools.norm.eps = 0.0
    x = torch.zeros(1, 2, 9, 9)
    x[:, :, 4, 4] = 1
    pools.mix.weight.data = torch.tensor([[1.0, 9.0, 0.0, 0.0], [0.0, 0.0, 25.0, 49.0]])[
        ..., None, None
    ]
    first, second = pools(x)[0]
    assert first[4].tolist() == [0.0, 0, 0, 1, 2, 1, 0, 0, 0]
    torch.testing.assert_close(second[4], torch.tensor([0.0, 1, 2, 2, 2, 2, 2, 1, 0]))
    torch.testing.assert_close(second[1], torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 0]))


@torch.no_grad()
def test_merged_pools_are_one_convolution() -> None:
    pools = alive(Pools(3))
    merged = pools.merged()
    assert type(merged) is nn.Conv2d
    assert not merged.training
    for side in (1, 4, 11):  # borders everywhere, and none in the middle
        x = numbers(2, 3, side, side)
        torch.testing.assert_close(merged(x), pools(x), rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(pools).to(torch.bfloat16).requires_grad_(False).merged()
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert not half.weight.requires_grad


def test_attention_is_that_of_segment_anything() -> None:
    """So `attention.fused` and `prune.mlp` find it."""
    encoder = build(CONFIGS["lite"], 64)
    kinds = [type(m).__name__ for m in encoder.modules()]
    assert (kinds.count("Block"), kinds.count("MLPBlock"), kinds.count("Pools")) == (1, 1, 10)
