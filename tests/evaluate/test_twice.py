"""The same run twice, in several processes, and killed at any row."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core.errors import ConfigError, ModelError
from samcompress.evaluate import Report, Rounds, _child, benchmark
from samcompress.evaluate.memory import package_environment
from samcompress.evaluate.processes import latency_processes, median_interval, together
from samcompress.evaluate.schema import check

ROW = importlib.import_module("samcompress.evaluate.row")
PROCESSES = importlib.import_module("samcompress.evaluate.processes")
FEW = Rounds(warmup_calls=1, warmup_seconds=0, calls=3, seconds=0, max_seconds=20)
FIVE = Rounds(warmup_calls=1, warmup_seconds=0, calls=3, seconds=0, max_seconds=60, processes=5)
FAST: dict[str, Any] = {"memory": False, "progress": False, "threads": 1}


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The child's work in this process: starting five interpreters is paid for in a slow test."""
    modules: list[str] = []

    def run(module: str, arguments: list[str], *, timeout: float) -> dict[str, Any]:
        modules.append(module)
        return json.loads(json.dumps(_child.times(Path(arguments[0]))))

    monkeypatch.setattr(PROCESSES, "run_child", run)
    return modules


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def test_same_run_twice(inside: list[str], tmp_path: Path) -> None:
    sam = random_sam()
    models = {"base": sam, "small": sc.prune.Mlp(ratio=0.5, criterion="magnitude")(sam)}
    data = sc.shapes(2, size=48)
    first, second = (
        benchmark(models, data, prompts=("box",), rounds=FIVE, out=tmp_path / f"{n}.json", **FAST)
        for n in (1, 2)
    )
    for name in ("1.json", "2.json"):
        check(json.loads((tmp_path / name).read_text()))
    assert len(inside) == 20  # two runs, two rows, five processes
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert a["identity"] == b["identity"]
        for part in ("encoder", "prompt", "end_to_end"):
            timing = a["latency"][part]
            low, high = timing["interval_ms"]
            assert low <= np.median(timing["process_medians_ms"]) <= high
            assert timing["n"] == len(timing["samples_ms"]) == 15
    # In turns, so that whatever else the machine does falls on both.
    ratios = [r.rows[1]["latency"]["vs_base_ci"]["end_to_end"] for r in (first, second)]
    assert overlap(*ratios)


@pytest.mark.slow
def test_medians_of_two_runs_lie_in_their_intervals(tmp_path: Path) -> None:
    """With processes of their own, on whatever else this machine does: one of four tries."""
    data, sam = sc.shapes(1), sc.load("tiny")
    rounds = Rounds(
        warmup_calls=3, warmup_seconds=0.2, calls=15, seconds=0.5, max_seconds=20, processes=5
    )
    for _ in range(4):
        runs = [benchmark({"b": sam}, data, rounds=rounds, accuracy=False, **FAST) for _ in "ab"]
        ends = [r.rows[0]["latency"]["end_to_end"]["interval_ms"] for r in runs]
        if overlap(*ends):
            return
    pytest.fail(f"{ends}")


def test_interval_by_hand() -> None:
    assert median_interval([5.0] * 5) == (5.0, 5.0)
    low, high = median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert 1 <= low < 3 < high <= 100
    assert median_interval([1.0, 2.0, 3.0, 4.0, 100.0]) == (low, high)
    # Of a hundred medians, the interval is as wide as theory says: 1.25 sigma / sqrt(n), twice 1.96.
    values = np.random.default_rng(0).normal(10, 1, 100)
    low, high = median_interval(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 10, rel=0.35)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        low, high = median_interval(draw.normal(10, 1, 15).tolist(), draws=500)
        held += low <= 10 <= high
    assert held / 300 == pytest.approx(0.95, abs=0.05)


