"""TensorRT engines for NVIDIA GPUs, built from ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import BackendError
from ._base import Backend, Options, Run, Sample
from .onnxruntime import OnnxRuntime


class TensorRt(Backend):
    """The row of the support table, and how to export and run.

    An engine is for one kind of GPU and one version of TensorRT; the ONNX file beside it is for
    all. In float32 only, without TF32: in float16 image encoders of SAM gave wrong masks.
    """

    name = "tensorrt"
    suffix = ".engine"
    extra = "tensorrt"
    packages = ("onnx", "onnxscript", "tensorrt")
    devices = ("cuda",)
    dynamic_shapes = False

    def ready(self, dtype: str = "float32") -> None:
        """Check packages, and that there is a GPU."""
        super().ready(dtype)
        check_gpu()

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
        """Write `path` for the GPU of this machine, and the ONNX file it was built from."""
        trt, fixed = self.package("tensorrt"), replace(options, dynamic={})
        graph = path.with_suffix(".onnx")
        files = [graph, graph.with_name(graph.name + ".data")]
        with self.writing(module, path, *files):
            files = OnnxRuntime().export(module, example, graph, dtype=dtype, options=fixed)
            logger = trt.Logger(trt.Logger.ERROR)
            builder = trt.Builder(logger)
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, logger)
            if not parser.parse_from_file(str(graph)):
                errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
                raise ValueError("\n".join(errors))
            settings = builder.create_builder_config()
            settings.clear_flag(trt.BuilderFlag.TF32)
            engine = builder.build_serialized_network(network, settings)
            if engine is None:
                raise ValueError("TensorRT built no engine")
            path.write_bytes(bytes(engine))
        return [path, *files]

    def load(self, path: Path, *, device: str, threads: int) -> Run:
        """Open an engine on the GPU; tensors come from the CPU and go back there."""
        trt = self.package("tensorrt", f"running {path.name}")
        check_gpu()
        expected = f"an engine of TensorRT {trt.__version__} for {torch.cuda.get_device_name()}"
        with self.opening(path, expected):
            engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(
                path.read_bytes()
            )
            if engine is None:
                raise ValueError("not an engine for this GPU and this version")
        context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        takes = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        sizes = {name: tuple(engine.get_tensor_shape(name)) for name in names}

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: ", ".join(f"{n} {sizes[n]}" for n in takes)):
                given = dict(zip(takes, tensors, strict=True))
                wrong = [name for name, tensor in given.items() if tensor.shape != sizes[name]]
                if wrong:
                    raise ValueError(f"{wrong[0]} is {tuple(given[wrong[0]].shape)}")
                held: dict[str, Any] = {
                    name: given[name].detach().float().contiguous().cuda()
                    if name in given
                    else torch.empty(sizes[name], device="cuda")
                    for name in names
                }
                for name, tensor in held.items():
                    context.set_tensor_address(name, tensor.data_ptr())
                if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                    raise ValueError("TensorRT refused the call")
            return tuple(held[name].cpu() for name in names if name not in given)

        return run


def command(graph: Path) -> str:
    """The line that builds the engine of an ONNX file on another machine."""
    return f"trtexec --onnx={graph} --saveEngine={graph.with_suffix('.engine')} --noTF32"


def check_gpu() -> None:
    """Check that torch sees a GPU.

    Raises:
        BackendError: if it does not.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            "tensorrt finds no NVIDIA GPU.",
            where=f"torch {torch.__version__}",
            got="torch.cuda.is_available() is False",
            expected="the GPU that is to run the engine: engines are built where they run",
            fix="export with backend='onnxruntime', and there: " + command(Path("encoder.onnx")),
        )
