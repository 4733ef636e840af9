"""prune.supernet: what comes out of it, training, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import equal, stopped_and_resumed
from pruning import SCENES, toy
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import parameter_count
from samcompress.distill.align_bottleneck import survivors
from samcompress.prune import _elastic
from samcompress.prune._elastic import Subnet
from samcompress.prune.supernet import Supernet

SHORT: dict[str, Any] = {
    "budget": "macs<=70%",
    "criterion": "magnitude",
    "images": 2,
    "population": 2,
    "generations": 1,
    "batch_size": 2,
}
BLOCKS = "image_encoder.blocks"


def find(sam: Any = None, data: Any = SCENES, *, run: dict[str, Any] | None = None, **fields: Any):
    step = Supernet(**{**SHORT, "steps": 0, **fields})
    return step(sam or toy(), data=data, progress=False, **(run or {}))


def state_of(model: nn.Module) -> dict[str, Any]:
    return sc.lineage(model)[-1].state


def macs_of(sam: Any) -> int:
    found = sc.evaluate.macs(sam)
    return found.encoder + found.decoder_per_prompt


# --- the technique --------------------------------------------------------------------------------


def test_the_result_is_cut_out_of_the_model_as_it_came(tmp_path: Path) -> None:
    """Without training its weights are the model's, in their order, and any budget is met."""
    sam = toy()
    small = find(sam, budget="macs<=50%", blocks=0.5, criterion="disturbed_taylor")
    state = state_of(small)
    assert macs_of(small) == state["cost_after"]
    assert macs_of(sam) == state["cost_before"]
    assert 0.45 < state["cost_after"] / state["cost_before"] <= 0.5
    again = copy.deepcopy(sam)
    Supernet().rebuild(again, state)
    assert equal(again, small)
    kept, blocks = state["kept"], small.image_encoder.blocks
    assert len(blocks) < 4
    for place, number in enumerate(kept[BLOCKS]):
        units = kept.get(f"{BLOCKS}.{place}.mlp", list(range(96)))
        assert units == sorted(units)
        whole = sam.image_encoder.blocks[number].mlp.lin1.weight
        assert torch.equal(blocks[place].mlp.lin1.weight, whole[units])
    sc.save(small, tmp_path / "small")
    assert equal(sc.load(tmp_path / "small"), small)
    assert "iou_trained" not in state


def test_it_prunes_on_and_later_steps_find_the_units(tmp_path: Path) -> None:
    small = find(budget="macs<=60%", blocks=0.5)
    further = sc.prune.Mlp(ratio=0.5, criterion="magnitude")(small)
    for i in range(len(small.image_encoder.blocks)):
        name = f"{BLOCKS}.{i}.mlp"
        assert survivors(further, small, name) == sc.lineage(further)[-1].state["kept"][name]
    again = find(small, budget="macs<=80%")
    assert parameter_count(again) < parameter_count(small)


def test_the_best_of_those_tried_is_taken() -> None:
    few, many = (state_of(find(budget="macs<=60%", generations=n, population=4)) for n in (0, 3))
    assert many["tried"] > few["tried"]
    assert many["error"] <= few["error"]
    assert many["error_largest"] < many["error"] < many["error_smallest"]


def test_it_is_deterministic() -> None:
    first, second = (find(steps=2, lr=1e-3) for _ in range(2))
    assert state_of(first) == state_of(second)
    assert equal(first, second)
    assert state_of(find(seed=1))["kept"] != state_of(find())["kept"]


def test_parameters_and_a_budget_in_numbers() -> None:
    sam = toy()
    whole = parameter_count(sam)
    small = find(sam, budget=f"parameters<={0.9 * whole}")
    assert 0.85 * whole < parameter_count(small) <= 0.9 * whole
    assert state_of(small)["cost_after"] == parameter_count(small)
    assert state_of(small)["cost_before"] == whole


def test_training_helps_on_tiny(trained: nn.Module) -> None:
    data = sc.shapes(4, seed=2)
    before = state_of(find(trained, data, population=2, generations=0))
    small = find(trained, data, steps=10, lr=1e-3, population=2, generations=0)
    after = state_of(small)
    assert len(after["curve"]) == 10
    assert all(math.isfinite(v) for v in after["curve"])
    assert after["error_smallest"] < 0.6 * before["error_smallest"]
    assert after["error"] < before["error"]
    assert before["error_largest"] < 1e-6
    assert (after["images"], after["steps"], after["skipped"]) == (4, 10, 0)
    assert after["iou_trained"] is False
    assert not any(p.grad is not None for p in small.parameters())


