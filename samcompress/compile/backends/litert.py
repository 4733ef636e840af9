"""LiteRT (TensorFlow Lite) files for phones and small devices.

The converter, litert-torch, needs torch below 2.15. It has an environment of its own, whose Python
is called; files run in this one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import BackendError
from ._base import Backend, Options, Run, Sample, floats
from ._native import contiguous, muted

PYTHON = "SAMCOMPRESS_LITERT_PYTHON"
WORKER = Path(__file__).with_name("_litert_worker.py")
VERSIONS = "from importlib.metadata import version as v; print(v('litert-torch'), v('torch'))"


class LiteRt(Backend):
    """The row of the support table, and how to export and run."""

    name = "litert"
    suffix = ".tflite"
    extra = "litert"
    packages = ("ai_edge_litert",)
    dtypes = ("float32", "int8")
    calibrated = ("int8",)
    calibrators = ("ai_edge_quantizer",)
    dynamic_shapes = False
    # All tensors of the encoder are integers then, sums and norms too.
    tolerance: ClassVar[Mapping[str, float]] = {"int8": 0.7}

    def ready(self, dtype: str = "float32") -> None:
        """Check packages here, and the converter in its environment."""
        super().ready(dtype)
        if dtype == "int8":
            self.package("ai_edge_quantizer")
        converter()

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
        """Write `path`; its inputs have names, its outputs are ``output_0``, ``output_1``, ..."""
        with self.writing(module, path), tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "program.pt2"
            with contiguous(module):
                torch.export.save(torch.export.export(module, example), program)
            target = Path(folder) / path.name if dtype == "int8" else path
            _convert(program, target, options.inputs)
            if dtype == "int8":
                path.write_bytes(self._integers(target, options.inputs, samples))
        return [path]

    def load(self, path: Path, *, device: str, threads: int) -> Run:
        """Open an interpreter; what goes in and comes out is float32, whatever the file takes."""
        runtime = self.package("ai_edge_litert.interpreter", f"running {path.name}")
        with self.opening(path, "a file that this ai-edge-litert reads"), muted():
            interpreter = runtime.Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
            graph = interpreter.get_signature_runner()
            takes, gives = graph.get_input_details(), graph.get_output_details()
        # Signatures are sorted by name; the interpreter's own list is in the order of arguments.
        place = {d["index"]: i for i, d in enumerate(interpreter.get_input_details())}
        names = sorted(takes, key=lambda name: place[takes[name]["index"]])
        results = sorted(gives, key=lambda name: int(name.rpartition("_")[2]))

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: ", ".join(f"{n} {takes[n]['shape']}" for n in names)):
                given = dict(zip(names, floats(tensors), strict=True))
                _check_sizes(given, takes)
                found = graph(**{name: _stored(x, takes[name]) for name, x in given.items()})
            return tuple(torch.from_numpy(_plain(found[name], gives[name])) for name in results)

        return run

    def _integers(self, path: Path, names: Sequence[str], samples: Sequence[Sample]) -> bytes:
        """The file with every tensor in int8, inputs and outputs too."""
        tools = self.package("ai_edge_quantizer")
        quantizer = tools.quantizer.Quantizer(str(path), tools.recipe.static_wi8_ai8())
        ranges: dict[str, dict[str, Any]] = {}
        with muted():
            # One by one: over several the quantizer takes a moving average, which cuts tails off.
            for sample in samples:
                inputs = {"serving_default": [dict(zip(names, floats(sample), strict=True))]}
                _widen(ranges, quantizer.calibrate(inputs, num_threads=torch.get_num_threads()))
            made = quantizer.quantize(ranges, enable_progress_report=False)
        return bytes(made.quantized_model)


def converter() -> tuple[str, str]:
    """The Python that has litert-torch, and the versions of that and of its torch.

    Raises:
        BackendError: if no environment is named, or it is not such a one.
    """
    given = os.environ.get(PYTHON)
    if not given and importlib.util.find_spec("litert_torch"):
        given = sys.executable
    fix = (
        "python -m venv litert && litert/bin/pip install litert-torch && "
        f"export {PYTHON}=$PWD/litert/bin/python"
    )
    expected = "the Python of an environment of its own: litert-torch needs torch < 2.15"
    if not given:
        raise BackendError(
            "litert finds no converter.", where=PYTHON, got="not set", expected=expected, fix=fix
        )
    versions = _versions(given)
    if len(versions.split()) != 2:
        raise BackendError(
            "litert finds no converter.",
            where=PYTHON,
            got=f"{given}: {versions}",
            expected=expected,
            fix=fix,
        )
    return given, "litert-torch {}, torch {}".format(*versions.split())


@functools.cache
def _versions(python: str) -> str:
    """Two versions, or what went wrong."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", VERSIONS], capture_output=True, text=True, check=False
        )
    except OSError as err:
        return f"cannot be run, {err.strerror}"
    return (done.stdout or done.stderr.strip().rpartition("\n")[2]).strip()


def _convert(program: Path, target: Path, names: Sequence[str]) -> None:
    """Have the other environment write `target`."""
    environment = {
        **os.environ,
        # Its own packages are built for GPUs and look for them; nothing is to be fetched either.
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    python, versions = converter()
    # -I: PYTHONPATH is for the packages of this environment.
    command = [python, "-I", str(WORKER), str(program), str(target), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or not target.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError("\n".join([f"{versions}, exit {done.returncode}", *said[-2:]]))


def _widen(ranges: dict[str, dict[str, Any]], seen: Mapping[str, Mapping[str, Any]]) -> None:
    """Take what one sample showed into the ranges of all tensors."""
    for name, new in seen.items():
        old = ranges.setdefault(name, dict(new))
        for side, wider in (("min", np.minimum), ("max", np.maximum)):
            if side in new:
                old[side] = wider(old[side], new[side])


def _check_sizes(given: Mapping[str, Any], takes: Mapping[str, Any]) -> None:
    for name, array in given.items():
        if array.shape != tuple(takes[name]["shape"]):
            raise ValueError(f"{name} is {array.shape}")


def _stored(array: Any, tensor: Mapping[str, Any]) -> Any:
    """Floats as the file stores them."""
    scale, zero = tensor["quantization"]
    if tensor["dtype"] == np.float32:
        return array
    limits = np.iinfo(tensor["dtype"])
    return np.clip(np.rint(array / scale) + zero, limits.min, limits.max).astype(tensor["dtype"])


def _plain(array: Any, tensor: Mapping[str, Any]) -> Any:
    """Floats of what the file gives, in memory of their own."""
    if tensor["dtype"] == np.float32:
        return array.copy()
    scale, zero = tensor["quantization"]
    return (array.astype(np.float32) - zero) * np.float32(scale)
