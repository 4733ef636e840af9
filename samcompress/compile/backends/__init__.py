"""Runtimes, one file each; their rows are the support table.

| back end | file | extra | devices | types | dynamic sizes |
|---|---|---|---|---|---|
| `onnxruntime` | `.onnx` | `onnx` | cpu | float32, int8 | yes |
| `openvino` | `.xml`, `.bin` | `openvino` | cpu | float32, bfloat16, int8 (calibrated) | yes |
| `aot` | `.pt2` | compiler of C++ [2] | cpu | float32, bfloat16, int8 (calibrated) | yes |
| `executorch` | `.pte` | `executorch` | cpu | float32 | no |
| `litert` | `.tflite` | `litert` [1] | cpu | float32, int8 (calibrated) | no |
| `coreml` | `.mlpackage.zip` | `coreml` | written anywhere, runs on macOS | float32, float16 | no |
| `tensorrt` | `.engine`, `.onnx` | `tensorrt` | cuda | float32 | no |

[1] To write, litert-torch in an environment of its own: `SAMCOMPRESS_LITERT_PYTHON`.
[2] To write; for int8 `neural-compressor` too.
"""

from ._base import Backend, Opened, Options, Run, Sample
from .aot import Aot
from .coreml import CoreMl
from .executorch import ExecuTorch
from .litert import LiteRt
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .tensorrt import TensorRt

# One line each; `Export.backend` takes its names from here.
KINDS: tuple[type[Backend], ...] = (
    OnnxRuntime,
    OpenVino,
    Aot,
    ExecuTorch,
    LiteRt,
    CoreMl,
    TensorRt,
)
BACKENDS: dict[str, Backend] = {kind.name: kind() for kind in KINDS}

__all__ = ["BACKENDS", "Backend", "Opened", "Options", "Run", "Sample"]
