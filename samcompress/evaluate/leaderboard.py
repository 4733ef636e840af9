"""Results of several files and machines in one place: a table for each machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.display import Cell, Column, Table
from ..core.errors import ConfigError, DataError
from ..core.files import write_whole
from .measures import (
    MEASURES,
    Measure,
    Row,
    accuracy_of,
    interval,
    known_measures,
    same_rules,
    slot_name,
    slots,
)
from .report import Report
from .stats import comparable, pareto

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Entry:
    """A row and the file it came from.

    Attributes:
        row: as a result file holds it.
        doc: the document it stood in.
        source: name of the file.
    """

    row: Row
    doc: Row
    source: str

    @property
    def machine(self) -> str:
        """What its times are of: the device by name, and on a CPU the threads."""
        device = self.row["device"]
        name = self.row.get("device_name") or (_cpu(self.doc) if device == "cpu" else None)
        threads = next(filter(None, (part.get("threads") for part in self._places())), None)
        count = f", {threads} thread{'s' * (threads != 1)}" if threads and device == "cpu" else ""
        return f"{device}: {name}{count}" if name else f"{device}{count}"

    def _places(self) -> tuple[Row, ...]:
        """Where the number of threads may stand; the nearest to the times first."""
        return self.row.get("latency") or {}, self.doc["settings"], self.doc["environment"]


class Leaderboard:
    """What `leaderboard` found; shows itself as tables, one for each machine.

    Args:
        entries: rows of one set of data and one protocol each prompt.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    @property
    def machines(self) -> list[str]:
        """Devices by name, in the order the files were given."""
        return list(dict.fromkeys(entry.machine for entry in self.entries))

    def of(self, machine: str) -> list[Entry]:
        """Rows of one machine, the most accurate first; what was not measured last.

        Raises:
            ConfigError: if no row is of it.
        """
        found = [entry for entry in self.entries if entry.machine == machine]
        if not found:
            raise ConfigError(
                "no row was measured on this machine.",
                got=machine,
                expected="; ".join(self.machines),
            )
        known = slots([entry.row for entry in found])

        def place(entry: Entry) -> tuple[bool, float]:
            value = interval(accuracy_of(entry.row, known[0]), "miou", "ci")[0] if known else None
            return value is None, -(value or 0.0)

        return sorted(found, key=place)

    def table(self, machine: str) -> Table:
        """The table of one machine.

        Raises:
            ConfigError: as `of`.
        """
        entries = self.of(machine)
        rows = [entry.row for entry in entries]
        known = slots(rows)
        shown = known_measures(rows)
        columns = [Column("rank"), Column("name", align="left")]
        columns += [Column(f"mIoU {slot_name(s, known)}", group="± 95 %") for s in known]
        columns += [Column(m.label, m.unit) for m in shown.values()]
        columns += [Column("unbeaten"), Column("file", align="left")]
        best = _unbeaten(rows, known, shown)
        body: list[list[Any]] = []
        for number, (entry, on) in enumerate(zip(entries, best, strict=True), 1):
            row = entry.row
            if row["status"] != "measured":
                reason = f"not measured: {row.get('reason') or 'no reason given'}"
                body.append([None, row["name"], reason])
                continue
            cells: list[Any] = [number, Cell(row["name"], mark="bold" if row["base"] else "")]
            for slot in known:
                value, error = interval(accuracy_of(row, slot), "miou", "ci")
                cells.append(Cell(value, error) if value is not None else _missing())
            for measure in shown.values():
                value = measure.read(row)[0]
                cells.append(_missing() if value is None else value)
            body.append([*cells, on, entry.source])
        data = self.entries[0].doc["data"]
        title = (
            f"{data['name']}: {data['n_images']} images, {data['n_instances']} objects; {machine}"
        )
        return Table(tuple(columns), body, title=title, notes=self._notes(rows, known))

    def _notes(self, rows: list[Row], known: list[tuple[str, str]]) -> tuple[str, ...]:
        notes = []
        for slot in known:
            first = next(e for row in rows if (e := accuracy_of(row, slot)))
            notes.append(f"{slot_name(slot, known)}: {first['protocol']}")
        notes.append("unbeaten: no other row is as fast and as accurate, and better in one of both")
        return tuple(notes)

    def pareto(self, machine: str) -> Figure:
        """Picture of gain against cost on one machine; see `plots.pareto`.

        Raises:
            ConfigError: as `of`.
            DataError: if no row was both timed and scored.
        """
        entries = self.of(machine)
        rows = [{**entry.row, "device": machine} for entry in entries]
        return Report({**entries[0].doc, "rows": rows}).pareto()

    def text(self) -> str:
        """The tables as fixed-width text."""
        return "\n\n".join(self.table(machine).text() for machine in self.machines)

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return "".join(self.table(machine).html() for machine in self.machines)

    def html(self, path: str | Path | None = None) -> str:
        """One self-contained page: a table and a picture for each machine.

        Raises:
            CheckpointError: if it cannot be written.
        """
        from .html import document, picture

        parts = []
        for machine in self.machines:
            try:
                drawn = picture(
                    self.pareto(machine), "Accuracy against time; grey ones are beaten."
                )
            except DataError as err:
                drawn = f"<p>No picture: {escape(err.what)}</p>"
            table = self.table(machine).html()
            parts.append(f"<section><h2>{escape(machine)}</h2>{table}{drawn}</section>")
        data = self.entries[0].doc["data"]
        text = document("samcompress leaderboard", str(data["name"]), parts)
        if path is not None:
            write_whole(Path(path), text.encode())
        return text


