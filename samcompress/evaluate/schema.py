"""The result file: its JSON schema, and the check against it."""

from __future__ import annotations

from typing import Any

from ..core.errors import CheckpointError

FORMAT = 1


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


NUMBER = {"type": "number"}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
ID = {"type": ["integer", "string"]}
ANY = {"type": "object"}
MAYBE = {"type": ["number", "null"]}
INTERVAL = {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}
SKIPPED = {"type": "array", "items": _object({"id": ID, "what": TEXT, "reason": TEXT})}

TIMING = _object(
    {
        "median_ms": NUMBER,
        "iqr_ms": NUMBER,
        "p90_ms": NUMBER,
        "p99_ms": NUMBER,
        "min_ms": NUMBER,
        "n": {"type": "integer", "minimum": 1},
        "first_call_ms": NUMBER,
        "samples_ms": {"type": "array", "items": NUMBER, "minItems": 1},
    },
    {
        "wall_median_ms": NUMBER,
        # Where several processes measured: the median of each, and the interval drawn over them.
        "process_medians_ms": {"type": "array", "items": NUMBER, "minItems": 5},
        "interval_ms": INTERVAL,
    },
)

LATENCY = _object(
    {
        "encoder": TIMING,
        "prompt": TIMING,
        "end_to_end": TIMING,
        "preprocess": TIMING,
        "postprocess": TIMING,
    },
    {
        "throughput": ANY,
        "threads": COUNT,
        "settings": ANY,
        "processes": COUNT,
        # Interval of `vs_base`, drawn over processes.
        "vs_base_ci": {"type": "object", "additionalProperties": INTERVAL},
        # Median of the base over this median, from calls that took turns in the same minutes.
        "vs_base": {"type": "object", "additionalProperties": NUMBER},
        # Median of the base in its own row over its median in these minutes: times of this row are
        # shown times this, so that all shown times are of the same minutes.
        "scale": {"type": "object", "additionalProperties": NUMBER},
    },
)

MEMORY = _object(
    {
        "method": TEXT,
        "baseline_mb": NUMBER,
        "loaded_mb": NUMBER,
        "peak_mb": NUMBER,
        "steady_mb": NUMBER,
    },
    {"reserved_mb": MAYBE},
)

ENERGY = _object(
    {
        "counter": TEXT,
        "joules_per_image": NUMBER,
        "joules_per_image_above_idle": NUMBER,
        "watts": NUMBER,
        "idle_watts": NUMBER,
        "seconds": NUMBER,
        "calls": COUNT,
        "idle_seconds": NUMBER,
    },
    {"parts": {"type": "object", "additionalProperties": NUMBER}},
)

SAMPLE = _object(
    {"image_id": ID, "annotation_id": ID, "iou": NUMBER},
    {"category": {"type": ["integer", "null"]}, "area": NUMBER, "score": NUMBER, "mask": ANY},
)

ACCURACY = _object(
    {
        "protocol": TEXT,
        "prompt": TEXT,
        "choice": TEXT,
        "miou": NUMBER,
        "samples": {"type": "array", "items": SAMPLE},
    },
    {
        "ci": INTERVAL,
        "delta": MAYBE,
        "delta_ci": _or_null(INTERVAL),
        "n_images": COUNT,
        "n_instances": COUNT,
        "by_size": ANY,
        "worse_share": MAYBE,
        "wilcoxon_p": MAYBE,
        "agreement": MAYBE,
        "skipped": SKIPPED,
    },
)

DETECTION = _object(
    {
        "protocol": TEXT,
        "ap": NUMBER,
        "ap50": NUMBER,
        "ap75": NUMBER,
        "ar": {"type": "object", "additionalProperties": NUMBER},
        "by_size": ANY,
        "by_group": {"type": "object", "additionalProperties": MAYBE},
        "detector": _object({"sha256": TEXT, "n_boxes": COUNT}),
        "n_images": COUNT,
        "n_instances": COUNT,
        "n_detections": COUNT,
    },
    {
        "ci": INTERVAL,
        "delta": MAYBE,
        "delta_ci": _or_null(INTERVAL),
        "draws": {"type": "array", "items": NUMBER},
        "skipped": SKIPPED,
    },
)

