"""A teacher that answers the same prompts as the student, whatever its size and grid."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core._objective import Share
from ..core.checkpoint import identity as model_identity
from ..core.contract import device_of, embedding_shape
from ..core.errors import ModelError, NoEffectError
from ..core.transform import Context
from ._cache import Teacher, evaluating
from ._clicks import Asked
from ._decode import Decoded, check_decoder, decode
from ._embeddings import Embeddings
from ._samples import Augment, Batch, Frame, Samples

if TYPE_CHECKING:
    from ..core.data import Dataset


@dataclass(frozen=True)
class Guided:
    """Part of a batch.

    Attributes:
        batch: images and objects.
        features: (B, C, h, w) of the teacher; None if it must look at ``batch.others[0]`` itself.
    """

    batch: Batch
    features: Tensor | None

    @property
    def weight(self) -> float:
        """The number of prompts."""
        return self.batch.weight


class GuidedSamples:
    """Draws batches with what the teacher's cache holds of them.

    Args:
        samples: draws the batches.
        cache: the teacher's embeddings; None for a teacher that runs in every step.
    """

    def __init__(self, samples: Samples, cache: Embeddings | None) -> None:
        self.samples, self.cache = samples, cache

    @property
    def data(self) -> Dataset:
        """The images."""
        return self.samples.data

    @property
    def side(self) -> int:
        """S of the student's frame."""
        return self.samples.frames[0].size

    @property
    def grid(self) -> int:
        """Cells a side of the grid that masks are compared on."""
        return self.samples.frames[0].grid

    def draw(self, step: int, share: Share) -> Guided:
        """A part of the batch of a step."""
        batch = self.samples.draw(step, share)
        return Guided(batch, None if self.cache is None else self.cache.read(batch.indices))


class Guide:
    """A teacher's answers on the student's grid, without gradients and in eval mode.

    Args:
        teacher: a SAM, never changed; on the student's device.
        student: gives the frame that prompts are in, and the size of masks.
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        self.teacher = teacher
        self.ratio = teacher.image_encoder.img_size / student.image_encoder.img_size
        self.grid = Frame.of(student).grid

    @torch.no_grad()
    def features(self, drawn: Guided) -> Tensor:
        """(B, C, h, w) embeddings on the teacher's own grid."""
        device = device_of(self.teacher)
        if drawn.features is not None:
            return drawn.features.to(device)
        with evaluating(self.teacher):
            found: Tensor = self.teacher.image_encoder(drawn.batch.others[0].to(device))
        return found

    @torch.no_grad()
    def decode(self, features: Tensor, owner: Tensor, asked: Asked) -> Decoded:
        """Its answers to prompts in the student's frame, on the grid of the student's."""
        with evaluating(self.teacher):
            return decode(self.teacher, features, owner, asked.scaled(self.ratio)).at(self.grid)


def guided(
    label: str,
    model: nn.Module,
    ctx: Context,
    *,
    batch_size: int,
    prompts: int,
    augment: Augment | None,
    seed: int,
    channels: bool = False,
) -> tuple[GuidedSamples, Guide]:
    """What a student and its teacher learn from.

    Without augmentation the teacher's embeddings are computed once, and kept in the working folder
    if there is one, the same that `Encoder` uses; otherwise the teacher looks at every batch.

    Args:
        label: the technique's, for messages.
        model: the student.
        ctx: gives teacher, data and folder.
        batch_size: see `Samples`.
        prompts: see `Samples`.
        augment: see `Samples`.
        seed: see `Samples`.
        channels: whether embeddings are compared, too.

    Raises:
        NoEffectError: if the student is the teacher.
        ModelError: if their answers cannot be compared.
        DataError, CheckpointError: see `Teacher.fill`.
    """
    teacher = ctx.original
    _check_pair(label, model, teacher, channels=channels)
    if device_of(teacher) != device_of(model):
        teacher = copy.deepcopy(teacher).to(device_of(model))
    frames, cache = [Frame.of(model)], None
    if augment is None:
        folder = ctx.workdir and ctx.workdir / "teacher"
        kept = Teacher(teacher, ctx.data, folder, rule=frames[0].rule)
        kept.fill(ctx.progress)
        cache = kept.reader()
    else:
        frames.append(Frame.of(teacher))
    samples = Samples(
        ctx.data, frames, batch_size=batch_size, prompts=prompts, augment=augment, seed=seed
    )
    return GuidedSamples(samples, cache), Guide(teacher, model)


def compared(student: Any, teacher: Any) -> tuple[int, int]:
    """How many channels of the student's embedding and of the teacher's have a counterpart.

    All of them; but where their decoders take different further ones, only those before.
    """
    models = student, teacher
    further = [getattr(model.mask_decoder, "features", 0) for model in models]
    whole = [embedding_shape(model)[0] for model in models]
    if further[0] != further[1]:
        whole = [count - more for count, more in zip(whole, further, strict=True)]
    return whole[0], whole[1]


def _check_pair(label: str, student: Any, teacher: Any, *, channels: bool) -> None:
    check_decoder(f"{label}'s teacher", teacher)
    if model_identity(student) == model_identity(teacher):
        raise NoEffectError(
            f"{label} has nothing to learn.",
            got="a student that equals the teacher already",
            expected="a step before it that changes what the model says",
            fix="teacher=, the model to imitate: without it that is the one that came in",
        )
    models = (student, teacher)
    answers = {"masks a prompt": [m.mask_decoder.num_mask_tokens for m in models]}
    if channels:
        answers["channels of the embedding"] = list(compared(student, teacher))
    for what, (mine, other) in answers.items():
        if mine != other:
            raise ModelError(
                f"student and teacher differ in the {what}.",
                where=label,
                got=f"student {mine}, teacher {other}",
                expected="the same number; sizes of images and grids may differ",
                fix="a teacher= of the same family as the student",
            )
