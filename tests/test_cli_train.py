"""The verb `train`: what it runs, says, writes, and how it goes on after a Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fitting
import pytest
import torch
from test_cli import run, start

import samcompress as sc
from samcompress.cli.train import _bars, _steps
from samcompress.core import _saved

SIZES = "image_size=64,depth=2,global_attn_indexes=[1]"
TEACHER = f"tiny:random@{SIZES}"
STUDENT = f"{TEACHER},seed=1"
DATA = "shapes:4@seed=5"
FEW = "steps=3, batch_size=2"


def words(preset: str, out: Path, *more: object) -> tuple[object, ...]:
    return ("train", preset, STUDENT, "--teacher", TEACHER, "--data", DATA, "--out", out, *more)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def test_preset_by_its_short_name(tmp_path: Path) -> None:
    done = run(*words(f"encoder({FEW}, lr=1e-3)", tmp_path / "out", "--limit", 3))
    assert done.exit_code == 0, done.stderr
    loaded = sc.load(tmp_path / "out")
    (step,) = sc.lineage(loaded)
    assert step.transform == sc.distill.Encoder(steps=3, batch_size=2, lr=1e-3)
    assert step.state["images"] == 3
    sizes = {"image_size": 64, "depth": 2, "global_attn_indexes": (1,)}
    student, teacher = (sc.build("tiny", seed=seed, **sizes) for seed in (1, 0))
    images = sc.data.open(DATA).subset(3)
    assert same(loaded, step.transform(student, teacher=teacher, data=images))
    # The table tells steps, rate and losses, the log how it went, the last lines what masks gained.
    row = next(line for line in done.stdout.splitlines() if line.startswith("distill.encoder"))
    assert row.split()[1:5] == ["3", "2", "0.00100", "0"]
    assert row.split()[-1][0] == "█"
    assert "3 steps in" in done.stderr
    assert "'parameters'" not in done.stderr
    assert f"saved to {tmp_path / 'out'}" in done.stderr
    assert "agreement before  agreement after" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-5:-2]] == [
        "box",
        "point",
        "clicks-3",
    ]


def test_chain_of_presets(tmp_path: Path) -> None:
    chain = f"encoder({FEW}) | prompt_loop({FEW}, prompts=2)"
    done = run(*words(chain, tmp_path / "out", "--workdir", tmp_path / "work"))
    assert done.exit_code == 0, done.stderr
    steps = sc.lineage(sc.load(tmp_path / "out"))
    assert [s.transform.label for s in steps] == ["distill.encoder", "distill.prompt_loop"]
    assert sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "work").iterdir()) == [
        "distill-encoder",
        "distill-prompt_loop",
        "teacher",
    ]
    assert not (tmp_path / "out-work").exists()


def test_the_model_that_came_in_teaches_what_the_chain_makes_of_it(tmp_path: Path) -> None:
    chain = f"prune.mlp(ratio=0.5, criterion='magnitude') | encoder({FEW})"
    command = ("train", chain, TEACHER, "--data", DATA)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    done = run(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "agreement" not in done.stdout  # the teacher is what came in
    labels = [step.transform.label for step in sc.lineage(sc.load(tmp_path / "out"))]
    assert labels == ["prune.mlp", "distill.encoder"]


def test_images_without_masks_are_enough_for_the_encoder(tmp_path: Path) -> None:
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for scene in sc.shapes(2):
        Image.fromarray(scene.image).save(photos / f"{scene.name}.jpg")
    command = ("train", f"encoder({FEW})", STUDENT, "--teacher", TEACHER, "--data", photos)
    done = run(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "masks" not in done.stdout


def test_dry_run_times_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chain = "encoder(epochs=500, batch_size=2) | supervised(steps=900, batch_size=2, prompts=2)"
    done = run(*words(chain, tmp_path / "out", "--dry-run"))
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[4:]}
    assert rows["distill.encoder"][1] == "1000"
    assert rows["distill.supervised"][1] == "900"
    step, teacher, _, memory = rows["distill.encoder"][2:]
    assert float(step) > 0
    assert float(teacher) > 0
    assert float(memory) > 0.05
    assert rows["distill.supervised"][3] == "-"
    hours, minutes, seconds = map(int, rows["distill.supervised"][4].split(":"))
    expected = 900 * float(rows["distill.supervised"][2])
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(expected, rel=0.02, abs=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("--data", "--data is needed: images to train on."),
        ("--out", "--out is needed, or --dry-run"),
    ],
)
def test_missing_options_are_wrong_usage(tmp_path: Path, left_out: str, message: str) -> None:
    command = list(words("encoder", tmp_path / "out"))
    at = command.index(left_out)
    done = run(*command[:at], *command[at + 2 :])
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("encodr", "try       distill.encoder"),
        ("encodr(steps=2) | prompt_loop", "there is no technique 'distill.encodr'"),
        ("encoder(step=2)", "distill.encoder has no field 'step'"),
        ("encoder(steps=0)", "steps is out of range"),
        ("encoder(steps=", "not understood"),
        ("prune.mlp", "nothing in this chain trains"),
    ],
)
def test_presets_that_cannot_run(tmp_path: Path, preset: str, text: str) -> None:
    done = run(*words(preset, tmp_path / "out"))
    assert done.exit_code == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_teacher(tmp_path: Path) -> None:
    done = run("train", "encoder", STUDENT, "--data", DATA, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr == (
        "ConfigError: distill.encoder needs a teacher.\n"
        "  got       no --teacher\n"
        "  expected  the model to imitate, usually the one the student was made from\n"
        "  try       --teacher vit_b.pth, a folder, or a Hub id\n"
    )


def test_interrupted_and_started_again(tmp_path: Path) -> None:
    steps = 150
    preset = f"encoder(steps={steps}, batch_size=2)"
    command = words(preset, tmp_path / "out")
    # A background job of a shell ignores Ctrl-C, and so would what it starts: the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if f"{steps} steps at" in line:
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    work = tmp_path / "out-work"
    assert errors.endswith(
        f"Interrupted. Checkpoints are in {work}; run the same command again to go on.\n"
    )
    assert not (tmp_path / "out").exists()
    (checkpoint,) = work.glob("distill-encoder-*.safetensors")
    at = _saved.read(checkpoint)[1]["step"]
    assert at < steps
    again = run(*command)
    assert again.exit_code == 0, again.stderr
    if at:
        assert f"{steps - at} steps at" in again.stderr
    whole = run(*words(preset, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.stderr
    assert same(sc.load(tmp_path / "out"), sc.load(tmp_path / "whole"))
    assert again.stdout == whole.stdout


def test_two_processes_write_one_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    chain = f"encoder({FEW}) | prompt_loop({FEW}, prompts=2)"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "samcompress", *map(str, words(chain, tmp_path / "two"))),
        ],
        env=fitting.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distill.encoder") == 1
    assert done.stderr.count("distill.encoder: loss") == 1
    assert run(*words(chain, tmp_path / "one")).exit_code == 0
    one, two = (sc.lineage(sc.load(tmp_path / name)) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.transform == b.transform
        assert a.state["curve"] == pytest.approx(b.state["curve"], rel=1e-3)


def test_bars_are_logarithmic() -> None:
    assert _bars([100.0, 10.0, 1.0]) == "█▅▁"
    assert _bars([1.0, 1.0]) == "▁▁"
    assert _bars([]) == ""
    assert len(_bars([float(i) for i in range(1, 51)])) == 10


def test_commands_of_the_page_are_understood() -> None:
    page = (Path(__file__).parents[1] / "docs/howto/train.md").read_text()
    commands = re.findall(r"samcompress train '([^']+)' (.*)", page)
    assert len(commands) >= 4
    known = run("train", "--help").stdout
    for preset, rest in commands:
        assert _steps(preset)
        options = re.findall(r"--[a-z-]+", rest)
        assert all(option in known for option in options)
        assert "--data" in options
