from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal, near, scenes, stopped_and_resumed, together
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core._trainable import training
from samcompress.core.data import Dataset
from samcompress.distill import prompt_loop
from samcompress.distill._clicks import Asked, Clicks, to_cell
from samcompress.distill._decode import decode
from samcompress.distill._guide import Guide
from samcompress.distill._losses import to_grid
from samcompress.distill._mask_losses import bce, dice
from samcompress.distill.prompt_loop import Loop, PromptLoop, best

MODES = ("train", "freeze", "lora")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


def loop(student: nn.Module, teacher: nn.Module, **fields: Any) -> Loop:
    settings = PromptLoop(**{"batch_size": 4, **fields})
    return Loop(student, *together(student, teacher, settings), settings)


def small(**fields: Any) -> PromptLoop:
    return PromptLoop(**{"steps": 2, "batch_size": 2, "prompts": 2, **fields})


class Spy:
    """Keeps what a function was asked and what it said."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            self.calls.append((args, kwargs, found))
            return found

        patch.setattr(owner, name, watched)


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("box_share", [0.0, 1.0])
def test_student_that_is_the_teacher(box_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = random_sam()
    objective = loop(copy.deepcopy(teacher), teacher, box_share=box_share, iou=1.0, rounds=3)
    spy = Spy(monkeypatch, Clicks, "errors")
    answers = Spy(monkeypatch, prompt_loop, "decode")
    drawn = objective.source.draw(0, Share())
    terms = objective(drawn, 0)
    # The masks differ nowhere, so no prompt is asked again.
    assert len(spy.calls) == len(answers.calls) == 1
    (_, mine, theirs), _, (_, labels) = spy.calls[0][0][:3], 0, spy.calls[0][2]
    assert torch.equal(mine, theirs)
    assert (labels == -1).all()
    assert terms["iou"].item() == 0
    # What is left is how unsure the teacher is of its own masks.
    shown = answers.calls[0][2].at(objective.source.grid)
    logits = shown.logits[:, : 1 if box_share else 4]
    valid = drawn.batch.valid[drawn.batch.owner]
    target = (logits > 0).float()
    for name, loss in (("cross-entropy", bce), ("dice", dice)):
        assert terms[name].item() == pytest.approx(5 * loss(logits, target, valid).mean().item())


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = random_sam()
    student = near(teacher)
    objective = loop(student, teacher)
    drawn = objective.source.draw(0, Share())
    hidden = drawn.batch.valid == 0
    assert hidden.any()

    def result() -> tuple[list[float], list[Tensor]]:
        terms = objective(drawn, 0)
        torch.stack(list(terms.values())).sum().backward()
        grads = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        student.zero_grad()
        return [t.item() for t in terms.values()], grads

    values, grads = result()
    real = Guide.decode

    def other(self: Guide, features: Tensor, owner: Tensor, asked: Asked) -> Any:
        found = real(self, features, owner, asked)
        return replace(found, logits=torch.where(hidden[owner][:, None], 50.0, found.logits))

    monkeypatch.setattr(Guide, "decode", other)
    again, same = result()
    assert again == values
    assert all(map(torch.equal, same, grads))


def test_annotated_masks_only_say_where_prompts_are() -> None:
    teacher = random_sam()
    objective = loop(near(teacher), teacher, box_share=1.0)
    drawn = objective.source.draw(0, Share())
    blank = replace(drawn, batch=replace(drawn.batch, target=torch.zeros_like(drawn.batch.target)))
    assert [t.item() for t in objective(drawn, 0).values()] == [
        t.item() for t in objective(blank, 0).values()
    ]


@pytest.mark.parametrize(("box_share", "masks"), [(1.0, {0}), (0.0, {0, 1, 2, 3})])
def test_a_box_teaches_the_single_mask_alone(box_share: float, masks: set[int]) -> None:
    teacher = random_sam()
    student = near(teacher)
    objective = loop(student, teacher, box_share=box_share)
    torch.stack(list(objective(objective.source.draw(0, Share()), 0).values())).sum().backward()
    heads = student.mask_decoder.output_hypernetworks_mlps
    slopes = [sum(p.grad.abs().sum() for p in head.parameters()) for head in heads]
    assert {i for i, slope in enumerate(slopes) if slope > 0} == masks
    assert all(p.grad is None for p in student.mask_decoder.iou_prediction_head.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_soft_targets() -> None:
    teacher = random_sam()
    student = copy.deepcopy(teacher)
    hard, soft = (loop(student, teacher, target=t, rounds=1) for t in ("hard", "soft"))
    drawn = hard.source.draw(0, Share())
    assert hard(drawn, 0) != soft(drawn, 0)
    slopes = []
    for objective in (hard, soft):
        objective(drawn, 0)["cross-entropy"].backward()
        slopes.append(student.image_encoder.neck[0].weight.grad.abs().max().item())
        student.zero_grad()
    # Cross-entropy is least where the probabilities are equal.
    assert slopes[1] < 1e-3 * slopes[0]


def test_the_mask_that_is_clicked_on() -> None:
    logits = torch.arange(8.0).view(2, 4, 1, 1)
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3]] * 2)
    asked = Asked(torch.zeros(2, 3, 2), torch.tensor([[2, 3, 0], [1, -1, 1]]))
    assert best(logits, scores, asked).flatten().tolist() == [0.0, 5.0]


def test_clicks_lie_where_the_masks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = random_sam(image_size=128)
    student = random_sam(seed=3)
    objective = loop(student, teacher, rounds=3)
    errors_, mine, theirs = (
        Spy(monkeypatch, owner, name)
        for owner, name in ((Clicks, "errors"), (prompt_loop, "decode"), (Guide, "decode"))
    )
    drawn = objective.source.draw(0, Share())
    objective(drawn, 0)
    assert len(errors_.calls) == 2
    assert len(mine.calls) == len(theirs.calls) == 3
    asked = [args[3] for args, _, _ in mine.calls]
    assert [a.labels.shape[1] for a in asked] == [2, 3, 4]
    boxed = asked[0].labels[:, 0] == 2
    assert boxed.any()
    assert not boxed.all()
    assert torch.equal(asked[0].points[boxed].flatten(1), drawn.batch.boxes[boxed])
    for here, there in zip(mine.calls, theirs.calls, strict=True):
        assert there[0][3] is here[0][3]
        assert here[0][3].masks is None
        assert not here[0][3].points.requires_grad
        assert there[2].logits.shape == here[2].at(objective.source.grid).logits.shape
    for (_, student_mask, teacher_mask, _), kwargs, (points, labels) in errors_.calls:
        rows = kwargs["rows"]
        cell = to_cell(points, 64 / student_mask.shape[-1])
        place = (torch.arange(len(rows)), cell[:, 1], cell[:, 0])
        going = labels >= 0
        assert going.sum() > 3
        assert (student_mask ^ teacher_mask)[place][going].all()
        assert (drawn.batch.valid[drawn.batch.owner[rows]][place] >= 0.5)[going].all()
        assert torch.equal(teacher_mask[place][going], labels[going] == 1)


def test_teacher_answers_on_the_students_grid() -> None:
    teacher, student = random_sam(image_size=128), random_sam()
    objective = loop(student, teacher)
    drawn = objective.source.draw(0, Share())
    features = objective.guide.features(drawn)
    assert torch.equal(features, teacher.image_encoder(drawn.batch.others[0]))
    asked = Asked(torch.tensor([[[10.0, 20.0], [0, 0]]]), torch.tensor([[1, -1]]))
    found = objective.guide.decode(features, torch.tensor([1]), asked).logits
    same = Asked(torch.tensor([[[20.5, 40.5], [0, 0]]]), asked.labels)
    expected = decode(teacher, features, torch.tensor([1]), same).logits
    torch.testing.assert_close(found, to_grid(expected, (64, 64)), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: str) -> None:
    teacher = random_sam()
    student = near(teacher)
    objective = loop(student, teacher, decoder=mode)
    with training(objective, objective.settings.parts):
        terms = objective(objective.source.draw(0, Share()), 0)
        assert list(terms) == ["cross-entropy", "dice"]
        torch.stack(list(terms.values())).sum().backward()
        slopes = {n: p.grad for n, p in student.named_parameters()}
        encoder = [g for n, g in slopes.items() if n.startswith("image_encoder.")]
        assert all(g is not None and g.abs().sum() > 0 for g in encoder)
        assert all(g is None for n, g in slopes.items() if n.startswith("prompt_encoder."))
        decoder = [g for n, g in slopes.items() if n.startswith("mask_decoder.")]
        assert any(g is not None for g in decoder) == (mode == "train")
        if mode == "lora":
            assert all(u.b.grad.abs().sum() > 0 for u in objective.updates)


@pytest.mark.parametrize(("mode", "iou"), [*((m, 0.0) for m in MODES), ("train", 1.0)])
def test_only_declared_modules_change(mode: str, iou: float, data: Dataset) -> None:
    teacher = random_sam()
    student = near(teacher)
    before, kept = copied(student), copied(teacher)
    kinds = [(n, type(m)) for n, m in student.named_modules()]
    step = small(decoder=mode, iou=iou, lr=1e-3)
    done = step(student, data=data, teacher=teacher, progress=False)
    found = changed(before, done)
    head = {n for n in before if n.startswith("mask_decoder.iou_prediction_head.")}
    decoder = {n for n in before if n.startswith("mask_decoder.")}
    expected = {
        "train": decoder if iou else decoder - head,
        "freeze": set(),
        "lora": {n for n in decoder if n.endswith(("q_proj.weight", "v_proj.weight"))},
    }[mode]
    assert found == {n for n in before if n.startswith("image_encoder.")} | expected
    assert [(n, type(m)) for n, m in done.named_modules()] == kinds
    assert not changed(kept, teacher)
    assert all(p.grad is None for m in (teacher, student, done) for p in m.parameters())
    assert all(p.requires_grad for p in done.parameters())
    assert sc.lineage(done)[-1].state["iou_trained"] == (iou > 0)


# -------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("mode", MODES)
def test_it_learns(mode: str, trained: nn.Module) -> None:
    chain = sc.prune.Mlp(ratio=0.75, criterion="magnitude") | PromptLoop(
        steps=6, batch_size=2, prompts=2, decoder=mode, lr=1e-3
    )
    done = chain(trained, data=sc.shapes(4), progress=False)
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"]
    assert (state["images"], state["steps"], state["skipped"]) == (4, 6, 0)


@pytest.mark.parametrize(
    ("size", "augment"), [(64, None), (128, None), (128, sc.distill.Augment())]
)
def test_teacher_of_another_size(size: int, augment: Any, data: Dataset) -> None:
    student = random_sam(image_size=192 - size)
    teacher = random_sam(seed=5, image_size=size, out_chans=64)
    done = small(augment=augment)(student, data=data, teacher=teacher, progress=False)
    assert len(sc.lineage(done)[-1].state["curve"]) == 2
    assert not equal(done, student)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder": "freeze", "ema": 0.9, "augment": {"scale": [0.5, 2.0]}},
        {"decoder": "lora", "iou": 0.5, "accumulate": 2},
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(
    fields: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    step = small(**{"steps": 6, **fields})
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    whole = step(random_sam(), **run)
    again = stopped_and_resumed(step, random_sam(), run, tmp_path)
    assert equal(whole, again)
    assert sc.lineage(whole)[-1].state == sc.lineage(again)[-1].state
    assert len(list(tmp_path.glob("distill-prompt_loop-*.safetensors"))) == 1


def test_workers_and_random_state_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    first = small()(random_sam(), **run)
    torch.rand(1)
    before = torch.get_rng_state()
    second = small(workers=2)(random_sam(), **run)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, second)


def test_micro_batches_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    whole, parts = (small(steps=1, batch_size=4, accumulate=a)(random_sam(), **run) for a in (1, 4))
    curves = [sc.lineage(m)[-1].state["curve"] for m in (whole, parts)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


def test_the_encoders_cache_is_used_again(data: Dataset, tmp_path: Path) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False, "workdir": tmp_path}
    student = sc.distill.Encoder(steps=1, batch_size=2)(random_sam(), **run)
    (cached,) = (tmp_path / "teacher").glob("*.safetensors")
    written = cached.stat().st_mtime_ns
    small(steps=1)(student, **run)
    assert [cached] == list((tmp_path / "teacher").glob("*.safetensors"))
    assert cached.stat().st_mtime_ns == written


@pytest.mark.parametrize("mode", ["train", "lora"])
def test_the_predictor_gives_the_logits_of_training(
    mode: str, data: Dataset, tmp_path: Path
) -> None:
    done = small(decoder=mode, lr=1e-3)(
        random_sam(), data=data, teacher=random_sam(seed=5), progress=False
    )
    sc.save(done, tmp_path / "student")
    loaded = sc.load(tmp_path / "student")
    objective = loop(done, random_sam(seed=5), batch_size=1, box_share=1.0)
    batch = objective.source.draw(0, Share()).batch
    boxes = [sc.Prompt(box=box) for box in batch.boxes.tolist()]
    image = data[batch.indices[0]].image
    found = sc.predict(loaded, [image], [boxes])[0].logits
    asked = Asked(batch.boxes.view(-1, 2, 2), torch.tensor([[2, 3]] * len(boxes)))
    with torch.no_grad():
        expected = decode(done, done.image_encoder(batch.images), batch.owner, asked).logits
    torch.testing.assert_close(found, expected[:, :1], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ errors


def test_nothing_to_learn(data: Dataset) -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        small()(random_sam(), data=data, progress=False)
    assert str(caught.value) == (
        "distill.prompt_loop has nothing to learn.\n"
        "  got       a student that equals the teacher already\n"
        "  expected  a step before it that changes what the model says\n"
        "  try       teacher=, the model to imitate: without it that is the one that came in"
    )


def test_another_number_of_masks(data: Dataset) -> None:
    with pytest.raises(errors.ModelError) as caught:
        small()(
            random_sam(), data=data, teacher=random_sam(num_multimask_outputs=2), progress=False
        )
    assert str(caught.value) == (
        "student and teacher differ in the masks a prompt.\n"
        "  where     distill.prompt_loop\n"
        "  got       student 4, teacher 3\n"
        "  expected  the same number; sizes of images and grids may differ\n"
        "  try       a teacher= of the same family as the student"
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rounds", 0, ">= 1"),
        ("prompts", 0, ">= 1"),
        ("lora_rank", 0, ">= 1"),
        ("box_share", 1.5, "0 <= box_share <= 1"),
        ("iou", -1.0, "0 <= iou <= inf"),
        ("decoder", "lorra", "'train' | 'freeze' | 'lora'"),
        ("target", "mixed", "'hard' | 'soft'"),
    ],
)
def test_fields_out_of_range(field: str, value: object, expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        PromptLoop(**{field: value})
    assert str(caught.value).startswith(f"distill.prompt_loop: {field} ")
    assert f"  expected  {expected}" in str(caught.value)


def test_rates() -> None:
    plan = PromptLoop(steps=100).plan(1)
    assert plan.rate(0) == 1e-4
    assert plan.rate(99) == pytest.approx(1e-5, rel=0.01)
    assert (plan.clip, plan.weight_decay, plan.optimizer) == (0.01, 0.05, "adamw")
    assert PromptLoop().plan(160).steps == 5 * 160 / 8
