"""Training through the rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.errors import ConfigError, ModelError
from samcompress.quantize._fake import Rounded
from samcompress.quantize.fake_quant import FakeQuant
from samcompress.quantize.qat import QAT, learning

LOW = FakeQuant(weight_bits=4, activation_bits=4, images=2)


def scenes() -> Any:
    return sc.shapes(4, size=(48, 64))


def test_training_lowers_the_loss_and_ends_on_the_grid(tiny_sam: nn.Module, tmp_path: Any) -> None:
    chain = LOW | QAT(steps=20, batch_size=2, lr=1e-3)
    trained = chain(tiny_sam, data=scenes())
    state = sc.lineage(trained)[-1].state
    assert [run["steps"] for run in state["runs"]] == [16, 4]
    assert state["runs"][1]["loss_after"] < state["runs"][0]["loss_before"]
    fresh = LOW(tiny_sam, data=scenes())
    assert trained.state_dict().keys() == fresh.state_dict().keys()
    moved = stepped = 0
    for name, layer in trained.named_modules():
        if not isinstance(layer, Rounded):
            continue
        codes = layer.weight / layer.along(layer.weight_scale) + layer.along(layer.weight_zero)
        assert (codes - codes.round()).abs().max() < 1e-4, name
        other: Any = fresh.get_submodule(name)
        assert torch.equal(layer.weight_scale, other.weight_scale)
        moved += int((layer.weight != other.weight).sum())
        inside: Any = layer.input
        stepped += int(inside.scale != other.input.scale)
    assert moved
    assert stepped
    sc.save(trained, tmp_path / "model")
    again = sc.load(tmp_path / "model")
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.image_encoder(image), trained.image_encoder(image))
        assert torch.equal(again.image_encoder(image), again.image_encoder(image))


def test_gradients_reach_weights_and_steps(tiny_sam: nn.Module) -> None:
    rounded = LOW(tiny_sam, data=scenes())
    layer: Any = rounded.get_submodule("image_encoder.blocks.0.mlp.lin1")
    with learning(rounded):
        names = dict(rounded.named_parameters())
        assert "image_encoder.blocks.0.mlp.lin1.input.scale" in names
        rounded.image_encoder(torch.zeros(1, 3, 64, 64)).square().mean().backward()
        assert layer.weight.grad.abs().max() > 0
        assert layer.input.scale.grad.abs() > 0
    assert "image_encoder.blocks.0.mlp.lin1.input.scale" in dict(rounded.named_buffers())
    assert not layer.input.scale.requires_grad


def test_by_masks(tiny_sam: nn.Module) -> None:
    chain = LOW | QAT(steps=2, settle=0.0, batch_size=2, target="masks")
    trained = chain(tiny_sam, data=scenes())
    runs = sc.lineage(trained)[-1].state["runs"]
    assert [run["steps"] for run in runs] == [2]


def test_errors(tiny_sam: nn.Module) -> None:
    with pytest.raises(ModelError, match="not quantized"):
        QAT(steps=1)(tiny_sam, data=scenes())
    with pytest.raises(ConfigError, match="settle is out of range"):
        QAT(settle=1.5)
    with pytest.raises(ConfigError, match="batch_size is out of range"):
        QAT(batch_size=0)
    with pytest.raises(ConfigError, match="steps is out of range"):
        QAT(steps=0)
