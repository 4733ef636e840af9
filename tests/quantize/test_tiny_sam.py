"""Scales by what rounding does to the masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.data import as_dataset
from samcompress.core.errors import ConfigError
from samcompress.core.transform import Context
from samcompress.quantize._fake import FakeLinear, Product, Rounded, unrounded
from samcompress.quantize._quantizers import Quantizer, Twin
from samcompress.quantize._search import _rows, best, gather, search
from samcompress.quantize.fake_quant import FakeQuant
from samcompress.quantize.tiny_sam import TinySAM

SMALL: dict[str, Any] = {"images": 2, "candidates": 6, "rounds": 1}


def scenes(count: int = 2) -> Any:
    return as_dataset(sc.shapes(count, size=(48, 64)))


def test_the_best_multiple_by_hand() -> None:
    start = torch.tensor([1.0, 4.0])
    found = best(start, [1.0, 0.5, 2.0], lambda s: (s - 2).abs())
    assert found.tolist() == [2.0, 2.0]
    assert float(best(torch.tensor(1.0), [1.0, 3.0], lambda s: torch.zeros(()))) == 1.0


def test_importance_is_finite_and_the_search_never_raises_the_weighed_error(
    tiny_sam: nn.Module,
) -> None:
    step = FakeQuant(weight_bits=4, activation_bits=4, images=2)
    rounded = step(tiny_sam, data=scenes())
    originals = {
        name: tiny_sam.get_submodule(name)
        for name, layer in rounded.named_modules()
        if isinstance(layer, Rounded)
    }
    teacher = unrounded(rounded, originals)
    assert not any(isinstance(m, Quantizer) for m in teacher.modules())
    before = copy.deepcopy(rounded.state_dict())
    context = Context(step="test", dataset=scenes())
    kept = gather(rounded, teacher, context, images=2, prompts="mixed")
    assert all(torch.equal(v, before[k]) for k, v in rounded.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rounded.modules())
    assert all("forward" not in vars(m) for m in rounded.modules())
    assert all(p.grad is None and p.requires_grad for p in rounded.parameters())
    products = [n for n, m in rounded.named_modules() if isinstance(m, (FakeLinear, Product))]
    assert sorted(kept) == sorted(products)
    weights = {name: torch.cat(k.importance) for name, k in kept.items() if k.importance}
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert sum(bool(w.any()) for w in weights.values()) >= len(products) - 1

    name = "image_encoder.blocks.1.mlp.lin1"
    layer: Any = rounded.get_submodule(name)
    true: Any = originals[name]
    x, importance = torch.cat(kept[name].left), torch.cat(kept[name].importance)

    def error() -> float:
        with torch.no_grad():
            wanted = true(x) - true.bias
            return float(((layer(x) - layer.bias - wanted).square() * importance).sum())

    first = error()
    with torch.no_grad():
        search(layer, kept[name], true, candidates=20, rounds=2)
    assert error() < first


def test_the_technique(tiny_sam: nn.Module, tmp_path: Any) -> None:
    rounded = TinySAM(**SMALL)(tiny_sam, data=scenes())
    twins = [n for n, m in rounded.named_modules() if isinstance(m, Twin)]
    assert sum(name.endswith("mix.left") for name in twins) == 9
    assert sum(name.endswith("lin2.input") for name in twins) == 2  # GELU; the decoder has ReLU
    state = sc.lineage(rounded)[-1].state
    assert state["searched"] >= len(state["layers"]) - 2
    for layer in rounded.modules():
        if isinstance(layer, Rounded):
            codes = layer.weight / layer.along(layer.weight_scale)
            assert (codes - codes.round()).abs().max() < 1e-4
            assert codes.abs().max() < 127.5
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        true, found = tiny_sam.image_encoder(image), rounded.image_encoder(image)
    assert (found - true).norm() / true.norm() < 0.05
    sc.save(rounded, tmp_path / "model")
    again = sc.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again.image_encoder(image), found)


def test_maps_of_all_heads_are_looked_at() -> None:
    factors = torch.arange(12.0).view(12, 1, 1).expand(12, 40, 8)
    kept, rows = _rows((factors, factors.transpose(1, 2)), product=True)
    assert kept[0][:, 0, 0].tolist() == [0, 3, 6, 9]
    assert kept[0].shape == (4, 32, 8)
    assert kept[1].shape == (4, 8, 40)
    assert rows(factors @ factors.transpose(1, 2)).shape == (4, 32, 40)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"candidates is out of range(.|\n)*>= 1"):
        TinySAM(candidates=0)
    with pytest.raises(ConfigError, match=r"rounds is out of range"):
        TinySAM(rounds=0)
