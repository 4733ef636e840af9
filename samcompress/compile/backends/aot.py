"""Torch's own graphs, compiled ahead of time: `torch.export` and AOTInductor.

Integers by Intel's neural-compressor (Apache-2.0), which rounds torch's graph before that.
"""

from __future__ import annotations

import json
import platform
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core._require import require
from ...core.errors import BackendError
from ._base import (
    Backend,
    Opened,
    Options,
    Sample,
    check_sizes,
    free_sizes,
    quiet,
    sizes_of,
    told,
)
from ._compiler import check_compiler

# Where a file says what it takes, and what it runs on.
INPUTS, PROCESSOR = "samcompress_inputs", "samcompress_processor"
CPUINFO = Path("/proc/cpuinfo")
# Instructions that a compiler uses where the processor has them.
VECTORS = re.compile(r"(?:s?sse|avx|amx|fma|f16c|bmi|sve|asimd|i8mm|bf16)\w*")


class Aot(Backend):
    """The row of the support table, and how to export and run.

    A file holds machine code: open only those of people that may run programs on the machine.
    """

    name = "aot"
    suffix = ".pt2"
    dtypes = ("float32", "bfloat16", "int8")
    calibrated = ("int8",)
    calibrators = ("neural_compressor",)
    calibrators_extra = "neural-compressor"

    def ready(self, dtype: str = "float32") -> None:
        """Check that there is a compiler of C++; running a file needs none."""
        super().ready(dtype)
        if dtype == "int8":
            self._rounds()
        if dtype == "bfloat16" and not _has_bfloat16():
            raise BackendError(
                "this processor has no bfloat16.",
                where="export",
                expected="AVX512-BF16, AMX, or an ARM processor with bfloat16",
                fix="precision='float32' or 'int8'",
            )
        check_compiler(f"compile.export with {self.name}")

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
        """Write `path`, machine code and weights in one file."""
        facts = {
            INPUTS: json.dumps(sizes_of(example, options)),
            PROCESSOR: " ".join(processor()),
        }
        with self.writing(module, path):
            free: Any = free_sizes(options)
            if dtype == "int8":
                module = self._rounded(module, example, free, samples)
            if dtype != "float32" and _has_bfloat16():
                module, free = InBFloat16(module), free and (free,)
            program = torch.export.export(module, example, dynamic_shapes=free)
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={
                    # Else the number of threads now would be in the machine code.
                    "cpp.dynamic_threads": True,
                    # Weights as constants, which are packed for the processor once.
                    "freezing": True,
                    "aot_inductor.metadata": facts,
                },
            )
        return [path]

    def _rounded(self, module: nn.Module, example: Sample, free: Any, samples: Any) -> nn.Module:
        """The module as a graph of integer products, with ranges found on the samples."""
        quantization, export = self._rounds()
        graph = export.export(module, example_inputs=example, dynamic_shapes=free)
        # Histograms: its usual moving average of ranges cuts tails off, for four times the error.
        config = quantization.INT8StaticQuantConfig(act_algo="kl")
        prepared = quantization.prepare(graph, config)
        for sample in samples:
            prepared(*sample)
        rounded: nn.Module = quantization.convert(prepared)
        return rounded

    def _rounds(self) -> list[Any]:
        purpose = f"{self.name} in int8"
        with quiet():
            return [
                require(
                    f"neural_compressor.torch.{name}", extra=self.calibrators_extra, purpose=purpose
                )
                for name in ("quantization", "export")
            ]

    def load(self, path: Path, *, device: str, threads: int) -> Opened:
        """Open the machine code, which runs on torch's threads."""
        expected = f"a file that torch {torch.__version__} reads, made for a processor like this"
        with self.opening(path, expected), quiet():
            # Read first: opening runs code of the file.
            with zipfile.ZipFile(path) as package:
                name = next(n for n in package.namelist() if n.endswith("_metadata.json"))
                facts = json.loads(package.read(name))
            sizes, made_for = json.loads(facts[INPUTS]), facts[PROCESSOR].split()
        lacking = sorted(set(made_for) - set(processor()))
        if lacking:
            raise BackendError(
                "a file holds machine code for another processor.",
                where=str(path),
                got=f"this one lacks {', '.join(lacking)}",
                fix="export the model again on this machine",
            )
        with self.opening(path, expected), quiet():
            graph: Any = torch._inductor.aoti_load_package(str(path))

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: told(sizes)):
                check_sizes(tensors, sizes)
                found = graph(*(t.detach().cpu().contiguous() for t in tensors))
            return (found,) if isinstance(found, Tensor) else tuple(found)

        return Opened(run, {"processor": made_for})


class InBFloat16(nn.Module):
    """A module whose products are computed in bfloat16; what needs more bits stays in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """As the module's; results are float32."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self.module(*inputs)
        return found.float() if isinstance(found, Tensor) else tuple(t.float() for t in found)


def _has_bfloat16() -> bool:
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(processor())


def processor() -> list[str]:
    """Kind of processor and the vector instructions it has; machine code may use all of them."""
    known = CPUINFO.read_text() if CPUINFO.is_file() else torch.backends.cpu.get_cpu_capability()
    return [platform.machine(), *sorted(set(VECTORS.findall(known.lower())))]
