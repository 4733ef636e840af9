"""Whether torch finds the compiler that its generated code needs."""

from __future__ import annotations

import importlib.util

import torch

from ...core.errors import BackendError


def check_compiler(step: str, device: str = "cpu") -> None:
    """Check that generated code can be made into machine code for a device.

    Raises:
        BackendError: if there is no compiler for it.
    """
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise BackendError(
                f"{step} needs triton, which compiles for the GPU.",
                where=f"torch {torch.__version__}",
                fix="pip install triton, or a torch for CUDA that brings it",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as err:
        raise BackendError(
            f"{step} needs a compiler of C++.",
            where=f"torch {torch.__version__}",
            got="none that torch finds",
            expected="g++ or clang++; cl on Windows",
            fix="install one, e.g. apt-get install g++, or name it in CXX",
        ) from err
