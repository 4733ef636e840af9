"""What a benchmark found, as a table, a page, a file and pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.display import Cell, Column, Table
from ..core.errors import CheckpointError, ConfigError, DataError
from ..core.files import write_whole
from .measures import (
    MASKS,
    Measure,
    Row,
    accuracy_of,
    interval,
    known_measures,
    same_rules,
    slot_name,
    slots,
    speedup,
)
from .stats import comparable
from .worst import Worst, losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

AGREES = 0.9  # mean IoU to the base's masks below which a model no longer says the same
SLOWER = 0.97  # speed-up below which it is no longer the noise of a quiet machine
_TURNS = "speed-up: calls in turns with the base's; ms of others: the base's over that ratio"
_FLAG = "! slower than the base, or masks that agree with the base's by an IoU below 0.9"


class Report:
    """Results of `benchmark`: shows itself as a table, writes itself as JSON or as one HTML page.

    Args:
        doc: a result document, as `schema` describes it.

    Raises:
        CheckpointError: if the document is not one.
    """

    def __init__(self, doc: dict[str, Any]) -> None:
        from .schema import check

        check(doc)
        self.doc = doc

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that `save` wrote.

        Raises:
            CheckpointError: if the file cannot be read or is no result file.
        """
        try:
            doc = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise CheckpointError(
                "this is not a result file.",
                where=str(path),
                got=f"{type(err).__name__}: {err}",
                expected="JSON as `samcompress bench --json` writes it",
            ) from err
        return cls(doc)

    # --- reading ---

    @property
    def rows(self) -> list[Row]:
        """One dictionary for each model and device."""
        return list(self.doc["rows"])

    @property
    def devices(self) -> list[str]:
        """Devices the rows were measured on."""
        return list(dict.fromkeys(row["device"] for row in self.rows))

    def select(self, device: str | None = None) -> list[Row]:
        """Rows that may stand in one table: one device, one protocol for each column.

        Args:
            device: which one; may be left out where all rows have the same.

        Raises:
            ConfigError: if rows are of several devices or protocols, or the device has none.
        """
        rows = [row for row in self.rows if device in (None, row["device"])]
        if not rows:
            raise ConfigError(
                "no row was measured on this device.",
                got=device,
                expected=", ".join(self.devices) or "a report with rows",
            )
        comparable({f"{r['name']} on {r['device']}": r["device"] for r in rows}, what="device")
        same_rules({row["name"]: row for row in rows})
        return rows

    def base(self, device: str | None = None) -> Row | None:
        """The row the others are compared with; None where it is not there or was not measured."""
        rows = self.select(device)
        return next((r for r in rows if r["base"] and r["status"] == "measured"), None)

    def worst(
        self, n: int = 12, *, name: str | None = None, device: str | None = None
    ) -> list[Worst]:
        """The objects on which compressed models lost most against the base.

        Args:
            n: how many.
            name: one model; all of them if left out.
            device: as in `select`.

        Raises:
            ConfigError: as `select`, or if there is no such model.
        """
        rows = self.select(device)
        if name is not None and name not in [row["name"] for row in rows]:
            raise ConfigError(
                "there is no such model in the report.",
                got=name,
                expected=", ".join(row["name"] for row in rows),
            )
        base = self.base(device)
        others = [r for r in rows if base and r is not base and name in (None, r["name"])]
        found = [worst for row in others for worst in losses(row, base or {})]
        # Each object once, with the model and prompt that lost most on it.
        most = {(w.image_id, w.annotation_id): w for w in sorted(found, key=lambda w: w.loss)}
        return sorted(most.values(), key=lambda w: -w.loss)[:n]

    # --- faces ---

    def table(self, device: str | None = None) -> Table:
        """The headline table of one device.

        Raises:
            ConfigError: as `select`.
        """
        rows = self.select(device)
        base = self.base(device)
        known = slots(rows)
        columns = [Column("name", align="left")]
        columns += [
            Column(f"{what} {slot_name(slot, known)}", group="accuracy (± 95 %)")
            for slot in known
            for what in ("mIoU", "change")
        ]
        columns += [Column("IoU to base", group="accuracy (± 95 %)")] if known else []
        shown = known_measures(rows)
        for key, measure in shown.items():
            columns.append(Column(measure.label, measure.unit, group=measure.group))
            if key == "latency_ms" and base:
                columns.append(Column("speed-up", "x", group=measure.group))
        if len(columns) == 1:
            columns.append(Column("result", align="left"))
        body = [self._cells(row, base, known, shown) for row in rows]
        data = self.doc["data"]
        title = f"{data['name']}: {data['n_images']} images, {data['n_instances']} objects"
        title += f"; device: {rows[0]['device']}"
        return Table(tuple(columns), body, title=title, notes=tuple(self._notes(rows, body)))

    def _cells(
        self, row: Row, base: Row | None, known: list[tuple[str, str]], shown: Mapping[str, Measure]
    ) -> list[Cell]:
        name = Cell(row["name"], mark="bold" if row["base"] else "")
        if row["status"] != "measured":
            return [name, Cell(f"not measured: {row.get('reason') or 'no reason given'}")]
        cells, agreements = [name], []
        for slot in known:
            entry = accuracy_of(row, slot)
            cells.append(_cell(*interval(entry, "miou", "ci")))
            change = interval(entry, "delta", "delta_ci")
            cells.append(Cell(None) if row is base else _cell(*change, sign=True))
            agreements.append((entry or {}).get("agreement"))
        given = [a for a in agreements if a is not None]
        if known and row is base:
            cells.append(Cell(None))
        elif known:
            low = bool(given) and min(given) < AGREES
            cells.append(_cell(min(given, default=None), red=low))
        for key, measure in shown.items():
            value, error = measure.read(row)
            cells.append(_cell(value, error if key in MASKS else None))
            if key == "latency_ms" and base:
                ratio = speedup(row, base)
                cells.append(_cell(ratio, red=ratio is not None and ratio < SLOWER))
        return cells

    def _notes(self, rows: list[Row], body: list[list[Cell]]) -> list[str]:
        known = slots(rows)
        notes = []
        for slot in known:
            entries = (accuracy_of(row, slot) for row in rows)
            protocol = next(entry["protocol"] for entry in entries if entry)
            notes.append(f"{slot_name(slot, known)}: {protocol}")
        for part, name in (("detection", "AP"), ("everything", "everything")):
            entry = next((row[part] for row in rows if row.get(part)), None)
            notes += [f"{name}: {entry['protocol']}"] if entry else []
        if any((row.get("latency") or {}).get("vs_base") for row in rows):
            notes.append(_TURNS)
        if any(cell.mark == "red" for cells in body for cell in cells):
            notes.append(_FLAG)
        notes += [
            f"{row['name']}: first layer whose output is not finite: {row['first_nonfinite']}"
            for row in rows
            if row.get("first_nonfinite")
        ]
        notes += [f"not measured: {gap}" for gap in self.gaps(rows)]
        return notes

    def gaps(self, rows: list[Row]) -> list[str]:
        """What was not measured in rows that were, and why; equal gaps of several rows as one."""
        found: dict[str, list[str]] = {}
        for row in rows:
            for part, reason in (row.get("missing") or {}).items():
                found.setdefault(f"{part} ({reason})", []).append(row["name"])
        gaps = [f"{gap} of {', '.join(names)}" for gap, names in found.items()]
        measured = [row for row in rows if row["status"] == "measured"]
        for part in ("accuracy", "latency", "memory"):
            tried = any(row.get(part) or part in (row.get("missing") or {}) for row in measured)
            gaps += [f"{part} (not asked for)"] if measured and not tried else []
        return gaps

    def text(self) -> str:
        """The tables as fixed-width text, one for each device."""
        return "\n\n".join(self.table(device).text() for device in self.devices)

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        from .html import picture

        parts = []
        for device in self.devices:
            parts.append(self.table(device).html())
            if len(slots(self.select(device))) and self.base(device):
                with contextlib.suppress(DataError):  # nothing was timed
                    parts.append(picture(self.pareto(device=device)))
        return "".join(parts)

    def markdown(self) -> str:
        """The tables in Markdown, one for each device."""
        return "\n\n".join(self.table(device).markdown() for device in self.devices) + "\n"

    def json(self) -> str:
        """The whole document."""
        return json.dumps(self.doc, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the document as JSON; `load` reads it again.

        Raises:
            CheckpointError: if it cannot be written.
        """
        write_whole(Path(path), self.json().encode())

    def html(
        self,
        path: str | Path | None = None,
        *,
        data: Any = None,
        models: Mapping[str, nn.Module] | None = None,
        worst: int = 6,
        published: Sequence[str] = (),
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """One self-contained page: no script, nothing fetched, light or dark as the reader likes.

        Args:
            path: where to write it; not written if left out.
            data: the samples that were measured; with `models`, the worst masks are drawn.
            models: the models that were measured, under the names of the rows.
            worst: how many of the worst masks are listed and drawn.
            published: models of `sc.list_models` whose published figures are laid over the
                pictures, marked as such, and listed with their source.
            more: sections by their titles, of what shows itself in a notebook: a `Sensitivity`, a
                table, what a checker of a device found.

        Returns:
            The page.

        Raises:
            CheckpointError: if it cannot be written.
            UnknownTransformError: if a published model is unknown.
        """
        from .html import page

        text = page(
            self, data=data, models=models or {}, worst=worst, published=published, more=more
        )
        if path is not None:
            write_whole(Path(path), text.encode())
        return text

    # --- pictures ---

    def pareto(
        self,
        x: str = "latency_ms",
        y: str = "miou",
        *,
        device: str | None = None,
        published: Sequence[str] = (),
        ax: Axes | None = None,
    ) -> Figure:
        """Picture of gain against cost; see `plots.pareto`."""
        from .plots import pareto

        return pareto(self, x, y, device=device, published=published, ax=ax)

    def waterfall(
        self, name: str | None = None, *, device: str | None = None, ax: Axes | None = None
    ) -> Figure:
        """Picture of what each step earned and cost; see `plots.waterfall`."""
        from .plots import waterfall

        return waterfall(self, name, device=device, ax=ax)

    def time_split(
        self, *, prompts: int = 1, device: str | None = None, ax: Axes | None = None
    ) -> Figure:
        """Picture of where the time goes; see `plots.time_split`."""
        from .plots import time_split

        return time_split(self, prompts=prompts, device=device, ax=ax)


def _cell(
    value: float | None, error: float | None = None, *, sign: bool = False, red: bool = False
) -> Cell:
    if value is None:
        return Cell("not measured", mark="grey")
    return Cell(float(value), error, "red" if red else "", sign)
