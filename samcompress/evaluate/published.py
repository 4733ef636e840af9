"""Published figures of other models, to be laid over what was measured here, and marked as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.display import Column, Table
from ..core.errors import ConfigError
from ..core.zoo import Figure, find

METRICS = {"latency_ms": "latency, ms", "encoder_ms": "encoder, ms"}
PROMPTS = {"box": "mIoU, box", "point": "mIoU, point", "center": "mIoU, point"}
MARK = "published, not measured here"


@dataclass(frozen=True)
class Overlay:
    """A published model beside two measures of a report.

    Attributes:
        name: as `sc.load` knows it.
        title: as people do.
        x: its cost; None where none is published.
        y: its gain; None likewise.
        settings: how either was measured, and where it stands.
    """

    name: str
    title: str
    x: float | None
    y: float | None
    settings: tuple[str, ...]


def overlays(names: Sequence[str], x: str, y: str) -> list[Overlay]:
    """What is published of models, in the measures of a picture.

    Sizes and work are facts of a model. Times and accuracies were measured by others, on other
    machines, data and prompts: they stand beside ours for orientation, never in one table.

    Args:
        names: of `sc.list_models`.
        x: a cost, as in `plots.pareto`.
        y: ``"miou:box"``, or another prompt.

    Raises:
        ConfigError: if names is no list.
        UnknownTransformError: if there is no such model.
    """
    if isinstance(names, str):
        raise ConfigError("published is a list.", got=repr(names), expected='("mobile_sam",)')
    found = []
    for name in names:
        entry = find(name)
        cost: tuple[float | None, str] = (None, "")
        if x in METRICS:
            cost = _figure(entry.figures, METRICS[x])
        elif x == "parameters":
            cost = entry.parameters / 1e6, f"parameters: {entry.paper}"
        elif x == "gmacs":
            cost = float(entry.macs), f"work of the encoder at {entry.input_size} px: {entry.paper}"
        gain = _figure(entry.figures, PROMPTS.get(y.partition(":")[2], ""))
        settings = tuple(text for _, text in (cost, gain) if text)
        found.append(Overlay(name, entry.title, cost[0], gain[0], settings))
    return found


def table(found: Sequence[Overlay], x: str, y: str) -> Table:
    """The published figures, with how and where."""
    columns = (
        Column("model", align="left"),
        Column(x),
        Column(y),
        Column("how it was measured, and source", align="left"),
    )
    rows = [
        (o.title, o.x, o.y, "; ".join(o.settings) or "nothing is published of either")
        for o in found
    ]
    notes = ("Other machines, other images, other prompts: for orientation only.",)
    return Table(columns, rows, title=f"Figures {MARK}", notes=notes)


def _figure(figures: Sequence[Figure], metric: str) -> tuple[float | None, str]:
    first = next((f for f in figures if f.metric == metric), None)
    if first is None:
        return None, ""
    return first.value, f"{metric}: {first.setting} ({first.source})"
