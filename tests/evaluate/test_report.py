"""The report's table, file and page, on a document made by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import documents
import pytest

import samcompress as sc
from samcompress.core.errors import CheckpointError, ConfigError
from samcompress.evaluate.report import Report


@pytest.fixture
def report() -> Report:
    return Report(documents.document())


def test_report_as_golden_text_and_markdown(report: Report, golden) -> None:
    golden("report.txt", repr(report) + "\n")
    golden("report.md", report.markdown())
    assert max(map(len, repr(report).splitlines())) <= 100


def test_units_stand_in_the_header(report: Report) -> None:
    units = {c.name: c.unit for c in report.table().columns}
    assert units["image encoder + 1 prompt"] == "ms"
    assert units["on disk"] == "MB"
    assert units["parameters"] == "M"
    assert units["encoder work"] == "GMAC"
    assert units["speed-up"] == "x"


def test_numbers_are_values(report: Report) -> None:
    base, pruned, *_ = report.table().records()
    assert base["image encoder + 1 prompt"] == 20.0
    assert base["speed-up"] == 1.0
    assert base["change box"] is None
    assert pruned["change box"] == pytest.approx(-0.02)
    assert pruned["change box ±"] == pytest.approx(0.004)
    assert pruned["speed-up"] == pytest.approx(20 / 14)
    assert pruned["image encoder + 1 prompt"] == pytest.approx(14)
    assert report.rows[1]["latency"]["end_to_end"]["median_ms"] == 17.5  # in busier minutes


def test_speed_up_is_that_of_calls_in_turns() -> None:
    doc = documents.document()
    doc["rows"][1]["latency"]["vs_base"] = {"end_to_end": 1.25}
    assert Report(doc).table().records()[1]["speed-up"] == 1.25


def test_losses_stay_and_are_red(report: Report) -> None:
    cells = {row[0].value: row for row in report.table().cells()}
    assert {c.value for c in cells["broken"] if c.mark == "red"} == {0.55, 20 / 22}
    assert not [c for c in cells["pruned"] if c.mark == "red"]
    assert "! slower than the base" in repr(report)
    assert "broken: first layer whose output is not finite: image_encoder.neck.1" in repr(report)


def test_noise_of_equal_speed_is_not_red() -> None:
    doc = documents.document()
    doc["rows"][1]["latency"]["vs_base"] = {"end_to_end": 0.975}
    row = Report(doc).table().cells()[1]
    assert not [c for c in row if c.mark == "red"]


def test_what_was_not_measured_is_said(report: Report) -> None:
    assert re.search(r"mobile +not measured: pip install 'samcompress\[onnx\]'", repr(report))
    doc = documents.document()
    doc["rows"][1]["memory"] = None
    doc["rows"][1]["missing"] = {"memory": "the process was killed"}
    partly = Report(doc)
    assert partly.table().records()[1]["peak memory"] == "not measured"
    assert "not measured: memory (the process was killed) of pruned" in repr(partly)


def test_column_that_nobody_has_is_left_out() -> None:
    doc = documents.document()
    for row in doc["rows"]:
        row["memory"] = row["latency"] = None
    table = Report(doc).table()
    assert not {"peak memory", "encoder", "speed-up"} & {c.name for c in table.columns}
    assert "not measured: latency (not asked for)" in table.notes
    assert "not measured: memory (not asked for)" in table.notes


def test_two_devices_do_not_share_a_table() -> None:
    doc = documents.document()
    slow = documents.row("base", [], base=True, total=1, disk=4, ms=90, loss=0, device="cuda")
    doc["rows"].append(slow)
    report = Report(doc)
    with pytest.raises(ConfigError) as raised:
        report.table()
    assert str(raised.value) == (
        "rows of different device do not belong in one table.\n"
        "  where     'base on cpu' and 'base on cuda'\n"
        "  got       cpu and cuda\n"
        "  expected  one device\n"
        "  try       make one table for each"
    )
    assert report.table("cuda").records()[0]["image encoder + 1 prompt"] == 90
    assert repr(report).count("device: c") == 2
    with pytest.raises(ConfigError, match="no row was measured on this device"):
        report.table("mps")


def test_two_protocols_do_not_share_a_table() -> None:
    doc = documents.document()
    doc["rows"][1]["accuracy"][0]["protocol"] = "coco@val2017#108/box/single"
    with pytest.raises(ConfigError, match="rows of different protocol id") as raised:
        Report(doc).table()
    assert "shapes#8/box/single" in str(raised.value)
    assert "coco@val2017#108/box/single" in str(raised.value)


def test_several_choices_of_mask_get_their_own_columns() -> None:
    doc = documents.document()
    for row in doc["rows"]:
        if row["accuracy"]:
            oracle = {**row["accuracy"][0], "choice": "oracle", "protocol": "shapes#8/box/oracle"}
            row["accuracy"].append(oracle)
    names = [c.name for c in Report(doc).table().columns]
    assert {"mIoU box, single", "mIoU box, oracle", "mIoU center"} <= set(names)


def test_worst_are_those_that_lost_most(report: Report) -> None:
    worst = report.worst(5)
    assert [w.name for w in worst] == ["broken"] * 5
    assert worst[0].loss == max(w.loss for w in report.worst(1000))
    assert [w.loss for w in worst] == sorted((w.loss for w in worst), reverse=True)
    assert {w.name for w in report.worst(5, name="pruned")} == {"pruned"}
    with pytest.raises(ConfigError, match="no such model in the report"):
        report.worst(5, name="smal")


def test_saved_and_loaded_again(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json").doc == report.doc
    assert json.loads(report.json()) == report.doc


def test_what_is_no_result_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("not json")
    with pytest.raises(CheckpointError, match="this is not a result file"):
        Report.load(tmp_path / "r.json")
    with pytest.raises(CheckpointError, match="this is not a result file"):
        Report.load(tmp_path / "absent.json")
    (tmp_path / "r.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError):
        Report.load(tmp_path / "r.json")


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        fetched = ("src", "href", "xlink:href", "data", "srcset")
        self.links += [str(v) for k, v in attrs if k in fetched]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    return page


def test_page_is_one_file_that_fetches_nothing(report: Report, tmp_path: Path) -> None:
    text = report.html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == text
    page = parse(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "@import" not in text
    assert "url(http" not in text


def test_page_has_every_part(report: Report) -> None:
    text = report.html()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Results",
        "Pictures",
        "Worst masks",
        "Recipes to copy",
        "Data and licence",
        "Environment",
        "Settings",
        "What was not measured",
    ]
    assert text.count("<svg") == 5  # two prompts, one waterfall, two splits of time
    assert "<b>pruned</b>: 1.43 times as fast for one image and one prompt, 80.5 %" in text
    assert "mobile on cpu: pip install" in text
    assert "drawn by samcompress" in text
    assert "&quot;type&quot;: &quot;prune.mlp&quot;" in text
    assert "color-scheme: light dark" in text


def test_page_is_the_same_every_time(report: Report) -> None:
    assert report.html() == report.html()


def test_names_are_escaped_on_the_page() -> None:
    doc = documents.document()
    for row in doc["rows"]:
        row["name"] = f"<img src=x> {row['name']}"
    assert "<img" not in Report(doc).html()


def test_notebook_shows_table_and_picture(report: Report) -> None:
    shown = report._repr_html_()
    assert shown.count("<table") == 1
    assert shown.count("<svg") == 1
    parse(shown)


def test_report_without_base_or_accuracy_still_shows() -> None:
    doc = documents.document(rows=[documents.missing("base", "no such device")])
    doc["rows"][0]["base"] = True
    text = Report(doc).html()
    assert "There is no measured base" in text
    assert "No picture: no row was timed." in text
    assert Report(doc)._repr_html_().count("<svg") == 0


def test_page_draws_the_worst_masks_when_given_data_and_models() -> None:
    data = sc.shapes(2, seed=3)
    models = {"base": sc.build("tiny"), "small": sc.build("tiny", seed=1)}
    report = sc.evaluate.benchmark(
        models, data, latency=False, memory=False, prompts=("box", "clicks-2"), progress=False
    )
    text = report.html(data=data, models=models, worst=2)
    assert "<image" in text
    assert "Give <code>data=</code>" in report.html()
    assert report._repr_html_().count("<svg") == 0  # nothing was timed
    other = report.html(data=data, models={"small": models["small"]}, worst=2)
    assert "none of the worst objects can be drawn" in other
