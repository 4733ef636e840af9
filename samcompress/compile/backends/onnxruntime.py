"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import ast
import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core._require import EXTRAS, require
from ...core.errors import BackendError, MissingDependencyError
from ._base import Options, Run

# An ONNX file is one protobuf message, which ends at 2 GB; larger weights go into a file beside it.
LARGEST_FILE = 1_500_000_000


class OnnxRuntime:
    """The row of the support table, and how to export and run."""

    name = "onnxruntime"
    suffix = ".onnx"
    extra = "onnx"
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32",)
    dynamic_shapes = True

    def unavailable(self) -> str | None:
        """None, or which package is missing and the line that installs it."""
        try:
            for module in EXTRAS[self.extra]:
                require(module, extra=self.extra, purpose=self.name)
        except MissingDependencyError as err:
            return str(err)
        return None

    def export(
        self,
        module: nn.Module,
        example: tuple[Tensor, ...],
        path: Path,
        *,
        dtype: str,
        options: Options,
    ) -> list[Path]:
        """Write `path`, and ``path.data`` where the weights are too large for one file."""
        sizes = {
            name: torch.export.Dim(name, min=1)
            for axes in options.dynamic.values()
            for name in axes.values()
        }
        shapes = tuple(
            {axis: sizes[name] for axis, name in options.dynamic.get(given, {}).items()}
            for given in options.inputs
        )
        tensors = (*module.parameters(), *module.buffers())
        large = sum(t.numel() * t.element_size() for t in tensors) > LARGEST_FILE
        data = path.with_name(path.name + ".data")
        try:
            with _quiet(), torch.no_grad():
                program: Any = torch.onnx.export(
                    module,
                    example,
                    input_names=options.inputs,
                    output_names=options.outputs,
                    dynamic_shapes=shapes,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                )
                optimizer = require("onnxscript.optimizer", extra=self.extra, purpose=self.name)
                optimizer.optimize_ir(program.model, should_fold=_may_fold)
                _tidy(program.model.graph)
                program.save(str(path), external_data=large)
        except Exception as err:
            for file in (path, data):
                file.unlink(missing_ok=True)
            raise BackendError(
                f"{self.name} could not export a {type(module).__name__}.",
                where="export",
                got=_tail(err),
                fix="samcompress doctor shows the versions; report this message with them",
            ) from err
        return [path, data] if data.exists() else [path]

    def load(self, path: Path, *, device: str, threads: int) -> Run:
        """Open a session on the CPU."""
        runtime = require("onnxruntime", extra=self.extra, purpose=f"running {path.name}")
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        try:
            session = runtime.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as err:
            raise BackendError(
                f"{self.name} could not open a file.",
                where=str(path),
                got=_tail(err),
                expected=f"an ONNX file that onnxruntime {runtime.__version__} reads",
                fix="export the model again",
            ) from err
        names = [given.name for given in session.get_inputs()]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            arrays = (t.detach().cpu().contiguous().numpy() for t in tensors)
            try:
                found = session.run(None, dict(zip(names, arrays, strict=True)))
            except Exception as err:
                raise BackendError(
                    f"{self.name} could not run a graph.",
                    where=str(path),
                    got=_tail(err),
                    expected=", ".join(f"{i.name} {i.shape}" for i in session.get_inputs()),
                ) from err
            return tuple(torch.from_numpy(array) for array in found)

        return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints and warnings to ourselves; its errors still come as exceptions."""
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def _may_fold(node: Any) -> bool | None:
    """Keep integer weights as they are: folded, they would be stored as floats. Else as usual."""
    kinds = [value.dtype.name for value in node.inputs if value is not None and value.dtype]
    return False if "INT8" in kinds else None


def _tidy(graph: Any) -> None:
    """Name nodes by their modules; drop source lines and paths of the machine that exported."""
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        modules = [name for name in ast.literal_eval(scopes)[:-1] if name]
        node.name = "/".join((*modules[-1:], node.name))
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _tail(err: Exception, lines: int = 3) -> str:
    text = [line for line in f"{type(err).__name__}: {err}".splitlines() if line.strip()]
    return " | ".join(text[:1] + text[1:][-lines:])[:600]
