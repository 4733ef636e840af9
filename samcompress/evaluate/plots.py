"""Pictures of a report: each function returns a figure, draws into `ax` if given, shows nothing.

Colours are those of Okabe and Ito, which people who see fewer colours can tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.display import number
from ..core.errors import ConfigError, DataError
from ..core.figures import axes, plain
from .measures import Row, measure, milliseconds, slots, stages
from .published import MARK, overlays
from .stats import pareto as frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report

BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
GREY = "#8c8c8c"
CROWD, LONG = 14, 26  # models, and letters of a name, from which names no longer fit beside points


def pareto(
    report: Report,
    x: str = "latency_ms",
    y: str = "miou",
    *,
    device: str | None = None,
    published: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure:
    """Gain against cost: which model shall I take?

    The base is a star; what another model beats in both is grey; bars are half the interquartile
    range of times and the 95 % interval of accuracies. Of many models, or such with long names,
    those on the frontier are numbered and named below.

    Args:
        report: the results.
        x: the cost: ``"latency_ms"``, ``"encoder_ms"``, ``"prompt_ms"``, ``"memory_mb"``,
            ``"size_mb"``, ``"parameters"`` or ``"gmacs"``.
        y: the gain: ``"miou"``, one prompt's, such as ``"miou:box"``, ``"ap"`` or ``"ar"``.
        device: as in `Report.select`.
        published: models of `sc.list_models` whose published figures are laid over it, hollow; a
            dashed line where only the gain is published.
        ax: axes to draw into.

    Raises:
        ConfigError: as `Report.select`, or if there is no such measure.
        DataError: if no row has both.
        UnknownTransformError: if a published model is unknown.
    """
    rows = report.select(device)
    cost, gain = measure(x, rows), measure(y, rows)
    rows = [r for r in rows if None not in (cost.read(r)[0], gain.read(r)[0])]
    if not rows:
        raise DataError("no row has both measures.", got=f"{cost.axis}, {gain.axis}")
    costs, gains = ([m.read(r)[0] for r in rows] for m in (cost, gain))
    # What is beyond the budget of a search is drawn, and beats nothing.
    inside = np.array([not row.get("beyond_budget") for row in rows])
    best = np.zeros(len(rows), dtype=bool)
    best[inside] = frontier(np.array(costs)[inside], np.array(gains)[inside])
    crowded = len(rows) > CROWD or any(len(r["name"]) > LONG for r in rows if not r["base"])
    figure, ax = axes(ax, (7.2, 4.2 + 0.2 * crowded * (best.sum() + 1)))
    order = sorted(np.flatnonzero(best), key=lambda i: costs[i])
    ax.plot(
        [costs[i] for i in order],
        [gains[i] for i in order],
        color=GREY,
        linewidth=1,
        drawstyle="steps-post",
        zorder=1,
    )
    for i, row in enumerate(rows):
        colour = BLUE if best[i] else GREY
        # Of many the bars of beaten ones would hide the others.
        bars = best[i] or row["base"] or not crowded
        ax.errorbar(
            costs[i],
            gains[i],
            xerr=cost.read(row)[1] if bars else None,
            yerr=gain.read(row)[1] if bars else None,
            fmt="*" if row["base"] else "o",
            markersize=15 if row["base"] else 4 if crowded and not best[i] else 7,
            color=colour,
            ecolor=colour,
            elinewidth=1,
            capsize=2,
        )
    prompt = y.partition(":")[2] or (slots(rows)[0][0] if y == "miou" else y)
    _overlay(ax, published, x, f"miou:{prompt}")
    ax.set_xlabel(cost.axis)
    ax.set_ylabel(gain.axis)
    ax.set_title(f"{report.doc['data']['name']}, {rows[0]['device']}", loc="left")
    ax.margins(x=0.15, y=0.15)
    ax.set_xlim(left=max(0.0, ax.get_xlim()[0]))
    plain(ax)
    named = rows
    if crowded:
        named = _numbered(ax, rows, order)
    elif published:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), fontsize=8)
    figure.draw_without_rendering()  # lays the axes out, so that places on the page are known
    _labels(ax, named, costs, gains, best)
    return figure


def _numbered(ax: Axes, rows: list[Row], order: list[Any]) -> list[Row]:
    """Numbers as names along the frontier, and what they stand for below; no name for the rest."""
    from matplotlib.lines import Line2D

    numbers = {i: str(k) for k, i in enumerate(order, 1) if not rows[i]["base"]}
    lines = [
        Line2D([], [], linestyle="", marker=f"${n}$", markersize=4 + 3 * len(n), color=BLUE)
        for n in numbers.values()
    ]
    more, texts = ax.get_legend_handles_labels()
    ax.legend(
        [*lines, *more],
        [*(_wrapped(rows[i]["name"], 84) for i in numbers), *texts],
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(0, -0.13),
        fontsize=8,
    )
    return [
        row if row["base"] else {**row, "name": numbers.get(i, "")} for i, row in enumerate(rows)
    ]


def _overlay(ax: Axes, names: Sequence[str], x: str, y: str) -> None:
    """Published figures, which nobody can take for ours."""
    for found in overlays(names, x, y):
        label = f"{found.title}: {MARK}"
        if found.y is not None and found.x is None:
            ax.axhline(found.y, color=PINK, linestyle="--", linewidth=1, label=label)
            ax.annotate(
                found.title,
                (0, found.y),
                (4, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=8,
                color=PINK,
            )
        elif found.x is not None and found.y is not None:
            ax.plot(found.x, found.y, "D", mfc="none", color=PINK, markersize=7, label=label)
            ax.annotate(
                found.title,
                (found.x, found.y),
                (6, -12),
                textcoords="offset points",
                fontsize=8,
                color=PINK,
            )


def waterfall(
    report: Report,
    name: str | None = None,
    *,
    device: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """What each step of one model earned (above) and cost (below), added up from left to right.

    Size comes from what every step noted. Time and accuracy of a step need a row that is the model
    at that stage; where there is none, they are part of the next bar.

    Args:
        report: the results.
        name: the model; the one with most steps if left out.
        device: as in `Report.select`.
        ax: axes to draw into.

    Raises:
        ConfigError: as `Report.select`, or if there is no such model.
        DataError: if the model went through no step.
    """
    rows = report.select(device)
    named = [r for r in rows if name in (None, r["name"])]
    if not named:
        known = ", ".join(r["name"] for r in rows)
        raise ConfigError("there is no such model in the report.", got=name, expected=known)
    row = max(named, key=lambda r: len(r["lineage"]))
    found = stages(row, rows)
    if len(found) < 2:
        raise DataError("the model went through no step.", got=row["name"])
    figure, ax = axes(ax, (7.2, 3.8))
    series = (("size", -1, SKY), ("time", -1, BLUE), ("miou", 1, ORANGE))
    legend = {"size": "bytes saved", "time": "time saved", "miou": "mIoU change"}
    for shift, (field, sense, colour) in zip((-0.27, 0.0, 0.27), series, strict=True):
        level = 0.0
        label: str | None = legend[field]
        for k, stage in enumerate(found[1:]):
            share = getattr(stage, field)
            if share is None:
                continue
            now = 100 * sense * (share - 1)
            ax.bar(k + shift, now - level, 0.25, bottom=level, color=colour, label=label)
            text = f"{number(now - level, sign=True)}"
            up = now >= level
            ax.annotate(
                text,
                (k + shift, now),
                (0, 3 if up else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=8,
            )
            level, label = now, None
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(found) - 1), [s.label.replace(".", ".\n") for s in found[1:]])
    ax.set_ylabel("% of the base, added up")
    ax.set_title(_wrapped(row["name"], 64), loc="left")
    ax.use_sticky_edges = False
    ax.margins(y=0.15)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    plain(ax)
    return figure


def time_split(
    report: Report, *, prompts: int = 1, device: str | None = None, ax: Axes | None = None
) -> Figure:
    """Where the time of one image goes, so that "faster" is never the encoder alone.

    Args:
        report: the results.
        prompts: prompts on the image; each costs a run of the decoder and one postprocessing.
        device: as in `Report.select`.
        ax: axes to draw into.

    Raises:
        ConfigError: as `Report.select`.
        DataError: if no row was timed.
    """
    rows = [r for r in report.select(device) if r.get("latency")]
    if not rows:
        raise DataError("no row was timed.", fix="run the benchmark with latency")
    figure, ax = axes(ax, (7.2, 1.3 + 0.42 * len(rows)))
    each = "prompt" if prompts == 1 else f"{prompts} prompts"
    parts = (
        ("preprocess", "resize", 1, PINK),
        ("encoder", "image encoder", 1, BLUE),
        ("prompt", each, prompts, ORANGE),
        ("postprocess", "masks to full size", prompts, GREEN),
    )
    places = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for key, label, times, colour in parts:
        width = times * np.array([milliseconds(r, key)[0] for r in rows])
        ax.barh(places, width, 0.6, left=left, label=label, color=colour)
        left += width
    for place, total in zip(places, left, strict=True):
        ax.annotate(
            number(float(total)), (total, place), (4, 0), textcoords="offset points", va="center"
        )
    ax.set_yticks(places, [_wrapped(r["name"]) for r in rows])
    ax.set_xlabel("ms an image")
    ax.margins(x=0.1)
    # To the left there is room beside long names.
    ax.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    plain(ax)
    return figure


def bars(
    report: Report, x: str = "size_mb", *, device: str | None = None, ax: Axes | None = None
) -> Figure:
    """One measure of every model, with its error.

    Args:
        report: the results.
        x: the measure, as in `pareto`; accuracies too.
        device: as in `Report.select`.
        ax: axes to draw into.

    Raises:
        ConfigError: as `Report.select`, or if there is no such measure.
        DataError: if no row has it.
    """
    rows = report.select(device)
    shown = measure(x, rows)
    rows = [r for r in rows if shown.read(r)[0] is not None]
    if not rows:
        raise DataError("no row has this measure.", got=shown.axis)
    figure, ax = axes(ax, (7.2, 1.0 + 0.42 * len(rows)))
    places = np.arange(len(rows))[::-1]
    values = [shown.read(r) for r in rows]
    errors = [error or 0.0 for _, error in values]
    colours = [GREY if r["base"] else BLUE for r in rows]
    ax.barh(places, [v for v, _ in values], 0.6, color=colours)
    if any(errors):
        ax.errorbar([v for v, _ in values], places, xerr=errors, fmt="none", ecolor="black")
    ax.set_yticks(places, [_wrapped(r["name"]) for r in rows])
    ax.set_xlabel(shown.axis)
    plain(ax)
    return figure


def _wrapped(name: str, width: int = LONG + 4) -> str:
    return "\n".join(textwrap.wrap(name, width)[:3])


def _labels(
    ax: Axes, rows: list[Row], costs: list[Any], gains: list[Any], best: np.ndarray
) -> None:
    """Names beside the points, each where it covers no other name."""
    taken: list[np.ndarray] = []
    for i in np.argsort(costs):
        if not rows[i]["name"]:
            continue
        name = rows[i]["name"] + (
            " (base)" if rows[i]["base"] and rows[i]["name"] != "base" else ""
        )
        x, y = ax.transData.transform((costs[i], gains[i])) * 72 / ax.figure.dpi
        size = np.array([5.6 * len(name), 11.0])  # about what these letters take
        shifts = [(side, up) for up in (8, -19, 21, -32, 34, -45, 47) for side in (7, -7 - size[0])]
        boxes = [
            np.array([x + dx, y + dy, x + dx + size[0], y + dy + size[1]]) for dx, dy in shifts
        ]
        free = [k for k, box in enumerate(boxes) if not any(_cover(box, other) for other in taken)]
        k = free[0] if free else 0
        taken.append(boxes[k])
        ax.annotate(
            name,
            (costs[i], gains[i]),
            shifts[k],
            textcoords="offset points",
            color="black" if best[i] else GREY,
            fontsize=9,
        )


def _cover(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[:2] < other[2:]).all() and (other[:2] < one[2:]).all())
