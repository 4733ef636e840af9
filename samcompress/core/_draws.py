"""Randomness as a pure function of seed and step, so that there is no state to save or restore."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(*keys: object) -> torch.Generator:
    """A CPU generator that depends on the keys alone, e.g. ``generator(seed, step, "clicks")``."""
    return torch.Generator().manual_seed(_number(*keys))


def batch(n: int, size: int, *, seed: int, step: int) -> list[int]:
    """Which of `n` items make up the batch of a step.

    Items come in a new random order each epoch; a batch may reach over the end of one, so every
    item is seen equally often and every batch is full.

    Example:
        >>> sorted(batch(6, 3, seed=0, step=0) + batch(6, 3, seed=0, step=1))
        [0, 1, 2, 3, 4, 5]
    """
    places = range(step * size, (step + 1) * size)
    orders = {e: _order(n, seed, e) for e in {p // n for p in places}}
    return [orders[p // n][p % n] for p in places]


def _order(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def _number(*keys: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1


@contextmanager
def drawn(device: torch.device, *keys: object) -> Iterator[None]:
    """Make dropout a function of the keys, and leave the global random state as it was."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        number = _number(*keys)
        torch.default_generator.manual_seed(number)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield
