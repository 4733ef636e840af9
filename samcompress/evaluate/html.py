"""The report as one HTML file that needs no other: no script, nothing fetched, light and dark."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from ..core.display import Cell, Column, Table, number
from ..core.errors import DataError
from .measures import MEASURES, Row, accuracy_of, interval, slot_name, slots
from .plots import pareto, time_split, waterfall
from .worst import Worst, cases, mask_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from .report import Report

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem;
  border-bottom: 1px solid #8885; padding-bottom: .2rem; }
table { font-size: .92rem; } tbody tr { border-top: 1px solid #8883; }
thead tr:first-child th { opacity: .75; font-weight: 500; } thead { border-bottom: 2px solid #8886; }
.lead { opacity: .75; margin-top: 0; } .pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; flex: 1 1 30rem; max-width: 46rem; } figure svg, figure img { width: 100%;
  height: auto; } figcaption { font-size: .88rem; opacity: .8; }
pre { background: #8881; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .88rem; }
summary { cursor: pointer; padding: .2rem 0; } code { font-size: .92em; }
@media print { details { display: block; } }
"""


def page(
    report: Report, *, data: Any = None, models: Mapping[str, nn.Module], worst: int = 6
) -> str:
    """The whole page; see `Report.html` for the arguments."""
    doc = report.doc
    body = [
        "<h1>samcompress report</h1>",
        f'<p class="lead">{escape(_origin(doc))}</p>',
    ]
    for device in report.devices:
        heading = f" on {device}" if len(report.devices) > 1 else ""
        body += [
            _section(f"Results{heading}", _headline(report, device), report.table(device).html()),
            _section(f"Pictures{heading}", _pictures(report, device)),
            _section(f"Worst masks{heading}", _worst(report, device, data, models, worst)),
        ]
    body += [
        _section("Recipes to copy", *(_recipe(row) for row in _first(report.rows))),
        _section("Data and licence", _pairs(doc["data"])),
        _section("Environment", _pairs(doc["environment"])),
        _section("Settings", _pairs(doc["settings"])),
        _section("What was not measured", _not_measured(report)),
    ]
    title = escape(f"samcompress: {doc['data']['name']}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def picture(figure: Figure, caption: str = "") -> str:
    """A figure as inline SVG whose ink takes the colour of the page's text."""
    import matplotlib as mpl

    file = io.StringIO()
    # A fixed salt instead of random ids: the same report gives the same page.
    with mpl.rc_context({"svg.hashsalt": "samcompress"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = svg.replace("<svg ", '<svg fill="currentColor" ', 1)
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{text}</figure>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "</section>"


def _origin(doc: dict[str, Any]) -> str:
    data = doc["data"]
    dates = sorted(row["date"] for row in doc["rows"] if row.get("date"))
    when = f", {dates[-1][:10]}" if dates else ""
    return (
        f"{data['name']}: {data['n_images']} images, {data['n_instances']} objects{when}; "
        f"samcompress {doc['samcompress']}"
    )


# --- sentences ---


def _headline(report: Report, device: str) -> str:
    base = report.base(device)
    if base is None:
        return "<p>There is no measured base to compare with.</p>"
    lines = [_sentence(row, base) for row in report.select(device) if row is not base]
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _sentence(row: Row, base: Row) -> str:
    """What one model won and lost, in words."""
    name = f"<b>{escape(row['name'])}</b>"
    if row["status"] != "measured":
        return f"{name}: not measured, {escape(row.get('reason') or 'no reason given')}"
    parts = []
    fast, small = (_ratio(base, row, key) for key in ("latency_ms", "size_mb"))
    if fast:
        parts.append(f"{number(fast)} times as fast for one image and one prompt")
    if small:
        parts.append(f"{number(100 / small)} % of the base's bytes")
    known = slots([base])
    for slot in known:
        change, error = interval(accuracy_of(row, slot), "delta", "delta_ci")
        if change is not None:
            shown = Cell(change, error, sign=True).text
            parts.append(f"mIoU {shown} with prompt {slot_name(slot, known)}")
    return f"{name}: {escape(', '.join(parts))}"


def _ratio(base: Row, row: Row, key: str) -> float | None:
    (before, _), (now, _) = MEASURES[key].read(base), MEASURES[key].read(row)
    return before / now if before and now else None


def _not_measured(report: Report) -> str:
    doc = report.doc
    gaps = [
        f"{row['name']} on {row['device']}: {row.get('reason') or 'no reason given'}"
        for row in report.rows
        if row["status"] != "measured"
    ]
    for device in report.devices:
        rows = [r for r in report.select(device) if r["status"] == "measured"]
        for measure in MEASURES.values():
            names = [r["name"] for r in rows if measure.read(r)[0] is None]
            if names:
                gaps.append(f"{measure.axis} on {device}: {', '.join(names)}")
    skipped = [*doc["data"].get("skipped", ())]
    if skipped:
        gaps.append(f"{len(skipped)} parts of the data could not be read and were left out:")
        gaps += [f"{s['id']}, {s['what']}: {s['reason']}" for s in skipped[:10]]
    gaps += [
        f"Other devices than {', '.join(report.devices)}: times and memory hold for the machine below "
        "Environment only.",
        f"Other prompts than {', '.join(slot_name(s, k) for k in [slots(report.rows)] for s in k)}; "
        "detection (AP), segmenting everything, energy.",
    ]
    return f"<ul>{''.join(f'<li>{escape(gap)}</li>' for gap in gaps)}</ul>"


# --- pictures ---


def _pictures(report: Report, device: str) -> str:
    wanted: list[tuple[Callable[[], Figure], str]] = [
        (
            lambda slot=slot: pareto(report, y=f"miou:{slot}", device=device),
            f"Which one shall I take? Accuracy against time, prompt: {slot}. The base is the star; "
            "grey ones are beaten in both.",
        )
        for known in [slots(report.select(device))]
        for slot in (slot_name(s, known) for s in known)
    ]
    wanted += [
        (
            lambda: waterfall(report, device=device),
            "Which step earned what, and which cost what? Gains above, losses below.",
        ),
        (
            lambda: time_split(report, device=device),
            "Where the time of one image with one prompt goes.",
        ),
        (
            lambda: time_split(report, prompts=32, device=device),
            "The same with 32 prompts: the decoder runs for each of them.",
        ),
    ]
    made = []
    for make, caption in wanted:
        try:
            made.append(picture(make(), caption))
        except DataError as err:
            made.append(f"<p>No picture: {escape(err.what)}</p>")
    return f'<div class="pictures">{"".join(made)}</div>'


def _worst(
    report: Report, device: str, data: Any, models: Mapping[str, nn.Module], n: int
) -> str:
    found = report.worst(n, device=device)
    base = report.base(device)
    if not found or base is None:
        return "<p>There is nothing to compare with the base.</p>"
    drawn = ""
    if data is not None and models:
        try:
            figure = mask_grid(cases(found, data, models, base=base["name"]))
            drawn = picture(figure, "White: outline of the truth. Pink: the prompt. Blue: the masks. "
                            "Difference: orange was lost, sky blue was added.")
        except DataError as err:
            drawn = f"<p>No masks drawn: {escape(err.what)}</p>"
    else:
        drawn = "<p>Give <code>data=</code> and <code>models=</code> to see the masks.</p>"
    return _worst_table(found).html() + drawn


def _worst_table(found: list[Worst]) -> Table:
    columns = (
        Column("model", align="left"),
        Column("prompt", align="left"),
        Column("image", align="left"),
        Column("object", align="left"),
        Column("area", "pixels"),
        Column("IoU of base"),
        Column("IoU now"),
        Column("change"),
    )
    rows = [
        (w.name, w.protocol.split("/")[1], str(w.image_id), str(w.annotation_id), float(w.area), w.base_iou, w.iou,
         Cell(-w.loss, sign=True))
        for w in found
    ]
    return Table(columns, rows, title="Objects that lost most against the base")


# --- facts ---


def _first(rows: list[Row]) -> list[Row]:
    """One row for each name that has steps."""
    return list({row["name"]: row for row in reversed(rows) if _steps(row)}.values())[::-1]


def _steps(row: Row) -> list[Any]:
    return (row.get("recipe") or {}).get("steps", [])


def _recipe(row: Row) -> str:
    chain = " | ".join(step["type"] for step in _steps(row))
    text = json.dumps(row["recipe"], indent=2)
    name = escape(row["name"])
    return (
        f"<details><summary><b>{name}</b>: {escape(chain)}</summary>"
        f"<p>Save as <code>recipe.json</code>, then "
        f"<code>samcompress apply recipe.json --model MODEL --out OUT</code></p>"
        f"<pre>{escape(text)}</pre></details>"
    )


def _pairs(facts: Mapping[str, Any]) -> str:
    rows = [(key, _shown(value)) for key, value in _flat(facts)]
    columns = (Column("what", align="left"), Column("value", align="left"))
    return Table(columns, rows).html()


def _flat(facts: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in facts.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}: ")
        else:
            found.append((name, value))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], Mapping):
            return f"{len(value)}"
        return ", ".join(map(_shown, value)) or "none"
    return "not known" if value is None else number(value)


