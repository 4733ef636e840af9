"""Sweeps: every chain a row, refusals shown, nothing measured twice, recipes that reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.evaluate import _chains
from samcompress.evaluate.benchmark import benchmark
from samcompress.evaluate.report import Report
from samcompress.evaluate.study import Study
from samcompress.evaluate.sweep import sweep

FAST: dict[str, Any] = {
    "objectives": ("gmacs", "miou"),
    "latency": False,
    "prompts": ("box",),
    "progress": False,
}
GRID = "prune.mlp(ratio={0.25, 0.5}, criterion='magnitude') | attention.fused"


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return random_sam()


@pytest.fixture(scope="module")
def data() -> Any:
    return sc.shapes(2, size=64)


def test_rows_of_a_grid_are_an_ordinary_result(sam: nn.Module, data: Any, tmp_path: Path) -> None:
    study = sweep([GRID, "quantize.int8_weights"], sam, data, out=tmp_path, **FAST)
    names = ["base", "mlp 0.25 magnitude + fused", "mlp 0.5 magnitude + fused", "int8_weights"]
    assert [row["name"] for row in study.rows] == names
    assert [row["name"] for row in Report.load(tmp_path / "results.json").rows] == names
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert Study.load(tmp_path).text() == study.text()
    assert study.front[-1]["accuracy"][0]["miou"] == max(
        row["accuracy"][0]["miou"] for row in study.rows
    )


def test_recipes_give_the_same_model_again(sam: nn.Module, data: Any, tmp_path: Path) -> None:
    seen = sc.shapes(2, size=64, seed=9)
    grid = "prune.mlp(ratio={0.5}) | quantize.int8_weights"
    study = sweep(grid, sam, data, calibration=seen, out=tmp_path, **FAST)
    (file,) = (tmp_path / "recipes").iterdir()
    assert "calibrated on 2 images of shapes" in file.read_text()
    again = sc.Pipeline.load(file)(sam, data=seen, progress=False)
    assert sc.Pipeline.load(file) == study.recipe("mlp 0.5 + int8_weights")
    report = benchmark(
        {"base": sam, "again": again}, data, prompts=("box",), latency=False, memory=False,
        progress=False,
    )  # fmt: skip
    one, two = report.rows[1], study.rows[1]
    assert one["identity"] == two["identity"]
    assert one["accuracy"] == two["accuracy"]
    with pytest.raises(errors.ConfigError, match="there is no such chain"):
        study.recipe("mlp")


def test_steps_before_are_no_part_of_a_recipe(sam: nn.Module, data: Any) -> None:
    smaller = sc.substitute.ImageSize(size=32)(sam)
    study = sweep({"fused": sc.attention.Fused()}, smaller, data, **FAST)
    assert study.rows[1]["name"] == "fused"
    assert len(study.rows[1]["recipe"]["steps"]) == 2
    assert study.recipe("fused") == sc.Pipeline([sc.attention.Fused()])


def test_refusals_are_counted_and_shown(sam: nn.Module, data: Any, tmp_path: Path) -> None:
    grid = [
        "substitute.image_size(size={48, 64})",
        "prune.mlp(ratio=0.5)",
        "prune.mlp(ratio={0.3})",
    ]
    study = sweep(grid, sam, data, out=tmp_path, **FAST)
    assert [row["name"] for row in study.rows] == ["base", "image_size 48"]
    assert [(r.name, r.outcome) for r in study.refused] == [
        ("image_size 64", "refused"),
        ("mlp 0.5", "refused"),
        ("mlp 0.3", "refused"),
    ]
    assert "needs images" in study.refused[1].reason
    assert "chains not in the running: 3 refused" in study.text()


def test_a_fault_of_one_chain_ends_nothing(
    sam: nn.Module, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(sc.attention.Fused, "apply", broken)
    study = sweep(["attention.fused", "quantize.int8_weights"], sam, data, **FAST)
    assert [(r.outcome, r.reason) for r in study.refused] == [
        ("failed", "ZeroDivisionError: of its own")
    ]
    assert len(study.rows) == 2


def test_nothing_is_measured_twice(
    sam: nn.Module, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(GRID, sam, data, out=tmp_path, **FAST)

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(_chains.Bench, "make", never)
    again = sweep(GRID, sam, data, out=tmp_path, **FAST)
    assert again.rows == first.rows


def test_other_conditions_are_not_mixed(sam: nn.Module, data: Any, tmp_path: Path) -> None:
    sweep("attention.fused", sam, data, out=tmp_path, **FAST)
    with pytest.raises(errors.ConfigError, match="made under other conditions"):
        sweep("attention.fused", sam, data, out=tmp_path, **{**FAST, "prompts": ("point",)})
    # Another model of the same name is measured anew, and so are its chains.
    other = sweep("attention.fused", random_sam(seed=3), data, out=tmp_path, **FAST)
    assert {row["base_identity"] for row in other.rows} == {other.base["identity"]}


def test_names_that_would_be_alike_are_told_apart(sam: nn.Module, data: Any) -> None:
    grid = "prune.mlp(ratio={0.5, 0.5001}, criterion='magnitude')"
    names = [row["name"] for row in sweep(grid, sam, data, **FAST).rows]
    assert names[1] == "mlp 0.5 magnitude"
    assert names[2].startswith("mlp 0.5 magnitude #")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"objectives": "miou"}, "objectives is a list"),
        ({"objectives": ("latency_ms", "miou")}, "the objective latency_ms was not measured"),
        ({"objectives": ("speed", "miou")}, "no such measure"),
    ],
)
def test_objectives_that_make_no_sense(
    sam: nn.Module, data: Any, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(errors.ConfigError, match=text):
        sweep("attention.fused", sam, data, **{**FAST, **changes})


def test_what_is_no_grid(sam: nn.Module, data: Any) -> None:
    with pytest.raises(errors.ConfigError, match="this is no grid of chains"):
        sweep([], sam, data, **FAST)
    doc = dict(sweep("attention.fused", sam, data, **FAST).report.doc)
    del doc["study"]
    with pytest.raises(errors.ConfigError, match="of a benchmark, not of a sweep"):
        Study(doc)
