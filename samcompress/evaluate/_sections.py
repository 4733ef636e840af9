"""Sections of the page that only some results have: detection, everything, files for devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..core.display import Cell, Column, Table
from .measures import Row, interval

# By column and its heading.
Cells = Mapping[tuple[str, str], Any]


def detection(rows: Sequence[Row]) -> str:
    """AP and AR of every model; empty where nobody asked for them."""
    return _part(rows, "detection", _detection)


def everything(rows: Sequence[Row]) -> str:
    """What the masks of whole images find; empty where nobody asked for it."""
    return _part(rows, "everything", _everything)


def checks(rows: Sequence[Row]) -> str:
    """What an Edge TPU would run of exported files, a folded table each; empty without any."""
    parts = []
    for row in rows:
        for check in row.get("checks") or ():
            title = f"{row['name']}: {check['title']}"
            parts.append(folded(title, _records(check["rows"], check["notes"])))
    if not parts:
        return ""
    said = "Files held against the published rules of its maker, operator by operator: an Edge TPU "
    said += "runs a file up to the first operator that it cannot map. Nothing was run on one."
    return f"<p>{said}</p>{''.join(parts)}"


def folded(title: str, body: str) -> str:
    """A body that shows when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _detection(entry: Row) -> Cells:
    return {
        ("precision", "AP"): Cell(*interval(entry, "ap", "ci")),
        ("precision", "change"): Cell(*interval(entry, "delta", "delta_ci"), sign=True),
        ("precision", "AP50"): entry["ap50"],
        ("precision", "AP75"): entry["ap75"],
        **{("precision", f"AP {name}"): part["ap"] for name, part in entry["by_size"].items()},
        **{("precision", f"AP {name}"): value for name, value in entry["by_group"].items()},
        **{("recall", f"AR@{most}"): value for most, value in entry["ar"].items()},
        ("", "masks"): entry["n_detections"],
    }


def _everything(entry: Row) -> Cells:
    most, (low, high) = max(entry["ar"], key=int), entry["ci"]
    return {
        **{("recall", f"AR@{k}"): value for k, value in entry["ar"].items()},
        ("recall", f"AR@{most}"): Cell(entry["ar"][most], (high - low) / 2),
        ("recall", "change"): Cell(*interval(entry, "delta", "delta_ci"), sign=True),
        **{("recall", f"AR {name}"): part["ar"][most] for name, part in entry["by_size"].items()},
        **{("objects found", f"IoU {k}"): value for k, value in entry["shares"].items()},
        ("objects found", "best IoU"): entry["miou"],
        ("an image", "masks"): entry["n_masks"] / entry["n_images"],
        ("an image", "prompts"): entry["n_prompts"] / entry["n_images"],
        ("an image", "seconds"): entry["seconds"],
    }


def _part(rows: Sequence[Row], part: str, read: Callable[[Row], Cells]) -> str:
    found = {row["name"]: read(entry) for row in rows if (entry := row.get(part))}
    asked = [row for row in rows if part in row]
    if not asked:
        return ""
    every = dict.fromkeys(key for cells in found.values() for key in cells)
    names = [key for key in every if any(_there(cells.get(key)) for cells in found.values())]
    head = [Column(name, group=group) for group, name in names or [("", "result")]]
    columns = (Column("name", align="left"), *head)
    body = []
    for row in asked:
        name, cells = Cell(row["name"], mark="bold" if row["base"] else ""), found.get(row["name"])
        if cells is None:
            body.append([name, f"not measured: {(row.get('missing') or {}).get(part, '')}"])
        else:
            body.append([name, *(cells.get(key) for key in names)])
    first: Row = next((row[part] for row in asked if row[part]), {})
    notes = [first["protocol"]] if first else []
    if "detector" in first:
        boxes = first["detector"]
        notes.append(f"{boxes['n_boxes']} boxes of the detector, SHA-256 {boxes['sha256']}")
    return Table(columns, body, notes=tuple(notes)).html()


def _there(value: Any) -> bool:
    return (value.value if isinstance(value, Cell) else value) is not None


def _records(rows: Sequence[Row], notes: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    words = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    columns = (Column(name, align="left" if name in words else "right") for name in names)
    return Table(
        tuple(columns), [[row.get(name) for name in names] for row in rows], notes=tuple(notes)
    ).html()
