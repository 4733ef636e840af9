"""Pages and pictures of studies, of many models, and of published figures beside measured ones."""

from __future__ import annotations

from typing import Any

import documents
import numpy as np
import pytest

import samcompress as sc
from samcompress.core import errors
from samcompress.core.display import Column, Table
from samcompress.evaluate import plots
from samcompress.evaluate.html import chosen
from samcompress.evaluate.published import MARK, overlays
from samcompress.evaluate.report import Report
from samcompress.evaluate.study import Study


def crowd(count: int = 20) -> dict[str, Any]:
    """A base and models that get slower and worse, but for every fourth."""
    rows = [documents.row("base", [], base=True, total=1.0, disk=4.0, ms=20.0, loss=0.0)]
    for k in range(count):
        good = k % 4 == 0
        rows.append(
            documents.row(
                f"image_size {k} + mlp 0.{k} + int8_weights",
                [documents.PRUNE, documents.INT8],
                total=1.0,
                disk=4.0 - k / 10,
                ms=18.0 - k / 2 if good else 19.0,
                loss=0.01 * k if good else 0.3,
            )
        )
    return documents.document(rows=rows)


def study(**changes: Any) -> dict[str, Any]:
    doc = crowd()
    refused = [
        {"name": "mlp <0.9>", "steps": [], "outcome": "refused", "reason": "too <b>much</b>"}
    ]
    doc["study"] = {
        "kind": "search",
        "objectives": ["latency_ms", "miou"],
        "budget": ["latency_ms<=15 on cpu"],
        "calibration": None,
        "steps_before": 0,
        "refused": refused,
        "space": {"format": 1, "slots": [], "left_out": {"distill.encoder": "it trains"}},
        **changes,
    }
    return doc


def test_front_keeps_the_budget_and_begins_with_the_cheapest() -> None:
    found = Study(study())
    times = [row["latency"]["end_to_end"]["median_ms"] / 1.25 for row in found.front]
    assert times == sorted(times)
    assert max(times) <= 15
    assert "base" not in [row["name"] for row in found.front]
    assert found.title == "search: 20 chains measured, 3 on the front"
    area = sum(
        (20 - t) * (g - low)
        for t, g, low in zip(
            times,
            [r["accuracy"][0]["miou"] for r in found.front],
            [0.0, *[r["accuracy"][0]["miou"] for r in found.front][:-1]],
            strict=True,
        )
    )
    assert found.hypervolume == pytest.approx(area)
    assert "hypervolume" in found.text()


def test_worst_are_those_of_the_front() -> None:
    found = Study(study())
    assert {w.name for w in found.worst()} <= {row["name"] for row in found.front}


def test_page_of_a_study_shows_front_refusals_and_space() -> None:
    page = Study(study()).html()
    assert "<h2>Study</h2>" in page
    assert "1 chains are not in the running" in page
    assert "too &lt;b&gt;much&lt;/b&gt;" in page
    assert "1 techniques were not tried" in page
    assert "<script" not in page
    assert "There are too many models to draw each" in page


def test_more_sections_stand_in_the_page() -> None:
    table = Table((Column("operator", align="left"),), [("GELU <x>",)])
    page = Report(documents.document()).html(more={"Edge TPU": table})
    assert "<h2>Edge TPU</h2>" in page
    assert "GELU &lt;x&gt;" in page


def test_many_models_are_numbered_along_the_frontier() -> None:
    report = Report(crowd())
    ax = report.pareto().axes[0]
    drawn = {text.get_text() for text in ax.texts}
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert drawn == {"base", *(str(k) for k in range(1, len(named) + 1))}
    assert named[0] == "image_size 16 + mlp 0.16 + int8_weights"  # the fastest
    times = [int(name.split()[1]) for name in named]
    assert times == sorted(times, reverse=True)


def test_of_many_models_only_the_unbeaten_are_drawn_one_by_one() -> None:
    few = chosen(Report(crowd()))
    assert [r["name"].split()[1] for r in few.rows if not r["base"]] == ["0", "4", "8", "12", "16"]
    assert chosen(Report(documents.document())).rows == documents.document()["rows"]


def test_published_figures_are_marked_and_sourced() -> None:
    ax = Report(documents.document()).pareto(published=("mobile_sam",)).axes[0]
    hollow = [line for line in ax.lines if line.get_marker() == "D"]
    assert [(p.get_xdata()[0], p.get_ydata()[0], p.get_markerfacecolor()) for p in hollow] == [
        (424, 0.744, "none")
    ]
    (label,) = (text.get_text() for text in ax.get_legend().get_texts())
    assert label == f"MobileSAM: {MARK}"
    page = Report(documents.document()).html(published=("mobile_sam",))
    assert "Figures published, not measured here" in page
    assert "arXiv 2312.06660" in page
    assert MARK not in Report(documents.document()).html()


def test_a_gain_without_a_cost_is_a_line_and_nothing_is_nothing() -> None:
    ax = Report(documents.document()).pareto(published=("nano_sam", "mobile_sam_v2")).axes[0]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [float(np.ravel(line.get_ydata())[0]) for line in dashed] == [0.706]
    assert dashed[0].get_color() == plots.PINK
    (nothing,) = overlays(("mobile_sam_v2",), "latency_ms", "miou:box")
    assert (nothing.x, nothing.y) == (None, None)


def test_sizes_are_facts_of_the_model() -> None:
    (found,) = overlays(("mobile_sam",), "parameters", "miou:point")
    assert found.x == pytest.approx(sc.model_info("mobile_sam").parameters / 1e6)
    assert found.y == 0.509


def test_unknown_models_are_no_overlay() -> None:
    with pytest.raises(errors.UnknownTransformError):
        overlays(("mobile_sma",), "latency_ms", "miou:box")
    with pytest.raises(errors.ConfigError, match="published is a list"):
        overlays("mobile_sam", "latency_ms", "miou:box")
