"""Multi-objective search over chains of techniques, which goes on after a kill at any moment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core._progress import Progress, ProgressLike
from ..core._require import require
from ..core.budget import Limit
from ..core.data import Dataset, Sample
from ..core.errors import ConfigError
from ._chains import BASE, Bench, Row
from ._trials import Trials
from .latency import Rounds
from .space import Space
from .study import OBJECTIVES, Study, excess, limits, spent
from .sweep import check_objectives, facts, opened


def search(
    space: Space | Mapping[str, Any] | str | Path | None,
    budget: str | Sequence[str],
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    *,
    calibration: Dataset | Sequence[Sample] | None = None,
    objectives: Sequence[str] = OBJECTIVES,
    chains: int = 32,
    seconds: float | None = None,
    singles: bool = True,
    seed: int = 0,
    storage: Any = None,
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
    """Search for chains that no other chain beats: fast and small on one side, good on the other.

    Every technique is tried by itself first, then combinations that Optuna's TPE sampler proposes.
    Every chain that can be made is one row of an ordinary result file. What a technique refuses is
    counted and shown, and tells the sampler to look elsewhere. A chain is never measured twice.

    With `out` the search goes on where it was, after Ctrl-C, a crash or a kill: make the same call
    again, with more `chains` to search further. Several processes or machines of one kind that
    reach the same folder share one search: make the same call on each.

    Args:
        space: what may be tried: a `Space`, its dictionary or JSON file; None for
            ``Space.default(model)``.
        budget: limits that all chains of the front keep, e.g. ``"latency_ms<=50 on cpu"``, several
            in a list, or none as ``()``. Quantities are those of `core.budget.MEASURED`. A chain
            beyond its parameters or macs is not measured; one beyond another limit is, and is not
            in the running.
        model: a SAM; not changed.
        data: images with masks, to measure on.
        calibration: other images, for techniques that look at some.
        objectives: what the front is made of: costs as `plots.pareto` takes them, and accuracies.
        chains: stop when so many were measured.
        seconds: begin no further chain after so long.
        singles: begin with every technique by itself, with as many as half of `chains`.
        seed: of what is proposed.
        storage: an Optuna storage or its URL; by default a journal file in `out`.
        base: what tables call the model.
        device: where to measure.
        prompts: how objects are asked for.
        latency: measure it.
        memory: measure it, in a process of its own for each chain.
        rounds: how often calls are repeated; few if left out.
        threads: CPU threads inside an operator for speed and memory.
        out: folder for ``results.json``, ``front.png``, recipes, rows and the journal.
        progress: True for bars, False for silence, a callable for events.
        protocol: choice, feedback, include_crowd, min_area, average, seed of `accuracy`.

    Raises:
        ConfigError: if budget, space or objectives make no sense, or `out` or `storage` holds a
            search of other conditions.
        MissingDependencyError: if Optuna is not installed.
        ModelError: if the model is no SAM, or cannot be measured.

    Source:
        Optuna: T. Akiba et al., 2019, arXiv 1907.10902 (MIT). Several objectives in TPE: Y. Ozaki
        et al., 2020, doi 10.1145/3377930.3389817.

    Example:
        >>> import samcompress as sc
        >>> sam = sc.build("tiny")
        >>> study = search(
        ...     Space.parse("prune.mlp(ratio={0.25, 0.5, 0.75}, criterion='magnitude')"),
        ...     "parameters<=90%",
        ...     sam,
        ...     sc.shapes(1),
        ...     objectives=("gmacs", "miou"),
        ...     latency=False,
        ...     progress=False,
        ... )
        >>> len(study.rows)
        3
    """
    require("optuna", extra="search", purpose="sc.evaluate.search")
    wanted = limits(budget, device, memory=memory, latency=latency)
    whole = _space(space, model, calibration is not None)
    if chains < 1:
        raise ConfigError("chains is out of range.", got=chains, expected="at least 1")
    until = None if seconds is None else time.monotonic() + seconds
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
        trials = Trials(bench, whole, wanted, tuple(objectives), seed=seed, storage=storage)
        trials.resume(singles=chains // 2 if singles else 0)
        for _ in Progress(progress, "search").track(
            _more(trials, chains, until), label="chains", total=max(0, chains - trials.measured())
        ):
            pass
        study = _study(bench, trials, whole, wanted, objectives)
        if out is not None:
            study.save(folder)
    return study


def _more(trials: Trials, chains: int, until: float | None) -> Iterator[None]:
    """Try until so many chains are measured, time is up, or nothing new is found any more."""
    while trials.measured() + trials.running() < chains and not trials.exhausted():
        if until is not None and time.monotonic() > until:
            return
        if trials.one():
            yield


def _space(space: Any, model: nn.Module, calibration: bool) -> Space:
    if space is None:
        return Space.default(model, calibration=calibration)
    if isinstance(space, Mapping):
        return Space.from_dict(dict(space))
    return Space.load(space) if isinstance(space, (str, Path)) else _checked(space)


def _checked(space: Any) -> Space:
    if not isinstance(space, Space):
        raise ConfigError(
            "this is no space.", got=repr(space), expected="a Space, a dictionary, a JSON file"
        )
    return space


def _study(
    bench: Bench, trials: Trials, space: Space, budget: Sequence[Limit], objectives: Sequence[str]
) -> Study:
    rows, refused, elsewhere = trials.found()
    about = facts("search", bench, objectives, [str(limit) for limit in budget], refused)
    about.update(
        space=space.to_dict(),
        trials=trials.counts(),
        elsewhere=elsewhere,
        seed=trials.seed,
    )
    doc = bench.document(rows, about)
    doc["rows"] = [_marked(row, budget, bench.base) for row in doc["rows"]]
    return Study(doc)


def _marked(row: Row, budget: Sequence[Limit], base: Row) -> Row:
    """A row that tells what of the budget it is beyond; the base too, as there is one beside it."""
    costs = [(limit, spent(limit, row)) for limit in budget]
    beyond = [str(k) for k, cost in costs if cost is not None and excess(k, cost, base) > 0]
    return {**row, "beyond_budget": ", ".join(beyond)} if beyond else row
