"""OpenVINO files, quantized by NNCF where integers are asked for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import BackendError
from ._base import (
    Backend,
    Opened,
    Options,
    Sample,
    check_sizes,
    floats,
    free_sizes,
    sizes_of,
    told,
)

# Where a file says what it is to be computed in, and what it takes.
PRECISION, INPUTS = ["samcompress", "precision"], ["samcompress", "inputs"]
# Numbers of a constant from which on it is worth storing smaller.
LARGE = 4096
# Operations that only say where numbers lie.
_MOVES = ("Concat", "Convert", "Gather", "Reshape", "Slice", "StridedSlice", "Transpose")


class OpenVino(Backend):
    """The row of the support table, and how to export and run."""

    name = "openvino"
    suffix = ".xml"
    extra = "openvino"
    packages = ("openvino",)
    dtypes = ("float32", "bfloat16", "int8")
    calibrated = ("int8",)
    calibrators = ("nncf",)

    def ready(self, dtype: str = "float32") -> None:
        """Check packages, and that the processor has the type."""
        super().ready(dtype)
        if dtype == "int8":
            self.package("nncf")
        if dtype == "bfloat16" and not _has_bfloat16(_core(self.package("openvino"))):
            raise BackendError(
                "openvino finds no bfloat16 on this processor.",
                where="export",
                expected="AVX512-BF16, AMX, or an ARM processor with bfloat16",
                fix="precision='float32' or 'int8'",
            )

    def package(self, module: str, purpose: str | None = None) -> ModuleType:
        """Import a package of this runtime, and have it keep to itself that it is used."""
        with _unreported():
            return super().package(module, purpose)

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
        """Write the graph to `path` and its weights to a ``.bin`` beside it."""
        runtime, weights = self.package("openvino"), path.with_suffix(".bin")
        with self.writing(module, path, weights):
            program = torch.export.export(module, example, dynamic_shapes=free_sizes(options))
            # Kept until the end: the graph's constants lie in its memory.
            reader = self._reader(program, example, options)
            graph = self._converted(reader, example, options)
            if dtype == "int8":
                graph = self._quantized(graph, samples)
                _halve(graph, self.package("openvino.opset13"))
            graph.set_rt_info(dtype, PRECISION)
            graph.set_rt_info(json.dumps(sizes_of(example, options)), INPUTS)
            # Halves round less than bfloat16 and integers: beside them they are as good as floats.
            # Of a graph with integers this leaves all floats as they are.
            runtime.save_model(graph, path, compress_to_fp16=dtype != "float32")
        return [path, weights]

    def load(self, path: Path, *, device: str, threads: int) -> Opened:
        """Compile for the CPU, for one request at a time."""
        runtime = self.package("openvino", f"running {path.name}")
        core = _core(runtime)
        with self.opening(path, f"a file that openvino {runtime.__version__} reads"):
            graph = core.read_model(path)
            wanted = graph.get_rt_info(PRECISION).astype(str)
            sizes = json.loads(graph.get_rt_info(INPUTS).astype(str))
            settings = {
                # Never left to the runtime, which rounds to bfloat16 by itself where that is fast.
                "INFERENCE_PRECISION_HINT": _floats_as(wanted, core),
                "INFERENCE_NUM_THREADS": threads,
                # Else tokens that meet stored int8 weights are rounded to integers, unasked.
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
                "NUM_STREAMS": 1,
                # As torch does it: other processes run on these cores too.
                "ENABLE_CPU_PINNING": False,
            }
            compiled = core.compile_model(graph, "CPU", settings)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self.running(path, lambda: told(sizes)):
                check_sizes(tensors, sizes)
                found = compiled.infer_new_request(
                    dict(zip(compiled.inputs, floats(tensors), strict=True))
                )
            return tuple(torch.from_numpy(found[output]) for output in compiled.outputs)

        hint = compiled.get_property("INFERENCE_PRECISION_HINT")
        return Opened(run, {"floats": hint.get_type_name()})

    def _converted(self, reader: Any, example: Sample, options: Options) -> Any:
        runtime = self.package("openvino")
        frontend = self.package("openvino.frontend").FrontEndManager().load_by_framework("pytorch")
        graph = frontend.convert(frontend.load(reader))
        graph.validate_nodes_and_infer_types()
        sizes = {}
        for name, given, tensor in zip(options.inputs, graph.inputs, example, strict=True):
            free = options.dynamic.get(name, {})
            fixed = [-1 if axis in free else size for axis, size in enumerate(tensor.shape)]
            sizes[given] = runtime.PartialShape(fixed)
            given.get_tensor().set_names({name})
        for name, output in zip(options.outputs, graph.outputs, strict=True):
            output.get_tensor().set_names({name})
        graph.reshape(sizes)
        return graph

    def _reader(self, program: Any, example: Sample, options: Options) -> Any:
        """What openvino reads: a trace of torch's graph where no size is free.

        OpenVINO transposes queries, keys and values together when it reads torch's graph itself,
        which takes a tenth of the encoder's time; a trace would fix the free sizes.
        """
        place = "openvino.frontend.pytorch"
        if options.dynamic:
            kind: Any = self.package(f"{place}.fx_decoder").TorchFXPythonDecoder
            return kind.from_exported_program(program)
        trace: Any = torch.jit.trace
        traced = trace(program.module(), example, check_trace=False)
        return self.package(f"{place}.ts_decoder").TorchScriptPythonDecoder(traced)

    def _quantized(self, graph: Any, samples: Sequence[Sample]) -> Any:
        nncf = self.package("nncf")
        advanced = self.package("nncf.quantization.advanced_parameters")
        return nncf.quantize(
            graph,
            nncf.Dataset(samples, lambda sample: tuple(floats(sample))),
            # Without it sums and norms become integers too, and errors double.
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=_left_out(graph)),
            # NNCF's SmoothQuant moves scales over windowed attention's reshapes: embeddings of
            # `mini` were off by 0.27 with it, by 0.014 without.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(
                    matmul=-1, convolution=-1
                )
            ),
        )


def _halve(graph: Any, operations: ModuleType) -> None:
    """Store large constants that are no integers as halves; they are floats again when opened."""
    for op in graph.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_element_type().get_type_name() != "f32":
            continue
        half = op.data.astype(np.float16) if math.prod(op.shape) >= LARGE else None
        if half is not None and np.isfinite(half).all():
            value = operations.convert(operations.constant(half), "f32")
            for user in op.output(0).get_target_inputs():
                user.replace_source_output(value.output(0))


def _left_out(graph: Any) -> list[str]:
    """Products that stay floats, where integers cost the most and save the least.

    Those are what mixes the heads of an attention, and the convolutions of an encoder that hardly
    has any: a transformer's first and last layers. On `vit_b` they do a tenth of the work and
    made half of the error.
    """
    weights = {
        op: size
        for op in graph.get_ordered_ops()
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
        and (size := _weight(op))
    }
    convolutions = [op for op in weights if op.get_type_name() != "MatMul"]
    few = sum(weights[op] for op in convolutions) < 0.1 * sum(weights.values())
    kept = convolutions if few else []
    kept += [op for op in weights if op not in convolutions and _follows_attention(op)]
    return [op.get_friendly_name() for op in kept]


def _weight(op: Any) -> int:
    """How many numbers it is multiplied by that no input decides; 0 if there are none."""
    node = op.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    constant = node.get_type_name() == "Constant"
    return math.prod(node.get_output_shape(0)) if constant else 0


def _follows_attention(op: Any) -> bool:
    """Whether what it multiplies is an attention's answer, in whatever order."""
    node = op.input_value(0).get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    kind = node.get_type_name()
    return kind == "ScaledDotProductAttention" or (kind == "MatMul" and not _weight(node))


@functools.cache
def _core(runtime: ModuleType) -> Any:
    """The one of this process, kept to its end.

    Each has the thread's signals handled on a stack of its own, and the end of one puts back the
    stack it found: after two that end in the order they began, that is one already freed, and the
    next signal (of a child that ends, say) is a segmentation fault. Seen in openvino 2026.4.
    """
    return runtime.Core()


def _floats_as(wanted: str, core: Any) -> str:
    """What numbers that are no integers are computed in; all of them where integers are not."""
    return "bf16" if wanted != "float32" and _has_bfloat16(core) else "f32"


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Both packages report their use over the network unless told not to at their first import."""
    try:
        checker: Any = importlib.import_module("openvino_telemetry.utils.opt_in_checker")
    except ImportError:
        yield
        return
    asked = checker.OptInChecker.check
    declined = checker.ConsentCheckResult.DECLINED
    checker.OptInChecker.check = lambda *_, **__: declined
    try:
        yield
    finally:
        checker.OptInChecker.check = asked
