"""Runtimes, one file each; their rows are the support table.

| back end | file | extra | devices | types | dynamic sizes |
|---|---|---|---|---|---|
| `onnxruntime` | `.onnx` | `onnx` | cpu | float32 | yes |
"""

from ._base import Backend, Options, Run
from .onnxruntime import OnnxRuntime

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (OnnxRuntime(),)}

__all__ = ["BACKENDS", "Backend", "Options", "Run"]
