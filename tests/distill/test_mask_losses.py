from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import random_sam
from torch import Tensor
from torch.nn import functional as F

from samcompress.distill import _mask_losses as L

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "bce": L.bce,
    "focal": L.focal,
    "dice": L.dice,
    "balanced": L.balanced,
    "logit_l1": L.logit_l1,
    "iou": L.iou,
    "mask_loss": L.mask_loss,
    "halfway": lambda *a: L.mask_loss(*a, **L.curriculum(0.5)),
}
H, W = 7, 9


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, soft targets, and valid maps: all, top left part, and one with part-shown cells."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 4, H, W, generator=g)
    target = torch.rand(3, H, W, generator=g)
    valid = torch.ones(3, H, W)
    valid[1, 5:], valid[1, :, 6:] = 0, 0
    valid[2, 4], valid[2, 5:] = 0.25, 0
    return logits, target * (valid > 0), valid


def shape(mask: Tensor) -> Tensor:
    """Logits that say just this mask."""
    return (2 * mask - 1) * 1e4


# ----------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_for_nothing(name: str) -> None:
    loss = LOSSES[name]
    logits, target, valid = drawn()
    outside = valid == 0
    assert outside.any()
    first = logits.clone().requires_grad_()
    second = torch.where(outside[:, None], -2 * logits + 5, logits).requires_grad_()
    changed = torch.where(outside, 1 - target, target)
    a, b = loss(first, target, valid), loss(second, changed, valid)
    assert torch.equal(a, b)
    assert a.shape == (3, 4)
    if name != "iou":
        ours, theirs = (torch.autograd.grad(x.sum(), t)[0] for x, t in ((a, first), (b, second)))
        assert torch.equal(ours, theirs)
        assert not ours.masked_select(outside[:, None]).any()
        assert ours.masked_select(~outside[:, None]).any()


