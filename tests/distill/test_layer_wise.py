from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal, near, scenes, stopped_and_resumed
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core._trainable import training
from samcompress.core.data import Dataset
from samcompress.distill._losses import to_grid
from samcompress.distill._taps import EMBEDDING, block, states
from samcompress.distill._views import Seen, apart
from samcompress.distill.layer_wise import Layers, LayerWise, partner, ramp, switch


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


def context(teacher: nn.Module, data: Dataset) -> Any:
    return SimpleNamespace(original=teacher, data=data, device=torch.device("cpu"))


def layers(student: nn.Module, teacher: nn.Module, **fields: Any) -> Layers:
    settings = LayerWise(batch_size=4, **fields)
    return Layers(student, context(teacher, scenes()), settings, steps=10)


# --------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("fields", [{}, {"tau": 0.9, "rho": 0.05, "kappa": 1.0}])
def test_ramp(count: int, fields: dict[str, float]) -> None:
    before = 0.0
    for i in range(101):
        w = ramp(i / 100, count, **fields)
        assert min(w) >= 0
        assert sum(w) == pytest.approx(1)
        centre = sum(number * v for number, v in enumerate(w, 1))
        assert centre >= before - 1e-12
        before = centre
    assert ramp(0.0, count, **fields) == [1.0] + [0.0] * (count - 1)
    assert all(v > 0 for v in w)


def test_ramp_by_hand() -> None:
    # a = 1, (0.4 - 0.3) / 0.2 = 0.5; kappa: 1 / 1.5 and 1.
    assert ramp(0.4, 2) == pytest.approx([(2 / 3) / (2 / 3 + 0.5), 0.5 / (2 / 3 + 0.5)])


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_switch(count: int) -> None:
    chosen = []
    for i in range(1000):
        w = switch(i / 1000, count)
        if i < 600:
            assert sorted(w) == [0.0] * (count - 1) + [1.0]
            chosen.append(w.index(1.0) + 1)
        else:
            assert w == [0.0] * count
    assert chosen == sorted(chosen)
    assert set(chosen) == set(range(1, count + 1))
    assert chosen[0] == 1


def test_partners() -> None:
    assert [partner(n, 6, 12) for n in range(1, 7)] == [2, 4, 6, 8, 10, 12]
    assert [partner(n, 8, 12) for n in range(1, 9)] == [2, 3, 5, 6, 8, 9, 11, 12]
    assert [partner(n, 6, 2) for n in range(1, 7)] == [1, 1, 1, 1, 2, 2]
    assert [partner(n, 5, 5) for n in range(1, 6)] == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("schedule", ["ramp", "switch"])
def test_student_that_is_the_teacher(schedule: str) -> None:
    teacher = random_sam()
    objective = layers(copy.deepcopy(teacher), teacher, schedule=schedule)
    with training(objective, objective.settings.parts):
        for step in (0, 5, 9):
            terms = objective(objective.source.draw(step, Share()), step)
            assert {k: v.item() for k, v in terms.items()} == {"layers": 0.0, "embedding": 0.0}
            torch.stack(list(terms.values())).sum().backward()
        assert all(
            p.grad is not None and not p.grad.any()
            for p in objective.student.image_encoder.parameters()
        )


def test_nothing_to_learn(data: Dataset) -> None:
    with pytest.raises(errors.NoEffectError, match=r"distill.layer_wise has nothing to learn"):
        LayerWise(steps=1)(random_sam(), data=data, progress=False)


