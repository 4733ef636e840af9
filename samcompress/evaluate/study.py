"""What a sweep or a search found: an ordinary report, its front, and what was refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.budget import COUNTS, EVERYWHERE, MEASURED, Limit
from ..core.display import Cell, Column, Table, number
from ..core.errors import ConfigError
from ..core.files import write_whole
from ..core.pipeline import Pipeline
from ._chains import Refused, Row, file_name
from .measures import MEASURES, Measure, measure
from .report import Report
from .stats import hypervolume, pareto
from .worst import Worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

OBJECTIVES = ("latency_ms", "miou")


def is_gain(name: str) -> bool:
    """Whether more of a measure is better."""
    return name.partition(":")[0] in ("miou", "ap", "ar", "found")


def spent(limit: Limit, row: Row) -> float | None:
    """What a row costs of what a budget limits; None where it was not measured."""
    if limit.quantity == "macs":
        macs = row.get("macs")
        return None if not macs else float(macs["encoder"] + macs["decoder_per_prompt"])
    if limit.quantity == "parameters":
        return (row.get("params") or {}).get("total")
    found: float | None = MEASURES[limit.quantity].read(row)[0]
    return found


def excess(limit: Limit, cost: float, base: Row) -> float:
    """How far a cost lies above a budget, as a share of it; 0 or less within it.

    Raises:
        ConfigError: if the budget is a share of something that the base was not measured for.
    """
    whole = spent(limit, base) if limit.relative else 1.0
    if whole is None:
        raise ConfigError(f"the budget {limit} needs a measurement of the base, and there is none.")
    return cost / limit.bound(whole) - 1


def limits(budget: str | Sequence[str], device: str, *, memory: bool, latency: bool) -> list[Limit]:
    """The limits of a budget, all of which hold together.

    Raises:
        ConfigError: if one is none, is of another device, or of what will not be measured.
    """
    texts = [budget] if isinstance(budget, str) else list(budget)
    found = [Limit.parse(text, MEASURED) for text in texts if text.strip()]
    for limit in found:
        if limit.device not in (None, device):
            raise ConfigError(
                "the budget is for another device than the search.",
                got=f"{limit}, searched on {device}",
                fix=f'device="{limit.device}", or a budget on {device}',
            )
        measured = memory if limit.quantity == "memory_mb" else latency
        if limit.quantity not in EVERYWHERE and not measured:
            what = "memory" if limit.quantity == "memory_mb" else "latency"
            raise ConfigError(f"the budget {limit} needs what is not measured.", fix=f"{what}=True")
    return found


class Study:
    """Results of `sweep` or `search`.

    It shows itself as the table of its front; `report` has every row.

    Args:
        doc: a result document with a part ``"study"``.

    Raises:
        CheckpointError: if it is no result document.
        ConfigError: if it is one of a plain benchmark.
    """

    def __init__(self, doc: Row) -> None:
        self.report = Report(doc)
        if "study" not in doc:
            raise ConfigError(
                "this result is of a benchmark, not of a sweep or search.",
                fix="sc.evaluate.Report.load(path)",
            )
        self.facts: Row = doc["study"]

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read the ``results.json`` of a study, or that in a folder.

        Raises:
            CheckpointError: if it cannot be read.
            ConfigError: as for a `Study`.
        """
        path = Path(path)
        return cls(Report.load(path / "results.json" if path.is_dir() else path).doc)

    # --- reading ---

    @property
    def rows(self) -> list[Row]:
        """The base and every chain that was measured."""
        return self.report.rows

    @property
    def base(self) -> Row:
        """The row of the model that the chains began with."""
        return next(row for row in self.rows if row["base"])

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Chains that gave no row, or one that is not in the running, and why."""
        return tuple(Refused(**{**r, "steps": tuple(r["steps"])}) for r in self.facts["refused"])

    @property
    def objectives(self) -> tuple[Measure, ...]:
        """What was to be little, or, for accuracies, much."""
        return tuple(measure(name, self.rows) for name in self.facts["objectives"])

    @property
    def front(self) -> list[Row]:
        """Rows within the budget that no other one beats, the cheapest first."""
        rows = self._running()
        names, found = self.facts["objectives"], self.objectives
        values = [[m.read(row)[0] for m in found] for row in rows]
        costs = [[v for n, v in zip(names, vs, strict=True) if not is_gain(n)] for vs in values]
        gains = [[v for n, v in zip(names, vs, strict=True) if is_gain(n)] for vs in values]
        if not rows:
            return []
        best = pareto(costs, gains)
        kept = [row for row, on in zip(rows, best, strict=True) if on]
        return sorted(kept, key=lambda row: float(found[0].read(row)[0]))

    @property
    def hypervolume(self) -> float | None:
        """Area that the front wins over what costs as much as the base and gains nothing.

        Of one cost and one gain; None for other objectives.
        """
        names = self.facts["objectives"]
        costs = [m for n, m in zip(names, self.objectives, strict=True) if not is_gain(n)]
        gains = [m for n, m in zip(names, self.objectives, strict=True) if is_gain(n)]
        if len(costs) != 1 or len(gains) != 1:
            return None
        points = [(costs[0].read(row)[0], gains[0].read(row)[0]) for row in self._running()]
        reference = (costs[0].read(self.base)[0], 0.0)
        return hypervolume([p[0] for p in points], [p[1] for p in points], reference=reference)

    def worst(self, n: int = 6) -> list[Worst]:
        """The objects on which chains of the front lost most; see `Report.worst`."""
        rows = {row["name"]: row for row in [self.base, *self.front]}
        return Report({**self.report.doc, "rows": list(rows.values())}).worst(n)

    def recipe(self, name: str) -> Pipeline:
        """The chain of a row.

        Raises:
            ConfigError: if there is no such chain.
        """
        chains = {row["name"]: row["recipe"] for row in self.rows if row.get("recipe")}
        if name not in chains:
            raise ConfigError("there is no such chain.", got=name, expected=", ".join(chains))
        # Rows tell the whole history, whose order nobody checks; a chain has its own.
        steps = Pipeline.from_dict(chains[name]).steps[self.facts["steps_before"] :]
        phases = [step.phase for step in steps]
        return Pipeline(steps, any_order=phases != sorted(phases))

    def _running(self) -> list[Row]:
        """Rows within the budget that have all objectives."""
        out = {r.name for r in self.refused}
        found = self.objectives
        return [
            row
            for row in self.rows
            if row["name"] not in out
            and row["status"] == "measured"
            and all(m.read(row)[0] is not None for m in found)
            and all(self._within(limit, row) for limit in self.limits)
        ]

    @property
    def limits(self) -> list[Limit]:
        """The budget."""
        return [Limit.parse(text, MEASURED) for text in self.facts["budget"]]

    def _within(self, limit: Limit, row: Row) -> bool:
        cost = spent(limit, row)
        return cost is not None and excess(limit, cost, self.base) <= 0

    # --- faces ---

    def table(self) -> Table:
        """The front, the cheapest first."""
        names, found = self.facts["objectives"], self.objectives
        columns = [Column("chain on the front", align="left")]
        columns += [Column(m.label, m.unit) for m in found]
        more = [k for k in ("latency_ms", "parameters", "size_mb") if k not in names]
        columns += [Column(MEASURES[k].label, MEASURES[k].unit) for k in more]
        rows = []
        for row in self.front:
            name = Cell(row["name"], mark="bold" if row["base"] else "")
            cells = [Cell(*m.read(row)) if is_gain(n) else Cell(m.read(row)[0])
                     for n, m in zip(names, found, strict=True)]  # fmt: skip
            rows.append([name, *cells, *(MEASURES[k].read(row)[0] for k in more)])
        return Table(columns=tuple(columns), rows=rows, title=self.title, notes=tuple(self.notes()))

    @property
    def title(self) -> str:
        """What was studied, in a line."""
        measured = sum(row["status"] == "measured" and not row["base"] for row in self.rows)
        return f"{self.facts['kind']}: {measured} chains measured, {len(self.front)} on the front"

    def notes(self) -> list[str]:
        """What else is to be known: budget, hypervolume, what was refused."""
        found = []
        if self.facts["budget"]:
            found.append(f"budget: {', '.join(self.facts['budget'])}")
        area = self.hypervolume
        if area is not None:
            cost = next(m for n, m in zip(self.facts["objectives"], self.objectives, strict=True)
                        if not is_gain(n))  # fmt: skip
            most = number(float(cost.read(self.base)[0]))
            found.append(
                f"hypervolume {number(area)} {cost.unit}, reference: {cost.label} {most} (the "
                "base's), mIoU 0"
            )
        outcomes = [item.outcome for item in self.refused]
        counts = {what: outcomes.count(what) for what in dict.fromkeys(outcomes)}
        if counts:
            parts = ", ".join(f"{n} {what}" for what, n in counts.items())
            found.append(f"chains not in the running: {parts}")
        if self.facts.get("elsewhere"):
            found.append(f"chains measured elsewhere, not shown: {self.facts['elsewhere']}")
        return found

    def refusals(self) -> Table:
        """Chains that are not in the running, and why."""
        columns = (
            Column("chain", align="left"),
            Column("outcome", align="left"),
            Column("reason", align="left"),
        )
        rows = [(r.name, r.outcome, r.reason) for r in self.refused]
        return Table(columns, rows, title="not in the running")

    def text(self) -> str:
        """The tables as fixed-width text."""
        tables = [self.table(), *([self.refusals()] if self.refused else [])]
        return "\n\n".join(table.text() for table in tables)

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        from .html import picture

        return self.table().html() + picture(self.pareto())

    def pareto(self, *, ax: Axes | None = None, published: Sequence[str] = ()) -> Figure:
        """Picture of the front; see `plots.pareto`."""
        from .plots import pareto as draw

        names = self.facts["objectives"]
        x = next((n for n in names if not is_gain(n)), OBJECTIVES[0])
        y = next((n for n in names if is_gain(n)), OBJECTIVES[1])
        return draw(self.report, x, y, ax=ax, published=published)

    def html(
        self,
        path: str | Path | None = None,
        *,
        data: Any = None,
        models: Mapping[str, nn.Module] | None = None,
        published: Sequence[str] = (),
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """One self-contained page; see `Report.html`."""
        return self.report.html(path, data=data, models=models, published=published, more=more)

    def save(self, folder: str | Path) -> None:
        """Write ``results.json``, ``front.png`` and a recipe for every chain.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        from ..core.figures import png

        folder = Path(folder)
        self.report.save(folder / "results.json")
        front = {row["name"] for row in self.front}
        for row in self.rows:
            if row["base"] or not row.get("recipe"):
                continue
            place = folder / "recipes" / f"{file_name(row['name'], row['identity'])}.json"
            chain = self.recipe(row["name"])
            text = _described(chain, self.facts, on_front=row["name"] in front)
            write_whole(place, text.encode())
        if self.front:
            write_whole(folder / "front.png", png(self.pareto()))


def _described(chain: Pipeline, facts: Row, *, on_front: bool) -> str:
    """A recipe that says where it comes from and what it needs."""
    data = facts["calibration"]
    needs = f"; calibrated on {data['n_images']} images of {data['name']}" if data else ""
    place = "on the front of" if on_front else "tried by"
    found = chain.to_dict()
    steps = found.pop("steps")
    described = {**found, "description": f"{place} a {facts['kind']}{needs}.", "steps": steps}
    return json.dumps(described, indent=2) + "\n"


def static(limit: Limit) -> bool:
    """Whether a budget can be judged before anything is measured."""
    return limit.quantity in COUNTS


def finite(values: Sequence[float | None]) -> bool:
    """Whether all objectives were measured."""
    return all(value is not None and math.isfinite(value) for value in values)
