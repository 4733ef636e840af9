"""Runs in a fresh process: load models, call them, print what they took.

For `memory`, and for times where `Rounds.processes` asks for several processes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.checkpoint import load_folder
from .devices import device, pinned
from .latency import Rounds, latency_many, one_call
from .memory import Memory, Process

CALLS = 3


def main(folder: str, spec: str, threads: int) -> Memory:
    """Measure the stages of one model's life."""
    with pinned(threads or None):
        return _stages(folder, spec)


def _stages(folder: str, spec: str) -> Memory:
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


def times(request: Path) -> dict[str, Any]:
    """`latency_many` of the folders that a request names."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    at = device(asked["device"]).torch_device
    models = {name: load_folder(folder, device=at) for name, folder in asked["models"].items()}
    found = latency_many(
        models,
        image=np.load(asked["image"], allow_pickle=False),
        rounds=Rounds(**asked["rounds"]),
        batches=asked["batches"],
        threads=asked["threads"],
    )
    return {name: entry.to_dict() for name, entry in found.items()}


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    if len(sys.argv) == 2:
        print(json.dumps(times(Path(sys.argv[1]))))
    else:
        print(json.dumps(asdict(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
