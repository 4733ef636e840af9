"""What can be trained: something that draws batches, and something that judges a model by them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from .errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One of `count` parts of a batch: batches are divided among processes and micro-batches.

    Attributes:
        index: of this part.
        count: of parts.
        filled: whether an empty part is an error, as it is in training: its mean would be NaN.
    """

    index: int = 0
    count: int = 1
    filled: bool = False

    def of(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This part of the items, each with its place in the whole batch.

        Parts differ in length by at most one. What is drawn at random for an item must depend on
        its place in the whole batch, never on the part it fell into.

        Raises:
            ConfigError: if there are fewer items than parts, and none may be empty.
        """
        if self.filled and len(items) < self.count:
            raise ConfigError(
                "a batch has fewer items than parts.",
                got=f"{len(items)} items for {self.count} parts",
                expected="at least one item for each micro-batch of each process",
                fix="a larger batch_size, a smaller accumulate, or fewer processes",
            )
        low, high = (len(items) * i // self.count for i in (self.index, self.index + 1))
        return list(enumerate(items[low:high], low))


class Drawn(Protocol):
    """Part of a batch, on the CPU."""

    @property
    def weight(self) -> float:
        """How much the part counts: the number of items that the losses are means of."""


class Source(Protocol):
    """Where batches come from; it is copied to worker processes, so it holds no model."""

    def draw(self, step: int, share: Share) -> Any:
        """A part of the step's batch: a pure function of its arguments, however often called."""


class Objective(nn.Module, ABC):
    """A student, where its batches come from, and the losses it is judged by.

    Everything that trains is a submodule, so one call of `forward` is one call for data-parallel
    wrappers as well. A teacher is no submodule: it has no place in checkpoints or optimisers.

    Args:
        student: the model to train, as submodule ``student``.
        source: draws the batches.
    """

    def __init__(self, student: nn.Module, source: Source) -> None:
        super().__init__()
        self.student = student
        self.source = source

    @abstractmethod
    def forward(self, drawn: Any, step: int) -> Mapping[str, Tensor]:
        """Named terms whose sum is minimised, each a mean over the items of `drawn`.

        A plain dict, as wrappers for several processes look into it; the parts of one batch give
        the same names in the same order.

        A pure function of its arguments and the weights: what is drawn at random here comes from
        a generator of seed, step and place.
        """
