"""Images as student and teachers see them, and what they are compared by while they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core._draws import batch, generator
from ..core._objective import Objective, Share
from ..core.contract import device_of
from ..core.errors import DataError, ModelError
from ._cache import READY_BYTES, evaluating
from ._losses import embedding_loss, to_grid, valid_cells
from ._samples import TRIES, Frame, alike
from ._taps import EMBEDDING, states

if TYPE_CHECKING:
    from ..core.data import Dataset


@dataclass(frozen=True)
class Seen:
    """Part of a batch of B images, on the CPU.

    Attributes:
        images: for each model (B, 3, S, S), normalised and padded; the student's first.
        sizes: height and width of each image inside the student's frame.
        places: of the images in the whole batch.
    """

    images: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    places: tuple[int, ...]

    @property
    def weight(self) -> float:
        """The number of images."""
        return float(len(self.sizes))

    def valid(self, grid: tuple[int, int]) -> Tensor:
        """(B, 1, h, w), 1 where a cell of the student's grid shows the image."""
        side = self.images[0].shape[-1]
        return torch.stack([valid_cells(size, side, grid) for size in self.sizes])


class Views:
    """Draws images without masks, each as the predictor would show it to each of the models.

    An image that cannot be decoded is replaced by another one, drawn from the same seed.

    Args:
        data: the images.
        frames: of the student, then of the teachers, who see images by the student's rule.
        batch_size: images in the whole batch.
        seed: of the order.
    """

    def __init__(
        self, data: Dataset, frames: Sequence[Frame], *, batch_size: int, seed: int
    ) -> None:
        self.data, self.frames = data, alike(frames)
        self.batch_size, self.seed = batch_size, seed
        self._kept: dict[int, tuple[dict[Frame, Tensor], tuple[int, int]]] = {}
        self._room = READY_BYTES

    def draw(self, step: int, share: Share) -> Seen:
        """A part of the batch of a step."""
        chosen = share.of(batch(len(self.data), self.batch_size, seed=self.seed, step=step))
        found = [self._usable(index, step, place) for place, index in chosen]
        stacks = {f: torch.stack([views[f] for views, _ in found]) for f in set(self.frames)}
        return Seen(
            images=tuple(stacks[frame] for frame in self.frames),
            sizes=tuple(size for _, size in found),
            places=tuple(place for place, _ in chosen),
        )

    def _usable(
        self, index: int, step: int, place: int
    ) -> tuple[dict[Frame, Tensor], tuple[int, int]]:
        for attempt in range(TRIES):
            if attempt:
                g = generator(self.seed, "view", step, place, attempt)
                index = int(torch.randint(len(self.data), (), generator=g))
            if index in self._kept:
                return self._kept[index]
            try:
                views = self._views(index)
            except DataError:
                self.data.hold(self.data[index])  # which counts it among the skipped
                continue
            self._room -= sum(view.nbytes for view in views[0].values())
            if self._room > 0:
                self._kept[index] = views
            return views
        raise DataError(
            "images that cannot be decoded, one after the other.",
            where=f"{self.data.name}, {TRIES} images tried",
            got="; ".join(map(str, self.data.skipped[:2])),
            fix="mend the data, or leave the damaged images out",
        )

    def _views(self, index: int) -> tuple[dict[Frame, Tensor], tuple[int, int]]:
        image = self.data[index].image
        views, size = {}, (0, 0)
        # The student's is first, and its size is what is told.
        for frame in reversed(self.frames):
            resized = frame.rule(frame.size, frame.size).resized(image)
            size = (resized.shape[1], resized.shape[2])
            views[frame] = frame.ready(resized)
        return views, size


class Looking(Objective):
    """A student and its teachers, who look at the same images at the same time.

    Args:
        student: the model to train.
        teachers: SAMs, used as they are, on their devices.
        data: the images.
        batch_size: images in the whole batch.
        seed: of their order.
    """

    source: Views

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        data: Dataset,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        frames = [Frame.of(model) for model in (student, *teachers)]
        super().__init__(student, Views(data, frames, batch_size=batch_size, seed=seed))
        self._teachers = tuple(teachers)  # a tuple hides them from checkpoints and optimisers

    def learn(self, drawn: Seen, names: Sequence[str]) -> dict[str, Tensor]:
        """(B, C, h, w) states of the student, with gradients."""
        images = drawn.images[0].to(device_of(self.student))
        return states(self.student.get_submodule("image_encoder"), images, names)

    @torch.no_grad()
    def teach(self, drawn: Seen, names: Sequence[str], number: int = 0) -> dict[str, Tensor]:
        """(B, C, h, w) states of a teacher, on the student's device."""
        encoder = self._teachers[number].get_submodule("image_encoder")
        with evaluating(encoder):
            found = states(encoder, drawn.images[1 + number].to(device_of(encoder)), names)
        home = device_of(self.student)
        return {name: value.to(home) for name, value in found.items()}


def apart(drawn: Seen, name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two states over the cells that show the image.

    Args:
        drawn: the images they are of.
        name: of the layer, for an error.
        student: (B, C, h, w).
        teacher: (B, C, h', w'), brought to the student's grid.

    Raises:
        ModelError: if the widths differ.
    """
    if student.shape[1] != teacher.shape[1]:
        embedding = name == EMBEDDING
        raise ModelError(
            "student and teacher differ in width where they are compared.",
            where="image_encoder" if embedding else f"image_encoder.{name}",
            got=f"student {tuple(student.shape[1:])}, teacher {tuple(teacher.shape[1:])}",
            expected="the same number of channels, or a record of which of them were kept",
            fix="a teacher= of the same family as the student"
            if embedding
            else "as teacher= the model that was pruned, or sc.distill.Encoder(), which compares "
            "embeddings only",
        )
    height, width = student.shape[-2:]
    valid = drawn.valid((height, width)).to(student.device)
    return embedding_loss(student, to_grid(teacher, (height, width)), valid, "mse")
