"""Batches drawn one after the other, ahead of time by worker processes if there are any."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ._objective import Share, Source
from .errors import SamCompressError


def batches(
    source: Source, steps: Sequence[int], shares: Sequence[Share], workers: int
) -> Generator[list[Any], None, None]:
    """The shares of the batch of each step; the same for any number of workers.

    Raises:
        SamCompressError: what `source` raises, also if it did so in a worker.
    """
    if workers == 0:
        for step in steps:
            yield [source.draw(step, share) for share in shares]
        return
    loader = DataLoader(
        _Draws(source),
        sampler=((step, share) for step in steps for share in shares),
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_undisturbed,
        generator=torch.Generator(),  # the global one would be changed
    )
    found = []
    for drawn in loader:
        if isinstance(drawn, SamCompressError):
            raise drawn
        found.append(drawn)
        if len(found) == len(shares):
            yield found
            found = []


class _Draws(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, key: tuple[int, Share]) -> Any:
        # Errors travel as values: the loader would wrap their text in a traceback.
        try:
            return self.source.draw(*key)
        except SamCompressError as err:
            return err


def _same(drawn: Any) -> Any:
    return drawn


def _undisturbed(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; workers end when the main one lets them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
