"""Distillation of the image encoder: the student's embeddings learn to equal the teacher's."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import _fit
from ..core._draws import batch
from ..core.checkpoint import fingerprint
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._cache import Ready, Teacher, evaluating
from ._losses import Kind, embedding_loss, to_grid, valid_cells

log = logging.getLogger("samcompress.distill")
PART = "image_encoder"
MEASURED = 64  # images by which the loss before and after is judged
SAME = 1e-6  # relative; below it lies what float16 in the cache loses


@register
@dataclass(frozen=True, kw_only=True)
class Encoder(Transform, family="distill", phase=40):
    """Train the image encoder until its embeddings equal the original model's.

    Use it after any step that changed the encoder: a smaller image size, pruned units, approximate
    attention. It needs images but no masks, and the decoder is not run, so a step is cheap. It
    cannot mend the decoder, does nothing for a student that equals its teacher, and from random
    weights it needs a hundred thousand images; start from a compressed copy instead.

    The teacher is the model that entered the pipeline, or ``teacher=``; its input size may differ.
    Its embeddings are computed once, and with ``workdir=`` kept on disk; then an interrupted run
    also goes on where its last checkpoint was, bit for bit on the CPU.

    Args:
        loss: distance of two embeddings: ``mse``, ``huber``, ``l1``, or ``mse+cos``, which weighs
            direction more. Only cells that show the image count, not those of the padding.
        epochs: how often each image is seen, > 0; 10 as in EdgeSAM's first stage.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1. Small, as it must fit a CPU; 64 is usual on GPUs.
        lr: highest learning rate of AdamW, > 0, used as given. It rises over 5 % of the steps, then
            falls along a cosine. 2e-4 suits batches of 8 and large models, 1e-3 batches of 64 or
            small models such as `tiny`.
        weight_decay: of weights; biases and norms have none. >= 0.
        seed: of the order of images.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if student and teacher differ in channels, or the student is not float32.
        NoEffectError: if the student equals the teacher already, or has nothing to train.
        DataError: if an image is damaged or its teacher embedding is not finite.
        CheckpointError: if a cache in ``workdir=`` belongs to another teacher, size or data set.

    Effect: the encoder's weights change, nothing else does; size and speed stay as they are. The
        state tells the loss before and after; `sc.evaluate` tells what that means for masks.

    Composes with: every step before it that changes the encoder (image size, pruned units,
        attention); reduce precision and export afterwards.

    Source: MobileSAM, Zhang et al. 2023, arXiv 2306.14289 (Apache-2.0, no training code): MSE on
        embeddings, decoder copied. EdgeSAM stage 1, Zhou et al. 2023, arXiv 2312.06660 (S-Lab
        licence, non-commercial; nothing of it is used): valid-region mask, AdamW, cosine, clip 5.
        We differ in batch size, learning rate and the choice of distances, and start from the
        compressed original.

    Example:
        >>> import samcompress as sc
        >>> recipe = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.Encoder(steps=8)
        >>> small = recipe(sc.load("tiny"), data=sc.shapes(8))
        >>> facts = sc.lineage(small)[-1].state
        >>> facts["loss_after"] < facts["loss_before"]
        True
    """

    needs_teacher: ClassVar[bool] = True

    loss: Kind = "mse"
    epochs: float = 10.0
    steps: int | None = None
    batch_size: int = 8
    lr: float = 2e-4
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def validate(self) -> None:
        """Check the fields."""
        self.between("epochs", 0, float("inf"))
        self.between("lr", 0, float("inf"))
        self.between("weight_decay", 0, 1, closed=True)
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.", got=value, expected=">= 1"
                )

    def check(self, model: nn.Module) -> None:
        """Check that the encoder has weights that can be trained."""
        _fit.trainable(model, (PART,))

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Train."""
        original = ctx.original
        _check_channels(model, original)
        teacher = Teacher(original, ctx.data, ctx.workdir and ctx.workdir / "teacher")
        teacher.fill(ctx.progress)
        objective = Objective(model, teacher, Ready(model, ctx.data), self)
        before, error = objective.measure()
        if error < SAME:
            raise NoEffectError(
                f"{self.label} has nothing to learn.",
                got="a student whose embeddings equal the teacher's already",
                expected="a step before it that changes the encoder's output",
                fix="teacher=, the model to imitate: without it that is the one that came in",
            )
        images = len(ctx.data)
        steps = self.steps or max(1, round(self.epochs * images / self.batch_size))
        plan = _fit.Plan(
            steps=steps, lr=self.lr, weight_decay=self.weight_decay, clip=5.0, seed=self.seed
        )
        identity = {
            **teacher.identity,
            **self.params(),
            "steps": steps,
            "student": fingerprint(model),
        }
        run = _fit.fit(
            model,
            objective,
            plan,
            parts=(PART,),
            checkpoint=_place(ctx.workdir, identity),
            identity=identity,
            progress=ctx.progress,
        )
        after, _ = objective.measure()
        log.info("%s: loss %.4g -> %.4g in %d steps", self.label, before, after, run.step)
        return {
            "loss_before": before,
            "loss_after": after,
            "images": images,
            "steps": run.step,
            "skipped": run.skipped,
            "curve": run.curve(),
        }

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Nothing to do: no shape has changed."""
        return state


class Objective:
    """The loss of a step, and of the images by which the student is judged."""

    def __init__(self, model: nn.Module, teacher: Teacher, ready: Ready, settings: Encoder) -> None:
        self.encoder, self.teacher, self.ready = model.get_submodule(PART), teacher, ready
        self.settings = settings
        self.n = len(teacher.data)

    def __call__(self, step: int) -> Mapping[str, Tensor]:
        """The loss of a step's batch."""
        s = self.settings
        student, teacher, valid = self._pair(batch(self.n, s.batch_size, seed=s.seed, step=step))
        return {"embedding": embedding_loss(student, teacher, valid, s.loss)}

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Loss, and squared error over the teacher's own square, of up to `MEASURED` images."""
        count = min(self.n, MEASURED)
        sums = torch.zeros(3, dtype=torch.float64)
        with evaluating(self.encoder):
            for i in range(count):
                student, teacher, valid = self._pair([i * self.n // count])
                zero = torch.zeros_like(teacher)
                sums += torch.stack(
                    [
                        embedding_loss(student, teacher, valid, self.settings.loss),
                        embedding_loss(student, teacher, valid, "mse"),
                        embedding_loss(zero, teacher, valid, "mse"),
                    ]
                ).cpu()
        return float(sums[0]) / count, float(sums[1] / sums[2])

    def _pair(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        images, sizes = self.ready.read(indices)
        student = self.encoder(images)
        height, width = student.shape[-2:]
        cells = [valid_cells(size, images.shape[-1], (height, width)) for size in sizes]
        teacher = to_grid(self.teacher.read(indices).to(student.device), (height, width))
        return student, teacher, torch.stack(cells).to(student.device)


def _check_channels(student: Any, teacher: Any) -> None:
    shapes = [tuple(m.prompt_encoder.get_dense_pe().shape[1:]) for m in (student, teacher)]
    if shapes[0][0] != shapes[1][0]:
        raise ModelError(
            "student and teacher embed images in different numbers of channels.",
            got=f"student {shapes[0]}, teacher {shapes[1]}",
            expected="the same number of channels; the grids may differ",
            fix="a teacher= of the same family as the student",
        )


def _place(workdir: Path | None, identity: Mapping[str, Any]) -> Path | None:
    """A checkpoint file of this run alone, so that two runs can share a folder."""
    if workdir is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return workdir / f"distill-encoder-{digest[:12]}.safetensors"