@pytest.mark.parametrize("name", LOSSES)
def test_padded_equals_cropped(name: str) -> None:
    logits, target, valid = drawn()
    cropped = LOSSES[name](
        logits[1:2, :, :5, :6], target[1:2, :5, :6], torch.ones_like(valid[1:2, :5, :6])
    )
    padded = LOSSES[name](logits[1:2], target[1:2], valid[1:2])
    torch.testing.assert_close(padded, cropped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_items_do_not_mix(name: str) -> None:
    logits, target, valid = drawn()
    whole = LOSSES[name](logits, target, valid)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(LOSSES[name](logits[order], target[order], valid[order]), whole[order])
    # Prompt by prompt and mask by mask; targets for each mask; valid with a channel of its own.
    for p in range(3):
        for m in range(4):
            one = LOSSES[name](
                logits[p, m][None, None], target[p][None, None], valid[p][None, None]
            )
            torch.testing.assert_close(one[0, 0], whole[p, m], rtol=1e-6, atol=1e-6)
    each = target[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(LOSSES[name](logits, each, valid[:, None]), whole)
    # Of unequal parts, the means weighted by their sizes make up the mean.
    parts = [LOSSES[name](logits[s], target[s], valid[s]) for s in (slice(1), slice(1, 3))]
    mean = sum(part.mean() * len(part) for part in parts) / 3
    assert mean == pytest.approx(float(whole.mean()), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_prompts(name: str) -> None:
    none = LOSSES[name](torch.zeros(0, 4, H, W), torch.zeros(0, H, W), torch.ones(0, H, W))
    assert none.shape == (0, 4)


def test_part_shown_cells_count_by_their_share() -> None:
    logits, target, valid = drawn()
    cell = F.binary_cross_entropy_with_logits(logits[2, 0], target[2], reduction="none")
    expected = (cell[:4].sum() + cell[4].sum() / 4) / (W * 4.25)
    torch.testing.assert_close(L.bce(logits, target, valid)[2, 0], expected)


def test_copy_of_the_teacher() -> None:
    teacher, _, valid = drawn()
    student = teacher.clone().requires_grad_()
    assert not L.logit_l1(student, teacher, valid).any()
    hard = (teacher > 0).float()
    assert torch.equal(L.iou(student, hard, valid), torch.ones(3, 4))
    # Not 0: a hard target asks for more certainty than the teacher has.
    loss = L.bce(student, hard, valid)
    assert torch.equal(loss, L.bce(teacher, hard, valid))
    assert bool((loss > 0).all())


# -------------------------------------------------------------------------------------- algebra


def test_focal() -> None:
    logits, target, valid = drawn()
    plain = L.focal(logits, target, valid, alpha=None, gamma=0)
    torch.testing.assert_close(plain, L.bce(logits, target, valid))
    # Two cells: per cell, not of the mean cross-entropy.
    logits, target = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[[1.0, 1.0]]])
    p = torch.sigmoid(logits).flatten()
    expected = float((0.25 * (1 - p) ** 2 * -p.log()).mean())
    ours = float(L.focal(logits, target, torch.ones(1, 1, 2)))
    assert ours == pytest.approx(expected, rel=1e-6)
    mean = -float(p.log().mean())
    scalar = 0.25 * (1 - math.exp(-mean)) ** 2 * mean
    assert abs(ours - scalar) > 0.02
    # alpha weighs the object, 1 - alpha the rest.
    flipped = L.focal(-logits, 1 - target, torch.ones(1, 1, 2))
    assert float(flipped) == pytest.approx(3 * ours, rel=1e-6)


def test_focal_follows_its_formula_for_hard_targets_with_gradient() -> None:
    logits, target, valid = drawn()
    target = (target > 0.5).float()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    hard = target[:, None].expand_as(logits)
    p = theirs.double().sigmoid()
    sure = torch.where(hard > 0, p, 1 - p)
    weight = torch.where(hard > 0, 0.25, 0.75)
    cell = -weight * (1 - sure) ** 2 * sure.log()
    expected = (cell * valid[:, None]).sum((2, 3)) / valid[:, None].sum((2, 3))
    loss = L.focal(ours, target, valid)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    a, b = torch.autograd.grad(loss.sum(), ours)[0], torch.autograd.grad(expected.sum(), theirs)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_soft_targets_are_reached() -> None:
    target = torch.tensor([[[0.2, 0.5, 0.9]]])
    logits = target.logit()[:, None].clone().requires_grad_()
    for loss in (L.bce, L.focal):
        slope = torch.autograd.grad(loss(logits, target, torch.ones(1, 1, 3)).sum(), logits)[0]
        assert float(slope.abs().max()) < 1e-6


def test_dice() -> None:
    a, b = torch.zeros(2, 1, 1, H, W)
    a[..., :2, :3], b[..., 4:, 5:] = 1, 1
    all_ = torch.ones(1, H, W)
    assert float(L.dice(shape(a), a[:, 0], all_)) == 0
    expected = 1 - 1 / (6 + 12 + 1)
    assert float(L.dice(shape(a), b[:, 0], all_)) == pytest.approx(expected, rel=1e-6)
    # Per mask, not pooled over masks.
    pair = L.dice(torch.cat([shape(a), shape(a)], 1), torch.cat([a, b], 1), all_)
    assert pair[0].tolist() == pytest.approx([0, expected], rel=1e-6)


def test_weights_of_mask_loss() -> None:
    args = drawn()
    parts = {name: LOSSES[name](*args) for name in ("balanced", "focal", "dice")}
    for focus in (0.0, 0.3, 1.0):
        weights = L.curriculum(focus)
        expected = sum(weights[name] * parts[name] for name in parts)
        torch.testing.assert_close(L.mask_loss(*args, **weights), expected)
    assert L.curriculum(0) == {"balanced": 1, "focal": 0, "dice": 1}
    assert L.curriculum(1) == {"balanced": 0, "focal": 20, "dice": 1}
    assert torch.equal(L.mask_loss(*args), L.mask_loss(*args, **L.curriculum(1)))
    edge = L.mask_loss(*args, bce=5.0, focal=0.0, dice=5.0)
    torch.testing.assert_close(edge, 5 * L.bce(*args) + 5 * parts["dice"])


def test_balanced_entropy_sees_small_objects() -> None:
    """The share of an object in the loss falls with the root of its area, not with its area."""
    logits, all_ = torch.zeros(1, 1, 40, 40), torch.ones(1, 40, 40)
    for side in (1, 4, 10):
        target = torch.zeros(1, 40, 40)
        target[:, :side, :side] = 1
        # All cells are equally wrong, so their loss tells their weight.
        slope = torch.func.grad(lambda x, t=target: L.balanced(x, t, all_).sum())(logits)[
            0, 0
        ].abs()
        object_, rest = slope[:side, :side].sum(), slope.sum() - slope[:side, :side].sum()
        area = side**2
        assert float(object_ / rest) == pytest.approx((area / (1600 - area)) ** 0.5, rel=1e-5)
        assert float(L.balanced(logits, target, all_)) == pytest.approx(2 * 0.6931472, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[[[1e4, 1e4, -1e4, -1e4]]]], dtype=dtype, requires_grad=True)
    target, valid = torch.tensor([[[1.0, 0, 1, 0]]]), torch.ones(1, 1, 4)
    high = float(torch.tensor(1e4, dtype=dtype))
    values = {
        "bce": (L.bce(logits, target, valid), high / 2),
        "focal": (L.focal(logits, target, valid), (0.75 + 0.25) * high / 4),
        "dice": (L.dice(logits, target, valid), 1 - 3 / 5),
        "balanced": (L.balanced(logits, target, valid), high),
        "mask_loss": (L.mask_loss(logits, target, valid), 20 * high / 4 + 0.4),
    }
    for name, (loss, expected) in values.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(expected, rel=1e-6), name
        slope = torch.autograd.grad(loss.sum(), logits)[0]
        assert slope.isfinite().all(), name


