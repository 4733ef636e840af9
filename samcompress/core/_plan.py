"""How to train, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .errors import ConfigError

GAIN = 1e-4  # relative; a smaller fall of the loss counts as none


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train.

    Attributes:
        steps: optimiser steps.
        lr: highest learning rate; it rises linearly, then `schedule` says.
        schedule: a fall along a cosine, nothing, or a half of the rate at each plateau: whenever
            the mean loss of `patience` epochs in a row was no gain.
        optimizer: AdamW decays weights apart from the gradient, Adam within it.
        betas: decay of the optimiser's two averages.
        weight_decay: of parameters with two or more dimensions; biases and norms have none.
        warmup: share of the steps in which the rate rises.
        floor: lowest learning rate after the rise over the highest.
        epoch: steps an epoch, for a plateau.
        patience: epochs without gain, for a plateau.
        clip: largest norm of the whole gradient; None for no limit.
        ema: decay of a running average of the weights, which is the result; None for none.
        accumulate: parts of a batch that go through the model one after the other, to save memory.
        precision: what the forward pass computes in; weights and optimiser are float32.
        tolerance: steps in a row whose loss or gradient may be other than finite.
        save_seconds: time between checkpoints.
        seed: of everything drawn at random.

    Raises:
        ConfigError: if `accumulate` is below 1, or a plateau lacks its epoch.
    """

    steps: int
    lr: float = 1e-3
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: float = 0.05
    floor: float = 0.01
    epoch: int | None = None
    patience: int = 4
    clip: float | None = 5.0
    ema: float | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    tolerance: int = 5
    save_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError("accumulate is out of range.", got=self.accumulate, expected=">= 1")
        if self.schedule == "plateau" and not (self.epoch and self.epoch > 0):
            raise ConfigError(
                "a plateau is judged by epochs.", got=f"epoch={self.epoch}", expected="steps, >= 1"
            )

    def rate(self, step: int, halved: int = 0) -> float:
        """Learning rate of a step, after so many plateaus."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        if self.schedule != "cosine":
            return self.lr * max(0.5**halved, self.floor)
        share = (step - rise) / max(1, self.steps - rise)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share)))

    def halved(self, total: Sequence[float]) -> int:
        """How many plateaus there were, from the loss of each step so far."""
        if self.schedule != "plateau" or self.epoch is None:
            return 0
        best, idle, count = math.inf, 0, 0
        for start in range(0, len(total) - self.epoch + 1, self.epoch):
            finite = [v for v in total[start : start + self.epoch] if math.isfinite(v)]
            mean = sum(finite) / len(finite) if finite else math.inf
            if mean < best and (best == math.inf or best - mean > GAIN * abs(best)):
                best, idle = mean, 0
                continue
            idle += 1
            if idle == self.patience:
                count, idle = count + 1, 0
        return count


@dataclass
class Run:
    """What happened, all sessions together.

    Attributes:
        step: steps done.
        resumed: step of the checkpoint this session began with, 0 for none.
        skipped: steps left out because loss or gradient was not finite.
        total: the summed loss of each step.
        curves: each loss term's value at each step, NaN where a step lacked it.
        seconds: time spent on steps.
        waited: the part of it in which the model waited for data.
        items: items learned from.
    """

    step: int = 0
    resumed: int = 0
    skipped: int = 0
    total: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    items: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step; 0 before the first."""
        return self.seconds / max(1, self.step)

    @property
    def items_per_second(self) -> float:
        """Throughput; 0 before the first step."""
        return self.items / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time in which the model waited for data."""
        return self.waited / self.seconds if self.seconds else 0.0

    def curve(self, points: int = 50) -> list[float]:
        """The summed loss in at most `points` means over equal stretches, without skipped steps."""
        total = [v for v in self.total if math.isfinite(v)]
        width = max(1, math.ceil(len(total) / points))
        parts = [total[i : i + width] for i in range(0, len(total), width)]
        return [float(f"{sum(p) / len(p):.6g}") for p in parts]