def test_terms_by_hand() -> None:
    teacher, student = random_sam(), near(random_sam())
    objective = layers(student, teacher, weight=3.0)
    drawn = objective.source.draw(0, Share())
    names = [block(0), block(1), EMBEDDING]
    mine, theirs = (states(m.image_encoder, drawn.images[0], names) for m in (student, teacher))
    errors_ = [
        torch.stack(
            [
                (a - b)[:, : h // 8, : w // 8].square().mean()
                for a, b, (h, w) in zip(mine[n], theirs[n], drawn.sizes, strict=True)
            ]
        ).mean()
        for n in names
    ]
    for step, progress in ((0, 0.0), (7, 0.7), (-1, 1.0)):
        w = ramp(progress, 2)
        terms = objective(drawn, step)
        expected = 3 * (w[0] * errors_[0] + w[1] * errors_[1])
        torch.testing.assert_close(terms["layers"], expected)
        torch.testing.assert_close(terms["embedding"], errors_[2])


def test_padding_does_not_count() -> None:
    student, teacher, name = *torch.randn(2, 2, 5, 8, 8), block(0)
    seen = Seen((torch.zeros(2, 3, 64, 64),), ((40, 64), (64, 48)), (0, 1))
    hidden = (seen.valid((8, 8)) == 0).expand_as(teacher)
    student.requires_grad_()
    loss = apart(seen, name, student, teacher)
    loss.backward()
    other = student.detach().masked_fill(hidden, 50.0).requires_grad_()
    same = apart(seen, name, other, teacher.masked_fill(hidden, -9.0))
    same.backward()
    assert same.item() == loss.item()
    assert torch.equal(student.grad, other.grad)
    assert not student.grad[hidden].any()
    crops = [(student - teacher)[0, :, :5], (student - teacher)[1, :, :, :6]]
    assert loss.item() == pytest.approx(sum(c.square().mean().item() for c in crops) / 2)
    # A finer teacher is averaged to the student's grid.
    fine = torch.randn(2, 5, 16, 16)
    assert torch.equal(
        apart(seen, name, student, fine), apart(seen, name, student, to_grid(fine, (8, 8)))
    )


def test_other_channels(data: Dataset) -> None:
    with pytest.raises(errors.ModelError) as caught:
        LayerWise(steps=1)(
            random_sam(), data=data, teacher=random_sam(out_chans=64), progress=False
        )
    assert str(caught.value) == (
        "student and teacher differ in width where they are compared.\n"
        "  where     image_encoder\n"
        "  got       student (32, 8, 8), teacher (64, 8, 8)\n"
        "  expected  the same number of channels, or a record of which of them were kept\n"
        "  try       a teacher= of the same family as the student"
    )


class Plain(nn.Module):
    """An image encoder without blocks."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.img_size = 64
        self.stem = nn.Conv2d(3, channels, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)


def test_teacher_without_the_tapped_layer(data: Dataset) -> None:
    teacher = random_sam()
    teacher.image_encoder = Plain()
    with pytest.raises(errors.ModelError) as caught:
        LayerWise(steps=1)(random_sam(), data=data, teacher=teacher, progress=False)
    assert str(caught.value) == (
        "the teacher lacks a layer that is tapped.\n"
        "  where     the teacher's image_encoder.blocks\n"
        "  got       Plain with stem\n"
        "  expected  ViT blocks with attn.qkv and mlp.act, as segment_anything builds them\n"
        "  try       a teacher with a ViT encoder, or sc.distill.Encoder(), which compares "
        "embeddings only"
    )
    with pytest.raises(errors.ModelError, match="the student lacks a layer"):
        LayerWise(steps=1)(teacher, data=data, teacher=random_sam(), progress=False)


# -------------------------------------------------------------------------------------------- runs


def test_only_the_encoder_changes(data: Dataset) -> None:
    teacher, student = random_sam(seed=5, embed_dim=48), random_sam()
    before, kept, random_state = copied(student), copied(teacher), torch.get_rng_state()
    done = LayerWise(steps=1, batch_size=2)(student, data=data, teacher=teacher, progress=False)
    assert changed(before, done) == {n for n in before if n.startswith("image_encoder.")}
    assert not changed(kept, teacher)
    assert not changed(before, student)
    assert all(p.grad is None for m in (teacher, student, done) for p in m.parameters())
    assert not any(m._forward_hooks for s in (teacher, done) for m in s.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_maps_between_widths_learn_and_are_thrown_away(data: Dataset) -> None:
    objective = layers(random_sam(), random_sam(embed_dim=48))
    assert {n: (m.in_channels, m.out_channels) for n, m in objective.maps.items()} == {
        "blocks_0": (32, 48),
        "blocks_1": (32, 48),
    }
    twin = layers(random_sam(), random_sam(embed_dim=48))
    assert equal(objective.maps, twin.maps)
    with training(objective, objective.settings.parts) as parameters:
        assert "maps.blocks_1.weight" in parameters
        terms = objective(objective.source.draw(9, Share()), 9)
        terms["layers"].backward()
        assert all(p.grad.any() for p in objective.maps.parameters())
    assert not layers(random_sam(), random_sam(seed=3)).maps


def test_it_learns(trained: nn.Module) -> None:
    chain = sc.prune.Mlp(ratio=0.75, criterion="magnitude") | LayerWise(steps=6, batch_size=2)
    state = sc.lineage(chain(trained, data=sc.shapes(4), progress=False))[-1].state
    assert state["loss_after"] < state["loss_before"] / 1.5
    assert (state["images"], state["steps"], state["skipped"]) == (4, 6, 0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ({}, {"image_size": 96, "embed_dim": 48}),
        ({"image_size": 96}, {"depth": 5}),
        ({"depth": 3}, {"image_size": 128}),
    ],
    ids=str,
)
def test_teacher_of_another_size(student: Any, teacher: Any, data: Dataset) -> None:
    small = random_sam(**student)
    done = LayerWise(steps=8, batch_size=3, lr=3e-3)(
        small, data=data, teacher=random_sam(seed=5, **teacher), progress=False
    )
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"]
    assert {k: v.shape for k, v in done.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }


@pytest.mark.parametrize(
    "step",
    [sc.substitute.ImageSize(size=32), sc.substitute.ImageSize(size=48) | sc.attention.Fused()],
    ids=repr,
)
def test_students_of_other_families(step: sc.Pipeline, data: Dataset) -> None:
    train = LayerWise(steps=6, batch_size=3, schedule="switch")
    done = (step | train)(random_sam(), data=data, progress=False)
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"]


@pytest.mark.parametrize(
    "fields", [{}, {"schedule": "switch", "ema": 0.9}, {"accumulate": 2}], ids=str
)
def test_resumed_equals_uninterrupted(
    fields: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    step = LayerWise(steps=6, batch_size=2, **fields)
    run = {"data": data, "teacher": random_sam(seed=5, embed_dim=48), "progress": False}
    whole = step(random_sam(), **run)
    again = stopped_and_resumed(step, random_sam(), run, tmp_path)
    assert equal(whole, again)
    assert sc.lineage(whole)[-1].state == sc.lineage(again)[-1].state


def test_workers_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    one, two = (LayerWise(steps=2, batch_size=2, workers=w)(random_sam(), **run) for w in (0, 1))
    assert equal(one, two)


def test_micro_batches_change_nothing(data: Dataset) -> None:
    run = {"data": data, "teacher": random_sam(seed=5), "progress": False}
    steps = [LayerWise(steps=1, batch_size=4, accumulate=a) for a in (1, 4)]
    curves = [sc.lineage(s(random_sam(), **run))[-1].state["curve"] for s in steps]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schedule", "ramps", "'ramp' | 'switch'"),
        ("tau", 0.0, "0 < tau < 1"),
        ("rho", 1.5, "0 < rho < 1"),
        ("kappa", 0.0, "0 < kappa < inf"),
        ("weight", -1.0, "0 < weight < inf"),
        ("batch_size", 0, ">= 1"),
    ],
)
def test_fields_out_of_range(field: str, value: object, expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        LayerWise(**{field: value})
    assert str(caught.value).startswith(f"distill.layer_wise: {field} ")
    assert f"  expected  {expected}" in str(caught.value)
