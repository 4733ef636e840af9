"""Folding of batch norms: which pairs are found, and that the function stays the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from norms import alive
from torch import Tensor, nn
from torch.nn import functional as F

from samcompress.substitute._fold import Pair, batch_norm_pairs, fold, fold_batch_norms


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def folded(module: nn.Module, x: Tensor) -> tuple[nn.Module, list[Pair]]:
    """The module after folding, having checked that it computes the same."""
    pairs = batch_norm_pairs(module, x)
    with torch.no_grad():
        before = module(x)
        after = copy.deepcopy(module)
        fold_batch_norms(after, pairs)
        torch.testing.assert_close(after(x), before, rtol=1e-5, atol=1e-5)
    return after, pairs


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(5, 6), nn.BatchNorm1d(6), (4, 5)),
        (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False), (4, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 7)),
        (nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.BatchNorm2d(6, eps=0.1), (2, 6, 5, 7)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 5, 7)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6), (2, 4, 5, 7)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 7)),
        (nn.ConvTranspose1d(4, 6, 2, groups=2), nn.BatchNorm1d(6), (2, 4, 5)),
        (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 3, 4, 5)),
        (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), (2, 4, 5, 7)),
    ],
    ids=str,
)
def test_each_kind_of_layer(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    module = alive(nn.Sequential(layer, norm))
    names = set(module.state_dict())
    after, pairs = folded(module, numbers(*shape))
    assert pairs == [("0", "1")]
    assert type(after[1]) is nn.Identity
    assert not after[1].training
    assert set(after.state_dict()) == {"0.weight", "0.bias"}
    assert set(module.state_dict()) == names  # finding does not touch the module


def test_by_hand() -> None:
    layer, norm = nn.Linear(1, 2), nn.BatchNorm1d(2, eps=0.0)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 4.0])
    norm.running_mean, norm.running_var = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.25])
    norm.weight.data, norm.bias.data = torch.tensor([2.0, 3.0]), torch.tensor([0.5, -0.5])
    fold(layer, norm)
    # 2 (x + 3 - 1) / 2 + 0.5 and 3 (2x + 4 - 2) / 0.5 - 0.5
    assert layer.weight.tolist() == [[1.0], [12.0]]
    assert layer.bias.tolist() == [2.5, 11.5]


class Net(nn.Module):
    """Norms that may and may not be folded, in an order that says nothing of the data's way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.way == "elsewhere too":
            return self.norm(y) + y
        if self.way == "two norms":
            return self.norm(y) + self.other(y)
        if self.way == "given out":
            return torch.cat([self.norm(y), y])
        if self.way == "returned":
            return [self.norm(y), y]
        if self.way == "function between":
            return self.norm(F.relu(y))
        if self.way == "in place between":
            return self.norm(F.relu(y, inplace=True))
        if self.way == "layer twice":
            return self.norm(y) + self.conv(2 * x)
        if self.way == "norm twice":
            return self.norm(y) + self.norm(x)
        if self.way == "norm first":
            return self.conv(self.norm(x))
        if self.way == "chain":
            return self.other(self.norm(y))
        return self.norm(y)


@pytest.mark.parametrize(
    "way",
    [
        "elsewhere too", "two norms", "given out", "returned", "function between",
        "in place between", "layer twice", "norm twice", "norm first",
    ],
)  # fmt: skip
def test_what_is_left_alone(way: str) -> None:
    assert batch_norm_pairs(alive(Net(way)), numbers(2, 4, 3, 3)) == []


def test_found_by_the_way_of_the_data() -> None:
    net = alive(Net("plain"))
    after, pairs = folded(net, numbers(2, 4, 3, 3))
    assert pairs == [Pair(layer="conv", norm="norm")]
    assert isinstance(after.other, nn.BatchNorm2d)


def test_a_chain_of_norms_takes_two_rounds() -> None:
    once, _ = folded(alive(Net("chain")), numbers(2, 4, 3, 3))
    twice, pairs = folded(once, numbers(2, 4, 3, 3))
    assert pairs == [("conv", "other")]
    assert isinstance(twice.other, nn.Identity)


def test_channels_elsewhere() -> None:
    # A linear layer's channels are in the last dimension, those of the norm behind it in the second.
    module = alive(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    assert batch_norm_pairs(module, numbers(2, 6, 5)) == []


def test_norms_without_statistics_and_layers_of_another_kind() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = (self.weight - self.weight.mean()) / self.weight.std()
            return F.conv2d(x, weight, self.bias)

    for layer, norm in (
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)),
        (Standardised(4, 4, 1), nn.BatchNorm2d(4)),
        (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
    ):
        assert batch_norm_pairs(nn.Sequential(layer, norm).eval(), numbers(1, 4, 3, 3)) == []


def test_a_subclass_that_adds_something_unknown() -> None:
    class Louder(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = alive(nn.Sequential(nn.Conv2d(4, 4, 1), Louder(4)))
    assert batch_norm_pairs(module, numbers(1, 4, 3, 3)) == []


def test_the_activation_in_a_norm_of_timm_stays() -> None:
    layers = pytest.importorskip("timm.layers")
    module = alive(
        nn.Sequential(
            layers.ConvNormAct(3, 8, 3, act_layer=nn.SiLU),
            layers.ConvNormAct(8, 4, 1, apply_act=False),
        )
    )
    after, pairs = folded(module, numbers(2, 3, 6, 6))
    assert pairs == [("0.conv", "0.bn"), ("1.conv", "1.bn")]
    assert isinstance(after[0].bn[1], nn.SiLU)


def test_modes_types_and_flags_are_kept() -> None:
    module = alive(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)))
    module = module.to(torch.bfloat16).train()
    module[0].weight.requires_grad_(False)
    pairs = batch_norm_pairs(module, numbers(1, 4, 3, 3).bfloat16())
    fold_batch_norms(module, pairs)
    assert pairs == [("0", "1")]
    assert all(m.training for m in module.modules())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())


def test_a_weight_that_another_layer_shares() -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    module = alive(nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second))
    after, _ = folded(module, numbers(2, 4, 3, 3))
    assert after[3].weight is not after[0].weight


def test_the_same_pairs_on_other_weights() -> None:
    x = numbers(2, 4, 3, 3)
    first, second = alive(Net("plain")), alive(Net("plain"), seed=2)
    pairs = batch_norm_pairs(first, x)
    fold_batch_norms(first, pairs)
    fold_batch_norms(second, [Pair(*names) for names in [list(pair) for pair in pairs]])
    second.load_state_dict(first.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
