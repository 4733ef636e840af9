"""The verbs `sweep`, `search` and `leaderboard`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import samcompress as sc
from samcompress.cli import app
from samcompress.cli import search as _verbs  # noqa: F401 - registers them

SAM = "tiny:random@image_size=64"
DATA = "shapes:1@seed=5"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_sweep_then_leaderboard(tmp_path: Path) -> None:
    grid = "prune.mlp(ratio={0.25, 0.5}, criterion='magnitude')"
    words = ("sweep", grid, "--model", SAM, "--data", DATA, "--prompts", "box", "--rounds", 1)
    done = run(*words, "--out", tmp_path / "a", "--html", tmp_path / "a.html")
    assert done.exit_code == 0, done.stderr
    assert "sweep: 2 chains measured" in done.stdout
    assert "mlp 0.5 magnitude" in (tmp_path / "a.html").read_text()
    (tmp_path / "b.json").write_bytes((tmp_path / "a" / "results.json").read_bytes())
    files = (tmp_path / "a", tmp_path / "b.json")
    board = run("leaderboard", *files, "--html", tmp_path / "l.html", "--json", "-")
    assert board.exit_code == 0, board.stderr
    assert len(json.loads(board.stdout)["rows"]) == 3
    assert "leaderboard" in (tmp_path / "l.html").read_text()


def test_recipe_of_a_sweep_is_applied_again(tmp_path: Path) -> None:
    run(*("sweep", "prune.mlp(criterion='magnitude')", "--model", SAM, "--data", DATA),
        *("--prompts", "box", "--rounds", 1, "--out", tmp_path / "a"))  # fmt: skip
    (recipe,) = (tmp_path / "a" / "recipes").iterdir()
    done = run("apply", recipe, "--model", SAM, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    row = sc.evaluate.Report.load(tmp_path / "a" / "results.json").rows[1]
    report = sc.evaluate.benchmark(
        {"small": sc.load(tmp_path / "small")},
        sc.data.open(DATA),
        prompts=("box",),
        latency=False,
        memory=False,
        progress=False,
    )
    assert report.rows[0]["weights_sha256"] == row["weights_sha256"]
    assert report.rows[0]["accuracy"][0]["miou"] == row["accuracy"][0]["miou"]


def test_search_shows_its_space_and_searches_an_edited_one(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ("search", "--model", SAM, "--data", DATA, "--out", tmp_path, "--prompts", "box")
    shown = run(*words, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    assert "why it is not tried" in shown.stdout
    assert "0.1 to 0.5, steps of 0.05" in shown.stdout
    space = json.loads((tmp_path / "space.json").read_text())
    space["slots"] = [slot for slot in space["slots"] if slot["name"] in ("mlp", "kernel")]
    edited = tmp_path / "mine.json"
    edited.write_text(json.dumps(space))
    more = ("--space", edited, "--chains", 2, "--rounds", 1, "--budget", "latency_ms<=1000 on cpu")
    done = run(*words, *more)
    assert done.exit_code == 0, done.stderr
    assert "search: 2 chains measured" in done.stdout
    assert "budget: latency_ms<=1000 on cpu" in done.stdout
    wrong = run(*words, *more, "--budget", "speed<=3")
    assert wrong.exit_code == 1
    assert "a budget cannot be of 'speed'" in wrong.stderr


def test_leaderboard_refuses_two_sets_of_data(tmp_path: Path) -> None:
    for name, data in (("a", DATA), ("b", "shapes:1@seed=6")):
        done = run(
            *("bench", SAM, "--data", data, "--quick", "--rounds", 1, "--prompts", "box"),
            *("--json", tmp_path / f"{name}.json"),
        )
        assert done.exit_code == 0, done.stderr
    board = run("leaderboard", tmp_path / "a.json", tmp_path / "b.json")
    assert board.exit_code == 1
    assert "rows of different data do not belong in one table" in board.stderr
