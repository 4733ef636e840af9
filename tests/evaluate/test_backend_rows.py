"""Exported runtimes as rows of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import random_sam

import samcompress as sc
from samcompress.core.errors import ConfigError, MissingDependencyError
from samcompress.evaluate import Rounds, benchmark
from samcompress.evaluate.runtimes import Variant, known, with_runtimes

FEW = Rounds(warmup_calls=0, warmup_seconds=0, calls=2, seconds=0, max_seconds=20)
FAST: dict[str, Any] = {"rounds": FEW, "memory": False, "progress": False, "threads": 1}


def test_a_row_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sam, data = random_sam(), sc.shapes(2, size=48)
    made: list[str] = []
    real = Variant.make

    def make(self: Variant, model: Any) -> Any:
        made.append(self.backend)
        if self.backend == "openvino":
            raise MissingDependencyError("openvino is needed and could not be imported.")
        return real(self, model)

    monkeypatch.setattr(Variant, "make", make)
    settings = {**FAST, "out": tmp_path / "r.json", "backends": ("onnxruntime", "openvino")}
    report = benchmark({"base": sam}, data, **settings)
    base, onnx, absent = report.rows
    assert [r["name"] for r in report.rows] == ["base", "base [onnxruntime]", "base [openvino]"]
    assert [r.get("backend") for r in report.rows] == ["torch", "onnxruntime", None]
    assert (onnx["status"], onnx["base"]) == ("measured", False)
    # What is scored is the file that runs, not the model it came from.
    assert onnx["accuracy"][0]["agreement"] > 0.99
    assert onnx["latency"]["vs_base"]["encoder"] > 0
    assert onnx["base_identity"] == base["identity"] != onnx["identity"]
    assert absent["reason"] == "openvino is needed and could not be imported."
    # Finished rows are taken over without exporting again.
    again = benchmark({"base": sam}, data, **settings)
    assert again.rows[:2] == report.rows[:2]
    assert made == ["onnxruntime", "openvino", "openvino"]


def test_names_and_mistakes() -> None:
    models = {"a": "tiny", "b": "tiny"}
    assert list(with_runtimes(models, ())) == ["a", "b"]
    every = with_runtimes({"a": "tiny"}, ("all", "onnxruntime"))
    assert list(every) == ["a", *(f"a [{name}]" for name in known())]
    variant = with_runtimes(models, ("onnxruntime:int8",))["b [onnxruntime:int8]"]
    assert variant == Variant("tiny", "onnxruntime", "int8")
    with pytest.raises(ConfigError, match="backends is a list"):
        with_runtimes(models, "onnxruntime")
    with pytest.raises(ConfigError, match=r"onnxruntim[\s\S]*onnxruntime"):
        with_runtimes(models, ("onnxruntim",))
    with pytest.raises(ConfigError, match="bfloat16"):
        with_runtimes(models, ("onnxruntime:bfloat16",))


def test_identity_tells_exports_apart() -> None:
    one, two = Variant("m", "onnxruntime"), Variant("m", "onnxruntime", "int8")
    assert one.identity("x") == one.identity("x")
    assert len({one.identity("x"), one.identity("y"), two.identity("x")}) == 3


def test_images_for_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are other ones than those that are scored, and part of what a row is."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    data, seen = sc.shapes(2, size=48), sc.shapes(3, seed=1, size=48)
    sam = random_sam()
    settings = {**FAST, "backends": ("openvino:int8", "openvino"), "latency": False}
    rows = benchmark({"base": sam}, data, **settings).rows
    assert rows[1]["status"] == "not_measured"
    assert "needs images" in rows[1]["reason"]
    assert rows[2]["status"] == "measured"
    found = benchmark({"base": sam}, data, calibration=seen, **settings).rows
    assert found[1]["status"] == "measured"
    assert found[2]["identity"] == rows[2]["identity"]
    one, two = (
        with_runtimes({"a": "tiny"}, ("openvino:int8",), images)["a [openvino:int8]"]
        for images in (data, seen)
    )
    assert isinstance(one, Variant)
    assert isinstance(two, Variant)
    assert one.identity("x") != two.identity("x")


def test_model_that_was_exported_is_not_exported_again() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    variant = Variant(None, "onnxruntime")  # type: ignore[arg-type]
    once = variant.make(random_sam())
    with pytest.raises(ConfigError, match="not exported again"):
        variant.make(once)
