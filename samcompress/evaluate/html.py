"""The report as one HTML file that needs no other: no script, nothing fetched, light and dark."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..core.display import Cell, Column, Table, number
from ..core.errors import DataError
from . import _sections
from ._sections import folded
from .measures import MEASURES, Row, accuracy_of, interval, measure, slot_name, slots, speedup
from .plots import CROWD, pareto, time_split, waterfall
from .published import MARK, overlays, table
from .stats import pareto as front
from .worst import Worst, cases, mask_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from .report import Report
    from .study import Study

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #8885; }
table { font-size: .86rem; margin-top: 1rem; }
thead { border-bottom: 2px solid #8886; }
tbody tr { border-top: 1px solid #8883; }
.lead { opacity: .75; margin-top: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; align-items: flex-start; }
figure { margin: 1rem 0 0; flex: 1 1 26rem; min-width: 0; max-width: min(36rem, 100%);
  overflow-x: auto; }
figure svg { width: 100%; min-width: 28rem; height: auto; }
figcaption { font-size: .88rem; opacity: .8; }
pre { background: #8881; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
pre, code { font-size: .88rem; }
summary { cursor: pointer; padding: .2rem 0; }
"""


def page(
    report: Report,
    *,
    data: Any = None,
    models: Mapping[str, nn.Module],
    worst: int = 6,
    published: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> str:
    """The whole page; see `Report.html` for the arguments."""
    doc = report.doc
    few = chosen(report)
    body = []
    if "study" in doc:
        body.append(_section("Study", _study(report)))
    for device in report.devices:
        heading = f" on {device}" if len(report.devices) > 1 else ""
        body += [
            _section(f"Results{heading}", _headline(few, device), report.table(device).html()),
            _section(f"Pictures{heading}", _pictures(report, few, device, published)),
            _section(f"Worst masks{heading}", _worst(few, device, data, models, worst)),
            *_extra(report.select(device), heading),
        ]
    body += [
        *(_section(title, part._repr_html_()) for title, part in (more or {}).items()),
        *_if_any("Recipes to copy", map(_recipe, _first(few.rows))),
        _section("Data and licence", _pairs(doc["data"])),
        _section("Environment", _pairs(doc["environment"])),
        _section("Settings", _pairs(doc["settings"])),
        _section("What was not measured", _not_measured(report)),
    ]
    return document("samcompress report", _origin(doc), body)


def document(title: str, lead: str, parts: Sequence[str]) -> str:
    """A page that needs no other.

    Args:
        title: heading of the page and of its tab.
        lead: a sentence below it.
        parts: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: {escape(lead.partition(': ')[0])}</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
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


def _extra(rows: list[Row], heading: str) -> list[str]:
    """Sections of what only some ask for."""
    parts = {
        "Detection: masks for a detector's boxes": _sections.detection(rows),
        "Segment everything": _sections.everything(rows),
        "What an Edge TPU would run": _sections.checks(rows),
    }
    return [s for title, part in parts.items() for s in _if_any(f"{title}{heading}", [part])]


def _if_any(title: str, parts: Iterable[str]) -> list[str]:
    found = list(filter(None, parts))
    return [_section(title, *found)] if found else []


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
    fast = speedup(row, base)
    if fast:
        parts.append(f"{number(fast)} times as fast for one image and one prompt")
    (before, _), (now, _) = (MEASURES["size_mb"].read(r) for r in (base, row))
    if before and now:
        parts.append(f"{number(100 * now / before)} % of the base's bytes")
    known = slots([base])
    for slot in known:
        change, error = interval(accuracy_of(row, slot), "delta", "delta_ci")
        if change is not None:
            shown = Cell(change, error, sign=True).text
            parts.append(f"mIoU {shown} with prompt {slot_name(slot, known)}")
    return f"{name}: {escape(', '.join(parts))}"


def _not_measured(report: Report) -> str:
    doc = report.doc
    gaps = [
        f"{row['name']} on {row['device']}: {row.get('reason') or 'no reason given'}"
        for row in report.rows
        if row["status"] != "measured"
    ]
    for device in report.devices:
        gaps += [f"on {device}: {gap}" for gap in report.gaps(report.select(device))]
    skipped = [*doc["data"].get("skipped", ())]
    if skipped:
        gaps.append(f"{len(skipped)} parts of the data could not be read and were left out:")
        gaps += [f"{s['id']}, {s['what']}: {s['reason']}" for s in skipped[:10]]
    known = slots(report.rows)
    parts = {
        "detection": "detection (AP)",
        "everything": "segmenting everything",
        "energy": "energy",
    }
    absent = [words for part, words in parts.items() if not any(r.get(part) for r in report.rows)]
    prompts = ", ".join(slot_name(slot, known) for slot in known) or "none"
    gaps += [
        f"Devices other than {', '.join(report.devices)}: times and memory are those of "
        "the machine described under Environment, and of no other.",
        f"{'; '.join((f'Prompts other than {prompts}', *absent))}.",
    ]
    return f"<ul>{''.join(f'<li>{escape(gap)}</li>' for gap in gaps)}</ul>"


# --- pictures ---


def chosen(report: Report) -> Report:
    """The base and what no other row beats, where there are too many rows to draw them all."""
    if len(report.rows) <= CROWD:
        return report
    if "study" in report.doc:
        best = [row["name"] for row in _study_of(report).front]
        rows = [row for row in report.rows if row["base"] or row["name"] in best]
        return type(report)({**report.doc, "rows": rows})
    rows = []
    for device in report.devices:
        here = report.select(device)
        known = slots(here)
        gains = [measure(f"miou:{slot_name(slot, known)}", here).read for slot in known]
        values = [[_or_nan(gain(row)[0]) for gain in gains] for row in here]
        timed = any(MEASURES["latency_ms"].read(row)[0] is not None for row in here)
        cost = MEASURES["latency_ms" if timed else "size_mb"].read
        unbeaten = front([_or_nan(cost(row)[0]) for row in here], values)
        rows += [row for row, on in zip(here, unbeaten, strict=True) if on or row["base"]]
    return type(report)({**report.doc, "rows": rows})


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _study_of(report: Report) -> Study:
    from .study import Study

    return Study(report.doc)


def _study(report: Report) -> str:
    """What was searched, what it found, and what was refused."""
    study = _study_of(report)
    parts = [study.table().html()]
    if study.refused:
        title = f"{len(study.refused)} chains are not in the running"
        parts.append(folded(title, study.refusals().html()))
    space = study.facts.get("space")
    if space:
        text = escape(json.dumps({k: v for k, v in space.items() if k != "left_out"}, indent=1))
        parts.append(folded("The space that was searched", f"<pre>{text}</pre>"))
        left = list(space.get("left_out", {}).items())
        columns = (Column("technique", align="left"), Column("why", align="left"))
        title = f"{len(left)} techniques were not tried"
        parts += [folded(title, Table(columns, left).html())] if left else []
    return "".join(parts)


def _pictures(report: Report, few: Report, device: str, published: Sequence[str]) -> str:
    rows = report.select(device)
    known = slots(rows)
    made = []
    if few is not report:
        text = "There are too many models to draw each: steps and times are those of the base "
        made.append(f"<p>{text}and of models that no other one beats.</p>")
    for slot in (slot_name(s, known) for s in known):
        caption = f"Which one shall I take? Accuracy against time, prompt: {slot}. "
        caption += "The base is the star; grey ones are beaten in both."
        caption += f" Pink: {MARK}." if published else ""
        what = {"y": f"miou:{slot}", "device": device, "published": published}
        made.append(_try(caption, pareto, report, **what))
    for row in few.select(device):
        if len(row["lineage"]) > 1:
            caption = f"Which step of {row['name']} earned what (above), and cost what (below)?"
            made.append(_try(caption, waterfall, report, row["name"], device=device))
    for prompts, caption in (
        (1, "Where the time of one image with one prompt goes."),
        (32, "The same with 32 prompts: the decoder runs for each of them."),
    ):
        made.append(_try(caption, time_split, few, prompts=prompts, device=device))
    tables = [
        table(
            overlays(published, "latency_ms", f"miou:{slot_name(s, known)}"),
            "ms",
            f"mIoU, {slot_name(s, known)}",
        ).html()
        for s in known
        if published
    ]
    return f'<div class="pictures">{"".join(made)}</div>{"".join(tables)}'


def _try(caption: str, draw: Callable[..., Figure], *args: Any, **kwargs: Any) -> str:
    """A picture, or the sentence that says why there is none."""
    try:
        return picture(draw(*args, **kwargs), caption)
    except DataError as err:
        return f"<p>No picture: {escape(err.what)}</p>"


def _worst(report: Report, device: str, data: Any, models: Mapping[str, nn.Module], n: int) -> str:
    found = report.worst(n, device=device)
    base = report.base(device)
    if not found or base is None:
        return "<p>There is nothing to compare with the base.</p>"
    if data is None or not models:
        drawn = "<p>Give <code>data=</code> and <code>models=</code> to see the masks.</p>"
    else:
        caption = "White: outline of the truth. Pink: the prompt. Blue: the masks. "
        caption += "Difference: orange was lost, sky blue was added."
        drawn = _try(caption, _masks, found, data, models, base["name"])
    return _worst_table(found).html() + drawn


def _masks(found: list[Worst], data: Any, models: Mapping[str, nn.Module], base: str) -> Figure:
    return mask_grid(cases(found, data, models, base=base))


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
        (
            w.name,
            w.protocol.split("/")[1],
            str(w.image_id),
            str(w.annotation_id),
            w.area,
            w.base_iou,
            w.iou,
            Cell(-w.loss, sign=True),
        )
        for w in found
    ]
    return Table(columns, rows, title="Objects that lost most against the base")


# --- facts ---


def _first(rows: list[Row]) -> list[Row]:
    """One row for each name that has steps."""
    return list({row["name"]: row for row in reversed(rows) if _steps(row)}.values())[::-1]


def _steps(row: Row) -> list[Any]:
    return list((row.get("recipe") or {}).get("steps", []))


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
