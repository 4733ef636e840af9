"""Distillation of the image encoder: the student's embeddings learn to equal the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core._draws import batch
from ..core._draws import drawn as randomly
from ..core._objective import Objective, Share
from ..core.contract import device_of, embedding_shape
from ..core.errors import NoEffectError
from ..core.framing import framing_of
from ..core.registry import register
from ..core.transform import Context, State
from ._cache import Ready, Teacher, evaluating
from ._embeddings import Embeddings
from ._guide import compared
from ._learner import JUDGED, SAME, Learner
from ._losses import Kind, embedding_loss, resizing, to_grid, valid_cells

if TYPE_CHECKING:
    from ..core.data import Dataset

PART = "image_encoder"


@register
@dataclass(frozen=True, kw_only=True)
class Encoder(Learner, family="distill", phase=40):
    """Train the image encoder until its embeddings equal the original model's.

    Use it after any step that changed the encoder: a smaller image size, pruned units, approximate
    attention. It needs images but no masks, and the decoder is not run, so a step is cheap. It
    cannot mend the decoder, does nothing for a student that equals its teacher, and from random
    weights it needs a hundred thousand images; start from a compressed copy instead.

    The teacher is the model that entered the pipeline, or ``teacher=``; its input size may differ.
    Its embeddings are computed once, and with ``workdir=`` kept on disk; then an interrupted run
    also goes on where its last checkpoint was, bit for bit on the CPU.

    A student that embeds images in another number of channels, or on another grid, gets an adapter
    for the time of training, named in the state: a linear map of its embeddings to the teacher's,
    which is thrown away, and the teacher's embeddings resized to the student's grid. Channels that
    only one of the two decoders takes, as SAM-HQ's, are left out and named there too. After a map
    the student's decoder must learn the new embeddings: follow with `PromptLoop` or `Supervised`.

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
        ema: decay of an average of the weights, which is then the result; None for none.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if the student is not float32.
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
    lr: float = 2e-4

    @property
    def parts(self) -> tuple[str, ...]:
        """The image encoder, and the map of its channels, which is empty where they agree."""
        return ("student.image_encoder", "adapter")

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The distance to the teacher's embeddings, which are computed now."""
        original = ctx.original
        folder, rule = ctx.workdir and ctx.workdir / "teacher", type(framing_of(model))
        teacher = Teacher(original, ctx.data, folder, rule=rule)
        teacher.fill(ctx.progress)
        source = Images(ctx.data, teacher.reader(), Ready(model, ctx.data), self)
        objective = Imitation(model, source, self)
        objective.adapt(original)
        if objective.error() < SAME:
            raise NoEffectError(
                f"{self.label} has nothing to learn.",
                got="a student whose embeddings equal the teacher's already",
                expected="a step before it that changes the encoder's output",
                fix="teacher=, the model to imitate: without it that is the one that came in",
            )
        return objective

    def finish(self, objective: Any) -> State:
        """Name the adapters."""
        return {"adapters": list(objective.adapters)}

    def judge(self, objective: Any) -> float:
        """Mean loss of images spread evenly over the data."""
        found: float = objective.measure()
        return found


@dataclass(frozen=True)
class Pairs:
    """Images and what the teacher makes of them.

    Attributes:
        images: (B, 3, S, S), normalised and padded.
        sizes: height and width of each image inside the padding.
        teacher: (B, C, h, w).
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    teacher: Tensor

    @property
    def weight(self) -> float:
        """The number of images."""
        return float(len(self.images))


class Images:
    """Draws the pairs of a step."""

    def __init__(self, data: Dataset, teacher: Embeddings, ready: Ready, settings: Encoder) -> None:
        self.data, self.teacher, self.ready, self.settings = data, teacher, ready, settings

    def draw(self, step: int, share: Share) -> Pairs:
        """A part of the batch of a step."""
        s = self.settings
        chosen = batch(len(self.data), s.batch_size, seed=s.seed, step=step)
        return self.pairs([index for _, index in share.of(chosen)])

    def pairs(self, indices: list[int]) -> Pairs:
        """Those of chosen images."""
        images, sizes = self.ready.read(indices)
        return Pairs(images.cpu(), sizes, self.teacher.read(indices))


class Imitation(Objective):
    """The distance of the student's embeddings to the teacher's."""

    source: Images

    def __init__(self, student: nn.Module, source: Images, settings: Encoder) -> None:
        super().__init__(student, source)
        self.settings, self.kind = settings, settings.loss
        self.adapter: nn.Module = nn.Identity()
        self.adapters: tuple[str, ...] = ()
        self.channels: tuple[int | None, int | None] = (None, None)

    def adapt(self, teacher: Any) -> None:
        """Choose what brings the student's embeddings and the teacher's together."""
        student: Any = self.student
        mine, theirs = (embedding_shape(model) for model in (student, teacher))
        self.channels = count, wanted = compared(student, teacher)
        if (count, wanted) != (mine[0], theirs[0]):
            self.adapters += (f"further channels left out: {mine[0]} and {theirs[0]} in all",)
        if count != wanted:
            with randomly(torch.device("cpu"), self.settings.seed, "adapter"):
                made = nn.Conv2d(count, wanted, 1)
            self.adapter = made.to(device_of(student))
            self.adapters += (f"student's channels {count} -> {wanted}, linear",)
        if mine[1:] != theirs[1:]:
            grids = " -> ".join("x".join(map(str, shape[1:])) for shape in (theirs, mine))
            self.adapters += (f"teacher's grid {grids}, {resizing(theirs[1:], mine[1:])}",)

    def forward(self, drawn: Pairs, step: int) -> dict[str, Tensor]:
        """Term ``embedding``."""
        return {"embedding": embedding_loss(*self._three(drawn), self.kind)}

    @torch.no_grad()
    def measure(self) -> float:
        """Mean loss of up to `JUDGED` images."""
        n = len(self.source.data)
        count = min(n, JUDGED)
        total = 0.0
        with evaluating(self):
            for i in range(count):
                three = self._three(self.source.pairs([i * n // count]))
                total += float(embedding_loss(*three, self.kind))
        return total / count

    @torch.no_grad()
    def error(self) -> float:
        """Squared error over the teacher's own square, of an image or two."""
        with evaluating(self):
            student, teacher, valid = self._three(self.source.pairs([0, len(self.source.data) - 1]))
        own = embedding_loss(torch.zeros_like(teacher), teacher, valid, "mse")
        return float(embedding_loss(student, teacher, valid, "mse") / own)

    def _three(self, drawn: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) of student and teacher, and (B, 1, h, w) cells that count."""
        images = drawn.images.to(device_of(self.student))
        mine, theirs = self.channels
        student = self.adapter(self.student.get_submodule(PART)(images)[:, :mine])
        height, width = student.shape[-2:]
        cells = [valid_cells(size, images.shape[-1], (height, width)) for size in drawn.sizes]
        teacher = to_grid(drawn.teacher[:, :theirs].to(student.device), (height, width))
        return student, teacher, torch.stack(cells).to(student.device)
