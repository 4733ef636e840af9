"""prune.slim_sam: both trainings, what stops them, settings, refusals, other formats."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal, scenes
from slimming import (
    BLIND,
    BLOCKS,
    SHORT,
    encode,
    geometry,
    middle_of,
    part,
    run,
    slimmable,
    state_of,
)
from torch import nn

import samcompress as sc
from samcompress.core import _fit, errors
from samcompress.core.data import Dataset
from samcompress.core.history import History, history, remember
from samcompress.core.sizes import parameter_count
from samcompress.distill.align_bottleneck import survivors
from samcompress.prune import slim_sam
from samcompress.prune._importance import element_scores
from samcompress.prune.slim_sam import SlimSAM


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


# --- both trainings -------------------------------------------------------------------------------


def test_it_is_the_chain_of_its_parts(data: Dataset, tmp_path: Path) -> None:
    """Cut, AlignBottleneck, cut, AlignEmbedding: the same weights, bit for bit."""
    sam, teacher = random_sam(), random_sam(seed=5)
    step = SlimSAM(**SHORT, seed=3, lr=1e-3)
    told = {"data": data, "teacher": teacher, "progress": False}
    small = step(sam, **told, workdir=tmp_path)
    state = state_of(small)
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-3, "seed": 3}

    def cut(model: nn.Module, which: dict[str, Any]) -> nn.Module:
        done, record = copy.deepcopy(model), history(model)
        step.rebuild(done, which)
        remember(done, History(record.base, (*record.steps, sc.Step(step, which))))
        return done

    channels = {"kept": part(state, "image_encoder"), "heads": {}, "head_dims": {}}

    def train(learner: Any, model: nn.Module) -> nn.Module:
        return sc.Pipeline([learner], any_order=True)(model, **told)

    first = train(sc.distill.AlignBottleneck(**settings), cut(sam, channels))
    middle = middle_of(tmp_path)
    assert equal(first, middle)
    assert [s.transform for s in sc.lineage(middle)] == [step]
    assert sc.lineage(middle)[0].state == channels
    inside = {
        **state, "kept": {n: k for n, k in state["kept"].items() if n != "image_encoder"}
    }  # fmt: skip
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    second = train(sc.distill.AlignEmbedding(**settings, middle=str(folder)), cut(first, inside))
    assert equal(second, small)
    losses = [sc.lineage(model)[-1].state for model in (first, second)]
    assert state["aligned"] == losses
    assert state["iou_trained"] is False
    assert all(found["loss_after"] < found["loss_before"] for found in losses)


def test_one_entry_that_is_saved_and_loaded(data: Dataset, tmp_path: Path) -> None:
    sam = slimmable()
    before = copied(sam)
    small = run(sam, data, ratio=0.6, **SHORT)
    assert not changed(before, sam)
    assert not any(m._forward_hooks for m in small.modules())
    (entry,) = sc.lineage(small)
    assert entry.transform == SlimSAM(ratio=0.6, **SHORT)
    assert entry.facts["after"]["parameters"] == parameter_count(small)
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert equal(small, again)
    assert torch.equal(encode(small), encode(again))
    assert sc.lineage(again) == sc.lineage(small)
    twice = sc.prune.Mlp(criterion="random")(again, progress=False)
    sc.save(twice, tmp_path / "twice")
    assert torch.equal(encode(sc.load(tmp_path / "twice")), encode(twice))


def test_only_the_encoder_trains(data: Dataset) -> None:
    sam = random_sam()
    small = run(sam, data, **SHORT)
    others = {n: t for n, t in copied(sam).items() if not n.startswith("image_encoder.")}
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in others.items())
    assert all(p.grad is None and p.requires_grad for p in small.parameters() if p.requires_grad)


def test_relative_positions_are_emptied_before_the_first_training(
    data: Dataset, tmp_path: Path
) -> None:
    fields = {**SHORT, "steps": 1, "lr": 1e-9, "rel_pos": "zero"}
    SlimSAM(**fields)(random_sam(), data=data, progress=False, workdir=tmp_path)
    for block in middle_of(tmp_path).image_encoder.blocks:
        assert block.attn.rel_pos_h.abs().max() < 1e-6


def test_dtype_flags_and_input_are_kept() -> None:
    sam = slimmable().to(torch.bfloat16).requires_grad_(False)
    before = copied(sam)
    small = run(sam, **BLIND)
    assert not changed(before, sam)
    for parameter in small.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
    theirs = {p.data_ptr() for p in sam.parameters()}
    assert not theirs & {p.data_ptr() for p in small.parameters()}


def test_published_settings_train_too(data: Dataset) -> None:
    fields = {**SHORT, "round_to": 4, "images": 2}
    small = SlimSAM.published(50, **fields)(slimmable(), data=data, progress=False)
    assert geometry(small) == (48, 4, 12, 144)
    first, second = state_of(small)["aligned"]
    assert first["steps"] == second["steps"] == 2
    assert all(block.attn.rel_pos_h.any() for block in small.image_encoder.blocks)  # trained anew


def test_later_pruning_knows_which_units_are_left(data: Dataset) -> None:
    """distill.align_bottleneck reads the lineage, here through two cuts of the hidden units."""
    sam = random_sam()
    small = run(sam, ratio=0.5, attention="heads", **BLIND)
    twice = sc.prune.Mlp(ratio=0.5, criterion="random", seed=3)(small, progress=False)
    name = f"{BLOCKS}.0.mlp"
    first, second = (state_of(model)["kept"][name] for model in (small, twice))
    assert survivors(small, sam, name) == first
    assert survivors(twice, sam, name) == [first[i] for i in second]


@pytest.mark.parametrize("dies", [3, 9])
def test_killed_and_resumed(dies: int, data: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    """In the first training, and in the second: nothing is done twice that was done."""
    step = SlimSAM(**{**SHORT, "steps": 6}, lr=1e-3)
    told = {"data": data, "progress": False}
    whole = step(random_sam(), **told)
    advance, steps, scored = _fit._Loop._advance, [], []

    def dying(loop: Any, *args: Any) -> bool:
        steps.append(loop.run.step)
        if len(steps) == dies + 1:
            raise InterruptedError
        return advance(loop, *args)

    def counted(*args: Any, **how: Any) -> Any:
        scored.append(1)
        return element_scores(*args, **how)

    monkeypatch.setattr(_fit._Loop, "_advance", dying)
    plan = _fit.Plan
    monkeypatch.setattr(_fit, "Plan", lambda **fields: plan(**fields, save_seconds=0.0))
    monkeypatch.setattr(slim_sam, "element_scores", counted)
    with pytest.raises(InterruptedError):
        step(random_sam(), **told, workdir=tmp_path)
    assert len(scored) == 1 + dies // 6
    again = step(random_sam(), **told, workdir=tmp_path)
    assert equal(whole, again)
    assert len(scored) == 2
    assert steps == [*range(6), *range(6)][: dies + 1] + [*range(6), *range(6)][dies:]
    assert state_of(again) == state_of(whole)
    assert equal(step(random_sam(), **told, workdir=tmp_path), whole)
    assert (len(scored), len(steps)) == (2, 13)


def test_another_run_in_the_same_folder(data: Dataset, tmp_path: Path) -> None:
    told = {"data": data, "progress": False, "workdir": tmp_path}
    one = SlimSAM(**SHORT)(random_sam(), **told)
    other = SlimSAM(**{**SHORT, "images": 1})(random_sam(), **told)
    more = SlimSAM(**{**SHORT, "steps": 3})(random_sam(), **told)
    assert len(list(tmp_path.glob("*.json"))) == 2 + 2 + 1  # the first cut of `more` is that of one
    assert not equal(one, other)
    assert not equal(one, more)


def test_decision_that_cannot_be_read(data: Dataset, tmp_path: Path) -> None:
    step = SlimSAM(**BLIND)
    step(random_sam(), progress=False, workdir=tmp_path)
    paths = sorted(tmp_path.glob("prune-slim_sam-*.json"))
    assert len(paths) == 2
    for path in paths:
        path.write_text("{")
    with pytest.raises(errors.CheckpointError) as caught:
        step(random_sam(), progress=False, workdir=tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "a file that says what was cut cannot be read."
    assert lines[1] in {f"  where     {path}" for path in paths}
    assert lines[-1] == "  try       delete the file, and they are computed again"


# --- settings -------------------------------------------------------------------------------------


def test_published_settings() -> None:
    step = SlimSAM.published(77, scope="global")
    assert (step.ratio, step.epochs, step.round_to, step.images) == (0.77, 40.0, 12, 1000)
    assert (step.attention, step.tie, step.accumulate) == ("head_dims", "heads", "sum")
    assert (step.rel_pos, step.scale, step.scope) == ("zero", "reset", "global")
    assert (SlimSAM.published(50).ratio, SlimSAM.published(50).epochs) == (0.5, 20.0)
    assert step == SlimSAM(**step.params())
    with pytest.raises(errors.ConfigError) as caught:
        SlimSAM.published(60)
    assert str(caught.value) == (
        "there is no such SlimSAM.\n  got       60\n  expected  50 or 77\n"
        "  try       sc.prune.SlimSAM.published(50, ratio=0.6)"
    )


def test_settings_of_training_reach_both() -> None:
    step = SlimSAM(
        epochs=3, feature_epochs=2, batch_size=6, micro_batches=3, lr=1e-3, precision="bf16",
        workers=1, seed=7,
    )  # fmt: skip
    for name in ("distill.align_bottleneck", "distill.align_embedding"):
        learner = step._learner(name)
        assert learner == sc.get(
            name, epochs=3, feature_epochs=2, batch_size=6, accumulate=3, lr=1e-3,
            precision="bf16", workers=1, seed=7,
        )  # fmt: skip
    defaults = SlimSAM()._learner("distill.align_embedding")
    assert defaults == sc.distill.AlignEmbedding()
    assert SlimSAM(steps=5)._learner("distill.align_embedding").steps == 5


@pytest.mark.parametrize("fields", [{"align": False}, {"epochs": 0}], ids=str)
def test_without_training(fields: dict[str, Any]) -> None:
    step = SlimSAM(criterion="magnitude", round_to=8, **fields)
    assert not step.trains
    assert not step.needs_data
    assert not step.needs_teacher
    small = step(slimmable(), consume=True, progress=False)
    assert "aligned" not in state_of(small)
    assert SlimSAM(criterion="taylor", **fields).needs_data
    assert SlimSAM(epochs=0, steps=1).trains


# --- refusals -------------------------------------------------------------------------------------


def refusal(error: type[Exception], sam: Any = None, data: Any = None, **run: Any) -> str:
    fields = {**SHORT, **run.pop("fields", {})}
    with pytest.raises(error) as caught:
        SlimSAM(**fields)(sam or random_sam(), data=data, progress=False, **run)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "where", "fix"),
    [
        ({"round_to": 32}, "image_encoder with 32 units", ", or a smaller round_to="),
        ({"ratio": 0.97, "round_to": 1}, "image_encoder with 32 units", ""),
        ({"ratio": 0.6, "round_to": 1, "attention": "heads"}, f"{BLOCKS}.0.attn with 2 heads", ""),
        ({"ratio": 0.8, "round_to": 1}, f"{BLOCKS}.0.attn with 2 heads", ""),
    ],
    ids=str,
)
def test_nothing_left(fields: dict[str, Any], where: str, fix: str, data: Dataset) -> None:
    step = SlimSAM(**{**SHORT, **fields})
    assert refusal(errors.ConfigError, data=data, fields=fields).splitlines() == [
        "prune.slim_sam: nothing of a module would be left.",
        f"  where     {where}",
        f"  got       ratio={step.ratio}, round_to={step.round_to}",
        f"  try       a smaller ratio={fix}",
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"ratio": 1.0}, "prune.slim_sam: ratio is out of range."),
        ({"round_to": 0}, "prune.slim_sam: round_to is out of range."),
        ({"epochs": -1.0}, "prune.slim_sam: epochs is out of range."),
        ({"tie": "both"}, "prune.slim_sam: tie has a value it cannot take."),
        ({"steps": 0}, "distill.align_bottleneck: steps is out of range."),
        ({"batch_size": 2, "micro_batches": 3}, "distill.align_bottleneck: accumulate divides a"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        SlimSAM(**fields)
    assert str(caught.value).startswith(text)


def test_channels_that_heads_do_not_divide() -> None:
    sam = sc.prune.Heads(ratio=0.25, criterion="random")(slimmable(), progress=False)
    sam = sc.prune.Channels(ratio=0.1, round_to=8, criterion="random")(sam, progress=False)
    with pytest.raises(errors.ConfigError) as caught:
        run(sam, tie="heads", **BLIND)
    assert str(caught.value).splitlines() == [
        'prune.slim_sam: tie="heads" finds channels that heads do not divide.',
        "  where     image_encoder",
        "  got       80 channels, 3 heads",
        "  expected  as many channels for each head",
        '  try       tie="none"',
    ]


@pytest.mark.parametrize(
    ("sizes", "got"),
    [
        ({"embed_dim": 48}, "2 blocks of 96 in the model, 2 blocks of 144 in the teacher"),
        ({"depth": 3}, "2 blocks of 96 in the model, 3 blocks of 96 in the teacher"),
        (None, "2 blocks of 96 in the model, no such block in the teacher"),
    ],
)
def test_teacher_that_cannot_be_compared(
    sizes: Any, got: str, data: Dataset, monkeypatch: Any
) -> None:
    teacher = random_sam(**(sizes or {}))
    if sizes is None:
        teacher.image_encoder = nn.Identity()
    monkeypatch.setattr(slim_sam, "element_scores", None)  # it is said before any work
    assert refusal(errors.ModelError, data=data, teacher=teacher).splitlines() == [
        "prune.slim_sam: the teacher's blocks are not as wide inside as the model's.",
        f"  where     {BLOCKS}.*.attn.qkv",
        f"  got       {got}",
        "  expected  the same, for the first training compares them",
        "  try       as teacher= the model from before this step, or align=False",
    ]


def test_early_refusals(data: Dataset) -> None:
    assert "prune.slim_sam needs the original model" in refusal(
        errors.ConfigError, data=data, consume=True
    )
    assert "prune.slim_sam needs images." in refusal(errors.DataError)
    half = random_sam().to(torch.bfloat16)
    assert "can only be trained in float32" in refusal(errors.ModelError, half, data)
    odd = random_sam()
    odd.image_encoder.blocks[0].mlp.act = nn.Sequential(nn.GELU(), nn.LayerNorm(96))
    assert refusal(errors.ModelError, odd, data).splitlines() == [
        "prune.slim_sam keeps the model between its cuts, and this one cannot be saved.",
        "  got       a SAM with modules that no recorded step put there",
        "  expected  a plain SAM, or one changed by samcompress steps alone",
        "  try       start from sc.build or sc.load, or align=False",
    ]
    bad = random_sam()
    bad.image_encoder.neck[0].weight.data[0, 5] = math.nan
    text = refusal(errors.ModelError, bad, fields={**BLIND, "criterion": "magnitude"})
    assert text.startswith("prune.slim_sam: the importance of units is not a finite number.")
    other = sc.attention.Fused()(random_sam(), progress=False)
    step = sc.Pipeline([SlimSAM(**BLIND)], any_order=True)
    with pytest.raises(errors.ModelError, match=r"prune\.slim_sam finds no ViT blocks"):
        step(other, progress=False)
