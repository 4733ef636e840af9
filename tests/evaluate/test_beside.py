"""Presets, detection, everything and checks of files as parts of a benchmark's rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from tflite_file import write_tflite

import samcompress as sc
from samcompress.compile._facades import ExportedEncoder
from samcompress.compile.backends.litert import LiteRt
from samcompress.core.data import Dataset, Sample
from samcompress.core.errors import CheckpointError, ConfigError, DataError
from samcompress.evaluate import Boxes, Report, Rounds, benchmark, leaderboard
from samcompress.evaluate._beside import checks, generator, generator_id
from samcompress.evaluate.measures import measure
from samcompress.evaluate.schema import check

ONE = Rounds(warmup_calls=0, warmup_seconds=0, calls=1, seconds=0)
FAST: dict[str, Any] = {
    "rounds": ONE, "latency": False, "memory": False, "progress": False, "threads": 1
}  # fmt: skip
LITERT = LiteRt().unavailable("int8")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return sc.shapes(2, size=48)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"base": random_sam(), "other": random_sam(seed=3)}


@pytest.fixture(scope="module")
def boxes(data: Dataset) -> list[dict[str, Any]]:
    """The box of every object."""
    return [
        {
            "image_id": sample.id,
            "category_id": i.category,
            "bbox": [i.box[0], i.box[1], i.box[2] - i.box[0], i.box[3] - i.box[1]],
            "score": 0.9,
        }
        for sample in data
        for i in sample.instances
    ]


@pytest.fixture(scope="module")
def report(models: dict[str, Any], data: Dataset, boxes: list[dict[str, Any]]) -> Report:
    return benchmark(models, data, prompts=("box",), detections=boxes, everything=3, **FAST)


# --- presets ---


def test_rows_by_the_rules_of_papers(models: dict[str, Any], data: Dataset, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**FAST, "presets": ("edgesam-box", "sam-click"), "seed": 2}
    found = benchmark(models, data, out=tmp_path, **settings)
    ids = [a["protocol"].partition("/")[2] for a in found.rows[1]["accuracy"]]
    assert ids == [
        "box/single/feedback=none/crowd=no,min_area=0,truth=resampled/instance",
        "center/predicted/feedback=none/crowd=no,min_area=0/instance",
    ]
    assert {"mIoU box, resampled truth", "mIoU center"} < {c.name for c in found.table().columns}
    again = benchmark(models, data, out=tmp_path, **settings)
    assert [row["date"] for row in again.rows] == [row["date"] for row in found.rows]
    with pytest.raises(ConfigError, match=r"other conditions[\s\S]*settings.protocol"):
        benchmark(models, data, out=tmp_path, **{**settings, "presets": ("edgesam-box",)})
    both = benchmark(models, data, prompts=("box",), presets=("samfast",), **FAST)
    assert [a["prompt"] for a in both.rows[0]["accuracy"]] == ["box", "com, with crowds"]


def test_presets_that_are_none(models: dict[str, Any], data: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"unknown preset[\s\S]*try       edgesam-box"):
        benchmark(models, data, presets=("edgesam-boxx",), **FAST)
    with pytest.raises(ConfigError, match="presets is a list"):
        benchmark(models, data, presets="edgesam-box", **FAST)
    with pytest.raises(ConfigError, match="no prompt to ask with"):
        benchmark(models, data, prompts=(), **FAST)


# --- detection and everything ---


def test_numbers_are_those_of_the_scorers(
    report: Report, models: dict[str, Any], data: Dataset, boxes: list[dict[str, Any]]
) -> None:
    row = report.rows[1]
    asked = sc.evaluate.detections(models["other"], data, boxes)
    ap = sc.evaluate.average_precision(asked, data)
    base = report.rows[0]["detection"]
    assert {k: row["detection"][k] for k in ap.to_dict()} == ap.to_dict(base)
    assert row["detection"]["delta"] == ap.ap - base["ap"]
    assert (base["delta"], base["delta_ci"]) == (None, None)
    found = sc.evaluate.recall(
        lambda image: generator(3)(models["other"], image),
        data,
        rank="sam",
        source="everything=Grid(side=3),min_iou=0,min_stability=0,nms=0.9",
    )
    its = {k: v for k, v in row["everything"].items() if k != "seconds"}
    base = report.rows[0]["everything"]
    assert its == found.to_dict(base)
    assert its["delta"] == pytest.approx(its["ar"]["1000"] - base["ar"]["1000"])
    assert its["delta_ci"][0] <= its["delta"] <= its["delta_ci"][1]
    assert row["everything"]["seconds"] > 0
    assert its["ci"][0] <= its["ar"]["1000"] <= its["ci"][1]
    check(json.loads(report.json()))


def test_every_face_shows_them(report: Report) -> None:
    row = report.table().records()[1]
    entry = report.rows[1]["everything"]
    assert row["AP"] == report.rows[1]["detection"]["ap"]
    assert row["AR@1000"] == entry["ar"]["1000"]
    assert row["found (IoU 0.75)"] == entry["shares"]["0.75"]
    assert "AR@1000" in report.markdown()
    assert "everything: shapes@0-48x48#2/everything=Grid(side=3)" in report.text()
    page = report.html()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert "Detection: masks for a detector&#x27;s boxes" in titles
    assert "Segment everything" in titles
    assert "objects found" in page
    assert page.count(">change<") >= 2
    assert report.rows[0]["detection"]["detector"]["sha256"] in page
    assert "Prompts other than box; energy." in page
    assert "AP" in leaderboard(report).text()
    assert measure("ap", report.rows).read(report.rows[1])[0] == row["AP"]


def test_what_cannot_be_scored_says_why(models: dict[str, Any]) -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:20, 6:24] = True
    image = torch.full((32, 32, 3), 90, dtype=torch.uint8)
    bare = Dataset([Sample.from_arrays("a", image.numpy(), [mask.numpy()])], "bare")
    box = {"image_id": "a", "category_id": 1, "bbox": [6, 4, 18, 16], "score": 1.0}
    found = benchmark(models, bare, prompts=("box",), detections=[box], **FAST)
    assert found.rows[0]["detection"] is None
    reason = "not measured: detection (an object has no category. image a, annotation 0)"
    assert f"{reason} of base, other" in " ".join(found.text().split())
    assert "AP" not in {c.name for c in found.table().columns}
    assert "not measured: an object has no category" in found.html()
    check(json.loads(found.json()))


def test_mistakes_are_found_first(models: dict[str, Any], data: Dataset, tmp_path: Path) -> None:
    other = [{"image_id": "elsewhere", "category_id": 1, "bbox": [0, 0, 4, 4], "score": 1.0}]
    with pytest.raises(DataError, match="no box is of these images"):
        benchmark(models, data, detections=other, **FAST)
    with pytest.raises(DataError, match=r"boxes\.json"):
        benchmark(models, data, detections=tmp_path / "boxes.json", **FAST)
    with pytest.raises(ConfigError, match="side is out of range"):
        benchmark(models, data, everything=0, **FAST)


def test_unequal_rows_share_no_table(report: Report) -> None:
    for part, where in (("detection", "boxes="), ("everything", "everything=Grid")):
        doc = json.loads(report.json())
        doc["rows"][1][part]["protocol"] += ",other"
        with pytest.raises(ConfigError, match=rf"different protocol id[\s\S]*{where}"):
            Report(doc).table()
        with pytest.raises(ConfigError, match="different protocol id"):
            leaderboard(Report(doc))


def test_settings_are_part_of_the_conditions(
    models: dict[str, Any], data: Dataset, boxes: list[dict[str, Any]], tmp_path: Path
) -> None:
    own = sc.Everything(sampler=sc.samplers.Grid(side=2), min_iou=0, max_masks=4)
    name = "everything=Grid(side=2),min_iou=0,max_masks=4"
    assert generator_id(own) == name
    settings: dict[str, Any] = {**FAST, "prompts": ("box",), "out": tmp_path}
    base = {"base": models["base"]}
    first = benchmark(base, data, detections=Boxes.of(boxes), everything=own, **settings)
    assert first.doc["settings"]["everything"] == name
    assert first.doc["settings"]["detections"] == Boxes.of(boxes).facts()
    assert f"/{name}/" in first.rows[0]["everything"]["protocol"]
    again = benchmark(base, data, detections=boxes, everything=own, **settings)
    assert again.rows[0]["date"] == first.rows[0]["date"]
    for changed in ({"everything": 2, "detections": boxes}, {"everything": own}):
        with pytest.raises(ConfigError, match="other conditions"):
            benchmark(base, data, **settings, **changed)


# --- files for devices ---


def test_page_says_what_an_edge_tpu_would_run(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ("INT8", (1, 10), None)
    write_tflite(
        tmp_path / "image_encoder.tflite",
        {"x": row, "y": row, "z": row},
        [("RELU", ["x"], ["y"], {}), ("GELU", ["y"], ["z"], {})],
    )
    sam = random_sam()
    assert checks(sam) == []
    sam.image_encoder = ExportedEncoder("litert", ["image_encoder.tflite", "weights.bin"], 64)
    sam.image_encoder.bind(tmp_path)
    (found,) = checks(sam)
    doc = json.loads(report.json())
    assert "What an Edge TPU would run" not in Report(doc).html()
    doc["rows"][1]["checks"] = json.loads(json.dumps([found]))
    check(doc)
    page = Report(doc).html()
    assert "<h2>What an Edge TPU would run</h2>" in page
    summary = "other: image_encoder.tflite: 1 of 2 operators would run on the Edge TPU; from"
    assert f"<details><summary>{summary}" in page
    assert "not an operator of the Edge TPU" in page
    (tmp_path / "image_encoder.tflite").write_bytes(b"no such file")
    with pytest.raises(CheckpointError):
        checks(sam)


@pytest.mark.slow
@pytest.mark.skipif(LITERT is not None, reason=str(LITERT))
def test_integers_of_litert_are_a_row(trained: torch.nn.Module) -> None:
    scenes = sc.shapes(4, seed=5)
    found = benchmark(
        {"tiny": trained},
        scenes,
        prompts=("box",),
        backends=("litert:int8",),
        calibration=sc.shapes(4, seed=1),
        **FAST,
    )
    base, row = found.rows
    assert (row["status"], row["backend"]) == ("measured", "litert")
    # What runs is the file, whose masks are nearly those of the model it was made of.
    assert 0.8 < row["accuracy"][0]["agreement"] < 1
    assert abs(row["accuracy"][0]["delta"]) < 0.1 < base["accuracy"][0]["miou"]
    files = [part["file"] for part in row["checks"]]
    assert files[0] == "encoder.tflite"
    assert len(files) == 5  # a decoder of each size besides
    assert "encoder.tflite: " in found.html()
