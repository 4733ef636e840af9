"""Progress of long steps: a bar on a terminal or notebook, events for a callable, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """What a ``progress=callable`` receives.

    Attributes:
        step: the technique or verb at work, e.g. ``"prune.mlp"``.
        label: what is being counted, e.g. ``"blocks"``.
        done: how many are finished.
        total: how many there are, None where unknown.
    """

    step: str
    label: str
    done: int
    total: int | None


ProgressLike = bool | Callable[[Event], None]


class Progress:
    """Counts through iterables for one step.

    Args:
        mode: True for a bar where standard error is a terminal or the session a notebook, False for
            silence, a callable for events.
        step: name shown in front of every bar.
    """

    def __init__(self, mode: ProgressLike = False, step: str = "") -> None:
        self.mode = mode
        self.step = step

    def track(
        self, items: Iterable[T], *, label: str = "", total: int | None = None
    ) -> Iterator[T]:
        """Yield the items while showing how far along they are."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        if callable(self.mode):
            for done, item in enumerate(items, 1):
                yield item
                self.mode(Event(self.step, label, done, total))
        elif self.mode and _visible():
            from tqdm.auto import tqdm

            yield from tqdm(items, desc=f"{self.step} {label}".strip(), total=total, leave=False)
        else:
            yield from items


def _visible() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
