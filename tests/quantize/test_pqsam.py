"""Inputs clipped, shifted and scaled by groups of channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core.errors import ConfigError
from samcompress.quantize._fake import FakeLinear
from samcompress.quantize._grouping import Tokens, fold, groups, restored, truncation
from samcompress.quantize._quantizers import Affine, Grouped
from samcompress.quantize.pqsam import PQSAM


def channels(n: int = 500) -> torch.Tensor:
    """Four narrow, two shifted, one wide channel."""
    x = torch.randn(n, 7, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.0, 1.0, 40.0])
    return x * scale + torch.tensor([0.0, 0, 0, 0, 30.0, 30.0, 0])


def made(bits: int, x: torch.Tensor) -> Grouped:
    tokens = Tokens("layer", bits, 1, spread=10.0, share=0.2)
    tokens.update(x)
    found = tokens.quantizer()
    assert isinstance(found, Grouped)
    return found


def test_groups_partition_the_channels() -> None:
    x = channels()
    group = groups(x, 0.2)
    assert torch.equal(group, groups(x, 0.2))
    assert sorted(group.unique().tolist()) == list(range(int(group.max()) + 1))
    assert group[6] not in group[:6].tolist()
    assert group[4] not in group[:4].tolist()
    assert len(groups(x[:, :1], 0.2)) == 1


def test_truncation_by_hand() -> None:
    x = torch.arange(101.0)
    assert truncation(x, 2.0).tolist() == [25 - 100, 75 + 100]


def test_groups_serve_uneven_channels_better() -> None:
    x = channels()
    plain = Affine(4).cover(x.min(), x.max())
    grouped = made(4, x)
    assert len(grouped.shift) > 1
    error = (restored(grouped, x) - x).square().mean()
    assert error < 0.7 * (plain(x) - x).square().mean()
    even = x[:, :4]
    alone = Affine(4).cover(even.min(), even.max())
    assert (restored(made(4, even), even) - even).square().mean() <= (
        (alone(even) - even).square().mean() * (1 + 1e-5)
    )


def test_with_many_bits_the_transform_is_the_identity() -> None:
    x = channels()
    assert (restored(made(16, x), x) - x).abs().max() / x.abs().max() < 1e-3


def test_a_folded_layer_is_the_layer() -> None:
    x = channels()
    grouped = made(8, x)
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        true = layer(x)
        fold(layer, grouped)
        found = F.linear(grouped.normal(x), layer.weight, layer.bias)
    assert (found - true).abs().max() / true.abs().max() < 1e-5


def test_the_technique(tiny_sam: nn.Module, tmp_path: Any) -> None:
    data = sc.shapes(2, size=(48, 64))
    step = PQSAM(weight_bits=6, activation_bits=6, images=2, steps=5)
    rounded = step(tiny_sam, data=data)
    state = sc.lineage(rounded)[-1].state
    assert max(state["groups"].values()) > 1
    assert all(after <= before for before, after in state["learned"].values())
    assert any(after < before for before, after in state["learned"].values())
    layers = [m for m in rounded.modules() if isinstance(m, FakeLinear)]
    assert all(isinstance(layer.input, Grouped) for layer in layers)
    for layer in layers:
        codes = layer.weight / layer.along(layer.weight_scale) + layer.along(layer.weight_zero)
        assert (codes - codes.round()).abs().max() < 1e-4
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        true, found = tiny_sam.image_encoder(image), rounded.image_encoder(image)
        sc.save(rounded, tmp_path / "model")
        assert torch.equal(sc.load(tmp_path / "model").image_encoder(image), found)
        again = step(tiny_sam, data=data).image_encoder(image)
    assert torch.equal(again, found)
    assert (found - true).norm() / true.norm() < 0.3


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"share is out of range(.|\n)*0 <= share < 1"):
        PQSAM(share=1.0)
    with pytest.raises(ConfigError, match="steps is out of range"):
        PQSAM(steps=-1)
    with pytest.raises(ConfigError, match="spread is out of range"):
        PQSAM(spread=0.0)
