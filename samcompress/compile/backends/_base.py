"""What every runtime must be able to do; it knows modules and tensors, not what they compute."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core._require import require
from ...core.errors import BackendError, ConfigError, MissingDependencyError, SamCompressError

Run = Callable[..., tuple[Tensor, ...]]
Sample = tuple[Tensor, ...]
Sizes = dict[str, list[int | str]]


@dataclass(frozen=True)
class Opened:
    """An open file: called with tensors, it gives tensors on the CPU.

    Attributes:
        run: calls the runtime.
        granted: what the runtime says it uses, as plain JSON values; it may not be what was asked.
    """

    run: Run
    granted: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        return self.run(*tensors)


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


class Backend(ABC):
    """One runtime.

    Attributes:
        name: how users ask for it.
        suffix: of its main file.
        extra: the samcompress extra that installs it; None where torch alone is enough.
        packages: what is imported to export in any type.
        devices: where it runs.
        dtypes: what it computes in.
        calibrated: those of them for which it must see samples.
        calibrators: what is imported for those besides.
        calibrators_extra: the extra that installs it, where that is another one.
        dynamic_shapes: whether `Options.dynamic` works; where not, `Export` writes a graph of each
            size and gives no `Options.dynamic`.
        integers: whether it writes layers that multiply integers in torch already.
        tolerance: how far it may be from torch in a type, where that is more than usual.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    calibrated: ClassVar[tuple[str, ...]] = ()
    calibrators: ClassVar[tuple[str, ...]] = ()
    calibrators_extra: ClassVar[str | None] = None
    dynamic_shapes: ClassVar[bool] = True
    integers: ClassVar[bool] = False
    tolerance: ClassVar[Mapping[str, float]] = {}

    def ready(self, dtype: str = "float32") -> None:
        """Check that it can export here in a type.

        Raises:
            MissingDependencyError: if a package is missing.
            BackendError: if this machine lacks something else.
        """
        for module in self.packages:
            self.package(module)

    def package(self, module: str, purpose: str | None = None) -> ModuleType:
        """Import a package of this runtime.

        Raises:
            MissingDependencyError: if it is missing.
        """
        return require(module, extra=self.extra, purpose=purpose or self.name)

    def hindrance(self, dtype: str = "float32") -> SamCompressError | None:
        """None, or why it cannot export here."""
        try:
            self.ready(dtype)
        except (MissingDependencyError, BackendError) as err:
            return err
        return None

    def unavailable(self, dtype: str = "float32") -> str | None:
        """None, or why it cannot export here and how to mend that."""
        err = self.hindrance(dtype)
        return None if err is None else str(err)

    def unrunnable(self) -> str | None:
        """None, or why a file cannot be run here although it can be written."""
        return None

    @abstractmethod
    def export(
        self,
        module: nn.Module,
        example: Sample,
        path: Path,
        *,
        dtype: str,
        options: Options,
        samples: Sequence[Sample] = (),
    ) -> list[Path]:
        """Write a module to `path` and return all files written, the main one first.

        Args:
            module: in float32, in eval mode.
            example: its inputs.
            path: of the main file.
            dtype: what to compute in; inputs and outputs stay float32.
            options: names and dynamic axes.
            samples: inputs to calibrate on, where `calibrated` asks for them.

        Raises:
            BackendError: if the runtime cannot express the module; no file is left.
        """

    @abstractmethod
    def load(self, path: Path, *, device: str, threads: int) -> Run:
        """Open a file for running; `open` is what is called from outside.

        Returns:
            What maps tensors to a tuple of tensors, on the CPU; an `Opened` where the runtime tells
            what it granted.

        Raises:
            BackendError: if the file cannot be read. Running raises it too.
        """

    def open(self, path: Path, *, device: str = "cpu", threads: int = 1) -> Opened:
        """Open a file for running.

        Raises:
            ConfigError: if there is no such device for it, or `threads` is below 1.
            MissingDependencyError: if the runtime is not installed.
            BackendError: if the file cannot be read. Running raises it too.
        """
        for name, got, fits, expected in (
            ("device", device, device in self.devices, " or ".join(self.devices)),
            ("threads", threads, threads >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(
                    f"{self.name}: {name} is out of range.", got=got, expected=expected
                )
        run = self.load(path, device=device, threads=threads)
        return run if isinstance(run, Opened) else Opened(run)

    @contextlib.contextmanager
    def writing(self, module: nn.Module, *files: Path) -> Iterator[None]:
        """Silent, without gradients; whatever goes wrong is an error of ours and leaves no file."""
        try:
            with quiet(), torch.no_grad():
                yield
        except Exception as err:
            for file in files:
                file.unlink(missing_ok=True)
            if isinstance(err, SamCompressError):
                raise
            raise BackendError(
                f"{self.name} could not export a {type(module).__name__}.",
                where="export",
                got=tail(err),
                fix="samcompress doctor shows the versions; report this message with them",
            ) from err

    @contextlib.contextmanager
    def opening(self, path: Path, expected: str) -> Iterator[None]:
        """Whatever goes wrong is a BackendError."""
        try:
            yield
        except Exception as err:
            raise BackendError(
                f"{self.name} could not open a file.",
                where=str(path),
                got=tail(err),
                expected=expected,
                fix="export the model again",
            ) from err

    @contextlib.contextmanager
    def running(self, path: Path, inputs: Callable[[], str]) -> Iterator[None]:
        """Whatever goes wrong is a BackendError that says what the graph takes."""
        try:
            yield
        except Exception as err:
            raise BackendError(
                f"{self.name} could not run a graph.",
                where=str(path),
                got=tail(err),
                expected=inputs(),
            ) from err


def free_sizes(options: Options) -> tuple[dict[int, Any], ...]:
    """Axis to size, for each input, of the axes that are not fixed."""
    sizes = {
        name: torch.export.Dim(name, min=1)
        for axes in options.dynamic.values()
        for name in axes.values()
    }
    return tuple(
        {axis: sizes[name] for axis, name in options.dynamic.get(given, {}).items()}
        for given in options.inputs
    )


def sizes_of(example: Sample, options: Options) -> Sizes:
    """Input name to its sizes, names where they are free; plain JSON values."""
    return {
        name: [options.dynamic.get(name, {}).get(axis, n) for axis, n in enumerate(given.shape)]
        for name, given in zip(options.inputs, example, strict=True)
    }


def check_sizes(tensors: Sequence[Tensor], sizes: Sizes) -> None:
    """For runtimes that do not look at sizes, and read whatever memory there is, or nothing.

    Raises:
        ValueError: naming the first input that does not fit.
    """
    free: dict[str, int] = {}
    for tensor, (name, wanted) in zip(tensors, sizes.items(), strict=True):
        fits = len(wanted) == tensor.ndim and all(
            found == (free.setdefault(size, found) if isinstance(size, str) else size)
            for found, size in zip(tensor.shape, wanted, strict=True)
        )
        if not fits or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}")


def told(sizes: Sizes) -> str:
    """Sizes for an error."""
    return ", ".join(f"{name} {wanted}" for name, wanted in sizes.items())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep an exporter's prints, warnings and logging to ourselves; its errors still come."""
    nowhere = io.StringIO()
    # Without any handler on it, the first message to the root logger would give it one for good.
    handler, before = logging.NullHandler(), logging.root.manager.disable
    logging.root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(handler)


def tail(err: Exception, lines: int = 3) -> str:
    """First and last lines of an error, on one."""
    text = [line for line in f"{type(err).__name__}: {err}".splitlines() if line.strip()]
    return " | ".join(text[:1] + text[1:][-lines:])[:600]


def floats(tensors: Sequence[Tensor]) -> list[Any]:
    """Arrays that lie in memory as they read."""
    return [t.detach().cpu().contiguous().numpy() for t in tensors]
