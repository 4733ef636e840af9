"""Runs in a fresh process for `memory`: load a folder, call the model, print what it took."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from ..core.checkpoint import load_folder
from .devices import device
from .latency import one_call
from .memory import Memory, Process

CALLS = 3


def main(folder: str, spec: str, threads: int) -> Memory:
    """Measure the stages of one model's life."""
    if threads:
        torch.set_num_threads(threads)
    at, process = device(spec), Process()
    on_gpu = at.memory() is not None

    def now() -> float:
        held = at.memory()
        return process.now_mb() if held is None else held["now_mb"]

    baseline = now()
    model = load_folder(folder, device=at.torch_device)
    call = one_call(model)
    loaded = now()
    at.reset_peak()
    process.reset_peak()
    for _ in range(CALLS):
        call()
    at.synchronize()
    held = at.memory()
    peak = process.peak_mb() if held is None else held["peak_mb"]
    return Memory(
        method=f"{at.kind} allocator" if on_gpu else process.method,
        baseline_mb=baseline,
        loaded_mb=loaded,
        peak_mb=peak,
        steady_mb=now(),
        reserved_mb=None if held is None else held["reserved_mb"],
    )


if __name__ == "__main__":
    print(json.dumps(asdict(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
