"""Images read, encoded and grouped, as all accuracies need it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import nn

from ..core.data import Dataset, Sample, Skipped
from ..core.errors import DataError, ShapeError
from ..core.predict import Embedding, encode

# Full-size masks of one group of objects take at most about this many bytes.
_MASK_BYTES = 2**27


def ahead(data: Dataset, workers: int) -> Iterator[Sample]:
    """`Dataset.readable`, with threads that read the next images while one is worked on."""
    if not workers:
        yield from data.readable()
        return
    waiting: deque[Future[Sample | None]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for sample in data:
                waiting.append(pool.submit(data.hold, sample))
                if len(waiting) > 2 * workers and (held := waiting.popleft().result()) is not None:
                    yield held
            while waiting:
                if (held := waiting.popleft().result()) is not None:
                    yield held
        finally:
            pool.shutdown(cancel_futures=True)


def encoded(
    model: nn.Module, samples: list[Sample], unread: list[Skipped]
) -> Iterator[tuple[Sample, Embedding]]:
    """Embeddings of samples, encoded at once; those the model cannot take are put into `unread`."""
    if not samples:
        return
    try:
        found = encode(model, [s.image for s in samples], batch_size=len(samples))
    except (DataError, ShapeError) as err:
        if len(samples) > 1:
            for sample in samples:
                yield from encoded(model, [sample], unread)
        else:
            unread.append(Skipped(samples[0].id, "image", reason(err)))
        return
    yield from zip(samples, found, strict=True)


def group_size(size: tuple[int, int], masks_each: int, most: int) -> int:
    """How many objects are decoded together, so that their full-size masks do not fill memory."""
    return min(most, max(1, _MASK_BYTES // (masks_each * math.prod(size))))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in its mode for use; left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def reason(err: DataError | ShapeError) -> str:
    """What went wrong, in one line."""
    return err.what if err.got is None else f"{err.what} Got {err.got}."