def test_half_precision_logits_are_judged_in_float32() -> None:
    logits, target, valid = drawn()
    for name, loss in LOSSES.items():
        ours = loss(logits.bfloat16(), target.bfloat16(), valid.bfloat16())
        exact = loss(logits.bfloat16().float(), target.bfloat16().float(), valid)
        assert torch.equal(ours, exact), name


# ------------------------------------------------------------------------------- choice of masks


def test_only_the_best_of_three_learns() -> None:
    sam = random_sam()
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, 32, 8, 8, generator=g)
    points = 60 * torch.rand(3, 1, 2, generator=g), torch.ones(3, 1)
    place = sam.prompt_encoder.get_dense_pe()
    target, valid = (torch.rand(3, 32, 32, generator=g) > 0.6).float(), torch.ones(3, 32, 32)
    heads = sam.mask_decoder.output_hypernetworks_mlps
    for row in range(3):
        sparse, dense = sam.prompt_encoder(points, None, None)
        logits, _ = sam.mask_decoder.predict_masks(features, place, sparse, dense)
        logits.retain_grad()
        losses = L.mask_loss(logits, target, valid)
        values, index = L.least(losses)
        expected = 20 * L.focal(logits, target, valid) + L.dice(logits, target, valid)
        assert torch.equal(index, expected[:, 1:].argmin(1) + 1)
        assert torch.equal(values, losses.gather(1, index[:, None])[:, 0])
        sam.zero_grad()
        values[row].backward()
        got = [h.layers[0].weight.grad for h in heads]
        moved = [g is not None and bool(g.any()) for g in got]
        assert moved == [m == int(index[row]) for m in range(4)]
        assert logits.grad is not None
        assert logits.grad.flatten(2).any(2).sum() == 1


def test_equal_losses_move_one_mask() -> None:
    losses = torch.zeros(2, 4, requires_grad=True)
    slope = torch.autograd.grad(L.least(losses)[0].sum(), losses)[0]
    assert torch.equal(slope.sum(1), torch.ones(2))
    assert (slope != 0).sum() == 2


# --------------------------------------------------------------------------------- IoU and scores


