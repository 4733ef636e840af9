"""Pictures: what they draw, and that they leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import documents
import numpy as np
import pytest

import samcompress as sc
from samcompress.core.errors import ConfigError, DataError
from samcompress.core.figures import png
from samcompress.core.prompt import Prompt
from samcompress.evaluate import plots
from samcompress.evaluate.measures import measure, stages
from samcompress.evaluate.report import Report
from samcompress.evaluate.worst import Case, Worst, cases, mask_grid


@pytest.fixture
def report() -> Report:
    return Report(documents.document())


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_pareto_says_what_its_axes_are(report: Report) -> None:
    ax = report.pareto().axes[0]
    assert ax.get_xlabel() == "image encoder + 1 prompt (ms)"
    assert ax.get_ylabel() == "mIoU, prompt: box"
    assert ax.get_title(loc="left") == "shapes, cpu"
    other = report.pareto("size_mb", "miou:center").axes[0]
    assert (other.get_xlabel(), other.get_ylabel()) == ("on disk (MB)", "mIoU, prompt: center")


def test_pareto_marks_base_and_dominated(report: Report) -> None:
    ax = report.pareto().axes[0]
    points = [line for line in ax.lines if line.get_marker() in ("*", "o")]
    drawn = {
        round(float(np.ravel(p.get_xdata())[0]), 3): (p.get_marker(), p.get_color()) for p in points
    }
    assert drawn == {
        20.0: ("*", plots.BLUE),
        14.0: ("o", plots.BLUE),
        15.5: ("o", plots.GREY),  # slower and worse than pruned
        22.0: ("o", plots.GREY),
    }
    assert set(texts(ax.figure)) == {"base", "pruned", "small", "broken"}


def test_pareto_draws_errors(report: Report) -> None:
    ax = report.pareto().axes[0]
    spans = [np.ptp(bar.get_segments()[0], axis=0) for bar in ax.collections]
    assert max(s[0] for s in spans) == pytest.approx(0.1 * 22)  # interquartile range of 22 ms
    assert max(s[1] for s in spans) == pytest.approx(0.04)  # 95 % interval


def test_unknown_measure_names_the_known(report: Report) -> None:
    with pytest.raises(ConfigError) as raised:
        report.pareto("latency")
    assert "expected  parameters, size_mb, gmacs" in str(raised.value)
    assert "try       latency_ms" in str(raised.value)
    with pytest.raises(ConfigError, match="no such measure"):
        report.pareto(y="miou:clicks-3")


def test_rows_of_two_devices_make_no_picture() -> None:
    doc = documents.document()
    doc["rows"][1]["device"] = "cuda"
    report = Report(doc)
    with pytest.raises(ConfigError, match="rows of different device"):
        report.pareto()
    assert len(texts(report.pareto(device="cuda"))) == 1


def test_stages_join_history_and_rows(report: Report) -> None:
    rows = report.rows
    base, prune, int8 = stages(rows[2], rows)
    assert [s.label for s in (base, prune, int8)] == [
        "base",
        "prune.mlp",
        "quantize.int8_weights",
    ]
    assert (prune.size, int8.size) == pytest.approx((0.8, 0.256))
    assert (prune.time, int8.time) == pytest.approx((0.7, 0.775))
    assert (prune.miou, int8.miou) == pytest.approx((0.78 / 0.8, 0.775 / 0.8))


def test_stage_nobody_measured_has_its_size_only(report: Report) -> None:
    rows = [row for row in report.rows if row["name"] != "pruned"]
    _, prune, int8 = stages(rows[1], rows)
    assert (prune.time, prune.miou) == (None, None)
    assert prune.size == pytest.approx(0.8)
    assert int8.time == pytest.approx(0.775)


def test_waterfall_adds_up(report: Report) -> None:
    ax = report.waterfall().axes[0]
    assert ax.get_title(loc="left") == "small"
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "prune.\nmlp",
        "quantize.\nint8_weights",
    ]
    found = dict(zip(("size", "time", "miou"), ax.containers[::2], strict=True))
    ends = {
        "size": 100 * (1 - 0.256),
        "time": 100 * (1 - 0.775),
        "miou": 100 * (0.775 / 0.8 - 1),
    }
    second = dict(zip(found, ax.containers[1::2], strict=True))
    for field, end in ends.items():
        (last,) = second[field]
        assert last.get_y() + last.get_height() == pytest.approx(end, abs=0.01)
        (first,) = found[field]
        assert first.get_y() == 0
        assert first.get_height() == pytest.approx(last.get_y(), abs=0.01)
    assert "-7.50" in texts(ax.figure)  # int8 was slower than the step before it


def test_waterfall_needs_steps(report: Report) -> None:
    with pytest.raises(DataError, match="went through no step"):
        report.waterfall("base")
    with pytest.raises(ConfigError, match="no such model"):
        report.waterfall("smal")


def test_time_split_counts_every_prompt(report: Report) -> None:
    one, many = (report.time_split(prompts=p).axes[0] for p in (1, 10))
    assert texts(one.figure)[0] == "21.3"  # 0.8 + 16 + 4 + 0.5
    assert texts(one.figure)[1] == "15.3"  # of another model as if measured beside the base
    assert texts(many.figure)[0] == "61.8"  # 0.8 + 16 + 10 * (4 + 0.5)
    labels = [t.get_text() for t in many.get_legend().get_texts()]
    assert labels == ["resize", "image encoder", "10 prompts", "masks to full size"]
    assert [t.get_text() for t in one.get_yticklabels()] == ["base", "pruned", "small", "broken"]


def test_bars(report: Report) -> None:
    ax = plots.bars(report, "memory_mb").axes[0]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([30.2, 28.2, 28.2, 30.2])  # above what imports take
    assert ax.get_xlabel() == "peak memory (MB)"
    nothing = Report(documents.document(rows=[documents.missing("base", "no device")]))
    with pytest.raises(DataError, match="no row has this measure"):
        plots.bars(nothing, "memory_mb")


def test_pictures_draw_into_given_axes(report: Report) -> None:
    figure = report.pareto()
    axes = figure.axes[0]
    before = len(axes.lines)
    assert report.pareto("size_mb", ax=axes) is figure
    assert len(axes.lines) > before
    assert figure.axes == [axes]
    for draw in (report.waterfall, report.time_split):
        assert draw(ax=axes) is figure


def case(**changes: object) -> Case:
    grid = np.indices((60, 80))
    truth = (grid[0] > 20) & (grid[0] < 50) & (grid[1] > 20) & (grid[1] < 60)
    parts = {
        "image": np.full((60, 80, 3), 100, np.uint8),
        "truth": truth,
        "base": truth,
        "small": truth & (grid[1] < 40),
        "prompt": Prompt(box=[20, 20, 60, 50]),
        "label": "small\nIoU 0.5",
    }
    return Case(**{**parts, **changes})


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(c) for c in np.unique(picture.reshape(-1, 4), axis=0)[:, :3].tolist()}


def test_mask_grid_shows_both_masks_and_their_difference() -> None:
    points = Prompt(points=[[30, 30], [70, 10]], labels=[1, 0])
    figure = mask_grid([case(), case(prompt=points)], tile=100)
    (shown,) = figure.axes[0].images
    mosaic = np.asarray(shown.get_array())
    assert mosaic.shape == (208, 316, 4)
    left, middle, right = (mosaic[:100, c : c + 100] for c in (0, 108, 216))
    blue = tuple(int(0.35 * 100 + 0.65 * v) for v in (0x00, 0x72, 0xB2))
    orange = tuple(int(0.35 * 100 + 0.65 * v) for v in (0xE6, 0x9F, 0x00))
    assert blue in colours(left)
    assert blue in colours(middle)
    assert blue not in colours(right)
    assert orange in colours(right)
    blues = [(p[..., :3] == blue).all(-1).sum() for p in (left, middle)]
    assert blues[1] < 0.6 * blues[0]  # half of the object was lost
    assert texts(figure)[-3:] == ["base", "compressed", "difference"]
    markers = [line.get_marker() for line in figure.axes[0].lines]
    assert markers.count("o") == 3
    assert markers.count("X") == 3


def test_mask_grid_at_the_border_and_without_any_mask() -> None:
    empty = np.zeros((60, 80), bool)
    corner = empty.copy()
    corner[:3, :3] = True
    cases_ = [
        case(truth=corner, base=empty, small=empty, prompt=Prompt(points=[[1, 1]])),
        case(truth=empty, base=empty, small=empty),
    ]
    figure = mask_grid(cases_, tile=64)
    assert len(png(figure)) > 1000
    with pytest.raises(DataError, match="no mask to draw"):
        mask_grid([])


def test_cases_ask_as_the_protocol_did() -> None:
    data = sc.shapes(1, seed=3)
    sample = data[0]
    models = {"base": sc.build("tiny"), "small": sc.build("tiny", seed=1)}
    protocol = "shapes#1/clicks-2/single/feedback=none/crowd=no,min_area=0/instance"
    item = Worst("small", protocol, sample.id, sample.instances[0].id, None, 0.9, 0.1)
    (found,) = cases([item], data, models, base="base")
    assert found.prompt.points.shape[0] <= 2
    assert found.truth.shape == found.base.shape == found.small.shape == sample.size
    assert "now 0.100" in found.label
    with pytest.raises(DataError, match="none of the worst objects can be drawn"):
        cases([item], data, {"base": models["base"]}, base="base")


def test_measures_read_their_rows(report: Report) -> None:
    row = report.rows[0]
    assert measure("parameters", report.rows).read(row) == (1.02, None)
    assert measure("latency_ms", report.rows).read(row) == (20.0, 1.0)
    assert measure("latency_ms", report.rows).read(report.rows[1]) == pytest.approx((14.0, 0.7))
    assert measure("miou:center", report.rows).read(row) == pytest.approx((0.7, 0.02))
    assert measure("memory_mb", report.rows).read(report.rows[4]) == (None, None)


def test_no_window_and_no_global_state() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import documents
from samcompress.evaluate.report import Report
report = Report(documents.document())
assert "matplotlib" not in sys.modules, "matplotlib was imported too early"
figure = report.pareto()
report.html()
assert figure._repr_png_()[1:4] == b"PNG"
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
