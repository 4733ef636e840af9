"""The demo, on few images and chains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import samcompress as sc
from samcompress.evaluate import demo as demonstration
from samcompress.evaluate.latency import Rounds


def test_demo_measures_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    chains = {
        "small": sc.prune.Mlp(ratio=0.25) | sc.quantize.Int8Weights(),
        "mobile": sc.Pipeline([sc.compile.Export()]),
    }
    monkeypatch.setattr(demonstration, "chains", lambda: chains)
    said: list[str] = []
    done = demonstration.demo(
        tmp_path, images=3, rounds=Rounds.quick(), memory=False, say=said.append, progress=False
    )
    rows = {row["name"]: row for row in done.report.rows}
    assert [row["status"] for row in rows.values()] == ["measured", "measured", "not_measured"]
    assert "not measured: pip install 'samcompress[onnx]'" in repr(done.report)
    assert [path.name for path in done.files] == ["report.html", "report.json", "pareto.png"]
    assert "<image" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == done.report.doc
    assert (tmp_path / "pareto.png").read_bytes()[1:4] == b"PNG"
    assert said[0] == "small: prune.mlp | quantize.int8_weights"
    assert len(sc.lineage(sc.load(tmp_path / "models" / "small"))) == 3


def test_chains_are_the_shipped_recipes_sized_for_the_base() -> None:
    chains = demonstration.chains()
    assert {f"{name}.json" for name in chains} - {"pruned.json"} == set(sc.list_recipes())
    families = {step.family for chain in chains.values() for step in chain}
    assert families == {"substitute", "prune", "attention", "distill", "quantize", "compile"}
    assert chains["mobile"].steps[0] == sc.substitute.ImageSize(size=demonstration.SIDE)
    assert chains["recover"].steps[:1] == chains["pruned"].steps
