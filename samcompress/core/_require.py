"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingDependencyError

# The modules each extra of pyproject.toml brings; a step's `extras` are checked before any work.
EXTRAS: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "search": ("optuna",),
    "neural-compressor": ("neural_compressor", "torchao"),
    "executorch": ("executorch",),
    "litert": ("ai_edge_litert", "ai_edge_quantizer"),
    "coreml": ("coremltools",),
    "tensorrt": ("tensorrt", "onnx", "onnxscript"),
    "train": ("accelerate",),
    "zoo": ("timm",),
    "graph": ("torch_pruning",),
}


def require(module: str, *, extra: str | None = None, purpose: str | None = None) -> ModuleType:
    """Import an optional module, or say which line installs it.

    Args:
        module: dotted name to import.
        extra: the samcompress extra that brings it; None if it is a package of its own.
        purpose: what it is needed for, in a few words.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        package = module.split(".")[0]
        target = f"'samcompress[{extra}]'" if extra else package
        raise MissingDependencyError(
            f"{package} is needed{f' for {purpose}' if purpose else ''} and could not be imported.",
            got=str(err),
            fix=f"pip install {target}",
        ) from err
