"""The numbers of a result row, by name: what tables print and pictures draw."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError, closest
from .stats import comparable

Row = dict[str, Any]
Value = tuple[Any, Any]  # a number and half the width of its interval; None for what is not there


@dataclass(frozen=True)
class Measure:
    """One number of a row.

    Attributes:
        label: what tables and axes call it.
        unit: empty for a pure number.
        group: heading that columns of the same kind share.
        read: gives the number and its error; None for what was not measured.
    """

    label: str
    unit: str
    group: str
    read: Callable[[Row], Value]

    @property
    def axis(self) -> str:
        """Label of an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def _at(row: Row, *path: str) -> Any:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _plain(*path: str, scale: float = 1.0) -> Callable[[Row], Value]:
    def read(row: Row) -> Value:
        value = _at(row, *path)
        return (None if value is None else value / scale), None

    return read


def milliseconds(row: Row, part: str) -> Value:
    """Median time of a part and half its interquartile range, as shown.

    Rows are timed in different minutes, each in turns with the base. What the machine did meanwhile
    is taken out by what it did to the base: the time shown is the base's, from the base's own row,
    over the ratio of the calls in turns. So times never contradict `speedup`.
    """
    median, spread = (_at(row, "latency", part, key) for key in ("median_ms", "iqr_ms"))
    scale = _at(row, "latency", "scale", part) or 1.0
    return (None, None) if median is None else (scale * median, scale * spread / 2)


def _timing(part: str) -> Callable[[Row], Value]:
    return lambda row: milliseconds(row, part)


def _peak(row: Row) -> Value:
    """Above what importing the libraries takes, which is the same for every model."""
    peak, before = (_at(row, "memory", key) for key in ("peak_mb", "baseline_mb"))
    return (None if peak is None or before is None else peak - before), None


def _precision(row: Row) -> Value:
    return interval(row.get("detection"), "ap", "ci")


def _recall(row: Row) -> Value:
    """Of the most masks, with its interval."""
    ar = _at(row, "everything", "ar") or {}
    ends = _at(row, "everything", "ci")
    most = max(ar, key=int, default=None)
    return (None, None) if most is None else (ar[most], ends and (ends[1] - ends[0]) / 2)


_EVERYTHING = "everything (± 95 %)"
# What a row may hold of masks beside its accuracies, each by rules of its own.
MASKS = {
    "ap": Measure("AP", "", "detector's boxes (± 95 %)", _precision),
    "ar": Measure("AR@1000", "", _EVERYTHING, _recall),
    "found": Measure("found (IoU 0.75)", "", _EVERYTHING, _plain("everything", "shares", "0.75")),
    "everything_s": Measure(
        "everything, an image", "s", _EVERYTHING, _plain("everything", "seconds")
    ),
}

MEASURES = {
    "parameters": Measure("parameters", "M", "size", _plain("params", "total", scale=1e6)),
    "size_mb": Measure("on disk", "MB", "size", _plain("bytes_on_disk", scale=1e6)),
    "gmacs": Measure("encoder work", "GMAC", "size", _plain("macs", "encoder", scale=1e9)),
    "encoder_ms": Measure("encoder", "ms", "time and memory", _timing("encoder")),
    "prompt_ms": Measure("each prompt", "ms", "time and memory", _timing("prompt")),
    "latency_ms": Measure(
        "image encoder + 1 prompt", "ms", "time and memory", _timing("end_to_end")
    ),
    "memory_mb": Measure("peak memory", "MB", "time and memory", _peak),
    "energy_j": Measure(
        "energy of an image", "J", "time and memory", _plain("energy", "joules_per_image")
    ),
}


def known_measures(rows: list[Row]) -> dict[str, Measure]:
    """Those of `MASKS` and `MEASURES` that some row has: the columns of a table."""
    every = {**MASKS, **MEASURES}
    return {k: m for k, m in every.items() if any(m.read(row)[0] is not None for row in rows)}


def speedup(row: Row, base: Row) -> float | None:
    """How many times as fast as the base for one image and one prompt.

    The ratio of calls that took turns with the base's, where the row has it.
    """
    if row is base:
        return 1.0
    turns = _at(row, "latency", "vs_base", "end_to_end")
    if turns is not None:
        return float(turns)
    (before, _), (now, _) = (MEASURES["latency_ms"].read(r) for r in (base, row))
    return before / now if before and now else None


def slots(rows: list[Row]) -> list[tuple[str, str]]:
    """(prompt, mask choice) of every accuracy in the rows, in order of appearance."""
    found = [(a["prompt"], a["choice"]) for row in rows for a in row.get("accuracy") or ()]
    return list(dict.fromkeys(found))


