"""Distances between masks, for each mask of each prompt, over the part of the frame with an image.

Everywhere `logits` is (P, M, h, w); `target` is (P, h, w), one for all masks of a prompt, or
(P, M, h, w), with values in [0, 1] unless said otherwise; `valid` is (P, h, w) or (P, 1, h, w), the
share of a cell that shows the image; and the result is (P, M), computed in float32. Sums over a
mask are divided by its own valid area, so that padding costs and teaches nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Norm = Literal["sum", "mean", "unit"]


def bce(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy."""
    logits, target, valid = _ready(logits, target, valid)
    return _mean(_entropy(logits, target), valid)


def balanced(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy that sees small objects too; twice as large as `bce` where all cells are alike.

    A cell of the object weighs 1, any other the root of the ratio of the two areas, at most 1: in
    all they weigh the geometric mean of what they do in `bce` and what the object does.
    """
    logits, target, valid = _ready(logits, target, valid)
    return _mean(_balance(target, valid) * _entropy(logits, target), valid)


def focal(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Cross-entropy that counts cells less, the better they are known.

    Args:
        logits: (P, M, h, w).
        target: (P, h, w) or (P, M, h, w).
        valid: (P, h, w) or (P, 1, h, w).
        alpha: weight of the object, 1 - alpha being that of the rest; None for no weights.
        gamma: 0 counts all cells alike.

    Source:
        arXiv 1708.02002; with |p - target| for 1 - p_t, which also suits soft targets, as in
        arXiv 2006.04388.
    """
    logits, target, valid = _ready(logits, target, valid)
    weight = _focus(logits.sigmoid(), target, alpha, gamma)
    return _mean(weight * _entropy(logits, target), valid)


def dice(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """One minus the Dice coefficient of each mask, with 1 added above and below."""
    logits, target, valid = _ready(logits, target, valid)
    return _dice(logits.sigmoid(), target, valid)


def logit_l1(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean distance to a teacher's logits, which are the target."""
    logits, target, valid = _ready(logits, target, valid)
    return _mean((logits - target).abs(), valid)


@torch.no_grad()
def iou(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Overlap of the binarised masks, logits at 0 and target at 0.5; 1 where both are empty."""
    logits, target, valid = _ready(logits, target, valid)
    answer, truth = logits > 0, target >= 0.5
    both = ((answer & truth) * valid).sum((2, 3))
    either = ((answer | truth) * valid).sum((2, 3))
    return torch.where(either > 0, both / either, 1.0)


def curriculum(focus: float) -> dict[str, float]:
    """Weights for `mask_loss`: balanced cross-entropy + dice at 0, SAM's loss at 1, linear between.

    From random weights the former learns faster: the plain mean over all cells hardly sees a small
    object, and its first answer is the empty mask.
    """
    return {"balanced": 1 - focus, "focal": 20 * focus, "dice": 1.0}


def mask_loss(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    bce: float = 0.0,
    balanced: float = 0.0,
    focal: float = 20.0,
    dice: float = 1.0,
) -> Tensor:
    """Weighted sum of the losses of a mask; by default SAM's.

    Args:
        logits: (P, M, h, w).
        target: (P, h, w) or (P, M, h, w).
        valid: (P, h, w) or (P, 1, h, w).
        bce: weight of the cross-entropy.
        balanced: weight of the balanced cross-entropy.
        focal: weight of the focal loss, alpha 0.25 and gamma 2.
        dice: weight of the Dice loss.

    Source:
        Segment Anything, arXiv 2304.02643, appendix A.
    """
    logits, target, valid = _ready(logits, target, valid)
    p = logits.sigmoid()
    weight = focal * _focus(p, target, 0.25, 2.0) + bce if focal else bce
    if balanced:
        weight = weight + balanced * _balance(target, valid)
    return _mean(weight * _entropy(logits, target), valid) + dice * _dice(p, target, valid)


def least(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The best of the masks 1 to 3 of each prompt; the others get no gradient.

    Args:
        losses: (P, 4), of the single mask and the three.

    Returns:
        Its loss (P,), and which it is (P,), 1 to 3.
    """
    values, index = losses[:, 1:].min(1)
    return values, index + 1


def score_loss(
    scores: Tensor,
    actual: Tensor,
    *,
    kind: Literal["mse", "l1"] = "mse",
    chosen: Tensor | None = None,
) -> Tensor:
    """Distance of predicted to actual IoUs.

    Args:
        scores: (P, M), predicted.
        actual: (P, M), from `iou`; no gradient goes there.
        kind: ``mse`` (SAM) or ``l1`` (SAM 2).
        chosen: (P,), the one mask of each prompt that counts; None for the mean of all.

    Returns:
        (P,).
    """
    apart = scores.float() - actual.detach().float()
    each = apart.square() if kind == "mse" else apart.abs()
    return each.mean(1) if chosen is None else each.gather(1, chosen[:, None])[:, 0]


@torch.no_grad()
def hard_weights(teacher: Tensor, student: Tensor, norm: Norm = "sum") -> Tensor:
    """Weights for a sum of losses that are large where the student falls behind the teacher.

    Args:
        teacher: IoU of the teacher's masks with the truth, any shape.
        student: IoU of the student's.
        norm: ``sum`` leaves the weights as published, 0.5 where both are equally good; ``mean``
            divides them by how many there are; ``unit`` makes them sum to 1. The last two look at
            the prompts given only.

    Returns:
        As `teacher`; before `norm` at least 0.2689, where the teacher's IoU is 0, and at most 1.

    Source:
        TinySAM, arXiv 2312.13789.
    """
    weight = torch.sigmoid(teacher.float() / student.float().clamp(min=1e-6) - 1)
    if norm == "mean":
        return weight / weight.numel()
    return weight / weight.sum() if norm == "unit" else weight


def _ready(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in float32 and of four dimensions."""
    target, valid = (t[:, None] if t.dim() == 3 else t for t in (target, valid))
    return logits.float(), target.float(), valid.float()


def _mean(cell: Tensor, valid: Tensor) -> Tensor:
    return (cell * valid).sum((2, 3)) / valid.sum((2, 3))


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")


def _focus(p: Tensor, target: Tensor, alpha: float | None, gamma: float) -> Tensor:
    known = (p - target).abs() ** gamma
    return known if alpha is None else (alpha * target + (1 - alpha) * (1 - target)) * known


def _balance(target: Tensor, valid: Tensor) -> Tensor:
    """Weights of the cells, 2 on average."""
    inside = (target * valid).sum((2, 3), keepdim=True).clamp(min=1)
    outside = ((1 - target) * valid).sum((2, 3), keepdim=True).clamp(min=1)
    weight = target + (1 - target) * (inside / outside).sqrt().clamp(max=1)
    total = valid.sum((2, 3), keepdim=True)
    return 2 * weight * total / (weight * valid).sum((2, 3), keepdim=True)


def _dice(p: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    both = (p * target * valid).sum((2, 3))
    return 1 - (2 * both + 1) / ((p * valid).sum((2, 3)) + (target * valid).sum((2, 3)) + 1)
