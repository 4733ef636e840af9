"""What SlimSAM's two alignments have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import _fit
from ..core.errors import ConfigError, ModelError
from ..core.transform import Context
from ._learner import Learner
from ._taps import depth
from ._views import Looking, Seen, apart


@dataclass(frozen=True, kw_only=True)
class Align(Learner):
    """What both alignments have in common: SlimSAM's way of training."""

    needs_teacher: ClassVar[bool] = True
    warmup: ClassVar[float] = 0.0
    clip: ClassVar[float | None] = None
    optimizer: ClassVar[Literal["adamw", "adam"]] = "adam"

    feature_epochs: int = 10
    epochs: float = 20.0
    batch_size: int = 4
    lr: float = 1e-4
    weight_decay: float = 0.0

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        if self.feature_epochs < 0:
            raise ConfigError(
                f"{self.label}: feature_epochs is out of range.",
                got=self.feature_epochs,
                expected=">= 0",
            )

    def check(self, model: nn.Module) -> None:
        """Check that the encoder has blocks, and weights that can be trained."""
        super().check(model)
        depth(model, "student")

    def plan(self, images: int) -> _fit.Plan:
        """Adam, its rate halved where the loss stays as it is."""
        return dataclasses.replace(
            super().plan(images), schedule="plateau", epoch=self.epoch_steps(images)
        )

    def epoch_steps(self, images: int) -> int:
        """Steps in which each image is seen once."""
        return max(1, round(images / self.batch_size))

    @abstractmethod
    def share(self, epoch: int) -> float:
        """Weight of the features in an epoch, counted from 0."""


class Aligned(Looking):
    """A student, and models it was cut from."""

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        ctx: Context,
        settings: Align,
        steps: int,
    ) -> None:
        s = settings
        super().__init__(student, teachers, ctx.data, batch_size=s.batch_size, seed=s.seed)
        self.settings, self.steps = settings, steps
        self.epoch_steps = s.epoch_steps(len(ctx.data))
        self.blocks = depth(student, "student")
        for teacher in teachers:
            if depth(teacher, "teacher") != self.blocks:
                raise ModelError(
                    f"{s.label} compares block with block.",
                    got=f"student {self.blocks} blocks, teacher {depth(teacher, 'teacher')}",
                    expected="the same number",
                    fix="sc.distill.LayerWise(), which pairs layers of different depths",
                )

    def alpha(self, step: int) -> float:
        """Weight of the features in a step; negative ones judge, as in the last epoch."""
        if step < 0:
            step = self.steps - 1
        return self.settings.share(step // self.epoch_steps)

    def mean(
        self,
        drawn: Seen,
        names: Sequence[str],
        mine: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
    ) -> Tensor:
        """Mean over layers of their errors."""
        return torch.stack([apart(drawn, n, mine[n], theirs[n]) for n in names]).mean()