def slot_name(slot: tuple[str, str], among: list[tuple[str, str]]) -> str:
    """``box``, or ``box, oracle`` where a prompt was measured with several choices of mask."""
    prompt, choice = slot
    alone = sum(p == prompt for p, _ in among) == 1
    return prompt if alone else f"{prompt}, {choice}"


def accuracy_of(row: Row, slot: tuple[str, str]) -> Row | None:
    """The accuracy entry of a row for one (prompt, choice)."""
    entries = row.get("accuracy") or ()
    return next((a for a in entries if (a["prompt"], a["choice"]) == slot), None)


def same_rules(rows: Mapping[str, Row]) -> None:
    """See that rows may stand in one table: one protocol for each column.

    Args:
        rows: by what errors call them.

    Raises:
        ConfigError: if two were made by different rules.
    """
    asked: list[Callable[[Row], Row | None]] = [
        *(functools.partial(accuracy_of, slot=slot) for slot in slots(list(rows.values()))),
        *(operator.methodcaller("get", part) for part in ("detection", "everything")),
    ]
    for read in asked:
        found = {name: entry["protocol"] for name, row in rows.items() if (entry := read(row))}
        if found:
            comparable(found)


def interval(entry: Row | None, value: str, ci: str) -> Value:
    """A number of an accuracy entry and half the width of its confidence interval."""
    if entry is None or entry.get(value) is None:
        return None, None
    ends = entry.get(ci)
    return entry[value], None if ends is None else (ends[1] - ends[0]) / 2


@dataclass(frozen=True)
class Stage:
    """A model after one step of its history, as shares of what the history began with.

    Attributes:
        label: the step; ``"base"`` before the first.
        size: bytes of all tensors; None where the step did not note them.
        time: image encoder + 1 prompt; None where the model was not measured after this step.
        miou: None likewise.
    """

    label: str
    size: float | None
    time: float | None
    miou: float | None


def stages(row: Row, rows: list[Row]) -> list[Stage]:
    """A row's history step by step; time and accuracy where another row is that very stage.

    Args:
        row: the row.
        rows: all rows of the same device, among them the base.
    """
    measured = {_key(r["lineage"]): r for r in rows if r["status"] == "measured"}
    base = next((r for r in rows if r["base"]), {})
    steps = row["lineage"]
    start = next((k for k in range(len(steps) + 1) if _key(steps[:k]) in measured), 0)
    first = measured.get(_key(steps[:start]), {})
    sizes = [_at(step, "facts", "after", "bytes") for step in steps]
    before = _at(steps[start], "facts", "before", "bytes") if start < len(steps) else None
    gain = measure("miou", rows).read if slots(rows) else None
    found = [Stage("base", 1.0, 1.0, 1.0)]
    for k in range(start + 1, len(steps) + 1):
        now = measured.get(_key(steps[:k]), {})
        size = sizes[k - 1] / before if sizes[k - 1] and before else None
        fast, before_fast = (speedup(r, base) if r else None for r in (now, first))
        time = before_fast / fast if fast and before_fast else None
        good, before_good = (gain(r)[0] if gain else None for r in (now, first))
        miou = good / before_good if good is not None and before_good else None
        found.append(Stage(steps[k - 1]["type"], size, time, miou))
    return found


def _key(steps: list[Row]) -> str:
    return json.dumps([[s["type"], s["params"]] for s in steps], sort_keys=True)


def measure(name: str, rows: list[Row]) -> Measure:
    """A measure by name: one of `MEASURES` or `MASKS`, ``"miou"`` or ``"miou:box"``.

    Args:
        name: plain ``"miou"`` takes the first prompt that was measured.
        rows: the rows it will be read from.

    Raises:
        ConfigError: if there is no such measure in the rows.

    Example:
        >>> measure("latency_ms", []).axis
        'image encoder + 1 prompt (ms)'
    """
    if name in MEASURES or name in MASKS:
        return MEASURES.get(name) or MASKS[name]
    known = slots(rows)
    kind, _, prompt = name.partition(":")
    chosen = next((s for s in known if prompt in ("", s[0], slot_name(s, known))), None)
    if kind != "miou" or chosen is None:
        names = [*MEASURES, *MASKS, "miou", *(f"miou:{slot_name(s, known)}" for s in known)]
        raise ConfigError(
            "there is no such measure in these results.",
            got=name,
            expected=", ".join(names),
            fix=closest(name, names),
        )
    slot = chosen

    def read(row: Row) -> Value:
        return interval(accuracy_of(row, slot), "miou", "ci")

    return Measure(f"mIoU, prompt: {slot_name(slot, known)}", "", "accuracy", read)
