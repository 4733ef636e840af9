"""Core ML packages for iPhones, iPads and Macs: written anywhere, run by macOS only."""

from __future__ import annotations

import collections
import platform
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import BackendError
from ._base import Options, Run, Sample, floats
from ._native import NoisyBackend, check_plain, contiguous, muted

# They leave the Neural Engine, or depend on values.
REFUSED = {
    "cond",
    "gather_nd",
    "non_zero",
    "scatter",
    "scatter_along_axis",
    "scatter_nd",
    "while_loop",
}
PRECISIONS = {"float32": "FLOAT32", "float16": "FLOAT16"}


class CoreMl(NoisyBackend):
    """The row of the support table, and how to export and run.

    A package is a folder; it is zipped, so that it is one file with one hash. Xcode wants it
    unzipped.
    """

    name = "coreml"
    suffix = ".mlpackage.zip"
    extra = "coreml"
    packages = ("coremltools",)
    dtypes = ("float32", "float16")
    dynamic_shapes = False

    def unrunnable(self) -> str | None:
        """None, or why a package cannot be run here."""
        if platform.system() == "Darwin":
            return None
        return f"Core ML is part of macOS and iOS; this is {platform.system()}"

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
        """Write `path`, once operators, sizes, names and types in it are what they should be."""
        tools = self.package("coremltools")
        with (
            self.writing(module, path),
            muted(),
            contiguous(module),
            tempfile.TemporaryDirectory() as folder,
        ):
            program = torch.export.export(module, example)
            check_plain(program)
            model = tools.convert(
                program.run_decompositions(_plainer()),
                convert_to="mlprogram",
                skip_model_load=True,
                minimum_deployment_target=tools.target.iOS16,
                compute_precision=tools.precision[PRECISIONS[dtype]],
                outputs=[tools.TensorType(name=name) for name in options.outputs],
            )
            model = self._named(model, options)
            check_graph(model.get_spec(), example, options)
            package = Path(folder) / path.name.removesuffix(".zip")
            model.save(str(package))
            _zip(package, path)
        return [path]

    def load(self, path: Path, *, device: str, threads: int) -> Run:
        """Open a package, on a Mac; Core ML chooses processor and threads by itself."""
        reason = self.unrunnable()
        if reason:
            raise BackendError(
                "coreml cannot run a package here.",
                where=str(path),
                got=reason,
                fix="open the folder on a Mac, or export for this machine with another backend",
            )
        tools = self.package("coremltools", f"running {path.name}")
        with (
            self.opening(path, "a zipped .mlpackage"),
            tempfile.TemporaryDirectory() as folder,
        ):
            with zipfile.ZipFile(path) as packed:
                packed.extractall(folder)
            model = tools.models.MLModel(str(next(Path(folder).iterdir())))
        takes = [(i.name, i.type.multiArrayType.shape) for i in model.get_spec().description.input]
        gives = [o.name for o in model.get_spec().description.output]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: ", ".join(f"{n} {list(s)}" for n, s in takes)):
                arrays = dict(zip([n for n, _ in takes], floats(tensors), strict=True))
                found = model.predict(arrays)
            return tuple(torch.as_tensor(found[name], dtype=torch.float32) for name in gives)

        return run

    def _named(self, model: Any, options: Options) -> Any:
        """Inputs called after the options, not after the arguments of `forward`."""
        tools, spec = self.package("coremltools"), model.get_spec()
        found = [given.name for given in spec.description.input]
        # By way of names that nothing has: a new name may be the old one of another input.
        between = [f"renamed_{i}" for i in range(len(found))]
        for old, new in zip((*found, *between), (*between, *options.inputs), strict=True):
            tools.utils.rename_feature(spec, old, new)
        return tools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


def _plainer() -> dict[Any, Any]:
    """Operators that the converter lacks, or writes as `scatter`, by others."""
    aten = torch.ops.aten
    return {
        aten.where.ScalarSelf: lambda chosen, x, y: torch.where(chosen, torch.full_like(y, x), y),
        aten.where.ScalarOther: lambda chosen, x, y: torch.where(chosen, x, torch.full_like(x, y)),
        aten.select_scatter.default: lambda x, new, dim, i: _put(x, new.unsqueeze(dim), dim, i),
        aten.slice_scatter.default: lambda x, new, dim=0, start=None, end=None, step=1: (
            _put(x, new, dim, start or 0) if step == 1 else NotImplemented
        ),
    }


def _put(x: Tensor, new: Tensor, dim: int, start: int) -> Tensor:
    """`x` with `new` in the place of as many of its slices, from `start` on."""
    size, start = x.shape[dim], start % x.shape[dim]
    end = start + new.shape[dim]
    pieces = x.narrow(dim, 0, start), new, x.narrow(dim, end, size - end)
    return torch.cat([piece for piece in pieces if piece.shape[dim]], dim)


def check_graph(spec: Any, example: Sample, options: Options) -> None:
    """Check what can be checked without Apple's runtime.

    Raises:
        ValueError: if operators, names or sizes are not what they should be.
    """
    found = {i.name: tuple(i.type.multiArrayType.shape) for i in spec.description.input}
    wanted = {n: tuple(t.shape) for n, t in zip(options.inputs, example, strict=True)}
    if found != wanted:
        raise ValueError(f"inputs are {found}, not {wanted}")
    names = [output.name for output in spec.description.output]
    if names != list(options.outputs):
        raise ValueError(f"outputs are {names}, not {list(options.outputs)}")
    refused = REFUSED & set(operators(spec))
    if refused:
        raise ValueError(f"operators that leave the Neural Engine: {', '.join(sorted(refused))}")


def operators(spec: Any) -> collections.Counter[str]:
    """How often each operator is in a package."""
    return collections.Counter(operation.type for operation in _operations(spec))


def _operations(spec: Any) -> Iterator[Any]:
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def _zip(package: Path, path: Path) -> None:
    """What belongs to the package; a table for debugging that the converter adds does not."""
    kept = [package / "Manifest.json", *sorted((package / "Data").rglob("*"))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in kept:
            if file.is_file():
                packed.write(file, file.relative_to(package.parent))
