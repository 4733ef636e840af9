"""prune.filters: how much goes, what is left of the model, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest
import torch
from conftest import random_sam, randomise
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint
from samcompress.core.sizes import parameter_count
from samcompress.evaluate.macs import macs
from samcompress.prune._filters import Part, silence
from samcompress.prune.filters import Filters

pytest.importorskip("torch_pruning")

SIDE = 64
IMAGE = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
SCENES = sc.shapes(2, seed=5, size=(48, 64))


def small_sam(**fields: Any) -> Any:
    return randomise(sc.substitute.LiteViT(**fields)(random_sam(), progress=False))


def prune(technique: Any, sam: Any, **run: Any) -> Any:
    return technique(sam, data=SCENES, progress=False, **run)


def state_of(model: Any) -> dict[str, Any]:
    return sc.lineage(model)[-1].state


def off(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def encode(model: Any) -> Tensor:
    return getattr(model, "image_encoder", model)(IMAGE)


# --- the technique --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "scope"),
    [
        ("disturbed_taylor", "local"),
        ("taylor", "global"),
        ("activation", "local"),
        ("magnitude", "global"),
        ("random", "local"),
    ],
)
def test_every_criterion(criterion: Any, scope: Any) -> None:
    sam = small_sam()
    small = prune(Filters(ratio=0.5, criterion=criterion, scope=scope), sam)
    assert parameter_count(small) < 0.7 * parameter_count(sam)
    state = state_of(small)
    assert json.loads(json.dumps(state)) == state
    sizes = {name: len(kept) for name, kept in state["kept"].items()}
    assert all(n % 8 == 0 for n in sizes.values())
    even = {name: _units(sam, name) // 2 for name in sizes}
    assert (sizes == even) == (scope == "local")
    assert abs(sum(sizes.values()) - sum(even.values())) <= 8 + 8  # the stem may stay whole
    whole = copy.deepcopy(sam)
    parts = {name: [Part(*p) for p in found] for name, found in state["parts"].items()}
    silence(whole, state["kept"], parts)
    assert off(encode(small), encode(whole)) < 1e-5


def _units(sam: Any, name: str) -> int:
    layer = sam.get_submodule(name)
    return getattr(layer, "out_features", None) or layer.out_channels


def test_work_falls_with_the_weights() -> None:
    sam = small_sam()
    small = prune(Filters(ratio=0.5, criterion="random"), sam)
    before, after = macs(sam), macs(small)
    assert after.encoder < 0.6 * before.encoder
    assert after.decoder_per_prompt == before.decoder_per_prompt


def test_taylor_keeps_what_matters() -> None:
    sam = small_sam()
    name = "image_encoder.encoder.stages.1.1.mlp"
    away = list(range(0, 128, 2))
    sam.get_submodule(f"{name}.1.0").weight.data[:, away] = 0
    small = prune(Filters(ratio=0.25, where=f"{name}.**"), sam)
    [(layer, kept)] = state_of(small)["kept"].items()
    assert layer == f"{name}.0.0"
    assert set(kept) >= set(range(1, 128, 2))
    assert off(encode(small), encode(sam)) < 1e-5


def test_saved_and_loaded_without_torch_pruning(tmp_path: Any, monkeypatch: Any) -> None:
    once = prune(Filters(ratio=0.25, criterion="random"), small_sam())
    small = prune(Filters(ratio=0.25, criterion="random", seed=1), once)
    sc.save(small, tmp_path / "small")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = sc.load(tmp_path / "small")
    assert torch.equal(encode(again), encode(small))
    assert [type(step.transform) for step in sc.lineage(again)[1:]] == [Filters, Filters]
    with pytest.raises(errors.MissingDependencyError) as caught:
        prune(Filters(criterion="random"), again)
    assert str(caught.value).startswith("torch_pruning is needed for prune.filters and could not")
    assert "pip install 'samcompress[graph]'" in str(caught.value)


def test_input_untouched_flags_and_types_kept() -> None:
    sam = small_sam().to(torch.bfloat16).requires_grad_(False)
    sam.image_encoder.train()
    before, drawn = fingerprint(sam), torch.get_rng_state()
    small = prune(Filters(ratio=0.5, images=1), sam)
    assert fingerprint(sam) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert small.image_encoder.training
    assert not any(p.requires_grad or p.dtype != torch.bfloat16 for p in small.parameters())
    for model in (sam, small):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        again = prune(Filters(ratio=0.5, images=1), sam)
    assert state_of(again) == state_of(small)


def test_a_width_keeps_a_portion_or_stays_whole() -> None:
    small = prune(Filters(ratio=0.99, criterion="magnitude", round_to=16), small_sam())
    kept = state_of(small)["kept"]
    assert {len(found) for found in kept.values()} == {16}
    assert "image_encoder.encoder.stem.0" not in kept  # has sixteen


def test_after_it_come_training_and_integers() -> None:
    steps = [
        Filters(ratio=0.5, criterion="random"),
        sc.distill.Encoder(steps=2, batch_size=2),
        sc.quantize.Int8Weights(min_size=0),
    ]
    small = prune(sc.substitute.LiteViT() | sc.Pipeline(steps), random_sam())
    families = [step.transform.family for step in sc.lineage(small)]
    assert families == ["substitute", "prune", "distill", "quantize"]
    assert torch.isfinite(encode(small)).all()


@pytest.mark.slow
def test_export() -> None:
    pytest.importorskip("onnxruntime")
    small = prune(Filters(ratio=0.5, criterion="random"), small_sam())
    exported = prune(sc.compile.Export(), small)
    prompts = [[sc.Prompt(points=[[20, 30]])]]
    found, expected = (
        sc.predict(model, [SCENES[0].image], prompts)[0].logits for model in (exported, small)
    )
    assert off(found, expected) < 1e-3


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["ratio", "round_to", "images"])
def test_out_of_range(field: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"prune.filters: {field} is out of range"):
        Filters(**{field: 0})


@pytest.mark.parametrize("step", [None, sc.substitute.ViT(variant="tiny")])
def test_vits_of_sam_are_refused(step: Any) -> None:
    sam = random_sam() if step is None else step(random_sam(), progress=False)
    with pytest.raises(errors.ModelError) as caught:
        prune(Filters(), sam)
    assert str(caught.value).splitlines() == [
        "prune.filters does not cut a ViT of segment_anything, whose tokens a norm runs over and "
        "whose heads share tables of positions.",
        "  where     image_encoder",
        f"  got       {type(sam.image_encoder).__name__}",
        "  expected  an encoder with convolutions, such as those of sc.substitute",
        "  try       sc.prune.Heads, sc.prune.Mlp or sc.prune.Channels",
    ]


class Foreign(nn.Module):
    """Somebody's encoder, in which each channel depends on all others."""

    def __init__(self, *, runs: bool = True) -> None:
        super().__init__()
        self.img_size, self.runs = SIDE, runs
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Softmax(1), nn.Conv2d(16, 32, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.runs:
            raise RuntimeError("no way\nin")
        return self.layers(x)


def with_encoder(encoder: nn.Module) -> Any:
    sam = random_sam()
    sam.image_encoder = encoder
    return sam


def test_nothing_to_cut() -> None:
    with pytest.raises(errors.ModelError) as caught:
        prune(Filters(criterion="random"), with_encoder(Foreign()))
    assert str(caught.value).splitlines() == [
        "prune.filters finds no filters in this image encoder that could be cut.",
        "  where     image_encoder",
        "  got       Foreign",
        "  expected  channels between torch.nn layers that no norm runs over",
        "  try       prune before layers are replaced, e.g. quantised",
    ]


def test_after_quantisation() -> None:
    sam = prune(sc.quantize.Int8Weights(min_size=0), small_sam())
    late = sc.Pipeline([Filters(criterion="random")], any_order=True)
    with pytest.raises(errors.ModelError, match="finds no filters"):
        prune(late, sam)


def test_what_cannot_be_traced() -> None:
    with pytest.raises(errors.ModelError) as caught:
        prune(Filters(criterion="random"), with_encoder(Foreign(runs=False)))
    assert str(caught.value).splitlines()[:3] == [
        "prune.filters: torch-pruning cannot trace this image encoder.",
        "  where     image_encoder",
        "  got       Foreign: RuntimeError: no way",
    ]


def test_where() -> None:
    sam = small_sam()
    with pytest.raises(errors.NoEffectError, match=r"prune.filters matched no module\."):
        prune(Filters(criterion="random", where="image_encoder.nothing"), sam)
    with pytest.raises(errors.NoEffectError) as caught:
        prune(Filters(criterion="random", where="image_encoder.encoder.neck"), sam)
    assert "prune.filters matched no layer it can act on." in str(caught.value)
    assert "all layers that make the same channels, e.g. image_encoder." in str(caught.value)


def test_nothing_would_change() -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        prune(Filters(criterion="random", round_to=1024), small_sam())
    assert str(caught.value).splitlines() == [
        "prune.filters: each width would stay whole.",
        "  got       ratio=0.25, round_to=1024, at most 640 units in a width",
        "  try       a larger ratio=, or a smaller round_to=",
    ]


def test_weights_that_are_not_finite() -> None:
    sam = small_sam()
    sam.image_encoder.encoder.stem[0].weight.data[0] = float("nan")
    with pytest.raises(errors.ModelError, match="the importance of units is not a finite number"):
        prune(Filters(criterion="magnitude"), sam)
