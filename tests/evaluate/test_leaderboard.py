"""Leaderboards: a table for each machine, and no two protocols or sets of data in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import documents
import pytest

from samcompress.core import errors
from samcompress.evaluate.leaderboard import leaderboard
from samcompress.evaluate.report import Report


def written(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(documents.document(**changes)))
    return path


def document(cpu: str, *, prefix: str = "", date: str = "2025-01-01") -> dict[str, Any]:
    doc = documents.document()
    doc["environment"]["cpu"] = {"model": cpu}
    for row in doc["rows"]:
        row["identity"] = f"{prefix}{row['name']}"
        row["date"] = f"{date}T12:00:00+00:00"
    return doc


def test_machines_get_their_own_tables(tmp_path: Path) -> None:
    fast, slow = document("Fast CPU"), document("Slow CPU", prefix="other ")
    board = leaderboard(Report(fast), Report(slow))
    assert board.machines == ["cpu: Fast CPU, 2 threads", "cpu: Slow CPU, 2 threads"]
    text = board.text()
    assert text.count("device") == 0
    assert text.count("Fast CPU, 2 threads") == 1
    with pytest.raises(errors.ConfigError, match="no row was measured on this machine"):
        board.table("cuda")


def test_the_most_accurate_comes_first_and_the_unbeaten_are_marked() -> None:
    board = leaderboard(Report(document("CPU")))
    records = board.table(board.machines[0]).records()
    assert [r["rank"] for r in records] == [1, 2, 3, 4, None]
    assert records[4]["mIoU box"].startswith("not measured: pip install")
    values = [r["mIoU box"] for r in records[:4]]
    assert values == sorted(values, reverse=True)
    assert {r["name"]: r["unbeaten"] for r in records[:4]} == {
        "base": True,
        "pruned": True,
        "small": False,
        "broken": False,
    }


def test_what_was_not_measured_stays() -> None:
    board = leaderboard(Report(document("CPU")))
    assert "not measured: pip install 'samcompress[onnx]'" in board.text()


def test_rows_of_one_machine_stand_together_each_model_once(tmp_path: Path) -> None:
    old, new = document("CPU"), document("CPU", date="2025-02-02")
    more = document("CPU", prefix="other ")
    new["rows"][1]["accuracy"][0]["miou"] = 0.5
    board = leaderboard(Report(old), Report(new), Report(more))
    (machine,) = board.machines
    names = [r["name"] for r in board.table(machine).records()]
    assert sorted(names) == sorted(2 * ["base", "pruned", "small", "broken", "mobile"])
    sources = {(e.row["identity"], e.source) for e in board.of(machine)}
    assert ("pruned", "report 2") in sources
    assert ("other pruned", "report 3") in sources
    assert ("pruned", "report 1") not in sources


def test_two_sets_of_data_are_refused(tmp_path: Path) -> None:
    one = written(tmp_path, "a.json")
    data = {**documents.document()["data"], "name": "coco", "fingerprint": "1" * 64}
    two = written(tmp_path, "b/results.json", data=data)
    with pytest.raises(errors.ConfigError) as caught:
        leaderboard(one, two.parent)
    assert str(caught.value) == (
        "rows of different data do not belong in one table.\n"
        "  where     'a.json' and 'b'\n"
        "  got       shapes (000000000000) and coco (111111111111)\n"
        "  expected  one data\n"
        "  try       make one table for each"
    )


def test_two_protocols_are_refused() -> None:
    one, two = documents.document(), documents.document()
    for row in two["rows"]:
        for entry in row["accuracy"]:
            entry["protocol"] = entry["protocol"].replace("crowd=no", "crowd=yes")
    with pytest.raises(errors.ConfigError, match="rows of different protocol id") as caught:
        leaderboard(Report(one), Report(two))
    assert "'base in report 1' and 'base in report 2'" in str(caught.value)


def test_no_file_and_no_result_file(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="there is no result to show"):
        leaderboard()
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(errors.CheckpointError, match="not a result file"):
        leaderboard(tmp_path / "x.json")


def test_page(tmp_path: Path) -> None:
    board = leaderboard(Report(document("Fast & CPU")), Report(document("Slow CPU", prefix="o ")))
    page = board.html(tmp_path / "board.html")
    assert (tmp_path / "board.html").read_text() == page
    assert "<h2>cpu: Fast &amp; CPU, 2 threads</h2>" in page
    assert page.count("<svg ") == 2
    assert "<script" not in page
