"""Searches: budget, refusals, kill and resume, and that no chain is measured twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.evaluate import _chains
from samcompress.evaluate.plots import BLUE
from samcompress.evaluate.report import Report
from samcompress.evaluate.search import search
from samcompress.evaluate.space import Space
from samcompress.evaluate.stats import pareto
from samcompress.evaluate.study import Study

pytest.importorskip("optuna")

SPACE = {
    "format": 1,
    "slots": [
        {
            "name": "size",
            "options": [
                {"type": "substitute.image_size", "params": {"size": {"choices": [32, 48]}}}
            ],
        },
        {
            "name": "mlp",
            "options": [
                {
                    "type": "prune.mlp",
                    "params": {
                        "ratio": {"low": 0.25, "high": 0.75, "step": 0.25},
                        "criterion": "magnitude",
                    },
                }
            ],
        },
        {"name": "kernel", "options": [{"type": "attention.fused"}]},
        {
            "name": "numbers",
            "options": [
                {"type": "quantize.int8_weights", "params": {"min_size": 0}},
                {"type": "quantize.b_float16"},
            ],
        },
    ],
}
FAST: dict[str, Any] = {
    "objectives": ("size_mb", "miou"),
    "latency": False,
    "prompts": ("box",),
    "progress": False,
}
SCRIPT = """
import sys
sys.path[:0] = {places!r}
import torch
torch.set_num_threads(1)
import samcompress as sc
from conftest import random_sam
from test_search import FAST, SPACE
from samcompress.evaluate.search import search
search(SPACE, (), random_sam(), sc.shapes(2, size=64), chains={chains}, out={out!r}, **FAST)
"""


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return random_sam()


@pytest.fixture(scope="module")
def data() -> Any:
    return sc.shapes(2, size=64)


@pytest.fixture(scope="module")
def whole(sam: nn.Module, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    search(SPACE, (), sam, data, chains=9, out=out, **FAST)
    return out


def chains_of(study: Study) -> list[tuple[str, Any]]:
    return [(row["name"], row["accuracy"][0]["miou"]) for row in study.rows]


def test_front_and_files(whole: Path) -> None:
    study = Study.load(whole)
    assert len(study.rows) == 10
    assert [row["name"] for row in study.rows][1:5] == [
        "image_size 32",
        "mlp 0.5 magnitude",
        "fused",
        "int8_weights 0",
    ]
    assert study.facts["trials"]["measured"] == 9
    costs = [row["bytes_on_disk"] for row in study.rows]
    gains = [row["accuracy"][0]["miou"] for row in study.rows]
    best = {r["name"] for r, on in zip(study.rows, pareto(costs, gains), strict=True) if on}
    assert {row["name"] for row in study.front} == best
    assert study.hypervolume is not None
    assert study.hypervolume > 0
    assert len(list((whole / "recipes").glob("*.json"))) == 9
    assert Report.load(whole / "results.json").doc["study"]["kind"] == "search"
    assert Space.from_dict(study.facts["space"]) == Space.from_dict(SPACE)


def test_every_technique_is_tried_by_itself_first(whole: Path) -> None:
    rows = Study.load(whole).rows[1:]
    assert [len(row["recipe"]["steps"]) for row in rows[:4]] == [1, 1, 1, 1]
    assert max(len(row["recipe"]["steps"]) for row in rows) > 1


def test_more_chains_go_on_from_there(
    sam: nn.Module, data: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = _chains.Bench.make

    def noted(self: Any, chain: Any) -> Any:
        made.append(chain)
        return make(self, chain)

    monkeypatch.setattr(_chains.Bench, "make", noted)
    before = chains_of(Study.load(whole))
    same = search(SPACE, (), sam, data, chains=9, out=whole, **FAST)
    assert not made
    assert chains_of(same) == before


def test_killed_and_resumed_finds_what_it_would_have_found(
    sam: nn.Module, data: Any, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    places = [str(Path(sc.__file__).parents[1]), *map(str, Path(__file__).parents[:2])]
    script = SCRIPT.format(places=places, chains=9, out=str(out))
    kills = 0
    for rows in (2, 5):
        worker = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
        until = time.monotonic() + 300
        while len(list(out.glob("rows/*.json"))) < 1 + rows and worker.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        worker.send_signal(signal.SIGKILL)
        _, said = worker.communicate()
        kills += worker.returncode == -signal.SIGKILL
        assert worker.returncode == -signal.SIGKILL, said.decode()
        assert not (out / "results.json").exists()
    study = search(SPACE, (), sam, data, chains=9, out=out, **FAST)
    assert kills == 2
    assert chains_of(study) == chains_of(Study.load(whole))
    assert [row["name"] for row in study.front] == [row["name"] for row in Study.load(whole).front]


def test_a_line_written_in_part_is_cut_off(sam: nn.Module, data: Any, tmp_path: Path) -> None:
    search(SPACE, (), sam, data, chains=1, out=tmp_path, **FAST)
    journal = tmp_path / "trials.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"work')
    study = search(SPACE, (), sam, data, chains=2, out=tmp_path, **FAST)
    assert len(study.rows) == 3


def test_budget_keeps_chains_out(sam: nn.Module, data: Any, tmp_path: Path) -> None:
    budget = ["parameters<=95%", "size_mb<=60%"]
    study = search(SPACE, budget, sam, data, chains=6, out=tmp_path, **FAST)
    outcomes = {r.name: (r.outcome, r.reason) for r in study.refused}
    assert outcomes["fused"][0] == "over budget"
    assert outcomes["fused"][1].startswith("parameters<=95%: it has")
    assert "fused" not in [row["name"] for row in study.rows]  # not measured at all
    assert outcomes["mlp 0.5 magnitude"] == ("over budget", "size_mb<=60%")
    assert "mlp 0.5 magnitude" in [row["name"] for row in study.rows]
    most = 0.6 * study.base["bytes_on_disk"]
    assert all(row["bytes_on_disk"] <= most for row in study.front)
    assert "budget: parameters<=95%, size_mb<=60%" in study.text()
    assert study.base["beyond_budget"] == "parameters<=95%, size_mb<=60%"
    ax = study.pareto().axes[0]  # what is beyond the budget is grey
    blue = [line for line in ax.lines if line.get_marker() in "*o" and line.get_color() == BLUE]
    assert len(blue) == len(study.front)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("latency<=50", "a budget cannot be of 'latency'"),
        ("latency_ms<=50 on cuda", "for another device than the search"),
        ("latency_ms<=50 on cpu", "needs what is not measured(.|\n)*latency=True"),
        ("memory_mb<=500 on cpu", "needs what is not measured(.|\n)*memory=True"),
        ("size_mb<=5 on cpu", "size_mb is the same on every device"),
        ("fast", "this is not a budget"),
    ],
)
def test_budget_that_makes_no_sense(sam: nn.Module, data: Any, budget: str, text: str) -> None:
    with pytest.raises(errors.ConfigError, match=text):
        search(SPACE, budget, sam, data, **FAST)


def test_small_spaces_end_by_themselves(sam: nn.Module, data: Any) -> None:
    space = Space.parse("prune.mlp(ratio={0.25, 0.5}, criterion='magnitude')")
    study = search(space, (), sam, data, chains=50, **FAST)
    assert len(study.rows) == 3
    assert study.facts["trials"]["measured"] == 2


def test_refused_chains_are_counted(sam: nn.Module, data: Any) -> None:
    space = Space.parse("substitute.image_size(size={48, 64}) | quantize.int8_weights(min_size=0)")
    study = search(space, (), sam, data, chains=2, **FAST)
    assert [r.outcome for r in study.refused] == ["refused"]
    assert study.refused[0].name == "image_size 64 + int8_weights 0"
    assert study.facts["trials"]["refused"] == 1


def test_other_conditions_are_not_mixed(sam: nn.Module, data: Any, whole: Path) -> None:
    with pytest.raises(errors.ConfigError, match="begun under other conditions") as caught:
        search(SPACE, "size_mb<=50%", sam, data, chains=9, out=whole, **FAST)
    assert 'budget: [] there, ["size_mb<=50%"] here' in str(caught.value)
    with pytest.raises(errors.ConfigError, match="seed: 0 there, 1 here"):
        search(SPACE, (), sam, data, chains=9, out=whole, seed=1, **FAST)


def test_storage_of_a_database_is_shared_by_folders_that_are_not(
    sam: nn.Module, data: Any, tmp_path: Path
) -> None:
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    search(SPACE, (), sam, data, chains=2, storage=url, out=tmp_path / "one", **FAST)
    study = search(SPACE, (), sam, data, chains=3, storage=url, out=tmp_path / "two", **FAST)
    assert len(study.rows) == 2
    assert "chains measured elsewhere, not shown: 2" in study.text()


def test_what_makes_no_search(sam: nn.Module, data: Any) -> None:
    with pytest.raises(errors.ConfigError, match="chains is out of range"):
        search(SPACE, (), sam, data, chains=0, **FAST)
    with pytest.raises(errors.ConfigError, match="this is no space"):
        search(7, (), sam, data, **FAST)  # type: ignore[arg-type]


def test_time_is_up(sam: nn.Module, data: Any) -> None:
    study = search(SPACE, (), sam, data, chains=9, seconds=0, **FAST)
    assert [row["name"] for row in study.rows] == ["base"]
    assert [row["name"] for row in study.front] == ["base"]
