"""What the tests of several presets do with a run."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core import _fit
from samcompress.core._draws import generator
from samcompress.core.data import Dataset
from samcompress.distill._guide import Guide, GuidedSamples
from samcompress.distill._samples import Frame, Samples


def scenes() -> Dataset:
    """Images wider and higher than square, so that there is padding, of the frame's long side."""
    wide, high = sc.shapes(2, size=(40, 64)), sc.shapes(4, size=(64, 48))[2:]
    return sc.data.as_dataset([*wide, *high])


def together(student: nn.Module, teacher: nn.Module, settings: Any) -> tuple[GuidedSamples, Guide]:
    """Batches and a teacher that looks at each of them, so its embeddings are not rounded."""
    frames = [Frame.of(student), Frame.of(teacher)]
    samples = Samples(
        scenes(),
        frames,
        batch_size=settings.batch_size,
        prompts=settings.prompts,
        augment=None,
        seed=settings.seed,
    )
    return GuidedSamples(samples, None), Guide(teacher, student)


def near(teacher: nn.Module, by: float = 0.03) -> nn.Module:
    """A copy whose masks differ from the teacher's, but not everywhere."""
    student, g = copy.deepcopy(teacher), generator("near")
    with torch.no_grad():
        for p in student.image_encoder.parameters():
            p += by * p.abs().mean() * torch.randn(p.shape, generator=g)
    return student


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """Parameters and buffers that are not what they were, bit for bit."""
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {k for k in before if not torch.equal(before[k], after[k])}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return not changed(copied(a), b)


def stopped_and_resumed(
    step: sc.Pipeline, student: nn.Module, run: dict[str, Any], folder: Path
) -> nn.Module:
    """Killed before the fourth step, as the checkpoint has it, and started again."""
    rate = _fit.Plan.rate

    def dying(plan: _fit.Plan, number: int, halved: int = 0) -> float:
        if number == 3:
            raise InterruptedError
        return rate(plan, number, halved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fit.Plan, "rate", dying)
        patch.setattr(_fit, "Plan", functools.partial(_fit.Plan, save_seconds=0.0))
        with pytest.raises(InterruptedError):
            step(student, **run, workdir=folder)
    return step(student, **run, workdir=folder)
