"""Torch's own graphs, compiled ahead of time: `torch.export` and AOTInductor."""

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

    def ready(self, dtype: str = "float32") -> None:
        """Check that there is a compiler of C++; running a file needs none."""
        super().ready(dtype)
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
            program = torch.export.export(module, example, dynamic_shapes=free_sizes(options))
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={
                    # Else the number of threads now would be in the machine code.
                    "cpp.dynamic_threads": True,
                    "aot_inductor.metadata": facts,
                },
            )
        return [path]

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


def processor() -> list[str]:
    """Kind of processor and the vector instructions it has; machine code may use all of them."""
    known = CPUINFO.read_text() if CPUINFO.is_file() else torch.backends.cpu.get_cpu_capability()
    return [platform.machine(), *sorted(set(VECTORS.findall(known.lower())))]
