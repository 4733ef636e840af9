"""The verb `train`."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import samcompress as sc

from ..core._progress import Event
from ..core.contract import device_of
from ..core.display import Column, Table
from ..core.errors import ConfigError
from ..evaluate.devices import device as machine
from ..evaluate.memory import Process
from ..evaluate.recipes import recipe
from ._app import INTERRUPTED, Data, Limit
from ._shared import load, opened, say, show

TRIED = 5  # steps of a dry run
ASKED = 16  # images by which masks are compared
PROMPTS = ("box", "point", "clicks-3")
BARS = "▁▂▃▄▅▆▇█"


def train(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help="encoder, 'prompt_loop(epochs=2, lr=1e-4)', or several joined by |; "
            "samcompress list 'distill.*' names them.",
        ),
    ],
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The model to train: as --model of apply.")
    ],
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

    Several processes: accelerate launch --num_processes 2 -m samcompress train ...

    Python: sc.save(sc.distill.Encoder()(student, teacher=teacher, data=data, workdir=w), out)
    """
    steps = _steps(preset)
    if data is None:
        raise typer.BadParameter("--data is needed: images to train on.")
    if out is None and not dry_run:
        raise typer.BadParameter("--out is needed, or --dry-run.")
    _check_teacher(steps, teacher)
    samples, place = opened(data, limit), _own(device)
    model, original = load(student, place), load(teacher, place) if teacher else None
    with _told():
        if dry_run:
            show(_dry(steps, model, original, samples))
            return
        assert out is not None
        work = workdir or out.with_name(f"{out.name}-work")
        try:
            trained = _chained(steps)(model, data=samples, teacher=original, workdir=work)
            if not _first():
                return
            sc.save(trained, out)
            show(_result(trained, len(steps)))
            say(f"saved to {out}; checkpoints and caches in {work} may go\n")
            show(*_compared(model, trained, original, samples))
        except KeyboardInterrupt:
            say(f"Interrupted. Checkpoints are in {work}; run the same command again to go on.")
            raise typer.Exit(INTERRUPTED) from None


def _steps(preset: str) -> list[sc.Transform]:
    """``encoder | prune.mlp`` as ``distill.encoder() | prune.mlp``; a recipe's file as it is."""
    chain = preset
    if not Path(preset).is_file():
        chain = re.sub(r"(^|\|)(\s*)(\w+)(?=\s*(\(|\||$))", r"\1\2distill.\3", preset)
        chain = chain if re.search(r"[(|]", chain) else f"{chain}()"
    steps = list(recipe(chain))
    if not any(_learns(step) for step in steps):
        raise ConfigError(
            "nothing in this chain trains.",
            got=preset,
            expected=", ".join(sc.list_transforms("distill.*")),
            fix="samcompress apply, for chains that need no training",
        )
    return steps


def _learns(step: sc.Transform) -> bool:
    return hasattr(step, "plan")


def _chained(steps: list[sc.Transform]) -> sc.Pipeline:
    # A student may have been trained, or made faster, before.
    return sc.Pipeline(steps, any_order=True)


def _check_teacher(steps: list[sc.Transform], name: str | None) -> None:
    """The student as it came in can teach only what the chain itself makes of it."""
    first = next(step for step in steps if _learns(step))
    wanting = [step.label for step in steps if step.needs_teacher]
    if wanting and name is None and first is steps[0]:
        raise ConfigError(
            f"{wanting[0]} needs a teacher.",
            got="no --teacher",
            expected="the model to imitate, usually the one the student was made from",
            fix="--teacher vit_b.pth, a folder, or a Hub id",
        )


def _first() -> bool:
    """Whether this is the process, of several, that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _own(device: str) -> str:
    """Of several GPUs the one of this process."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local else device


