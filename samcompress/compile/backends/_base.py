"""What every runtime must be able to do; it knows modules and tensors, not what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Names in an exported graph.

    Attributes:
        inputs: one name an input, in order.
        outputs: one name an output, in order.
        dynamic: input name to axis to a name for its size; equal names are equal sizes. The sizes
            in the example must be above 1. All other axes are fixed.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


class Backend(Protocol):
    """One runtime.

    Attributes:
        name: how users ask for it.
        suffix: of its main file.
        extra: the samcompress extra that installs it.
        devices: where it runs.
        dtypes: what it computes in.
        dynamic_shapes: whether `Options.dynamic` works.
    """

    name: str
    suffix: str
    extra: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    dynamic_shapes: bool

    def unavailable(self) -> str | None:
        """None, or why it cannot run here and how to fix it."""

    def export(
        self,
        module: nn.Module,
        example: tuple[Tensor, ...],
        path: Path,
        *,
        dtype: str,
        options: Options,
    ) -> list[Path]:
        """Write a module to `path` and return all files written, the main one first.

        Raises:
            BackendError: if the runtime cannot express the module; no file is left.
        """

    def load(self, path: Path, *, device: str, threads: int) -> Run:
        """Open a file for running; the result maps tensors to a tuple of tensors, on the CPU.

        Raises:
            BackendError: if the file cannot be read. Running raises it too.
        """
