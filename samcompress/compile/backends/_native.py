"""What native code of runtimes does that Python does not see."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._base import Backend, quiet


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Nothing of native code, which writes past `sys.stderr`, reaches the terminal; errors do."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


class NoisyBackend(Backend):
    """A runtime that warns, when it is imported, of its versions or of what it does itself."""

    def package(self, module: str, purpose: str | None = None) -> Any:
        """Import a package of this runtime, in silence."""
        with quiet(), muted():
            return super().package(module, purpose)


@contextlib.contextmanager
def contiguous(module: nn.Module) -> Iterator[None]:
    """While inside, no weight or buffer is a view with strides, which some runtimes misread."""
    views = [t for t in (*module.parameters(), *module.buffers()) if not t.is_contiguous()]
    kept = [t.data for t in views]
    for tensor in views:
        tensor.data = tensor.data.contiguous()
    try:
        yield
    finally:
        for tensor, data in zip(views, kept, strict=True):
            tensor.data = data


def check_plain(program: torch.export.ExportedProgram) -> None:
    """Refuse a graph with a view among its constants, which `contiguous` does not reach.

    Raises:
        ValueError: if there is one.
    """
    for name, value in (*program.state_dict.items(), *program.constants.items()):
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            raise ValueError(f"{name} is a view with strides {value.stride()}: make it a buffer")
