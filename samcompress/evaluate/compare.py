"""Two results beside each other: what changed, and whether it is more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.display import Cell, Column, Table
from ..core.errors import ConfigError
from .measures import milliseconds
from .records import Accuracy

if TYPE_CHECKING:
    from .report import Report

Row = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One model on one device by one protocol, in two results: second minus first.

    Attributes:
        name: the model.
        device: where it was measured.
        prompt: how objects were asked for.
        choice: which mask counted.
        first: mIoU in the first result.
        second: mIoU in the second.
        delta: second minus first, over the objects both have.
        ci: its 95 % interval, images resampled.
        n_instances: objects compared.
    """

    name: str
    device: str
    prompt: str
    choice: str
    first: float
    second: float
    delta: float
    ci: tuple[float, float]
    n_instances: int


@dataclass(frozen=True)
class Speed:
    """Time of encoder and one prompt of one model in two results, in milliseconds."""

    name: str
    device: str
    first_ms: float
    second_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster the second is."""
        return self.first_ms / self.second_ms


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints itself as a table.

    Attributes:
        differences: accuracy, joined object by object.
        speeds: times, where both results come from the same machine.
        notes: what could not be compared.
    """

    differences: tuple[Difference, ...]
    speeds: tuple[Speed, ...]
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """The table that is printed."""
        speeds = {(s.name, s.device): s for s in self.speeds}
        columns = (
            Column("name", align="left"),
            Column("device", align="left"),
            Column("prompt", align="left"),
            Column("first", group="mIoU"),
            Column("second", group="mIoU"),
            Column("change ± 95 %", group="mIoU"),
            Column("objects"),
            Column("first encoder + 1 prompt", "ms"),
            Column("second encoder + 1 prompt", "ms"),
        )
        rows = []
        keys = list(dict.fromkeys([*((d.name, d.device) for d in self.differences), *speeds]))
        for key in keys:
            speed = speeds.get(key)
            times = [speed.first_ms, speed.second_ms] if speed else [None, None]
            found = [d for d in self.differences if (d.name, d.device) == key]
            for d in found:
                half = (d.ci[1] - d.ci[0]) / 2
                label = d.prompt if d.choice == "single" else f"{d.prompt}, {d.choice}"
                change = Cell(d.delta, half, sign=True)
                rows.append([*key, label, d.first, d.second, change, d.n_instances, *times])
            if not found:
                rows.append([*key, None, None, None, None, None, *times])
        return Table(columns, rows, title="second result against first", notes=self.notes)

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def compare(first: Report | str | Path, second: Report | str | Path) -> Comparison:
    """Compare two results model by model, joined by object.

    Args:
        first: a report, or a file it was saved to.
        second: another, of the same data, with models of the same names.

    Raises:
        ConfigError: if data, devices or protocols differ, or no model is in both.
        CheckpointError: if a file is no result file.
    """
    one, two = (_report(source) for source in (first, second))
    _same_data(one.doc, two.doc)
    rows = {(r["name"], r["device"]): r for r in one.rows if r["status"] == "measured"}
    others = {(r["name"], r["device"]): r for r in two.rows if r["status"] == "measured"}
    common = [key for key in rows if key in others]
    if not common:
        raise ConfigError(
            "the two results have no model on a device in common.",
            got=f"{_list(rows)} and {_list(others)}",
            expected="at least one model of the same name, on the same device",
        )
    notes = [f"{n} on {d}: only in the first" for n, d in rows if (n, d) not in others]
    notes += [f"{n} on {d}: only in the second" for n, d in others if (n, d) not in rows]
    differences = [d for key in common for d in _differences(rows[key], others[key])]
    same_machine = _machine(one.doc) == _machine(two.doc)
    if not same_machine:
        notes.append("times are not compared: the machines differ")
    speeds = [
        Speed(*key, *(milliseconds(r, "end_to_end")[0] for r in (rows[key], others[key])))
        for key in common
        if same_machine and rows[key].get("latency") and others[key].get("latency")
    ]
    return Comparison(tuple(differences), tuple(speeds), tuple(notes))


def _differences(first: Row, second: Row) -> list[Difference]:
    entries = {a["protocol"]: a for a in first.get("accuracy") or ()}
    others = {a["protocol"]: a for a in second.get("accuracy") or ()}
    found = []
    for protocol in (protocol for protocol in entries if protocol in others):
        entry = entries[protocol]
        one, two = (Accuracy.from_dict(kept[protocol]) for kept in (entries, others))
        pair = two.against(one)
        found.append(
            Difference(
                first["name"],
                first["device"],
                entry["prompt"],
                entry["choice"],
                one.miou,
                two.miou,
                pair.delta,
                pair.ci,
                pair.n_instances,
            )
        )
    if entries and others and not found:
        raise ConfigError(
            f"{first['name']} was measured by different protocols.",
            got=f"{', '.join(entries)} and {', '.join(others)}",
            expected="one protocol in common",
        )
    return found


def _report(source: Report | str | Path) -> Report:
    from .report import Report

    return Report.load(source) if isinstance(source, (str, Path)) else source


def _same_data(first: Row, second: Row) -> None:
    data = [f"{doc['data']['name']} ({doc['data']['fingerprint'][:12]})" for doc in (first, second)]
    if first["data"]["fingerprint"] != second["data"]["fingerprint"]:
        raise ConfigError(
            "the two results are of different data.",
            got=f"{data[0]} and {data[1]}",
            expected="the same images and annotations",
            fix="run samcompress bench on the same --data",
        )


def _machine(doc: Row) -> tuple[Any, ...]:
    machine = doc["environment"]
    return machine.get("cpu"), machine.get("threads"), str(machine.get("gpus"))


def _list(rows: dict[tuple[str, str], Row]) -> str:
    return ", ".join(f"{name} on {device}" for name, device in rows) or "no measured row"