@contextmanager
def _told() -> Iterator[None]:
    """What training logs, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    names = ("fit", "distill") if _first() else ()
    loggers = [logging.getLogger(f"samcompress.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _dry(steps: list[sc.Transform], model: Any, teacher: Any, data: Any) -> Table:
    """Every preset for a few steps on a few images, and what the whole run would take."""
    teacher, rows = teacher or model, []
    for step in steps:
        learner: Any = step
        if not _learns(step):
            model = _chained([step])(model, data=data)
            continue
        few = dataclasses.replace(learner, steps=TRIED)
        part = data.subset(min(len(data), TRIED * few.batch_size))
        times: dict[str, list[float]] = {}

        def told(event: Event, times: dict[str, list[float]] = times) -> None:
            times.setdefault(event.label, []).append(time.monotonic())

        gpu, own = machine(device_of(model)), Process()
        gpu.reset_peak()
        with tempfile.TemporaryDirectory() as folder:
            _chained([few])(model, data=part, teacher=teacher, workdir=folder, progress=told)
        held = (gpu.memory() or {"peak_mb": own.peak_mb()})["peak_mb"]
        plan = learner.plan(len(data))
        each, image = _spacing(times.get("steps", [])), _spacing(times.get("teacher", []))
        whole = datetime.timedelta(seconds=math.ceil(each * plan.steps + image * len(data)))
        rows.append((step.label, plan.steps, each, image or None, str(whole), held / 1024))
    columns = (
        Column("preset", align="left"),
        Column("steps"),
        Column("step", "s"),
        Column("teacher", "s/image"),
        Column("in all", "h:mm:ss"),
        Column("memory", "GiB"),
    )
    return Table(columns, rows, title=f"dry run: {TRIED} steps of each")


def _spacing(times: Sequence[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def _result(model: Any, count: int) -> Table:
    """What the presets that ran made of their losses."""
    rows = []
    for step in sc.lineage(model)[-count:]:
        learner: Any = step.transform
        if not _learns(learner):
            continue
        state = step.state
        # One preset scales its rate by the batch, and says so.
        rate = state.get("lr", learner.lr)
        facts = [state[name] for name in ("skipped", "loss_before", "loss_after")]
        run = (learner.label, state["steps"], learner.batch_size, rate, *facts)
        rows.append((*run, _bars(state["curve"])))
    columns = (
        Column("preset", align="left"),
        Column("steps"),
        Column("batch"),
        Column("rate"),
        Column("skipped"),
        Column("loss before"),
        Column("loss after"),
        Column("curve", align="left"),
    )
    return Table(columns, rows, title="trained")


def _bars(values: Sequence[float], width: int = 10) -> str:
    """A curve in a line of text, in at most `width` means, on a logarithmic scale."""
    each = max(1, math.ceil(len(values) / width))
    parts = [values[i : i + each] for i in range(0, len(values), each)]
    logs = [math.log(max(sum(p) / len(p), 1e-12)) for p in parts]
    low = min(logs, default=0.0)
    span = max(logs, default=0.0) - low or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in logs)


def _compared(before: Any, after: Any, teacher: Any, data: Any) -> list[Table]:
    """Masks before and after, beside the truth and the teacher's; none without objects."""
    part = data.subset(min(len(data), ASKED))
    if not any(not i.crowd for sample in part for i in sample.instances):
        return []
    models = [before, after] if teacher is None else [before, after, teacher]
    found = [sc.evaluate.accuracies(m, part, PROMPTS, keep_masks=True) for m in models]
    names = ["before", "after"]
    if teacher is not None:
        names += ["teacher", "agreement before", "agreement after"]
    columns = (Column("prompt", align="left"), *map(Column, names))
    rows = []
    for prompt, *results in zip(PROMPTS, *found, strict=True):
        like = (
            [sc.evaluate.agreement(a, results[2]) for a in results[:2]]
            if teacher is not None
            else []
        )
        rows.append((prompt, *(r.miou for r in results), *like))
    notes = (
        f"Mean IoU on {len(part)} of the training images; samcompress bench measures on others.",
        *(["Agreement is that with the teacher's masks."] if teacher is not None else []),
    )
    return [Table(columns, rows, title="masks", notes=notes)]
