"""Distillation of hidden layers, from shallow to deep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core._draws import drawn as randomly
from ..core._objective import Objective
from ..core.contract import device_of
from ..core.registry import register
from ..core.transform import Context
from ._learner import Learner
from ._taps import EMBEDDING, block, depth, widths
from ._views import Looking, Seen, apart


@register
@dataclass(frozen=True, kw_only=True)
class LayerWise(Learner, family="distill", phase=40):
    """Train the image encoder's layers to say what the original's say, shallow ones first.

    Use it where the encoder became shallower or its attention changed, and `Encoder` alone learns
    slowly: hidden layers give each block a target of its own. Both models must be ViTs of blocks;
    for other encoders use `Encoder`. The teacher runs in each step, so a step costs more than one
    of `Encoder`, which reads its embeddings from a cache.

    The loss is ``weight`` times the weighted mean of the layers' squared errors, plus that of the
    embeddings. Layer ``l`` of the student's ``L`` learns from layer ``round(l * T / L)`` of the
    teacher's ``T``. Where widths differ a linear map between them is learnt too, and thrown away.

    Args:
        schedule: ``ramp`` adds deeper layers one after the other; ``switch`` takes one layer at a
            time, and in the end none but the embedding.
        tau: share of the steps in which the schedule moves to the deepest layer, between 0 and 1.
        rho: share of the steps in which a layer of ``ramp`` comes in, between 0 and 1.
        kappa: how much more a layer of ``ramp`` counts than the one before it, > 0.
        weight: of the layers' loss beside that of the embedding, > 0.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        lr: highest learning rate of AdamW, > 0, used as given.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images, and of the linear maps.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if student or teacher has no ViT blocks, their embeddings differ in channels, or
            the student is not float32.
        NoEffectError: if the student equals the teacher already, or has nothing to train.
        DataError: if no image can be decoded.
        CheckpointError: if a checkpoint in ``workdir=`` is damaged.

    Effect: the encoder's weights change, nothing else does; size and speed stay as they are. The
        state tells the loss before and after, both with the weights of the schedule's end.

    Composes with: every step before it that changes the encoder but leaves its blocks; `PromptLoop`
        or `Supervised` afterwards, to align the decoder; then reduce precision and export.

    Source: the idea of moving from shallow to deep layers: SAM-Lightening, Song et al. 2024, arXiv
        2403.09195 (no training code; its weights could not be confirmed). One layer at a time:
        FastSAM3D, Shen et al. 2024, arXiv 2403.09827. The formulas of both schedules are ours, so
        this is no reproduction of their figures.

    Example:
        >>> import samcompress as sc
        >>> chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.LayerWise(
        ...     steps=4, batch_size=2
        ... )
        >>> small = chain(sc.load("tiny"), data=sc.shapes(4))
        >>> facts = sc.lineage(small)[-1].state
        >>> facts["loss_after"] < facts["loss_before"]
        True
    """

    needs_teacher: ClassVar[bool] = True

    schedule: Literal["ramp", "switch"] = "ramp"
    tau: float = 0.6
    rho: float = 0.2
    kappa: float = 1.5
    weight: float = 1.0
    lr: float = 8e-4
    weight_decay: float = 0.1

    @property
    def parts(self) -> tuple[str, ...]:
        """The encoder, and the maps between widths."""
        return ("student.image_encoder", "maps")

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        for name in ("tau", "rho"):
            self.between(name, 0, 1)
        for name in ("kappa", "weight"):
            self.between(name, 0, math.inf)

    def check(self, model: nn.Module) -> None:
        """Check that the encoder has blocks, and weights that can be trained."""
        super().check(model)
        depth(model, "student")

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The errors of layers and embedding."""
        return Layers(model, ctx, self, steps)

    def weights(self, progress: float, layers: int) -> list[float]:
        """How much each of the student's layers counts at some point of the run, from 0 to 1."""
        if self.schedule == "ramp":
            return ramp(progress, layers, tau=self.tau, rho=self.rho, kappa=self.kappa)
        return switch(progress, layers, tau=self.tau)


