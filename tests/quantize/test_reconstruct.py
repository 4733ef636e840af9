"""Rounding learned unit by unit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.errors import ConfigError, ModelError
from samcompress.quantize._adaround import Rounding, reconstruction
from samcompress.quantize._fake import FakeLinear, Rounded
from samcompress.quantize._observe import weight_range
from samcompress.quantize._uniform import Grid
from samcompress.quantize._units import units
from samcompress.quantize.fake_quant import FakeQuant
from samcompress.quantize.pqsam import PQSAM
from samcompress.quantize.reconstruct import Reconstruct

LOW = FakeQuant(weight_bits=4, activation_bits=4, images=2)
MEND = Reconstruct(steps=12, images=1, lr=0.05)


def scenes() -> Any:
    return sc.shapes(2, size=(48, 64))


def rounded_layer(search: bool = False) -> tuple[FakeLinear, torch.Tensor]:
    layer = nn.Linear(40, 8)
    weight = layer.weight.detach().clone()
    fake = FakeLinear(layer, Grid(3))
    fake.cover(*weight_range(weight, fake.grid, search=search))
    return fake, weight


def test_rounding_starts_at_the_weight_and_ends_at_the_nearest() -> None:
    layer, weight = rounded_layer()
    rounding = Rounding(layer, weight)
    scale = layer.along(layer.weight_scale)
    codes = (weight / scale).floor() + layer.along(layer.weight_zero)
    inside = (codes >= 0) & (codes < 7)
    assert inside.float().mean() > 0.7
    assert ((rounding.soft() - weight).abs() / scale)[inside].max() < 1e-5
    # At exactly half a step the nearest is even, and the variable goes up: none here.
    assert torch.allclose(rounding.hard(), layer.weight, atol=1e-6)


def test_loss_does_not_depend_on_the_layout() -> None:
    draw = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(2, 5, 6, 7, generator=draw) for _ in range(2))
    last = reconstruction(found.permute(0, 2, 3, 1), wanted.permute(0, 2, 3, 1), -1)
    assert float(reconstruction(found, wanted, 1)) == pytest.approx(float(last), rel=1e-6)
    by_hand = (found - wanted).square().sum() / (2 * 6 * 7)
    assert float(last) == pytest.approx(float(by_hand), rel=1e-5)


def test_units_in_order_of_execution(tiny_sam: nn.Module) -> None:
    from samcompress.core.data import as_dataset
    from samcompress.core.transform import Context

    rounded = LOW(tiny_sam, data=scenes())
    names = units(rounded, Context(step="test", dataset=as_dataset(scenes())), "mixed")
    layer = "mask_decoder.transformer.layers"
    inside = ("self_attn", "cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
    assert names == [
        *(f"image_encoder.blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")),
        "image_encoder.neck",
        *(f"{layer}.{i}.{part}" for i in (0, 1) for part in inside),
        "mask_decoder.transformer.final_attn_token_to_image",
    ]


def test_every_weight_on_its_grid_and_no_unit_worse(tiny_sam: nn.Module) -> None:
    rounded = LOW(tiny_sam, data=scenes())
    mended = MEND(rounded, data=scenes(), teacher=tiny_sam)
    errors = sc.lineage(mended)[-1].state["units"]
    assert len(errors) == 14
    assert all(after <= before for before, after in errors.values())
    assert sum(after < before for before, after in errors.values()) > 7
    moved = 0
    for name, layer in mended.named_modules():
        if not isinstance(layer, Rounded):
            continue
        scale, zero = layer.along(layer.weight_scale), layer.along(layer.weight_zero)
        codes = layer.weight / scale + zero
        assert (codes - codes.round()).abs().max() < 1e-4, name
        true: Any = tiny_sam.get_submodule(name)
        low, high = layer.grid.codes
        clipped = ((true.weight / scale + zero).clamp(low, high) - zero) * scale
        assert ((layer.weight - clipped).abs() <= scale * (1 + 1e-4)).all(), name
        other: Any = rounded.get_submodule(name)
        moved += int((layer.weight != other.weight).sum())
    assert moved > 0


def test_nothing_is_dropped_afterwards(tiny_sam: nn.Module) -> None:
    mended = (LOW | MEND)(tiny_sam, data=scenes())
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mended.train()
    with torch.no_grad():
        assert torch.equal(mended.image_encoder(image), mended.image_encoder(image))
    fresh = LOW(tiny_sam, data=scenes())
    assert mended.state_dict().keys() == fresh.state_dict().keys()
    for name, module in mended.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert vars(module).keys() - {"_samcompress"} == (
            vars(fresh.get_submodule(name)).keys() - {"_samcompress"}
        ), name
    assert not any(b.requires_grad for b in mended.buffers())


def test_the_same_twice_and_saved(tiny_sam: nn.Module, tmp_path: Any) -> None:
    chain = LOW | Reconstruct(steps=3, images=1)
    model, other = (chain(tiny_sam, data=scenes()) for _ in range(2))
    first = model.state_dict()
    assert all(torch.equal(v, first[k]) for k, v in other.state_dict().items())
    sc.save(model, tmp_path / "model")
    again = sc.load(tmp_path / "model").state_dict()
    assert all(torch.equal(v, first[k]) for k, v in again.items())


def test_weights_without_activations(tiny_sam: nn.Module) -> None:
    chain = FakeQuant(weight_bits=3, activation_bits=None) | MEND
    mended = chain(tiny_sam, data=scenes())
    errors = sc.lineage(mended)[-1].state["units"].values()
    assert all(after <= before for before, after in errors)


def test_after_groups_and_folded_keys(tiny_sam: nn.Module) -> None:
    grouped = PQSAM(weight_bits=5, activation_bits=5, images=1, steps=0)
    chain = sc.Pipeline([grouped, Reconstruct(steps=3, images=1)])
    errors = sc.lineage(chain(tiny_sam, data=scenes()))[-1].state["units"].values()
    assert all(after <= before for before, after in errors)


def test_errors(tiny_sam: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"not quantized(.|\n)*FakeQuant"):
        MEND(tiny_sam, data=scenes())
    with pytest.raises(ConfigError, match=r"drop is out of range(.|\n)*0 <= drop < 1"):
        Reconstruct(drop=1.0)
    with pytest.raises(ConfigError, match="steps is out of range"):
        Reconstruct(steps=0)
    rounded = FakeQuant(weight_bits=8, activation_bits=None)(tiny_sam)
    other = copy.deepcopy(tiny_sam)
    weight = other.image_encoder.blocks[0].mlp.lin1.weight
    weight.data = weight.data.flip(0)
    with pytest.raises(
        ModelError, match=r"not the model that was rounded(.|\n)*blocks\.0\.mlp\.lin1"
    ):
        MEND(rounded, data=scenes(), teacher=other)
    smoothed = sc.quantize.SmoothQuant(images=1) | FakeQuant(weight_bits=6, activation_bits=None)
    with pytest.raises(ModelError, match="more than a step away"):
        MEND(smoothed(tiny_sam, data=scenes()), data=scenes(), teacher=tiny_sam)
    chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | LOW | MEND
    with pytest.raises(ModelError, match=r"another shape(.|\n)*teacher="):
        chain(tiny_sam, data=scenes())
