"""The command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import samcompress as sc
from samcompress.cli import app, named

SAM = "tiny:random"
DATA = "shapes:3@seed=5"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def start(*words: object, **kwargs: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "samcompress", *map(str, words)]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
    return subprocess.Popen(command, **kwargs)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    sam = sc.prune.Mlp(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
    sc.save(sam, tmp_path / "small")
    return tmp_path / "small"


def test_list_has_four_headings() -> None:
    done = run("list")
    assert done.exit_code == 0
    titles = [line for line in done.stdout.splitlines() if line.islower() and " " not in line]
    assert titles == ["techniques", "architectures", "recipes", "models"]
    for name in sc.list_transforms():
        assert name in done.stdout
    found = json.loads(run("list", "prune.ml*", "--json", "-").stdout)
    assert [row["name"] for row in found[0]["rows"]] == ["prune.mlp"]
    assert found[1]["rows"] == found[2]["rows"] == found[3]["rows"] == []


def test_info_of_technique_recipe_and_folder(small: Path) -> None:
    technique = run("info", "prune.mlp")
    assert "Remove the hidden units of least importance" in technique.stdout
    assert "Source:" in technique.stdout
    recipe = json.loads(run("info", "small", "--json", "-").stdout)
    assert [r["technique"] for r in recipe["rows"]] == ["prune.mlp", "quantize.int8_weights"]
    folder = run("info", small)
    assert folder.exit_code == 0
    assert "history" in folder.stdout
    assert "model.safetensors" in folder.stdout
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged = run("info", small)
    assert damaged.exit_code == 1
    assert "changed after it was saved" in damaged.stderr


def test_recipe_list_copy_check(tmp_path: Path) -> None:
    assert [r["name"] for r in json.loads(run("recipe", "list", "--json", "-").stdout)["rows"]] == [
        name.removesuffix(".json") for name in sc.list_recipes()
    ]
    copy = tmp_path / "mine.json"
    assert run("recipe", "cp", "small", copy).exit_code == 0
    assert sc.Pipeline.load(copy) == sc.Pipeline.load("small")
    again = run("recipe", "cp", "small", copy)
    assert again.exit_code == 1
    assert "the file is there already" in again.stderr
    without = run("recipe", "check", copy, "--model", SAM)
    assert without.exit_code == 1
    assert "! no: needs images." in without.stdout
    assert run("recipe", "check", copy, "--model", SAM, "--data", DATA).exit_code == 0


@pytest.mark.parametrize("name", sorted(sc.list_recipes()))
def test_shipped_recipes_fit_and_describe_themselves(name: str) -> None:
    pipeline = sc.Pipeline.load(name)
    assert sc.list_recipes()[name].endswith(".")
    assert [step.phase for step in pipeline] == sorted(step.phase for step in pipeline)
    assert sc.Pipeline.from_json(pipeline.to_json()) == pipeline


def test_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    chain = "prune.mlp(ratio=0.5) | quantize.int8_weights"
    words = ("apply", chain, "--model", SAM, "--out", out, "--image-size", 64, "--dry-run")
    done = run(*words, "--data", DATA, "--json", "-")
    assert done.exit_code == 0
    rows = json.loads(done.stdout)["rows"]
    assert [r["technique"] for r in rows] == [
        "substitute.image_size",
        "prune.mlp",
        "quantize.int8_weights",
    ]
    assert rows[1]["modules matched"] == "4 by image_encoder.blocks.*.mlp"
    assert rows[1]["needs"] == "data"
    assert not out.exists()
    assert run(*words).exit_code == 1


def test_apply_saves_what_the_recipe_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        *("apply", "small", "--model", SAM, "--data", DATA, "--limit", 2),
        *("--image-size", 64, "--out", out),
    )
    assert done.exit_code == 0, done.stderr
    assert "random weights" in done.stderr
    assert "next: samcompress bench" in done.stderr
    loaded = sc.load(out)
    assert [step.transform.label for step in sc.lineage(loaded)] == [
        "substitute.image_size",
        "prune.mlp",
        "quantize.int8_weights",
    ]
    assert loaded.image_encoder.img_size == 64
    pipeline = sc.substitute.ImageSize(size=64) | sc.Pipeline.load("small")
    twin = pipeline(sc.build("tiny"), data=sc.data.open(DATA).subset(2))
    assert all((a == b).all() for a, b in zip(loaded.parameters(), twin.parameters(), strict=True))


def test_bench_writes_results_page_and_picture(small: Path, tmp_path: Path) -> None:
    result, page, picture = (tmp_path / name for name in ("r.json", "r.html", "p.png"))
    words = ("bench", SAM, small, "--data", DATA, "--limit", 2, "--quick", "--json", result)
    done = run(*words, "--html", page, "--picture", picture)
    assert done.exit_code == 0, done.stderr
    report = sc.evaluate.Report.load(result)
    assert [(r["name"], r["base"]) for r in report.rows] == [(SAM, True), ("small", False)]
    assert "speed-up" in done.stdout
    assert "<image" in page.read_text()  # the worst masks
    assert picture.read_bytes()[1:4] == b"PNG"
    dates = [row["date"] for row in report.rows]
    time.sleep(1.1)
    assert run(*words).exit_code == 0  # finished rows are taken over
    again = sc.evaluate.Report.load(result)
    assert [row["date"] for row in again.rows] == dates
    other = run("bench", SAM, "--data", "shapes:2@seed=9", "--quick", "--json", result)
    assert other.exit_code == 1
    assert "other conditions" in other.stderr
    compared = run("compare", result, result, "--json", "-")
    assert compared.exit_code == 0
    assert {row["change ± 95 %"] for row in json.loads(compared.stdout)["rows"]} == {0.0}


def test_bench_of_few_rounds_has_speed_and_memory(small: Path) -> None:
    words = ("bench", SAM, small, "--data", "shapes:1", "--prompts", "box", "--json", "-")
    rows = json.loads(run(*words, "--rounds", 2, "--threads", 1).stdout)["rows"]
    assert [row["latency"]["end_to_end"]["n"] for row in rows] == [2, 2]
    assert rows[1]["latency"]["vs_base"]["end_to_end"] > 0
    assert all(row["memory"]["peak_mb"] > row["memory"]["baseline_mb"] > 0 for row in rows)


def test_bench_by_a_papers_rules_with_detection_and_everything(tmp_path: Path) -> None:
    boxes = [
        {"image_id": sample.id, "category_id": i.category, "bbox": [8, 8, 40, 40], "score": 0.9}
        for sample in sc.data.open("shapes:1")
        for i in sample.instances
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    words = ("bench", SAM, "--data", "shapes:1", "--quick", "--json", "-", "--preset", "hq,nanosam")
    done = run(*words, "--detections", tmp_path / "boxes.json", "--everything", 2)
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    rules = [a["protocol"].partition("/")[2] for a in row["accuracy"]]
    assert [text.split("/")[1] for text in rules] == ["single", "predicted"]
    assert "crowd=yes" in rules[1]
    assert row["detection"]["detector"]["n_boxes"] == len(boxes)
    assert row["everything"]["n_prompts"] == 4


def test_bench_prints_json_and_nothing_else() -> None:
    words = ("bench", SAM, "--data", "shapes:1", "--prompts", "box", "--quick", "--json", "-")
    document = json.loads(run(*words).stdout)
    assert [a["prompt"] for a in document["rows"][0]["accuracy"]] == ["box"]


def test_export_says_what_it_compared(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = run("export", SAM, "--to", tmp_path / "onnx")
    assert done.exit_code == 0, done.stderr
    assert "reloaded and compared with PyTorch\nlargest relative difference: " in done.stdout
    assert "embedding" in done.stdout
    assert sc.load(tmp_path / "onnx").image_encoder.img_size == 128


def test_doctor_is_content_here() -> None:
    done = run("doctor", "--json", "-")
    states = {row["what"]: row["state"] for row in json.loads(done.stdout)["rows"]}
    assert states["torch"] == states["device cpu"] == "ready"
    assert done.exit_code == int("broken" in states.values())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("info", "prune.mlpp"), "there is no such recipe"),
        (("apply", "prune.mpl()", "--model", SAM, "--out", "x"), "there is no technique"),
        (("apply", "small", "--model", "vit_b", "--out", "x"), "vit_b:random for random weights"),
        (("apply", "small", "--model", "nowhere.pth", "--out", "x"), "there is no such model"),
        (("apply", "small", "--model", SAM, "--out", "x"), "prune.mlp needs images"),
        (("apply", "prune.mlp(ratio=1)", "--model", SAM, "--out", "x"), "0 < ratio < 1"),
        (("apply", "prune.mlp(ratio=", "--model", SAM, "--out", "x"), "not understood"),
        (("apply", "small", "--model", f"{SAM}@size", "--out", "x"), "sizes are not understood"),
        (("bench", SAM, "--data", "nowhere"), "no data of a known layout"),
        (("bench", SAM, "--data", DATA, "--prompts", "boxx"), "unknown prompt"),
        (("bench", SAM, "--data", DATA, "--preset", "nano"), "try       nanosam"),
        (("bench", SAM, "--data", DATA, "--detections", "b.json"), "b.json"),
        (("compare", "a.json", "b.json"), "this is not a result file"),
    ],
)
def test_errors_are_one_message_and_exit_1(words: tuple[str, ...], text: str) -> None:
    done = run(*words)
    assert done.exit_code == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words", [("aply",), ("apply", "small"), ("bench", SAM), ("apply", "small", "--model", SAM)]
)
def test_wrong_usage_is_exit_2(words: tuple[str, ...]) -> None:
    if words[-1] == SAM and words[0] == "apply":
        words = (*words, "--data", "shapes:1")  # all but --out
    done = run(*words)
    assert done.exit_code == 2
    assert "Usage" in done.stderr


def test_every_verb_shows_its_python_call() -> None:
    for verb in (["list"], ["info"], ["recipe", "list"], ["recipe", "cp"], ["recipe", "check"],
                 ["apply"], ["train"], ["bench"], ["compare"], ["export"], ["doctor"], ["demo"]):  # fmt: skip
        done = run(*verb, "--help")
        assert done.exit_code == 0
        assert "Python: " in done.stdout


def test_models_get_short_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a" / "out").mkdir(parents=True)
    (tmp_path / "b" / "out").mkdir(parents=True)
    names = named([str(tmp_path / "a" / "out"), f"{tmp_path / 'b' / 'out'}/", "facebook/sam"])
    assert list(names) == ["out", "out (2)", "facebook/sam"]


def test_process_prints_version_and_hides_tracebacks() -> None:
    with start("--version") as done:
        assert done.communicate()[0] == f"{sc.__version__}\n"
    with start("info", "nothing", "--debug") as done:
        _, errors = done.communicate()
    assert done.returncode == 1
    assert "Traceback" in errors


def test_interrupted_bench_keeps_finished_rows(tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    words = ("bench", SAM, f"{SAM}@seed=1", "--data", DATA, "--json", result)
    # A background job of a shell ignores Ctrl-C, and so would what it starts: the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    signal.signal(signal.SIGINT, before)
    with process:
        deadline = time.monotonic() + 120
        while not result.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert f"Finished rows are in {result}; run the same command again to go on." in errors
    assert "Traceback" not in errors
    rows = json.loads(result.read_text())["rows"]
    assert [row["name"] for row in rows] == [SAM]