def ramp(
    progress: float, layers: int, *, tau: float = 0.6, rho: float = 0.2, kappa: float = 1.5
) -> list[float]:
    """Weights of layers that come in one after the other.

    Layer ``l`` of ``L``, from 1, rises from ``u = tau (l - 1) / L`` on, for ``rho`` of the run; the
    first is there at once. Each counts `kappa` times as much as the one before.

    Returns:
        `layers` weights, >= 0, of sum 1.

    Example:
        >>> ramp(0.0, 3), [round(w, 2) for w in ramp(1.0, 3)]
        ([1.0, 0.0, 0.0], [0.21, 0.32, 0.47])
    """
    risen = [1.0] + [
        min(max((progress - tau * (number - 1) / layers) / rho, 0.0), 1.0)
        for number in range(2, layers + 1)
    ]
    scaled = [a * kappa ** (number - layers) for number, a in enumerate(risen, 1)]
    return [value / sum(scaled) for value in scaled]


def switch(progress: float, layers: int, *, tau: float = 0.6) -> list[float]:
    """Weights of one layer at a time; from `tau` on of none, so only the embedding is left.

    Example:
        >>> switch(0.0, 3), switch(0.5, 3), switch(0.6, 3)
        ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0])
    """
    if progress >= tau:
        return [0.0] * layers
    # Rounding may reach the end a moment early.
    chosen = min(layers, 1 + math.floor(progress * layers / tau))
    return [float(number == chosen) for number in range(1, layers + 1)]


def partner(number: int, student: int, teacher: int) -> int:
    """Which of the teacher's layers a student's learns from, both counted from 1.

    Example:
        >>> [partner(number, 4, 12) for number in (1, 2, 3, 4)]
        [3, 6, 9, 12]
    """
    return max(1, (2 * number * teacher + student) // (2 * student))


class Layers(Looking):
    """Errors of the student's layers and of its embedding."""

    def __init__(self, student: nn.Module, ctx: Context, settings: LayerWise, steps: int) -> None:
        teacher = ctx.original
        s = settings
        super().__init__(student, [teacher], ctx.data, batch_size=s.batch_size, seed=s.seed)
        self.settings, self.steps = settings, steps
        mine, theirs = depth(student, "student"), depth(teacher, "teacher")
        self.pairs = [
            (block(number - 1), block(partner(number, mine, theirs) - 1))
            for number in range(1, mine + 1)
        ]
        self.maps = nn.ModuleDict()
        self._fit_widths()

    def _fit_widths(self) -> None:
        """A linear map for each layer whose width is not its partner's."""
        mine = widths(self.student, [own for own, _ in self.pairs])
        theirs = widths(self._teachers[0], [other for _, other in self.pairs])
        for own, other in self.pairs:
            if mine[own] != theirs[other]:
                with randomly(torch.device("cpu"), self.settings.seed, "map", own):
                    made = nn.Conv2d(mine[own], theirs[other], 1)
                self.maps[_key(own)] = made.to(device_of(self.student))

    def forward(self, drawn: Seen, step: int) -> Mapping[str, Tensor]:
        """Terms ``layers`` and ``embedding``."""
        s = self.settings
        # Negative steps judge the model, as at the end of the run.
        weights = s.weights(step / self.steps if step >= 0 else 1.0, len(self.pairs))
        mine = self.learn(drawn, [*(own for own, _ in self.pairs), EMBEDDING])
        theirs = self.teach(drawn, [*dict.fromkeys(other for _, other in self.pairs), EMBEDDING])
        errors = [
            weight * apart(drawn, own, self._mapped(own, mine[own]), theirs[other])
            for weight, (own, other) in zip(weights, self.pairs, strict=True)
        ]
        return {
            "layers": s.weight * torch.stack(errors).sum(),
            "embedding": apart(drawn, EMBEDDING, mine[EMBEDDING], theirs[EMBEDDING]),
        }

    def _mapped(self, name: str, state: Tensor) -> Tensor:
        return self.maps[_key(name)](state).float() if _key(name) in self.maps else state


def _key(name: str) -> str:
    return name.replace(".", "_")  # module names have no dot
