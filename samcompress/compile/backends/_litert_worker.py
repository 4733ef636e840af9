"""Torch's exported graph to .tflite. Runs in litert-torch's environment, without samcompress.

Usage: python -I _litert_worker.py PROGRAM.pt2 TARGET.tflite INPUT_NAME...
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch


class Named(torch.nn.Module):
    """Takes inputs by name: the names of the file's inputs."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> Any:
        """What the graph computes of its inputs, in their order."""
        return self.module(*inputs.values())


def main(source: str, target: str, *names: str) -> None:
    """Convert a program that has its example inputs in it."""
    program = torch.export.load(source)
    given, _ = program.example_inputs
    inputs = dict(zip(names, given, strict=True))
    converter: Any = importlib.import_module("litert_torch")
    converter.convert(Named(program.module()), sample_kwargs=inputs).export(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
