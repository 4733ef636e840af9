from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal, near, scenes, stopped_and_resumed, together
from safetensors import safe_open
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core._trainable import training
from samcompress.core.data import Dataset
from samcompress.distill import full_stage
from samcompress.distill._clicks import to_cell
from samcompress.distill._decode import decode
from samcompress.distill._guide import Guide
from samcompress.distill._losses import embedding_loss, valid_cells
from samcompress.distill._mask_losses import iou, least, logit_l1, mask_loss
from samcompress.distill.full_stage import FullStage, Stages
from samcompress.distill.supervised import chosen

TERMS = ["embedding", "tokens", "logits", "mask", "iou"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


@pytest.fixture
def one_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clicks after the first point."""
    monkeypatch.setattr(full_stage, "MOST_CLICKS", 0)


def stages(student: nn.Module, teacher: nn.Module, **fields: Any) -> Stages:
    settings = FullStage(**{"batch_size": 4, **fields})
    return Stages(student, *together(student, teacher, settings), settings)


def small(**fields: Any) -> FullStage:
    return FullStage(**{"steps": 2, "batch_size": 2, "prompts": 2, **fields})


def clicked(objective: Stages, at_least: int) -> tuple[int, Any, list[Any]]:
    """A step in which some prompts get so many clicks."""
    for step in range(50):
        drawn = objective.source.draw(step, Share())
        features = objective.student.image_encoder(drawn.batch.images)
        groups = objective.asked(features, drawn.batch, step)
        if groups[-1][0].labels.shape[1] >= 2 + at_least:
            return step, drawn, groups
    raise AssertionError


# ------------------------------------------------------------------------------------------- loss


def test_student_that_is_the_teacher() -> None:
    teacher = random_sam()
    objective = stages(copy.deepcopy(teacher), teacher, hmw_norm="sum")
    terms = objective(objective.source.draw(0, Share()), 0)
    assert list(terms) == TERMS
    assert [terms[name].item() for name in TERMS[:3]] == [0.0, 0.0, 0.0]
    assert terms["mask"] > 0
    assert terms["iou"] > 0
    # Weights where there is nothing to compare.
    objective.settle()
    assert objective.balance.weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.usefixtures("one_point")
def test_terms_by_hand() -> None:
    teacher = random_sam(seed=5)
    student = random_sam()
    objective = stages(student, teacher)
    drawn = objective.source.draw(0, Share())
    batch, owner = drawn.batch, drawn.batch.owner
    with torch.no_grad():
        terms = objective(drawn, 0)
        features = student.image_encoder(batch.images)
        taught = teacher.image_encoder(batch.images)
        ((asked, rows),) = objective.asked(features, batch, 0)
        grid = objective.source.grid
        mine, other = (
            decode(m, f, owner, asked).at(grid) for m, f in ((student, features), (teacher, taught))
        )
    assert torch.equal(rows, torch.arange(len(owner)))
    assert asked.labels.tolist() == [[1, -1]] * len(owner)
    valid = batch.valid[owner]
    cells = [valid_cells(size, 64, (8, 8)) for size in batch.sizes]
    each = [
        embedding_loss(features[i : i + 1], taught[i : i + 1], cells[i][None], "l1")
        for i in owner.tolist()
    ]
    assert terms["embedding"].item() == pytest.approx(torch.stack(each).mean().item())
    tokens = (mine.tokens - other.tokens).abs().mean()
    assert terms["tokens"].item() == pytest.approx(tokens.item())
    ious = [iou(d.logits, batch.target, valid) for d in (other, mine)]
    weight = torch.sigmoid(ious[0] / (ious[1] + 1e-6) - 1)
    hard = weight * logit_l1(mine.logits, other.logits, valid)
    assert terms["logits"].item() == pytest.approx(hard.mean().item(), rel=1e-4)
    losses = mask_loss(mine.logits, batch.target, valid)
    assert terms["mask"].item() == pytest.approx(least(losses)[0].mean().item())
    assert terms["iou"].item() == pytest.approx((mine.scores - ious[1]).abs().mean().item())
    for norm, expected in (("sum", hard.sum()), ("unit", hard.sum() / weight.sum())):
        found = stages(student, teacher, hmw_norm=norm)(drawn, 0)["logits"]
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_padding_does_not_count() -> None:
    teacher = random_sam()
    student = near(teacher)
    objective = stages(student, teacher)
    drawn = objective.source.draw(0, Share())
    batch = drawn.batch
    hidden = (batch.valid == 0)[batch.owner]
    assert hidden.any()
    other = replace(drawn, batch=replace(batch, target=batch.target.masked_fill(hidden, 1.0)))
    results = []
    for one in (drawn, other):
        terms = objective(one, 0)
        torch.stack(list(terms.values())).sum().backward()
        grads = [p.grad.clone() for p in student.image_encoder.parameters()]
        results.append(([t.item() for t in terms.values()], grads))
        student.zero_grad()
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_what_the_teacher_says_of_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = random_sam()
    student = near(teacher)
    objective = stages(student, teacher)
    drawn = objective.source.draw(0, Share())
    outside = drawn.batch.valid == 0
    cells = torch.stack([1 - valid_cells(size, 64, (8, 8)) for size in drawn.batch.sizes])
    assert outside.any()
    assert cells.any()

    def result() -> tuple[list[float], list[torch.Tensor]]:
        terms = objective(drawn, 0)
        torch.stack(list(terms.values())).sum().backward()
        grads = [p.grad.clone() for p in student.image_encoder.parameters()]
        student.zero_grad()
        return [t.item() for t in terms.values()], grads

    values, grads = result()
    said, distance = Guide.decode, Stages._embedding

    def other(self: Guide, features: torch.Tensor, owner: torch.Tensor, asked: Any) -> Any:
        found = said(self, features, owner, asked)
        return replace(found, logits=torch.where(outside[owner][:, None], 50.0, found.logits))

    monkeypatch.setattr(Guide, "decode", other)
    monkeypatch.setattr(
        Stages, "_embedding", lambda s, mine, theirs, b: distance(s, mine, theirs + 9 * cells, b)
    )
    again, same = result()
    assert again == values
    assert all(map(torch.equal, same, grads))


def test_several_clicks_teach_the_single_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = random_sam(seed=5), random_sam()
    objective = stages(student, teacher, prompts=2)
    step, drawn, groups = clicked(objective, 1)
    group = groups[-1:]
    monkeypatch.setattr(objective, "asked", lambda *_: group)
    objective(drawn, step)["mask"].backward()
    heads = student.mask_decoder.output_hypernetworks_mlps
    slopes = [sum(p.grad.abs().sum().item() for p in head.parameters()) for head in heads]
    assert slopes[0] > 0
    assert slopes[1:] == [0, 0, 0]


# ----------------------------------------------------------------------------------------- prompts


def test_clicks_lie_in_what_is_missed() -> None:
    student = random_sam()
    objective = stages(student, random_sam(seed=5))
    step, drawn, groups = clicked(objective, 3)
    batch = drawn.batch
    everything = torch.cat([rows for _, rows in groups])
    assert everything.sort().values.tolist() == list(range(len(batch.owner)))
    features = student.image_encoder(batch.images)
    for asked, rows in groups:
        assert not asked.points.requires_grad
        assert (asked.labels[:, 0] == 1).all()
        assert (asked.labels[:, 1] == -1).all()
        assert (asked.labels[:, 2:] == 1).all()
        assert asked.masks is None
        for count in range(2, asked.labels.shape[1]):
            earlier = replace(asked, points=asked.points[:, :count], labels=asked.labels[:, :count])
            answer = decode(student, features, batch.owner[rows], earlier)
            mask = chosen(answer.at(objective.source.grid), earlier) > 0
            missed = (batch.target[rows] >= 0.5) & ~mask & (batch.valid[batch.owner[rows]] >= 0.5)
            cell = to_cell(asked.points[:, count], 64 / mask.shape[-1])
            assert missed[torch.arange(len(rows)), cell[:, 1], cell[:, 0]].all()
    again = objective.asked(features, batch, step)
    assert all(
        torch.equal(a.points, b.points) for (a, _), (b, _) in zip(groups, again, strict=True)
    )


def test_what_lacks_nothing_is_asked_no_further() -> None:
    student = random_sam()
    with torch.no_grad():
        for head in student.mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.zero_()
        student.mask_decoder.output_upscaling[-1] = Everything()
    objective = stages(student, random_sam(seed=5))
    with torch.no_grad():
        for head in student.mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].bias += 1
        for step in range(6):
            drawn = objective.source.draw(step, Share())
            features = student.image_encoder(drawn.batch.images)
            ((asked, rows),) = objective.asked(features, drawn.batch, step)
            assert asked.labels.shape == (len(drawn.batch.owner), 2)
            assert len(rows) == len(drawn.batch.owner)


class Everything(nn.Module):
    """An activation after which all masks cover the frame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def test_rounds_are_drawn_from_0_to_9(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = stages(random_sam(), random_sam(seed=5), prompts=1)
    drawn = objective.source.draw(0, Share())
    calls: list[int] = []

    def counted(model: Any, features: Any, owner: Any, asked: Any) -> Any:
        calls.append(asked.labels.shape[1])
        return decode(model, features, owner, asked)

    monkeypatch.setattr(full_stage, "decode", counted)
    monkeypatch.setattr(full_stage, "chosen", lambda d, _: torch.full_like(d.logits[:, 0], -1.0))
    features = objective.student.image_encoder(drawn.batch.images).detach()
    lengths = set()
    for step in range(30):
        calls.clear()
        objective.asked(features, drawn.batch, step)
        lengths.add(len(calls))
    assert lengths == set(range(10))


# ----------------------------------------------------------------------------------------- balance


def test_the_three_distances_are_equal_in_the_first_batch(data: Dataset) -> None:
    teacher, student = random_sam(seed=5), random_sam()
    objective = stages(student, teacher)
    objective.settle()
    terms = {k: v.item() for k, v in objective(objective.source.draw(0, Share()), 0).items()}
    third = (terms["mask"] + terms["iou"]) / 3
    assert [terms[name] for name in TERMS[:3]] == pytest.approx([third] * 3)
    given = stages(student, teacher, alpha=0.0, gamma=2.5)
    given.settle()
    weights = given.balance.weights.tolist()
    assert weights == [0.0, objective.balance.weights[1].item(), 2.5]
    done = small(alpha=0.0, gamma=2.5)(student, data=data, teacher=teacher, progress=False)
    state = sc.lineage(done)[-1].state
    assert (state["alpha"], state["gamma"]) == (0.0, 2.5)
    assert state["beta"] > 0


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("decoder", ["train", "freeze"])
def test_gradients(decoder: str) -> None:
    teacher = random_sam(seed=5)
    student = random_sam()
    objective = stages(student, teacher, decoder=decoder)
    with training(objective, objective.settings.parts):
        objective(objective.source.draw(0, Share()), 0)["mask"].backward()
        assert all(p.grad.abs().sum() > 0 for p in student.image_encoder.parameters())
        assert all(p.grad is None for p in student.prompt_encoder.parameters())
        found = [p.grad is not None for p in student.mask_decoder.parameters()]
        assert any(found) == (decoder == "train")
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("decoder", ["train", "freeze"])
def test_only_declared_modules_change(decoder: str, data: Dataset) -> None:
    teacher, student = random_sam(seed=5), random_sam()
    before, kept = copied(student), copied(teacher)
    done = small(decoder=decoder)(student, data=data, teacher=teacher, progress=False)
    prefixes = ("image_encoder.", "mask_decoder.") if decoder == "train" else ("image_encoder.",)
    assert changed(before, done) == {n for n in before if n.startswith(prefixes)}
    assert not changed(kept, teacher)
    assert not changed(before, student)
    assert all(p.grad is None for m in (teacher, student, done) for p in m.parameters())


# -------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("decoder", ["train", "freeze"])
def test_it_learns(decoder: str, trained: nn.Module) -> None:
    chain = sc.prune.Mlp(ratio=0.75, criterion="magnitude") | FullStage(
        steps=6, batch_size=2, prompts=2, decoder=decoder, lr=5e-4
    )
    done = chain(trained, data=sc.shapes(4), progress=False)
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"]
    assert (state["images"], state["steps"], state["skipped"]) == (4, 6, 0)


@pytest.mark.parametrize("size", [64, 128])
def test_teacher_of_another_size(size: int, data: Dataset) -> None:
    student = random_sam(image_size=192 - size)
    teacher = random_sam(seed=5, image_size=size, embed_dim=48)
    done = small()(student, data=data, teacher=teacher, progress=False)
    assert len(sc.lineage(done)[-1].state["curve"]) == 2
    assert not equal(done, student)


@pytest.mark.parametrize("fields", [{}, {"decoder": "train", "ema": 0.9, "accumulate": 2}], ids=str)
def test_resumed_equals_uninterrupted(
    fields: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    step = small(**{"steps": 6, **fields})
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    whole = step(random_sam(), **run)
    again = stopped_and_resumed(step, random_sam(), run, tmp_path)
    assert equal(whole, again)
    state = sc.lineage(whole)[-1].state
    assert state == sc.lineage(again)[-1].state
    (checkpoint,) = tmp_path.glob("distill-full_stage-*.safetensors")
    with safe_open(checkpoint, framework="pt") as file:
        kept = file.get_tensor("model.balance.weights").tolist()
    assert kept == pytest.approx([state[k] for k in ("alpha", "beta", "gamma")], rel=1e-3)


def test_workers_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    first, second = (small(workers=n)(random_sam(), **run) for n in (0, 2))
    assert equal(first, second)


def test_micro_batches_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    whole, parts = (small(steps=1, batch_size=4, accumulate=a)(random_sam(), **run) for a in (1, 4))
    curves = [sc.lineage(m)[-1].state["curve"] for m in (whole, parts)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_the_predictor_gives_the_logits_of_training(data: Dataset, tmp_path: Path) -> None:
    done = small(decoder="train", lr=1e-3)(
        random_sam(), data=data, teacher=random_sam(seed=5), progress=False
    )
    sc.save(done, tmp_path / "student")
    objective = stages(done, random_sam(seed=5), batch_size=1)
    _, drawn, groups = clicked(objective, 1)
    image = data[drawn.batch.indices[0]].image
    asked, rows = groups[-1]
    # Clicks fall anywhere in a cell; the predictor takes none beyond the first pixel's centre.
    asked = replace(asked, points=asked.points.clamp(min=0))
    points = torch.cat([asked.points[:, :1], asked.points[:, 2:]], 1)
    prompts = [sc.Prompt(points=p.tolist(), labels=[1] * len(p)) for p in points]
    found = sc.predict(sc.load(tmp_path / "student"), [image], [prompts])[0].logits
    with torch.no_grad():
        features = done.image_encoder(drawn.batch.images)
        expected = decode(done, features, drawn.batch.owner[rows], asked).logits
    torch.testing.assert_close(found, expected[:, :1], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ errors


def test_nothing_to_learn(data: Dataset) -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        small()(random_sam(), data=data, progress=False)
    assert str(caught.value) == (
        "distill.full_stage has nothing to learn.\n"
        "  got       a student that equals the teacher already\n"
        "  expected  a step before it that changes what the model says\n"
        "  try       teacher=, the model to imitate: without it that is the one that came in"
    )


def test_other_channels(data: Dataset) -> None:
    with pytest.raises(errors.ModelError) as caught:
        small()(random_sam(), data=data, teacher=random_sam(out_chans=64), progress=False)
    assert str(caught.value) == (
        "student and teacher differ in the channels of the embedding.\n"
        "  where     distill.full_stage\n"
        "  got       student 32, teacher 64\n"
        "  expected  the same number; sizes of images and grids may differ\n"
        "  try       a teacher= of the same family as the student"
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("prompts", 0, ">= 1"),
        ("alpha", -1.0, "0 <= alpha <= inf"),
        ("beta", -1.0, "0 <= beta <= inf"),
        ("gamma", -1.0, "0 <= gamma <= inf"),
        ("hmw_norm", "max", "'sum' | 'mean' | 'unit'"),
        ("decoder", "lora", "'train' | 'freeze'"),
    ],
)
def test_fields_out_of_range(field: str, value: object, expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        FullStage(**{field: value})
    assert str(caught.value).startswith(f"distill.full_stage: {field} ")
    assert f"  expected  {expected}" in str(caught.value)


def test_rates() -> None:
    plan = FullStage().plan(160)
    assert (plan.steps, plan.optimizer, plan.weight_decay, plan.lr) == (160, "adam", 0.0, 1e-4)
