from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import changed, copied, equal, near, scenes, stopped_and_resumed
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core._trainable import training
from samcompress.core.data import Dataset
from samcompress.distill._taps import EMBEDDING, HIDDEN, QKV, block, states
from samcompress.distill.align_bottleneck import AlignBottleneck, Bottlenecks, survivors
from samcompress.distill.align_embedding import AlignEmbedding, Outputs

BOTH = pytest.mark.parametrize("kind", [AlignBottleneck, AlignEmbedding])


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


def made(kind: type, student: nn.Module, teacher: nn.Module, steps: int = 20, **fields: Any) -> Any:
    """Its objective: two steps an epoch."""
    ctx: Any = SimpleNamespace(original=teacher, data=scenes(), device=torch.device("cpu"))
    return kind(batch_size=len(ctx.data) // 2, **fields).objective(student, ctx, steps)


def pruned(sam: nn.Module, seed: int = 0, ratio: float = 0.5) -> nn.Module:
    return sc.prune.Mlp(ratio=ratio, criterion="random", seed=seed)(sam, progress=False)


def error(one: Tensor, two: Tensor, sizes: Any) -> Tensor:
    """Mean over images of the mean over the cells that show them."""
    each = [(one - two)[i, :, : h // 8, : w // 8].square().mean() for i, (h, w) in enumerate(sizes)]
    return torch.stack(each).mean()


# ------------------------------------------------------------------------------------------ shares


def test_shares() -> None:
    first, second = AlignBottleneck(), AlignEmbedding()
    assert [first.share(n) for n in range(12)] == [0.5] * 10 + [0.0] * 2
    assert [second.share(n) for n in range(12)] == pytest.approx(
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    )
    assert AlignBottleneck(alpha=0.2, feature_epochs=1).share(0) == 0.2
    assert AlignEmbedding(feature_epochs=0).share(0) == 0.0


@BOTH
def test_share_of_a_step(kind: type) -> None:
    objective = made(kind, near(random_sam()), random_sam(), steps=8, feature_epochs=3)
    share = objective.settings.share
    assert [objective.alpha(step) for step in range(8)] == [
        share(n) for n in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert objective.alpha(-1) == share(3)  # judged as the last step
    assert kind().plan(40).epoch == 10


@BOTH
def test_plan(kind: type) -> None:
    plan = kind().plan(100)
    assert (plan.steps, plan.epoch, plan.schedule, plan.patience) == (500, 25, "plateau", 4)
    assert (plan.optimizer, plan.lr, plan.weight_decay, plan.clip) == ("adam", 1e-4, 0.0, None)
    assert plan.rate(0) == plan.rate(499) == 1e-4
    assert plan.rate(499, 2) == 2.5e-5


# ------------------------------------------------------------------------------------------ losses


@BOTH
def test_student_that_is_the_teacher(kind: type, data: Dataset) -> None:
    teacher = random_sam()
    objective = made(kind, copy.deepcopy(teacher), teacher)
    with training(objective, objective.settings.parts):
        for step in (0, 18, 19):
            terms = objective(objective.source.draw(step, Share()), step)
            assert set(map(torch.Tensor.item, terms.values())) == {0.0}
            torch.stack(list(terms.values())).sum().backward()
        assert all(not p.grad.any() for p in objective.student.image_encoder.parameters())
    with pytest.raises(errors.NoEffectError, match="has nothing to learn"):
        kind(steps=1)(teacher, data=data, progress=False)


@pytest.mark.parametrize("step", [0, 19, 20])
@pytest.mark.parametrize("cut", [False, True])
def test_bottlenecks_by_hand(step: int, cut: bool) -> None:
    teacher = random_sam()
    student = near(pruned(teacher) if cut else teacher)
    objective = made(AlignBottleneck, student, teacher)
    drawn = objective.source.draw(0, Share())
    names = [*(block(i, layer) for i in (0, 1) for layer in (QKV, HIDDEN)), EMBEDDING]
    mine, theirs = (states(m.image_encoder, drawn.images[0], names) for m in (student, teacher))
    if cut:
        state = sc.lineage(student)[-1].state["kept"]
        for i in (0, 1):
            units = state[f"image_encoder.blocks.{i}.mlp"]
            theirs[block(i, HIDDEN)] = theirs[block(i, HIDDEN)][:, units]
    found = {n: error(mine[n], theirs[n], drawn.sizes) for n in names}
    alpha = 0.5 if step < 20 else 0.0
    assert isinstance(objective, Bottlenecks)
    terms = objective(drawn, step)
    expected = {
        "qkv": alpha * (found[block(0, QKV)] + found[block(1, QKV)]) / 2,
        "hidden": alpha * (found[block(0, HIDDEN)] + found[block(1, HIDDEN)]) / 2,
        "embedding": (1 - alpha) * found[EMBEDDING],
    }
    torch.testing.assert_close(dict(terms), expected)


def test_queries_of_global_blocks_count() -> None:
    """Upstream compares them with themselves. Only their bias differs here, and nothing before."""
    teacher = random_sam()
    student = copy.deepcopy(teacher)
    assert student.image_encoder.blocks[1].window_size == 0
    with torch.no_grad():
        student.image_encoder.blocks[1].attn.qkv.bias += 0.5
    objective = made(AlignBottleneck, student, teacher)
    with training(objective, objective.settings.parts):
        term = objective(objective.source.draw(0, Share()), 0)["qkv"]
        assert term.item() == pytest.approx(0.5 * 0.25 / 2)  # alpha, 0.5 squared, one block of two
        term.backward()
        assert student.image_encoder.blocks[1].attn.qkv.weight.grad.any()


def test_a_cut_alone_leaves_the_first_hidden_units_equal() -> None:
    """Before anything else differs, the units that were kept say exactly what they said."""
    teacher = random_sam()
    once = pruned(teacher)
    for student in (once, pruned(once, seed=3)):
        objective = made(AlignBottleneck, student, teacher)
        drawn = objective.source.draw(0, Share())
        names = [block(0, HIDDEN)]
        mine, theirs = objective.learn(drawn, names), objective.teach(drawn, names)
        kept = objective.kept[names[0]]
        assert 0 < len(kept) == mine[names[0]].shape[1] < 96
        same = theirs[names[0]][:, kept]
        torch.testing.assert_close(mine[names[0]], same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [0, 6, 19, 25])
@pytest.mark.parametrize("middle", [False, True])
def test_outputs_by_hand(step: int, middle: bool, tmp_path: Path) -> None:
    original = random_sam()
    between = near(original, 0.05) if middle else original
    if middle:
        sc.save(between, tmp_path / "middle")
    student = near(pruned(original))
    path = str(tmp_path / "middle") if middle else None
    objective = made(AlignEmbedding, student, original, middle=path)
    drawn = objective.source.draw(0, Share())
    names = [block(0), block(1), EMBEDDING]
    v2, v1, v0 = (
        states(m.image_encoder, drawn.images[0], names) for m in (student, between, original)
    )
    alpha = max(0, (10 - step // 2 - 1) / 10)
    blocks = [error(v2[n], v1[n], drawn.sizes) for n in names[:2]]
    expected = {
        "blocks": alpha * (blocks[0] + blocks[1]) / 2,
        "middle": alpha * error(v2[EMBEDDING], v1[EMBEDDING], drawn.sizes),
        "embedding": (1 - alpha) * error(v2[EMBEDDING], v0[EMBEDDING], drawn.sizes),
    }
    torch.testing.assert_close(dict(objective(drawn, step)), expected)
    assert isinstance(objective, Outputs)


@BOTH
def test_padding_does_not_count(kind: type) -> None:
    objective = made(kind, near(pruned(random_sam())), random_sam())
    teach = objective.teach

    def disturbed(drawn: Any, names: Any, number: int = 0) -> dict[str, Tensor]:
        valid = drawn.valid((8, 8))
        assert 0 < valid.mean() < 1
        return {n: v + 100 * (1 - valid) for n, v in teach(drawn, names, number).items()}

    def result() -> tuple[float, list[Tensor]]:
        total = torch.stack(list(objective(objective.source.draw(0, Share()), 0).values())).sum()
        return total.item(), torch.autograd.grad(total, list(parameters.values()))

    with training(objective, objective.settings.parts) as parameters:
        before, slopes = result()
        objective.teach = disturbed
        after, same = result()
    assert after == before
    assert all(torch.equal(a, b) for a, b in zip(slopes, same, strict=True))


# --------------------------------------------------------------------------------------- what fits

NAME = "image_encoder.blocks.0.mlp"


def test_survivors_through_several_cuts() -> None:
    base = random_sam()
    once = pruned(base)
    twice = pruned(once, seed=3)
    first = sc.lineage(once)[-1].state["kept"][NAME]
    second = sc.lineage(twice)[-1].state["kept"][NAME]
    assert survivors(base, base, NAME) is None
    assert survivors(once, base, NAME) == first
    assert survivors(twice, base, NAME) == [first[i] for i in second]
    assert survivors(twice, once, NAME) == second
    assert survivors(once, once, NAME) is None
    assert survivors(once, base, "image_encoder.blocks.0.attn") is None
    lin1 = base.image_encoder.blocks[0].mlp.lin1.weight
    units = survivors(twice, base, NAME)
    assert torch.equal(twice.image_encoder.blocks[0].mlp.lin1.weight, lin1[units])


def test_units_that_the_teacher_lost(data: Dataset) -> None:
    base = random_sam()
    with pytest.raises(errors.ModelError) as caught:
        AlignBottleneck(steps=1)(pruned(base), data=data, teacher=pruned(base, 1), progress=False)
    text = str(caught.value)
    assert text.startswith(
        "the student has units that the teacher lost.\n"
        f"  where     {NAME}\n  got       48 units in the student, 48 in the teacher, "
    )
    assert text.endswith("  try       as teacher= the model from before both were pruned")


def test_widths_that_nothing_explains(data: Dataset) -> None:
    for fields, where, widths in (
        ({"mlp_ratio": 2}, "blocks.0.mlp.act", (64, 96)),
        ({"embed_dim": 48}, "blocks.0.attn.qkv", (144, 96)),
    ):
        with pytest.raises(errors.ModelError) as caught:
            AlignBottleneck(steps=1)(
                random_sam(**fields), data=data, teacher=random_sam(), progress=False
            )
        assert str(caught.value) == (
            "student and teacher differ in width where they are compared.\n"
            f"  where     image_encoder.{where}\n"
            f"  got       student ({widths[0]}, 8, 8), teacher ({widths[1]}, 8, 8)\n"
            "  expected  the same number of channels, or a record of which of them were kept\n"
            "  try       as teacher= the model that was pruned, or sc.distill.Encoder(), which "
            "compares embeddings only"
        )
    with pytest.raises(errors.ModelError, match=r"image_encoder.blocks.0\n"):
        AlignEmbedding(steps=1)(
            random_sam(embed_dim=48), data=data, teacher=random_sam(), progress=False
        )


@BOTH
def test_other_depth(kind: type, data: Dataset) -> None:
    with pytest.raises(errors.ModelError) as caught:
        kind(steps=1)(random_sam(), data=data, teacher=random_sam(depth=3), progress=False)
    assert str(caught.value) == (
        f"{kind.name} compares block with block.\n"
        "  got       student 2 blocks, teacher 3\n"
        "  expected  the same number\n"
        "  try       sc.distill.LayerWise(), which pairs layers of different depths"
    )


def test_teacher_without_the_tapped_layer(data: Dataset) -> None:
    teacher = random_sam()
    teacher.image_encoder.blocks[1].mlp = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(errors.ModelError) as caught:
        AlignBottleneck(steps=1)(random_sam(), data=data, teacher=teacher, progress=False)
    assert str(caught.value).startswith(
        "the teacher lacks a layer that is tapped.\n"
        "  where     the teacher's image_encoder.blocks.1.mlp.act\n"
        "  got       Sequential with 0\n"
    )
    # Its blocks' outputs are all there.
    assert AlignEmbedding(steps=1)(random_sam(), data=data, teacher=teacher, progress=False)


# -------------------------------------------------------------------------------------------- runs


@BOTH
def test_only_the_encoder_changes(kind: type, data: Dataset) -> None:
    teacher = random_sam()
    student = near(pruned(teacher))
    before, kept, random_state = copied(student), copied(teacher), torch.get_rng_state()
    done = kind(steps=1)(student, data=data, teacher=teacher, progress=False)
    assert changed(before, done) == {n for n in before if n.startswith("image_encoder.")}
    assert not changed(kept, teacher)
    assert all(p.grad is None for m in (teacher, student, done) for p in m.parameters())
    assert not any(m._forward_hooks for s in (teacher, done) for m in s.modules())
    assert torch.equal(random_state, torch.get_rng_state())


@BOTH
@pytest.mark.parametrize("fused", [False, True])
def test_it_learns(kind: type, fused: bool, data: Dataset) -> None:
    chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude")
    chain = chain | sc.attention.Fused() if fused else chain
    done = (chain | kind(steps=8, lr=2e-3))(random_sam(), data=data, progress=False)
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"] / 1.2
    assert (state["images"], state["steps"], state["skipped"]) == (len(data), 8, 0)


@BOTH
def test_teacher_of_another_size(kind: type, data: Dataset) -> None:
    done = kind(steps=8, lr=2e-3)(
        random_sam(), data=data, teacher=random_sam(seed=5, image_size=96), progress=False
    )
    state = sc.lineage(done)[-1].state
    assert state["loss_after"] < state["loss_before"]


def test_both_cuts_of_slimsam(data: Dataset, tmp_path: Path) -> None:
    """The first alignment's result is the second one's model in the middle."""
    original = random_sam()
    first = sc.prune.Mlp(ratio=0.25, criterion="magnitude") | AlignBottleneck(steps=2)
    middle = first(original, data=data, progress=False)
    sc.save(middle, tmp_path / "middle")
    second = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | AlignEmbedding(
        steps=4, lr=1e-3, middle=str(tmp_path / "middle")
    )
    small = sc.Pipeline([second], any_order=True)(
        middle, data=data, teacher=original, progress=False
    )
    state = sc.lineage(small)[-1].state
    assert state["loss_after"] < state["loss_before"]
    assert small.image_encoder.blocks[0].mlp.lin1.out_features == 32


@BOTH
@pytest.mark.parametrize("fields", [{"feature_epochs": 1}, {"accumulate": 2, "ema": 0.9}], ids=str)
def test_resumed_equals_uninterrupted(
    kind: type, fields: dict[str, Any], data: Dataset, tmp_path: Path
) -> None:
    step = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | kind(steps=6, batch_size=2, **fields)
    run = {"data": data, "progress": False}
    whole = step(random_sam(), **run)
    again = stopped_and_resumed(step, random_sam(), run, tmp_path)
    assert equal(whole, again)
    assert sc.lineage(whole)[-1].state == sc.lineage(again)[-1].state


@pytest.mark.parametrize(
    ("kind", "field", "value", "expected"),
    [
        (AlignBottleneck, "alpha", 1.5, "0 <= alpha <= 1"),
        (AlignBottleneck, "feature_epochs", -1, ">= 0"),
        (AlignEmbedding, "feature_epochs", -1, ">= 0"),
        (AlignEmbedding, "lr", 0.0, "0 < lr < inf"),
        (AlignEmbedding, "middle", 3, "str"),
    ],
)
def test_fields_out_of_range(kind: Any, field: str, value: object, expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        kind(**{field: value})
    assert str(caught.value).startswith(f"{kind.name}: {field} ")
    assert f"  expected  {expected}" in str(caught.value)
