"""Thresholds of one model that let pass what those of another let pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError
from ..framing import framing_of
from ..predict import encode
from . import _runs
from ._rounds import Prompts, lattice

if TYPE_CHECKING:
    from .generator import Everything

SIDE = 16
SEEN = 4096  # logits of each lot of prompts that stand for all


def matched(
    settings: Everything,
    model: nn.Module,
    teacher: nn.Module,
    images: Iterable[NDArray[np.uint8]],
) -> Everything:
    """See `Everything.calibrate_thresholds`."""
    photos = list(images)
    if not photos:
        raise ConfigError("thresholds cannot be matched without images.", got="none")
    (scores, stable, inside), (wanted, firm, deep) = (
        _answers(m, photos, settings.stability_offset) for m in (model, teacher)
    )
    changes: dict[str, Any] = {}
    passed = wanted > settings.min_iou
    if settings.min_iou > 0:
        changes["min_iou"] = _exceeded_by(scores, float(passed.float().mean()))
    if settings.min_stability > 0:
        share = (
            float((firm[passed] >= settings.min_stability).float().mean()) if passed.any() else 0
        )
        mine = scores > changes.get("min_iou", -np.inf)
        changes["min_stability"] = _exceeded_by(stable[mine], share)
    tau = settings.sampler.tau
    if tau is not None and np.isfinite(tau):
        new = _exceeded_by(inside, float((deep > tau).float().mean()))
        changes["sampler"] = replace(settings.sampler, tau=new)  # type: ignore[type-var]
    return replace(settings, **changes)


def _exceeded_by(values: Tensor, share: float) -> float:
    """The number that this share of values exceeds, halfway between two of them."""
    values = values[~values.isnan()].double().sort(descending=True).values
    if not len(values):
        return 0.0
    count = round(share * len(values))
    above = values[count - 1] if count else values[0] + 1e-6
    below = values[count] if count < len(values) else values[-1] - 1e-6
    return float((above + below) / 2)


def _answers(
    model: Any, images: list[NDArray[np.uint8]], offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted IoU and stability of all masks of a grid, and some logits inside them."""
    found = [lot for image in images for lot in _lots(model, image, offset)]
    scores, stable, inside = (torch.cat(column) for column in zip(*found, strict=True))
    return scores, stable, inside


@torch.inference_mode()
def _lots(
    model: Any, image: NDArray[np.uint8], offset: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    from .generator import Session, check_prompts

    check_prompts(model)
    (embedding,) = encode(model, [image])
    session = Session(model, embedding)
    prompts = Prompts(points=lattice(SIDE, embedding.size))
    framing, threshold = framing_of(model), float(getattr(model, "mask_threshold", 0.0))
    for start in range(0, len(prompts), session.batch):
        answers = session.decode(prompts.part(start, start + session.batch))
        rows, masks = torch.ones_like(answers.scores).nonzero().T
        low = answers.low(rows, masks).float()
        # Where padding lies the model says anything.
        height, width = framing.inside(embedding.size)
        part = [-(-low.shape[1] * n // framing.frame) for n in (height, width)]
        low = low[:, : part[0], : part[1]].contiguous()
        inside = low[low > threshold]
        every = max(1, len(inside) // SEEN)
        stable = _runs.overlaps(low, threshold, offset)
        yield answers.scores.flatten().cpu(), stable.cpu(), inside[::every].cpu()
