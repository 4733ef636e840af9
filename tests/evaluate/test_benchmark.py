"""Rows, gaps, resuming, refusing: on small models with real measurements."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.core.errors import BackendError, CheckpointError, ConfigError, DataError
from samcompress.evaluate import Report, Rounds, benchmark, compare
from samcompress.evaluate.finite import first_nonfinite
from samcompress.evaluate.measures import milliseconds
from samcompress.evaluate.schema import check

ROW = importlib.import_module("samcompress.evaluate.row")
FEW = Rounds(warmup_calls=1, warmup_seconds=0, calls=3, seconds=0, max_seconds=20)
FAST: dict[str, Any] = {"rounds": FEW, "memory": False, "progress": False, "threads": 1}


@pytest.fixture(scope="module")
def data() -> Any:
    return sc.shapes(3, size=48)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    other = random_sam()
    with torch.no_grad():
        other.mask_decoder.mask_tokens.weight.mul_(0.9)
    return {"base": random_sam(), "other": other}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the rows that are really measured, in order."""
    names: list[str] = []
    real = ROW.measure_row

    def counted(row: dict[str, Any], *rest: Any) -> None:
        names.append(row["name"])
        real(row, *rest)

    monkeypatch.setattr(
        importlib.import_module("samcompress.evaluate._places"), "measure_row", counted
    )
    return names


def test_everything_of_a_row(models: dict[str, nn.Module], data: Any, tmp_path: Path) -> None:
    settings = {**FAST, "memory": True, "batches": (1, 2)}
    report = benchmark(models, data, out=tmp_path, **settings)
    check(json.loads((tmp_path / "results.json").read_text()))
    base, other = report.rows
    assert [r["status"] for r in report.rows] == ["measured"] * 2
    assert (base["base"], other["base"]) == (True, False)
    assert not base["missing"]
    assert base["params"]["total"] == sum(p.numel() for p in models["base"].parameters())
    assert base["macs"]["encoder"] > base["macs"]["encoder_no_attention"] > 0
    assert base["bytes_on_disk"] > 4 * base["params"]["total"]
    assert base["memory"]["peak_mb"] >= base["memory"]["loaded_mb"] > 0
    assert other["latency"]["vs_base"].keys() == {
        "preprocess", "encoder", "prompt", "postprocess", "end_to_end"
    }  # fmt: skip
    for part, ratio in other["latency"]["vs_base"].items():
        assert milliseconds(base, part)[0] == base["latency"][part]["median_ms"]
        assert milliseconds(base, part)[0] / milliseconds(other, part)[0] == pytest.approx(ratio)
    assert set(base["latency"]["throughput"]["images_per_s"]) == {"1", "2"}
    assert other["weights_sha256"] != base["weights_sha256"]
    assert [a["prompt"] for a in base["accuracy"]] == ["box", "center"]
    for mine, its in zip(other["accuracy"], base["accuracy"], strict=True):
        assert its["delta"] is None
        assert mine["delta"] == pytest.approx(mine["miou"] - its["miou"])
        assert 0 < mine["agreement"] < 1
        assert "mask" not in mine["samples"][0]
        direct = sc.evaluate.accuracy(models["other"], data, mine["prompt"])
        assert mine["miou"] == direct.miou
    assert report.doc["data"]["fingerprint"] == data.fingerprint
    assert report.doc["data"]["n_instances"] == sum(len(s.instances) for s in data)


def test_a_model_beside_itself(data: Any) -> None:
    sam = random_sam()
    settings = {**FAST, "latency": False}
    twin = benchmark({"a": sam, "b": copy.deepcopy(sam)}, data, **settings).rows[1]
    for entry in twin["accuracy"]:
        assert (entry["delta"], entry["delta_ci"], entry["agreement"]) == (0, [0, 0], 1)