def leaderboard(*results: Report | str | Path) -> Leaderboard:
    """Merge results of several files and machines.

    Rows of one machine stand in one table, those of two never do: a millisecond here is none there.
    The same model from two files is shown once, as measured last.

    Args:
        results: reports, or files of `benchmark`, `sweep` or `search`.

    Raises:
        ConfigError: if there is none, or they are of different data or protocols.
        CheckpointError: if a file is no result file.

    Example:
        >>> import samcompress as sc
        >>> from samcompress.evaluate.benchmark import benchmark
        >>> what = {"latency": False, "memory": False, "progress": False}
        >>> report = benchmark({"base": sc.build("tiny")}, sc.shapes(1), **what)
        >>> [entry.row["name"] for entry in leaderboard(report).entries]
        ['base']
    """
    if not results:
        raise ConfigError("there is no result to show.", expected="one result file or more")
    entries = []
    for number, result in enumerate(results, 1):
        loaded = isinstance(result, Report)
        report = result if isinstance(result, Report) else Report.load(_file(result))
        source = f"report {number}" if loaded else str(_named(Path(str(result))))
        entries += [Entry(row, report.doc, source) for row in report.rows]
    prints = {e.source: e.doc["data"]["fingerprint"] for e in entries}
    if len(set(prints.values())) > 1:
        names = {e.source: f"{e.doc['data']['name']} ({prints[e.source][:12]})" for e in entries}
        comparable(names, what="data")
    same_rules({f"{entry.row['name']} in {entry.source}": entry.row for entry in entries})
    return Leaderboard(_latest(entries))


def _latest(entries: list[Entry]) -> list[Entry]:
    """Each model once on a machine: by its identity, or its name where it has none."""
    kept: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        row = entry.row
        key = (entry.machine, str(row.get("identity") or f"{row['name']} {row.get('reason')}"))
        old = kept.get(key)
        if old is None or str(row.get("date", "")) > str(old.row.get("date", "")):
            kept[key] = entry
    return list(kept.values())


def _unbeaten(
    rows: list[Row], known: list[tuple[str, str]], shown: Mapping[str, Measure]
) -> list[bool | None]:
    if not known or "latency_ms" not in shown:
        return [None] * len(rows)
    nan = float("nan")
    costs = [nan if (v := MEASURES["latency_ms"].read(r)[0]) is None else v for r in rows]
    values = [interval(accuracy_of(row, known[0]), "miou", "ci")[0] for row in rows]
    return [bool(on) for on in pareto(costs, [nan if v is None else v for v in values])]


def _missing() -> Cell:
    return Cell("not measured", mark="grey")


def _cpu(doc: Row) -> str | None:
    cpu = doc["environment"].get("cpu")
    return cpu.get("model") if isinstance(cpu, dict) else cpu


def _file(source: str | Path) -> Path:
    path = Path(source)
    return path / "results.json" if path.is_dir() else path


def _named(path: Path) -> Path:
    """The file's name; with its folder where all files are called the same."""
    return Path(path.parent.name) / path.name if path.name == "results.json" else Path(path.name)