def test_iou() -> None:
    truth = torch.zeros(1, H, W)
    truth[0, :3, :4] = 1
    half = truth.clone()
    half[0, :, 2:] = 0
    logits = shape(torch.stack([truth, half, 1 - truth], 1))
    found = L.iou(logits, truth, torch.ones(1, H, W))
    assert found.tolist() == [[1.0, 0.5, 0.0]]
    # Cells count by the share that is shown; what lies in the padding does not.
    valid = torch.ones(1, H, W)
    valid[0, :, :2] = 0.5
    assert float(L.iou(logits, truth, valid)[0, 1]) == pytest.approx(3 / 9)
    empty = torch.full((1, 1, H, W), -1.0)
    assert float(L.iou(empty, torch.zeros(1, H, W), valid)) == 1
    # At exactly 0 and at 0.5 the rules of SAM and of the targets.
    assert float(L.iou(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), 0.5), valid[:, :1, :1])) == 0


def test_score_loss() -> None:
    logits, target, valid = drawn()
    logits.requires_grad_()
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(3, 1).requires_grad_()
    actual = L.iou(logits, target, valid)
    assert not actual.requires_grad
    # Even a target that has a history gets no gradient.
    history = actual + 0 * logits.sum()
    loss = L.score_loss(scores, history)
    assert loss.shape == (3,)
    loss.sum().backward()
    assert logits.grad is None
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, (scores - actual).detach() / 2)
    torch.testing.assert_close(loss, ((scores - actual) ** 2).mean(1))
    chosen = torch.tensor([3, 0, 1])
    one = L.score_loss(scores, actual, kind="l1", chosen=chosen)
    rows = torch.arange(3)
    torch.testing.assert_close(one, (scores - actual).abs()[rows, chosen])
    slope = torch.autograd.grad(one.sum(), scores)[0]
    assert torch.equal(slope != 0, F.one_hot(chosen, 4).bool())
    assert L.score_loss(scores.bfloat16(), actual).dtype == torch.float32
    # A perfect mask has 1 as its target.
    mask = (target > 0.5).float()
    assert torch.equal(L.iou(shape(mask[:, None]), mask, valid), torch.ones(3, 1))


# ------------------------------------------------------------------------------------ hard weights


def test_hard_weights() -> None:
    values = torch.linspace(0.05, 1, 20)
    assert torch.equal(L.hard_weights(values, values), torch.full((20,), 0.5))
    teacher, student = torch.meshgrid(values, values, indexing="ij")
    weights = L.hard_weights(teacher, student)
    below_one = weights < 1  # float32 reaches 1 where the student is far behind
    assert (weights.diff(dim=0)[below_one[1:]] > 0).all()
    assert (weights.diff(dim=1)[below_one[:, :-1]] < 0).all()
    low = 1 / (1 + math.e)
    assert low < float(weights.min())
    assert float(L.hard_weights(torch.zeros(1), torch.zeros(1))) == pytest.approx(low)
    assert float(L.hard_weights(torch.ones(1), torch.zeros(1))) == 1
    published = {(0.9, 0.8): 0.531, (0.9, 0.5): 0.690, (0.9, 0.1): 0.9997}
    for (t, s), expected in published.items():
        assert float(L.hard_weights(torch.tensor(t), torch.tensor(s))) == pytest.approx(
            expected, abs=5e-4
        )


def test_norms_of_hard_weights() -> None:
    g = torch.Generator().manual_seed(0)
    teacher, student = torch.rand(2, 5, generator=g, requires_grad=True)
    losses = torch.rand(5, generator=g)
    plain, mean, unit = (L.hard_weights(teacher, student, n) for n in ("sum", "mean", "unit"))
    assert not any(w.requires_grad for w in (plain, mean, unit))
    assert float(unit.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(mean, plain / 5)
    torch.testing.assert_close(unit, plain / plain.sum())
    same = L.hard_weights(teacher, teacher, "sum")
    assert torch.equal((same * losses).sum(), 0.5 * losses.sum())