def test_interrupted_run_goes_on(
    models: dict[str, nn.Module],
    data: Any,
    tmp_path: Path,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "r.json"
    three = {**models, "third": random_sam(depth=1, global_attn_indexes=(0,))}
    real = ROW.accuracies

    def interrupted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model is three["other"]:
            raise KeyboardInterrupt
        return real(model, *args, **kwargs)

    monkeypatch.setattr(ROW, "accuracies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(three, data, out=out, **FAST)
    first = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in first] == ["base"]
    assert list(tmp_path.iterdir()) == [out]

    monkeypatch.setattr(ROW, "accuracies", real)
    report = benchmark(three, data, out=out, **FAST)
    assert measured == ["base", "other", "other", "third"]
    assert report.rows[0] == first[0]
    assert 0 < report.rows[1]["accuracy"][0]["agreement"] < 1

    again = benchmark(three, data, out=out, **FAST)
    assert len(measured) == 4
    assert again.rows == report.rows


def test_only_changed_models_are_measured_again(
    models: dict[str, nn.Module], data: Any, tmp_path: Path, measured: list[str]
) -> None:
    settings = {**FAST, "latency": False, "out": tmp_path / "r.json"}
    benchmark(models, data, **settings)
    changed = copy.deepcopy(models["other"])
    with torch.no_grad():
        changed.image_encoder.pos_embed.add_(0.1)
    benchmark({**models, "other": changed}, data, **settings)
    assert measured == ["base", "other", "other"]
    # Another base: what is told about the others changes too.
    benchmark({"base": changed, "other": changed}, data, **settings)
    assert measured[3:] == ["base", "other"]
    benchmark({"base": changed, "other": changed}, data, resume=False, **settings)
    assert measured[5:] == ["base", "other"]


def test_other_conditions_are_refused(
    models: dict[str, nn.Module], data: Any, tmp_path: Path
) -> None:
    settings = {**FAST, "latency": False, "out": tmp_path / "r.json"}
    benchmark(models, data, **settings)
    kept = (tmp_path / "r.json").read_bytes()
    for change in (
        {"prompts": ("box",)},
        {"choice": "oracle"},
        {"data": sc.shapes(3, seed=9, size=48)},
        {"models": {"base": models["base"]}},
    ):
        arguments = {"models": models, "data": data, **settings, **change}
        with pytest.raises(ConfigError, match=r"under other conditions[\s\S]*resume=False"):
            benchmark(**arguments)
    assert (tmp_path / "r.json").read_bytes() == kept
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a result file of this format"):
        benchmark(models, data, **settings)
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(CheckpointError, match="results so far cannot be read"):
        benchmark(models, data, **settings)


def test_absent_device_is_a_row(
    models: dict[str, nn.Module], data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    report = benchmark(models, data, devices=("cuda", "cpu"), **{**FAST, "latency": False})
    status = [(r["name"], r["device"], r["status"]) for r in report.rows]
    assert status == [
        ("base", "cuda", "not_measured"),
        ("other", "cuda", "not_measured"),
        ("base", "cpu", "measured"),
        ("other", "cpu", "measured"),
    ]
    assert report.rows[0]["reason"] == "torch finds no CUDA device"


def test_broken_numbers_are_named_and_not_timed(data: Any) -> None:
    bad = random_sam()
    bad.image_encoder.blocks[1].mlp.lin2.bias.data[3] = float("nan")
    report = benchmark({"base": random_sam(), "bad": bad}, data, **FAST)
    row = report.rows[1]
    assert row["first_nonfinite"] == "image_encoder.blocks.1.mlp.lin2"
    assert row["status"] == "not_measured"
    assert "image_encoder.blocks.1.mlp.lin2 is the first layer" in row["reason"]
    assert "latency" not in row
    assert row["params"]["total"] > 0


def test_numbers_that_break_on_a_later_image(data: Any) -> None:
    class Bright(nn.Module):
        """Breaks on the third image it sees."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.img_size, self.seen = inner, inner.img_size, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return self.inner(x) * (float("inf") if self.seen > 2 else 1)

    bad = random_sam()
    bad.image_encoder = Bright(bad.image_encoder)
    row = benchmark({"base": bad}, data, **{**FAST, "latency": False}).rows[0]
    assert row["status"] == "not_measured"
    assert row["first_nonfinite"] == "image_encoder"
    assert "annotation" in row["reason"]


def test_finite_model_is_left_alone(tiny_sam: nn.Module) -> None:
    tiny_sam.train()
    assert first_nonfinite(tiny_sam, np.zeros((20, 30, 3), np.uint8)) is None
    assert all(m.training for m in tiny_sam.modules())
    assert not any(m._forward_hooks for m in tiny_sam.modules())


def test_one_gap_does_not_cost_the_row(
    models: dict[str, nn.Module], data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise BackendError("a measurement failed.", got="exit code -9")

    monkeypatch.setattr(ROW, "memory", fails)
    settings = {**FAST, "memory": True, "latency": False}
    row = benchmark({"base": models["base"]}, data, **settings).rows[0]
    assert row["status"] == "measured"
    assert row["memory"] is None
    assert row["missing"] == {"memory": "a measurement failed. exit code -9"}
    assert row["accuracy"][0]["miou"] >= 0


def test_model_that_cannot_run_is_a_row(data: Any) -> None:
    broken = random_sam()
    broken.image_encoder.neck[0].weight = nn.Parameter(torch.zeros(5, 5))
    report = benchmark({"base": random_sam(), "no": broken}, data, **FAST)
    assert report.rows[0]["status"] == "measured"
    assert report.rows[1]["status"] == "not_measured"
    assert report.rows[1]["reason"].startswith(("RuntimeError", "the multiply"))


def test_folders_are_loaded(data: Any, tmp_path: Path, models: dict[str, nn.Module]) -> None:
    sc.save(models["other"], tmp_path / "other")
    settings = {**FAST, "latency": False}
    found = benchmark({"base": models["base"], "o": tmp_path / "other"}, data, **settings)
    live = benchmark(models, data, **settings)
    assert found.rows[1]["weights_sha256"] == live.rows[1]["weights_sha256"]
    assert found.rows[1]["accuracy"][0]["miou"] == live.rows[1]["accuracy"][0]["miou"]


def test_mistakes_are_found_first(models: dict[str, nn.Module], data: Any) -> None:
    with pytest.raises(ConfigError, match="no model to measure"):
        benchmark({}, data)
    with pytest.raises(ConfigError, match=r"base is not among the models[\s\S]*base, other"):
        benchmark(models, data, base="huge")
    with pytest.raises(ConfigError, match="'tpu' is not a device"):
        benchmark(models, data, devices=("tpu",))
    with pytest.raises(ConfigError, match="devices is a list"):
        benchmark(models, data, devices="cpu")
    with pytest.raises(ConfigError, match="prompts is a list"):
        benchmark(models, data, prompts="box")
    with pytest.raises(ConfigError, match="unknown prompt"):
        benchmark(models, data, prompts=("bocks",))
    with pytest.raises(DataError, match="these are no data"):
        benchmark(models, 3)


def test_compare_joins_by_object(data: Any, models: dict[str, nn.Module], tmp_path: Path) -> None:
    first = benchmark(models, data, **FAST)
    swapped = {"base": models["other"], "third": models["base"]}
    second = benchmark(swapped, data, **FAST)
    second.save(tmp_path / "second.json")
    found = compare(first, tmp_path / "second.json")
    box = found.differences[0]
    one, two = (r.rows[0]["accuracy"][0]["miou"] for r in (first, second))
    assert (box.name, box.prompt, box.first, box.second) == ("base", "box", one, two)
    assert box.delta == pytest.approx(two - one)
    assert box.ci[0] <= box.delta <= box.ci[1]
    assert found.speeds[0].ratio > 0
    assert found.notes == ("other on cpu: only in the first", "third on cpu: only in the second")
    assert "base" in repr(found)
    assert "<table" in found._repr_html_()
    same = compare(first, first)
    assert {(d.delta, d.ci) for d in same.differences} == {(0.0, (0.0, 0.0))}


def test_compare_refuses_unequal_conditions(data: Any, models: dict[str, nn.Module]) -> None:
    settings = {**FAST, "latency": False}
    one = {"base": models["base"]}
    first = benchmark(one, data, **settings)
    with pytest.raises(ConfigError, match="of different data"):
        compare(first, benchmark(one, sc.shapes(3, seed=5, size=48), **settings))
    boxes, points = (benchmark(one, data, prompts=(p,), **settings) for p in ("box", "center"))
    with pytest.raises(ConfigError, match=r"different protocols[\s\S]*box[\s\S]*center"):
        compare(boxes, points)
    with pytest.raises(ConfigError, match=r"different protocols|different protocol id"):
        compare(first, benchmark(one, data, min_area=1, **settings))
    other = copy.deepcopy(first.doc)
    other["rows"][0]["device"] = "cuda"
    with pytest.raises(ConfigError, match=r"no model on a device in common[\s\S]*base on cuda"):
        compare(first, Report(other))
    elsewhere = copy.deepcopy(first.doc)
    elsewhere["environment"]["cpu"] = "another"
    assert compare(first, Report(elsewhere)).notes == (
        "times are not compared: the machines differ",
    )


def test_one_table_has_one_protocol_and_one_device(data: Any, models: dict[str, nn.Module]) -> None:
    report = benchmark(models, data, **{**FAST, "latency": False})
    mixed = copy.deepcopy(report.doc)
    mixed["rows"][1]["accuracy"][0]["protocol"] += "+"
    with pytest.raises(ConfigError, match="different protocol id"):
        Report(mixed).table()
    mixed = copy.deepcopy(report.doc)
    mixed["rows"][1]["device"] = "cuda"
    with pytest.raises(ConfigError, match="different device"):
        Report(mixed).table()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.pop("environment"), "environment"),
        (lambda d: d["rows"][0].update(status="maybe"), r"rows\[0\].status"),
        (lambda d: d["rows"][0]["accuracy"][0].pop("samples"), "samples"),
        (lambda d: d.update(format=2), "format"),
    ],
)
def test_schema_names_the_place(
    data: Any, models: dict[str, nn.Module], change: Any, place: str
) -> None:
    settings = {**FAST, "latency": False}
    doc = copy.deepcopy(benchmark({"base": models["base"]}, data, **settings).doc)
    check(doc)
    change(doc)
    with pytest.raises(CheckpointError, match=place):
        check(doc, where="r.json")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_masks_on_cuda(data: Any, models: dict[str, nn.Module]) -> None:
    report = benchmark(models, data, devices=("cpu", "cuda"), **FAST)
    cpu, _, cuda, _ = report.rows
    assert cuda["latency"]["encoder"]["n"] >= 3
    for a, b in zip(cpu["accuracy"], cuda["accuracy"], strict=True):
        assert a["miou"] == pytest.approx(b["miou"], abs=1e-3)
    assert next(models["base"].parameters()).device.type == "cpu"
