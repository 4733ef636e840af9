"""What the verbs share: models and data by what was typed, tables, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.text
import typer

import samcompress as sc

from ..core.build import ARCHITECTURES
from ..core.display import Table
from ..core.errors import ConfigError
from ..core.figures import png
from ..core.files import write_whole
from ..core.load import SHIPPED
from ..core.zoo import published


def say(text: str) -> None:
    """A line for the person, kept apart from the output."""
    print(text, file=sys.stderr, flush=True)


def show(*tables: Table, to_json: str | None = None) -> None:
    """Print tables, the flagged cells in red, or their values as JSON."""
    if to_json is not None:
        values = [{"title": t.title, "rows": t.records(), "notes": list(t.notes)} for t in tables]
        text = json.dumps(values[0] if len(values) == 1 else values, indent=1, default=str)
        if to_json == "-":
            print(text)
            return
        write_whole(Path(to_json), f"{text}\n".encode())
    console = rich.console.Console(highlight=False, soft_wrap=True)
    for table in tables:
        shown = rich.text.Text(f"{table.text()}\n" if table is not tables[-1] else table.text())
        shown.highlight_regex(r"! \S+", "bold red")
        console.print(shown)


def show_preflight(table: Table, to_json: str | None) -> None:
    """Print it; exit 1 unless every step is ready."""
    show(table, to_json=to_json)
    if any(row["ready"] != "yes" for row in table.records()):
        raise typer.Exit(1)


def opened(data: str | None, limit: int | None = None) -> Any:
    """The data of a ``--data`` option."""
    if data is None:
        return None
    found = sc.data.open(data)
    return found if limit is None else found.subset(limit)


def load(source: str, device: str = "cpu") -> Any:
    """A model by what the user typed."""
    found = source_of(source)
    return sc.load(found, device) if isinstance(found, str) else found.to(device)


def source_of(source: str) -> Any:
    """``vit_b:random@image_size=512`` as a model of random weights; anything else as it is."""
    name, random, sizes = source.partition(":random")
    if not random and source in ARCHITECTURES and source not in (*SHIPPED, *published()):
        raise ConfigError(
            f"{source} names an architecture, which has no weights.",
            expected="a checkpoint, a folder, or a Hub id such as facebook/sam-vit-base",
            fix=f"{source}:random for random weights",
        )
    if not random:
        return source
    try:
        fields = [word.split("=") for word in sizes.removeprefix("@").split(",") if word]
        values = {key: json.loads(value) for key, value in fields}
    except ValueError as err:
        raise ConfigError(
            "these sizes are not understood.", got=source, expected="vit_b:random@image_size=512"
        ) from err
    say(f"{source}: random weights, of use for times and sizes only")
    if name in published() and name not in ARCHITECTURES and values.keys() == {"image_size"}:
        resize = sc.get("substitute.image_size", size=values["image_size"])
        return resize(sc.build(name), consume=True)
    return sc.build(name, **values)


def named(models: Sequence[str]) -> dict[str, str]:
    """Models by the names tables use: the last part of a path, numbered where two are alike."""
    found: dict[str, str] = {}
    for source in models:
        name = Path(source).name if Path(source).exists() else source
        alike = sum(name == other.partition(" (")[0] for other in found)
        found[f"{name} ({alike + 1})" if alike else name] = source
    return found


def write_report(
    report: sc.evaluate.Report,
    html: Path | None,
    picture: Path | None,
    data: Any,
    sources: dict[str, str],
) -> None:
    """Write the page, with the worst masks drawn, and the picture."""
    device = report.devices[0]
    if html is not None:
        names = {worst.name for worst in report.worst(6, device=device)}
        base = report.base(device)
        names |= {base["name"]} if base and names else set()
        # A model on another runtime is not loaded again to be drawn.
        drawn = {name: load(sources[name]) for name in names if name in sources}
        report.html(html, data=data, models=drawn)
        say(f"report: {html}")
    if picture is not None:
        write_whole(picture, png(report.pareto(device=device)))
        say(f"picture: {picture}")
