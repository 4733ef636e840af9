"""Times from several processes: calls of one resemble each other more than they should.

What a process got by chance, addresses, threads, the CPUs it runs on, falls on all of its calls. So
the interval of a median is drawn over processes, never over calls.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..core.checkpoint import save
from ..core.timing import Timing
from .latency import PARTS, Rounds, check_real
from .memory import run_child

DRAWS = 10_000
Row = dict[str, Any]


def latency_processes(
    models: Mapping[str, nn.Module],
    *,
    device: str,
    image: np.ndarray,
    rounds: Rounds,
    batches: Sequence[int] = (),
    threads: int | None = None,
    timeout: float = 3600.0,
) -> dict[str, Row]:
    """`latency_many` in new processes, one after the other, and put together.

    Args:
        models: SAMs by name; they take turns in each process.
        device: where.
        image: (H, W, 3) uint8.
        rounds: how often to repeat in each process, and how many processes.
        batches: as for `latency`.
        threads: as for `latency`.
        timeout: seconds after which a process is given up.

    Returns:
        For each model the entry of a result row: calls of all processes, the median of each, and
        its ``interval_ms``.

    Raises:
        ModelError: if a model cannot be saved, or is simulated.
        BackendError: if a process fails.
    """
    for name, model in models.items():
        check_real(name, model)
    with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
        folder = Path(scratch)
        np.save(folder / "image.npy", image)
        places = {name: str(folder / str(number)) for number, name in enumerate(models)}
        for name, model in models.items():
            save(model, places[name])
        request = {
            "models": places,
            "device": device,
            "image": str(folder / "image.npy"),
            "rounds": replace(rounds, processes=1).to_dict(),
            "batches": list(batches),
            "threads": threads,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        arguments = [str(folder / "request.json")]
        runs = [
            run_child("samcompress.evaluate._child", arguments, timeout=timeout)
            for _ in range(rounds.processes)
        ]
    return {name: together([run[name] for run in runs]) for name in models}


def together(runs: Sequence[Row]) -> Row:
    """One entry of a result row out of the entries of several processes."""
    flows = [run["throughput"]["images_per_s"] for run in runs]
    flow = {batch: float(np.median([f[batch] for f in flows])) for batch in flows[0]}
    best = max(flow, key=flow.__getitem__, default=None)
    return {
        **{part: _part([run[part] for run in runs]) for part in PARTS},
        "throughput": {"images_per_s": flow, "best_batch": None if best is None else int(best)},
        "threads": runs[0]["threads"],
        "settings": runs[0]["settings"],
        "processes": len(runs),
    }


def _part(runs: Sequence[Row]) -> Row:
    medians = [run["median_ms"] for run in runs]
    whole = Timing(
        tuple(sample for run in runs for sample in run["samples_ms"]),
        float(np.median([run["first_call_ms"] for run in runs])),
        float(np.median([run["wall_median_ms"] for run in runs])),
    )
    return {
        **whole.to_dict(),
        "process_medians_ms": medians,
        "interval_ms": list(median_interval(medians)),
    }


def ratios(first: Row, second: Row, part: str) -> list[float]:
    """Time of the first over that of the second in each process, where they took turns."""
    both = zip(first[part]["process_medians_ms"], second[part]["process_medians_ms"], strict=True)
    return [a / b for a, b in both]


def median_interval(
    values: Sequence[float], *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the median by resampling with replacement.

    Args:
        values: one a process.
        draws: resamplings.
        level: share of the resampled medians inside.
        seed: of the resampling.

    Example:
        >>> median_interval([2.0, 2.0, 2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    picked = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    medians = np.median(np.asarray(values, dtype=float)[picked], axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)