def test_processes_are_put_together() -> None:
    def run(ms: float) -> dict[str, Any]:
        timing = {
            "median_ms": ms, "samples_ms": [ms, ms + 1, ms - 1], "first_call_ms": 10 * ms,
            "wall_median_ms": ms,
        }  # fmt: skip
        parts = dict.fromkeys(PROCESSES.PARTS, timing)
        flow = {"images_per_s": {"1": 1000 / ms, "2": 500 / ms}, "best_batch": 1}
        return {**parts, "throughput": flow, "threads": 2, "settings": {"cpus": [0, 1]}}

    found = together([run(ms) for ms in (1.0, 2.0, 3.0, 4.0, 9.0)])
    part = found["encoder"]
    assert (part["median_ms"], part["n"], part["first_call_ms"]) == (3, 15, 30)
    assert part["process_medians_ms"] == [1, 2, 3, 4, 9]
    assert found["throughput"]["best_batch"] == 1
    assert found["throughput"]["images_per_s"]["1"] == pytest.approx(1000 / 3)
    assert (found["processes"], found["threads"]) == (5, 2)


def test_few_processes_give_no_interval() -> None:
    with pytest.raises(ConfigError, match=r"too few for an interval[\s\S]*at least 5"):
        Rounds(processes=4)
    with pytest.raises(ConfigError, match=r"processes is out of range[\s\S]*at least 1"):
        Rounds(processes=0)
    # Files from before there was a choice are gone on with.
    assert "processes" not in Rounds().to_dict()
    assert Rounds(processes=6).to_dict()["processes"] == 6


def test_simulated_models_are_not_timed_in_processes_either() -> None:
    fake = sc.quantize.FakeQuant()(random_sam(), data=sc.shapes(1, size=48), progress=False)
    with pytest.raises(ModelError, match="simulated model is not timed"):
        latency_processes(
            {"x": fake}, device="cpu", image=np.zeros((8, 8, 3), np.uint8), rounds=FIVE
        )


@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_at_any_row(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = tmp_path / "r.json", sc.shapes(1, size=48)
    models = {name: random_sam(seed=n) for n, name in enumerate("abc")}
    real, seen = ROW.accuracies, []

    def interrupted(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        if len(seen) == at + 1:
            raise KeyboardInterrupt
        return real(model, *args, **kwargs)

    settings = {**FAST, "latency": False, "prompts": ("box",), "out": out}
    whole = benchmark(models, data, **{**settings, "out": None})
    monkeypatch.setattr(ROW, "accuracies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(models, data, **settings)
    kept = json.loads(out.read_text())["rows"] if out.exists() else []
    assert [row["name"] for row in kept] == list("abc"[:at])
    done = benchmark(models, data, **settings)
    assert len(seen) == 4  # the one that was broken off is measured again, no other
    assert done.rows[:at] == kept
    assert [r["accuracy"] for r in done.rows] == [r["accuracy"] for r in whole.rows]


KILLED = """
import importlib, os, signal, sys
import samcompress as sc
row = importlib.import_module("samcompress.evaluate.row")
real, left = row.accuracies, [int(sys.argv[2])]
def dies(model, *args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, *args, **kwargs)
row.accuracies = dies
models = {name: sc.build("tiny", seed=n, depth=1, global_attn_indexes=())
          for n, name in enumerate("abc")}
sc.evaluate.benchmark(models, sc.shapes(1, size=48), out=sys.argv[1], latency=False, memory=False,
                      progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
def test_killed_without_a_word(tmp_path: Path) -> None:
    """By a signal that no program can catch: no finished row is lost, none is made up."""
    out = tmp_path / "r.json"
    for count, rows in ((2, "a"), (9, "abc")):
        words = [sys.executable, "-c", KILLED, str(out), str(count)]
        done = subprocess.run(words, env=package_environment(), capture_output=True, check=False)
        assert done.returncode == (-signal.SIGKILL if count == 2 else 0), done.stderr
        assert "".join(row["name"] for row in Report.load(out).rows) == rows
        assert list(tmp_path.iterdir()) == [out]
