"""The verb `train`."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import samcompress as sc

from ..core._progress import Event
from ..core.display import Column, Table
from ..core.errors import ConfigError
from ..evaluate.recipes import recipe
from ._app import INTERRUPTED, Data, Limit
from ._shared import load, opened, say, show

TRIED = 5  # steps of a dry run


def train(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help="encoder, 'prompt_loop(epochs=2, lr=1e-4)', or several joined by |; "
            "samcompress list 'distill.*' names them.",
        ),
    ],
    student: Annotated[str, typer.Argument(help="The model to train: as --model of apply.")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the trained model.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The model to imitate; presets that need none ignore it.")
    ] = None,
    limit: Limit = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    workdir: Annotated[
        Path | None, typer.Option(help="Caches and checkpoints; OUT-work by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help=f"Time {TRIED} steps, tell what the run would take.")
    ] = False,
) -> None:
    """Train or distil a model; the same command again goes on where it was interrupted.

    Python: sc.save(sc.distill.Encoder()(student, teacher=teacher, data=data, workdir=w), out)
    """
    steps = list(recipe(_full(preset)))
    if data is None:
        raise typer.BadParameter("--data is needed: images to train on.")
    if out is None and not dry_run:
        raise typer.BadParameter("--out is needed, or --dry-run.")
    samples, model = opened(data, limit), load(student, device)
    original = _teacher(steps, teacher, device)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if dry_run:
        show(_dry(steps, model, original, samples))
        return
    assert out is not None
    place = workdir or out.with_name(f"{out.name}-work")
    try:
        trained = _chained(steps)(model, data=samples, teacher=original, workdir=place)
    except KeyboardInterrupt:
        say(f"Interrupted. Checkpoints are in {place}; run the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from None
    sc.save(trained, out)
    show(_result(trained, len(steps)))
    say(f"saved to {out}; checkpoints and caches in {place} may go")


def _full(preset: str) -> str:
    """``encoder | prune.mlp`` as ``distill.encoder | prune.mlp``; a file's name as it is."""
    if Path(preset).is_file():
        return preset
    return re.sub(r"(^|\|)(\s*)(\w+)(?=\s*(\(|\||$))", r"\1\2distill.\3", preset)


def _chained(steps: list[sc.Transform]) -> sc.Pipeline:
    # A student may have been trained, or made faster, before.
    return sc.Pipeline(steps, any_order=True)


def _teacher(steps: list[sc.Transform], name: str | None, device: str) -> Any:
    wanting = [step.label for step in steps if step.needs_teacher]
    if wanting and name is None:
        raise ConfigError(
            f"{wanting[0]} needs a teacher.",
            got="no --teacher",
            expected="the model to imitate, usually the one the student was made from",
            fix="--teacher vit_b.pth, a folder, or a Hub id",
        )
    return load(name, device) if wanting and name else None


def _dry(steps: list[sc.Transform], model: Any, teacher: Any, data: Any) -> Table:
    """Every preset for a few steps on a few images, and what the whole run would take."""
    rows = []
    for step in steps:
        learner: Any = step
        if not hasattr(learner, "plan"):
            continue
        few = dataclasses.replace(learner, steps=TRIED)
        part = data.subset(min(len(data), TRIED * few.batch_size))
        times: dict[str, list[float]] = {}

        def told(event: Event, times: dict[str, list[float]] = times) -> None:
            times.setdefault(event.label, []).append(time.monotonic())

        with tempfile.TemporaryDirectory() as folder:
            _chained([few])(model, data=part, teacher=teacher, workdir=folder, progress=told)
        total = learner.plan(len(data)).steps
        each, image = _spacing(times.get("steps", [])), _spacing(times.get("teacher", []))
        hours = (each * total + image * len(data)) / 3600
        rows.append((step.label, total, round(each, 4), round(image, 4), round(hours, 4)))
    columns = (
        Column("preset", align="left"),
        Column("steps"),
        Column("s a step"),
        Column("s an image, teacher"),
        Column("hours in all"),
    )
    return Table(columns, rows, title=f"dry run: {TRIED} steps of each")


def _spacing(times: list[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def _result(model: Any, count: int) -> Table:
    """Steps and losses of the presets that ran."""
    columns = (
        Column("preset", align="left"),
        Column("steps"),
        Column("skipped"),
        Column("loss before"),
        Column("loss after"),
    )
    names = ("steps", "skipped", "loss_before", "loss_after")
    rows = [
        (step.transform.label, *(step.state.get(name) for name in names))
        for step in sc.lineage(model)[-count:]
    ]
    return Table(columns, rows, title="trained")
