"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import BackendError
from ._base import Backend, Opened, Options, Sample, floats, free_sizes

# An ONNX file is one protobuf message, which ends at 2 GB; larger weights go into a file beside it.
LARGEST_FILE = 1_500_000_000
# What becomes a product of integers: with sums, norms and softmax too, errors are nine times those.
INTEGER = ["MatMul", "Gemm"]


class OnnxRuntime(Backend):
    """The row of the support table, and how to export and run."""

    name = "onnxruntime"
    suffix = ".onnx"
    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    dtypes = ("float32", "int8")
    integers = True

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
        """Write `path`, and ``path.data`` where the weights are too large for one file."""
        tensors = (*module.parameters(), *module.buffers())
        large = sum(t.numel() * t.element_size() for t in tensors) > LARGEST_FILE
        data = path.with_name(path.name + ".data")
        with self.writing(module, path, data):
            program: Any = torch.onnx.export(
                module,
                example,
                input_names=options.inputs,
                output_names=options.outputs,
                dynamic_shapes=free_sizes(options),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            optimizer = self.package("onnxscript.optimizer")
            optimizer.optimize_ir(program.model, should_fold=_may_fold)
            _tidy(program.model.graph)
            if dtype == "int8":
                self._quantize(program.model_proto, path, large)
            else:
                program.save(str(path), external_data=large)
        return [path, data] if data.exists() else [path]

    def load(self, path: Path, *, device: str, threads: int) -> Opened:
        """Open a session on the CPU."""
        runtime = self.package("onnxruntime", f"running {path.name}")
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4  # errors are raised, not printed
        with self.opening(path, f"an ONNX file that onnxruntime {runtime.__version__} reads"):
            session = runtime.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"]
            )
        given = session.get_inputs()

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: ", ".join(f"{i.name} {i.shape}" for i in given)):
                arrays = dict(zip([i.name for i in given], floats(tensors), strict=True))
                found = session.run(None, arrays)
            return tuple(torch.from_numpy(array) for array in found)

        level = session.get_session_options().graph_optimization_level.name
        return Opened(run, {"providers": session.get_providers(), "optimization": level})

    def _quantize(self, graph: Any, path: Path, large: bool) -> None:
        """Weights as int8, one scale a channel; tokens are rounded at run time, so no samples."""
        tools = self.package("onnxruntime.quantization")
        tools.quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=INTEGER,
            per_channel=True,
            weight_type=tools.QuantType.QInt8,
            use_external_data_format=large,
        )
        if not _multiplies_integers(self.package("onnx").load(path, load_external_data=False)):
            raise BackendError(
                f"{self.name}: this model would have no integer products.",
                where="export",
                got="convolutions alone, where int8 of this backend is for matrix products",
                fix="backend='openvino', precision='int8', which rounds convolutions too",
            )


def _multiplies_integers(model: Any) -> bool:
    return any(node.op_type.endswith("MatMulInteger") for node in model.graph.node)


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
