"""ExecuTorch programs, computed by XNNPACK: what runs on phones, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ._base import Opened, Options, Sample, quiet
from ._native import NoisyBackend, check_plain, contiguous, muted


class ExecuTorch(NoisyBackend):
    """The row of the support table, and how to export and run."""

    name = "executorch"
    suffix = ".pte"
    extra = "executorch"
    packages = ("executorch",)
    dynamic_shapes = False

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
        """Write `path`, graph and weights in one file; inputs have no names in it."""
        # To the end: the program holds the module's own tensors until it is written.
        with self.writing(module, path), muted(), contiguous(module):
            exir = self.package("executorch.exir")
            xnnpack = self.package("executorch.backends.xnnpack.partition.xnnpack_partitioner")
            program = torch.export.export(module, example)
            check_plain(program)
            lowered = exir.to_edge_transform_and_lower(
                program, partitioner=[xnnpack.XnnpackPartitioner()]
            )
            with path.open("wb") as file:
                lowered.to_executorch().write_to_file(file)
        return [path]

    def load(self, path: Path, *, device: str, threads: int) -> Opened:
        """Open a program.

        ExecuTorch has one set of threads for all programs of a process, as many as it likes: to
        change their number corrupts its memory (1.5.1). So `threads` has no effect.
        """
        runtime = self.package("executorch.runtime", f"running {path.name}")
        pool = self.package("executorch.extension.pybindings.portable_lib")
        with self.opening(path, "a program that this executorch reads"), quiet(), muted():
            # The first question about threads makes them, which writes to the terminal.
            granted = {"threads": pool._threadpool_get_thread_count()}
            program = runtime.Runtime.get().load_program(path)
            method = program.load_method("forward")
            takes = [
                tuple(method.metadata.input_tensor_meta(i).sizes())
                for i in range(method.metadata.num_inputs())
            ]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: ", ".join(map(str, takes))):
                given = [t.detach().cpu().float().contiguous() for t in tensors]
                _check_sizes(given, takes)
                # The memory of results may be that of the next call.
                found = [t.clone() for t in method.execute(given)]
            return tuple(found)

        return Opened(run, granted)


def _check_sizes(tensors: Sequence[Tensor], takes: Sequence[tuple[int, ...]]) -> None:
    """A program takes one size; its own message goes to the terminal and is a number."""
    found = [tuple(tensor.shape) for tensor in tensors]
    if found != list(takes):
        raise ValueError(f"sizes are {', '.join(map(str, found))}")
