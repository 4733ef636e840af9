"""What all techniques that train have in common."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core import _fit
from ..core._engine import engine_for
from ..core._objective import Objective, Share
from ..core.checkpoint import identity as model_identity
from ..core.contract import device_of
from ..core.errors import ConfigError, NoEffectError
from ..core.transform import Context, State, Transform
from ._cache import evaluating

log = logging.getLogger("samcompress.distill")
JUDGED = 64  # images by which the loss before and after is judged
SAME = 1e-6  # a loss below is what a cache in float16 loses
IOU_TERMS = frozenset({"iou", "score"})  # terms that teach a model to predict its masks' IoU


@dataclass(frozen=True, kw_only=True)
class Learner(Transform):
    """A technique that trains: the fields of the run, and the run itself.

    A subclass gives `objective`, the `parts` that train and, where it has something to do once
    training has ended, `finish`.
    """

    warmup: ClassVar[float] = 0.05
    floor: ClassVar[float] = 0.01
    clip: ClassVar[float | None] = 5.0
    optimizer: ClassVar[Literal["adamw", "adam"]] = "adamw"

    epochs: float = 10.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.01
    ema: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = 0
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    @property
    def parts(self) -> tuple[str, ...]:
        """Submodules of the objective that train."""
        return ("student.image_encoder",)

    def validate(self) -> None:
        """Check the fields that all have."""
        self.between("epochs", 0, float("inf"))
        self.between("lr", 0, float("inf"))
        self.between("weight_decay", 0, 1, closed=True)
        if self.ema is not None:
            self.between("ema", 0, 1)
        lowest = {"steps": 1, "batch_size": 1, "accumulate": 1, "workers": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.", got=value, expected=f">= {low}"
                )
        if self.accumulate > self.batch_size:
            raise ConfigError(
                f"{self.label}: accumulate divides a batch into more parts than it has images.",
                got=f"accumulate={self.accumulate}, batch_size={self.batch_size}",
                expected="accumulate <= batch_size",
            )

    def check(self, model: nn.Module) -> None:
        """Check that the parts have weights that can be trained."""
        inside = [p.removeprefix("student.") for p in self.parts if p.startswith("student.")]
        _fit.trainable(model, inside)

    @abstractmethod
    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """What is minimised in `steps` steps."""

    def finish(self, objective: Any) -> State:
        """Further facts for the state, once training has ended."""
        return {}

    def plan(self, images: int) -> _fit.Plan:
        """How to train on so many images."""
        return _fit.Plan(
            steps=self.steps or max(1, round(self.epochs * images / self.batch_size)),
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            floor=self.floor,
            clip=self.clip,
            ema=self.ema,
            accumulate=self.accumulate,
            precision=self.precision,
            seed=self.seed,
        )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Train."""
        images = len(ctx.data)
        plan = self.plan(images)
        # Before the teacher runs: several processes then share its work.
        engine = engine_for(device_of(model))
        identity = self.identity(model, ctx) | {"steps": plan.steps}
        objective = self.objective(model, ctx, plan.steps)
        before = self.judge(objective)
        if self.needs_teacher and before < SAME:
            raise NoEffectError(
                f"{self.label} has nothing to learn.",
                got="a student that equals the teacher already",
                expected="a step before it that changes what the model says",
                fix="teacher=, the model to imitate: without it that is the one that came in",
            )
        run = _fit.fit(
            objective,
            plan,
            parts=self.parts,
            checkpoint=_place(self.label, ctx.workdir, identity),
            identity=identity,
            progress=ctx.progress,
            workers=self.workers,
            engine=engine,
        )
        after = self.judge(objective)
        log.info("%s: loss %.4g -> %.4g in %d steps", self.label, before, after, run.step)
        return {
            "loss_before": before,
            "loss_after": after,
            "images": images,
            "steps": run.step,
            "skipped": run.skipped,
            "curve": run.curve(),
            "iou_trained": not IOU_TERMS.isdisjoint(run.curves),
            **self.finish(objective),
        }

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Nothing to do: no shape has changed."""
        return state

    def identity(self, model: nn.Module, ctx: Context) -> dict[str, Any]:
        """What tells this run from others: its fields, student, teacher and data."""
        teacher = {"teacher": model_identity(ctx.original)} if self.needs_teacher else {}
        # Neither changes the result, so a run may go on with others.
        fields = {k: v for k, v in self.params().items() if k not in ("workers", "accumulate")}
        return {**fields, **teacher, "student": model_identity(model), "data": ctx.data.fingerprint}

    def judge(self, objective: Objective) -> float:
        """Mean loss of a few batches that no step of training draws."""
        batches = max(1, JUDGED // self.batch_size)
        batches = min(batches, math.ceil(len(self.data_of(objective)) / self.batch_size))
        total, weight = 0.0, 0.0
        with evaluating(objective), torch.no_grad():
            for number in range(batches):
                drawn = objective.source.draw(-1 - number, Share())
                terms: Mapping[str, torch.Tensor] = objective(drawn, -1 - number)
                total += drawn.weight * sum(float(v) for v in terms.values())
                weight += drawn.weight
        return total / weight

    @staticmethod
    def data_of(objective: Objective) -> Any:
        """The data set behind an objective."""
        source: Any = objective.source
        return source.data


def _place(label: str, workdir: Path | None, identity: Mapping[str, Any]) -> Path | None:
    """A checkpoint file of this run alone, so that two runs can share a folder."""
    if workdir is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return workdir / f"{label.replace('.', '-')}-{digest[:12]}.safetensors"