def test_each_step_teaches_both_ends_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = _elastic.narrowed

    def watched(encoder: Any, subnet: Subnet) -> Any:
        seen.append(subnet)
        return real(encoder, subnet)

    monkeypatch.setattr(_elastic, "narrowed", watched)
    find(steps=2, subnets=3)
    first, second = seen[:5], seen[5:]
    assert len(second) == 5
    assert first[0] == second[0] == Supernet()._space(toy()).largest
    assert first[1] == second[1] != first[0]
    assert first[2:] != second[2:]


def test_stopped_and_resumed(tmp_path: Path) -> None:
    sam, data = toy(), sc.shapes(4, seed=5, size=(48, 64))
    step = sc.Pipeline([Supernet(**SHORT, steps=5, lr=1e-3)])
    run = {"data": data, "progress": False}
    again = stopped_and_resumed(step, sam, run, tmp_path)
    assert equal(again, step(sam, **run))


def test_one_training_serves_all_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sam, settings = toy(), {"steps": 2, "lr": 1e-3}
    other = {**settings, "budget": "parameters<=80%", "generations": 2}
    expected = find(sam, **other)
    find(sam, **settings, run={"workdir": tmp_path})

    def learns(*_: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(_elastic.Sandwich, "forward", learns)
    found = find(sam, **other, run={"workdir": tmp_path})
    assert equal(found, expected)
    assert state_of(found) == state_of(expected)
    assert len(list(tmp_path.glob("prune-supernet-*.safetensors"))) == 1
    with pytest.raises(AssertionError, match="trained again"):
        find(sam, **{**other, "subnets": 1}, run={"workdir": tmp_path})


def test_a_teacher_of_another_size() -> None:
    teacher = random_sam(seed=5, image_size=128, depth=2)
    assert state_of(find(run={"teacher": teacher}))["error"] > 0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"budget": "small"}, "this is not a budget"),
        ({"budget": "macs<=5%"}, "no subnet is as cheap as that"),
        ({"budget": "parameters<=20%"}, "% of the whole"),
        ({"budget": "macs<=2"}, "no subnet is as cheap as that"),
        ({"round_to": 0}, "round_to is out of range"),
        ({"heads": (0.5, 1.0)}, "heads is out of range"),
        ({"hidden": (0.0,)}, "hidden is out of range"),
        ({"blocks": 1.0}, "blocks is out of range"),
        ({"heads": (), "hidden": (), "blocks": 0}, "no subnet is as cheap as that"),
        ({"heads": 0.5}, r"heads has a value(.|\n)*a tuple or list"),
        ({"heads": ("a",)}, r"heads has a value(.|\n)*a number"),
        ({"steps": -1}, "steps is out of range"),
        ({"epochs": -1.0}, "epochs is out of range"),
        ({"subnets": -1}, "subnets is out of range"),
        ({"population": 1}, "population is out of range"),
        ({"generations": -1}, "generations is out of range"),
        ({"lr": 0.0}, "lr is out of range"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.ConfigError, match=text):
        find(**fields)


def test_models_that_are_refused() -> None:
    sam = toy()
    with pytest.raises(errors.NoEffectError, match="costs no more than it may"):
        find(sam, budget="macs<=100G")
    with pytest.raises(errors.ModelError, match="no ViT blocks"):
        find(sc.substitute.TinyViT()(random_sam()))
    with pytest.raises(errors.ModelError, match="cannot cut a layer that was replaced"):
        pipe = sc.Pipeline([Supernet(**SHORT, steps=0)], any_order=True)
        pipe(sc.quantize.Int8Weights()(sam), data=SCENES, progress=False)
    with pytest.raises(errors.ModelError, match="reads too"):
        find(sc.substitute.HQ()(random_sam(depth=4, global_attn_indexes=(1, 3))))
    with pytest.raises(errors.ModelError, match="student 32 channels, teacher 64"):
        find(sam, run={"teacher": random_sam(out_chans=64)})
    with pytest.raises(errors.DataError, match="needs images"):
        Supernet()(sam)