EVERYTHING = _object(
    {
        "protocol": TEXT,
        "ar": {"type": "object", "additionalProperties": NUMBER},
        "ci": INTERVAL,
        "shares": {"type": "object", "additionalProperties": NUMBER},
        "miou": NUMBER,
        "by_size": ANY,
        "seconds": NUMBER,
        "n_images": COUNT,
        "n_instances": COUNT,
        "n_masks": COUNT,
        "n_prompts": COUNT,
        "samples": {"type": "array", "items": SAMPLE},
    },
    {"delta": MAYBE, "delta_ci": _or_null(INTERVAL), "skipped": SKIPPED},
)

# What a checker says of a file for a device that is not here: a table in words.
CHECK = _object(
    {
        "file": TEXT,
        "title": TEXT,
        "rows": {"type": "array", "items": ANY},
        "notes": {"type": "array", "items": TEXT},
    }
)

ROW = _object(
    {
        "name": TEXT,
        "base": {"type": "boolean"},
        "device": TEXT,
        "status": {"enum": ["measured", "not_measured"]},
        "lineage": {"type": "array", "items": ANY},
    },
    {
        "reason": {"type": ["string", "null"]},
        "missing": {"type": "object", "additionalProperties": TEXT},
        "device_name": TEXT,
        "dtype": TEXT,
        "backend": TEXT,
        "image_size": COUNT,
        "params": _or_null(
            _object(
                {
                    "total": COUNT,
                    "encoder": COUNT,
                    "prompt_encoder": COUNT,
                    "mask_decoder": COUNT,
                    "buffers": COUNT,
                }
            )
        ),
        "macs": _or_null(
            _object({"encoder": COUNT, "encoder_no_attention": COUNT, "decoder_per_prompt": COUNT})
        ),
        "bytes_on_disk": {"type": ["integer", "null"]},
        "recipe": _or_null(ANY),
        "source": {"type": ["string", "null"]},
        "licence": {"type": ["string", "null"]},
        "weights_sha256": TEXT,
        "identity": TEXT,
        "base_identity": {"type": ["string", "null"]},
        "accuracy": _or_null({"type": "array", "items": ACCURACY}),
        "latency": _or_null(LATENCY),
        "memory": _or_null(MEMORY),
        "energy": _or_null(ENERGY),
        "detection": _or_null(DETECTION),
        "everything": _or_null(EVERYTHING),
        "checks": {"type": "array", "items": CHECK},
        "first_nonfinite": {"type": ["string", "null"]},
        "seconds": NUMBER,
        "date": TEXT,
    },
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Result of samcompress.evaluate.benchmark",
    **_object(
        {
            "format": {"const": FORMAT},
            "samcompress": TEXT,
            "environment": ANY,
            "data": _object(
                {"name": TEXT, "fingerprint": TEXT, "n_images": COUNT, "n_instances": COUNT},
                {
                    "licence": {"type": ["string", "null"]},
                    "note": {"type": ["string", "null"]},
                    "skipped": SKIPPED,
                },
            ),
            "settings": ANY,
            "rows": {"type": "array", "items": ROW},
        }
    ),
}


def check(doc: Any, *, where: str | None = None) -> None:
    """Check a result document.

    Args:
        doc: the parsed JSON.
        where: the file it came from, for the error.

    Raises:
        CheckpointError: naming the first place that is not as the schema says.
    """
    _check(doc, SCHEMA, where)


def check_row(row: Any, *, where: str | None = None) -> None:
    """Check one row.

    Args:
        row: the parsed JSON.
        where: the machine it came from, for the error.

    Raises:
        CheckpointError: as `check`.
    """
    _check(row, ROW, where)


def _check(doc: Any, rules: dict[str, Any], where: str | None) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(rules).iter_errors(doc))
    if error is not None:
        place = error.json_path
        raise CheckpointError(
            "this is not a result file of this format.",
            where=f"{where}: {place}" if where else place,
            got=_short(error.message),
            expected=f"what samcompress.evaluate.schema.SCHEMA describes, format {FORMAT}",
        )


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
