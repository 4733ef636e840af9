"""Every chain of a grid, measured beside one model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..core._progress import Progress, ProgressLike
from ..core.data import Dataset, Sample
from ..core.errors import ConfigError, SamCompressError
from ..core.history import lineage, step_dict
from ..core.pipeline import Pipeline
from ..core.transform import Transform
from ._chains import BASE, Bench, Refused, RefusedError, Row, one_line
from .latency import Rounds
from .recipes import recipe
from .space import Plan, Space, build
from .study import OBJECTIVES, Study

Chain = Pipeline | Transform | str | Path
Grid = Space | Chain | Sequence[Chain | Space] | Mapping[str, Chain]


def sweep(
    grid: Grid,
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    *,
    calibration: Dataset | Sequence[Sample] | None = None,
    objectives: Sequence[str] = OBJECTIVES,
    base: str = BASE,
    device: str = "cpu",
    prompts: Sequence[str] = ("box", "point"),
    latency: bool = True,
    memory: bool = False,
    rounds: Rounds | int | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    progress: ProgressLike = True,
    **protocol: Any,
) -> Study:
    """Measure every chain of a grid: each is a row of an ordinary result file, beside the base.

    With `out` each finished row is kept; the same call after a crash or a kill goes on from there.
    A chain that a technique refuses is counted and shown, and the others go on.

    Args:
        grid: a chain in one line with braces around values to choose from, as
            ``"prune.mlp(ratio={0.25, 0.5}) | quantize.int8_weights"``; a `Space`; a chain, recipe
            file or shipped recipe; several of these; or chains by the names they get in tables.
        model: a SAM; not changed.
        data: images with masks, to measure on.
        calibration: other images, for techniques that look at some.
        objectives: what the front is made of; costs as `plots.pareto` takes them, and accuracies.
        base: what tables call the model.
        device: where to measure.
        prompts: how objects are asked for.
        latency: measure it.
        memory: measure it, in a process of its own for each chain.
        rounds: how often calls are repeated; few if left out.
        threads: CPU threads inside an operator for speed and memory.
        out: folder for ``results.json``, ``front.png``, recipes and rows.
        progress: True for bars, False for silence, a callable for events.
        protocol: choice, feedback, include_crowd, min_area, average, seed of `accuracy`.

    Raises:
        ConfigError: if the grid is not understood or has no end, or `out` holds rows of other
            conditions; and as for `benchmark`.
        ModelError: if the model is no SAM, or cannot be measured.

    Example:
        >>> import samcompress as sc
        >>> study = sweep(
        ...     "prune.mlp(ratio={0.25, 0.5}, criterion='magnitude')",
        ...     sc.build("tiny"),
        ...     sc.shapes(1),
        ...     objectives=("gmacs", "miou"),
        ...     latency=False,
        ...     progress=False,
        ... )
        >>> [row["name"] for row in study.rows]
        ['base', 'mlp 0.25 magnitude', 'mlp 0.5 magnitude']
    """
    plans = list(_plans(grid))
    with opened(out) as folder:
        bench = Bench(
            model,
            data,
            calibration=calibration,
            folder=folder,
            base=base,
            progress=progress,
            settings={
                "devices": (device,),
                "prompts": tuple(prompts),
                "latency": latency,
                "memory": memory,
                "rounds": rounds,
                "threads": threads,
                **protocol,
            },
        )
        check_objectives(objectives, bench.base)
        rows: list[Row] = []
        refused: list[Refused] = []
        for name, plan in Progress(progress, "sweep").track(plans, label="chains"):
            found = _one(bench, plan, name)
            if isinstance(found, Refused):
                refused.append(found)
            elif found["name"] not in {row["name"] for row in rows}:
                rows.append(found)
                if found["status"] != "measured":
                    refused.append(refusal(found, "not measured", str(found["reason"])))
        study = Study(bench.document(rows, facts("sweep", bench, objectives, [], refused)))
        if out is not None:
            study.save(folder)
    return study


def _one(bench: Bench, plan: Pipeline | Plan, wanted: str | None) -> Row | Refused:
    try:
        chain = plan if isinstance(plan, Pipeline) else build(plan)
    except SamCompressError as err:
        made = [] if isinstance(plan, Pipeline) else plan
        steps = [{"type": kind, "params": params} for kind, params in made]
        name = " + ".join(kind for kind, _ in made) or "no step"
        return Refused(name, tuple(steps), "refused", one_line(err))
    name = bench.called(chain, wanted)
    row = bench.known(chain)
    if row is not None:
        return {**row, "name": name}
    try:
        return bench.measure(chain, bench.make(chain), name)
    except RefusedError as err:
        steps = [step_dict(step) for step in chain]
        return Refused(name, tuple(steps), err.outcome, str(err))


def _plans(grid: Grid) -> Iterator[tuple[str | None, Pipeline | Plan]]:
    """Names and chains, of spaces the steps only: they may refuse to stand in one chain."""
    if isinstance(grid, Mapping):
        for name, chain in grid.items():
            for _, plan in _plans(chain):
                yield name, plan
    elif isinstance(grid, Space):
        for decisions in grid.grid():
            yield None, grid.plan(lambda name, _, made=decisions: made[name])  # type: ignore[misc]
    elif isinstance(grid, Pipeline):
        yield None, grid
    elif isinstance(grid, Transform):
        yield None, Pipeline([grid])
    elif isinstance(grid, (str, Path)):
        space = _space(grid)
        yield from [(None, recipe(grid))] if space is None else _plans(space)
    elif isinstance(grid, Sequence) and grid:
        for part in grid:
            yield from _plans(part)
    else:
        raise ConfigError(
            "this is no grid of chains.",
            got=repr(grid),
            expected='"prune.mlp(ratio={0.25, 0.5})", a Space, or a list of chains',
        )


def _space(text: str | Path) -> Space | None:
    """The space that a text is, or that a file holds; None where it is a chain."""
    path = Path(text)
    if path.suffix == ".json" and path.is_file() and '"slots"' in path.read_text(encoding="utf-8"):
        return Space.load(path)
    return Space.parse(str(text)) if "{" in str(text) else None


def check_objectives(objectives: Sequence[str], base: Row) -> None:
    """See that a base has a number for each objective.

    Raises:
        ConfigError: if there is no such measure, or none of the base.
    """
    from .measures import measure

    if isinstance(objectives, str) or not objectives:
        raise ConfigError(
            "objectives is a list.", got=repr(objectives), expected='("latency_ms", "miou")'
        )
    for name in objectives:
        if measure(name, [base]).read(base)[0] is None:
            raise ConfigError(
                f"the objective {name} was not measured.",
                got=(base.get("missing") or {}).get(name) or "no such measurement of the base",
                fix="ask for it with latency=True or memory=True, or leave it out",
            )


def facts(
    kind: str, bench: Bench, objectives: Sequence[str], budget: list[str], refused: list[Refused]
) -> Row:
    """The part of a result document that makes it a study."""
    return {
        "kind": kind,
        "objectives": list(objectives),
        "budget": budget,
        "calibration": bench.about_calibration(),
        "steps_before": len(lineage(bench.model)),
        "refused": [item.to_dict() for item in refused],
    }


def refusal(row: Row, outcome: str, reason: str) -> Refused:
    """A row that is not in the running."""
    steps = (row.get("recipe") or {}).get("steps", [])
    return Refused(row["name"], tuple(steps), outcome, reason)


@contextmanager
def opened(out: str | Path | None) -> Iterator[Path]:
    """The folder, or one that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="samcompress-") as folder:
        yield Path(folder)
