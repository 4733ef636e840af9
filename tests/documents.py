"""A result document as `benchmark` writes it, small and the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np

PRUNE = {"type": "prune.mlp", "version": 1, "params": {"ratio": 0.5}}
INT8 = {"type": "quantize.int8_weights", "version": 1, "params": {}}


def document(**changes: Any) -> dict[str, Any]:
    """Base, one step, two steps, a model that lost too much, and one that was not measured."""
    rows = [
        row("base", [], base=True, total=1.02, disk=4.1, ms=20.0, loss=0.0),
        row("pruned", [PRUNE], total=0.82, disk=3.3, ms=14.0, loss=0.02),
        row("small", [PRUNE, INT8], total=0.82, disk=1.05, ms=15.5, loss=0.025),
        row("broken", [INT8], total=1.02, disk=1.3, ms=22.0, loss=0.3, agreement=0.55),
        missing("mobile", "pip install 'samcompress[onnx]'"),
    ]
    rows[3]["first_nonfinite"] = "image_encoder.neck.1"
    return {
        "format": 1,
        "samcompress": "0.1.0",
        "environment": {
            "cpu": {"model": "Example CPU", "cores": 2},
            "libraries": {"torch": "2.8.0", "numpy": "2.0.0"},
            "gpus": [],
        },
        "data": {
            "name": "shapes",
            "fingerprint": "0" * 64,
            "licence": "none needed: drawn by samcompress",
            "n_images": 8,
            "n_instances": 24,
            "note": None,
            "skipped": [],
        },
        "settings": {"prompts": ["box", "center"], "threads": 2, "seed": 0},
        "rows": rows,
        **changes,
    }


def row(
    name: str,
    steps: list[dict[str, Any]],
    *,
    total: float,
    disk: float,
    ms: float,
    loss: float,
    base: bool = False,
    agreement: float | None = 0.97,
    device: str = "cpu",
) -> dict[str, Any]:
    """One measured row; sizes in millions, `ms` for encoder and one prompt."""
    return {
        **_head(name, base, device),
        "status": "measured",
        "reason": None,
        "params": {
            "total": int(total * 1e6),
            "encoder": int(total * 9e5),
            "prompt_encoder": 5_000,
            "mask_decoder": int(total * 1e5) - 5_000,
            "buffers": 0,
        },
        "macs": {
            "encoder": int(3e8 * total),
            "encoder_no_attention": int(2e8 * total),
            "decoder_per_prompt": int(1e7),
        },
        "bytes_on_disk": int(disk * 1e6),
        "recipe": {"format": 1, "samcompress": "0.1.0", "steps": steps} if steps else None,
        "lineage": _lineage(steps),
        "weights_sha256": "1" * 64,
        "accuracy": [
            _accuracy("box", 0.80, loss, base, agreement),
            _accuracy("center", 0.70, 1.4 * loss, base, agreement),
        ],
        "latency": _latency(ms, base),
        "memory": {
            "method": "VmHWM in a fresh process",
            "baseline_mb": 300.0,
            "loaded_mb": 310.0,
            "peak_mb": 320.0 + 10 * total,
            "steady_mb": 312.0,
        },
        "first_nonfinite": None,
        "seconds": 12.5,
        "date": "2025-01-01T12:00:00+00:00",
    }


def missing(name: str, reason: str, device: str = "cpu") -> dict[str, Any]:
    """A row that could not be measured."""
    nothing = dict.fromkeys(("params", "macs", "bytes_on_disk", "recipe", "latency", "memory"))
    return {
        **_head(name, False, device),
        **nothing,
        "status": "not_measured",
        "reason": reason,
        "lineage": [],
        "accuracy": [],
        "first_nonfinite": None,
        "seconds": 0.0,
        "date": "2025-01-01T12:00:00+00:00",
    }


def _head(name: str, base: bool, device: str) -> dict[str, Any]:
    return {
        "name": name,
        "base": base,
        "device": device,
        "dtype": "float32",
        "backend": "torch",
        "image_size": 128,
    }


def _lineage(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sizes = {"prune.mlp": 0.8, "quantize.int8_weights": 0.32}
    found, size = [], 4.1e6
    for step in steps:
        after = size * sizes[step["type"]]
        facts = {
            "before": {"parameters": 1_020_000, "bytes": int(size)},
            "after": {"parameters": 820_000, "bytes": int(after)},
            "seconds": 0.5,
        }
        found.append({**step, "facts": facts})
        size = after
    return found


def _latency(ms: float, base: bool) -> dict[str, Any]:
    """`ms` as shown; all but the base was measured while the machine took a quarter longer."""
    parts = {
        "preprocess": 0.8,
        "encoder": 0.8 * ms,
        "prompt": 0.2 * ms,
        "postprocess": 0.5,
        "end_to_end": ms,
    }
    busy = 1.0 if base else 1.25
    entry: dict[str, Any] = {part: _timing(busy * value) for part, value in parts.items()}
    if not base:
        entry["vs_base"] = {part: 20 / ms for part in parts}
        entry["vs_base"].update(preprocess=1.0, postprocess=1.0)
        entry["scale"] = dict.fromkeys(parts, 1 / busy)
    return {**entry, "throughput": {"images_per_s": {}, "best_batch": None}, "threads": 2}


def _timing(ms: float) -> dict[str, Any]:
    return {
        "median_ms": ms,
        "iqr_ms": 0.1 * ms,
        "p90_ms": 1.2 * ms,
        "p99_ms": 1.4 * ms,
        "min_ms": 0.9 * ms,
        "n": 3,
        "first_call_ms": 3 * ms,
        "wall_median_ms": ms,
        "samples_ms": [0.9 * ms, ms, 1.4 * ms],
    }


def _accuracy(
    prompt: str, level: float, loss: float, base: bool, agreement: float | None
) -> dict[str, Any]:
    """Objects of level ± 0.1 whose losses grow with their number."""
    spread = np.linspace(-0.1, 0.1, 24)
    ious = (level + spread - loss * np.linspace(0.0, 2.0, 24)).clip(0)
    miou = float(ious.mean())
    samples = [
        {
            "image_id": i // 3,
            "annotation_id": i,
            "category": None,
            "area": 400.0 + 50 * i,
            "iou": round(float(iou), 6),
            "score": 0.9,
            "clicks": 0 if prompt == "box" else 1,
        }
        for i, iou in enumerate(ious)
    ]
    return {
        "protocol": f"shapes#8/{prompt}/single/feedback=none/crowd=no,min_area=0/instance",
        "prompt": prompt,
        "choice": "single",
        "miou": miou,
        "ci": [miou - 0.02, miou + 0.02],
        "delta": None if base else miou - level,
        "delta_ci": None if base else [miou - level - 0.004, miou - level + 0.004],
        "n_images": 8,
        "n_instances": 24,
        "by_size": {
            "S": {"miou": miou, "n_instances": 13},
            "M": {"miou": miou, "n_instances": 11},
            "L": {"miou": None, "n_instances": 0},
        },
        "worse_share": None if base else 0.1,
        "agreement": None if base else agreement,
        "samples": samples,
        "skipped": [],
    }
