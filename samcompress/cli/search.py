"""The verbs `sweep`, `search` and `leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.display import Column, Table
from ..core.figures import png
from ..core.files import write_whole
from ..evaluate.leaderboard import leaderboard as merge
from ..evaluate.search import search as search_for
from ..evaluate.space import NONE, Space
from ..evaluate.study import Study
from ..evaluate.sweep import sweep as sweep_over
from ._app import INTERRUPTED, Calibration, Json, Limit, Model, app
from ._shared import load, opened, say, show

Out = Annotated[Path, typer.Option(help="Folder for results, recipes, picture; resumed from.")]
Samples = Annotated[str, typer.Option(help="As for apply.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Prompts = Annotated[str, typer.Option(help="box, point, clicks-3, random-3, ...")]
Objectives = Annotated[
    str, typer.Option(help="Costs such as latency_ms, size_mb, gmacs; accuracies such as miou:box.")
]
Calls = Annotated[int | None, typer.Option("--rounds", help="Exactly N timed calls.", min=1)]
Threads = Annotated[int | None, typer.Option(help="CPU threads for times.", min=1)]
Memory = Annotated[bool, typer.Option("--memory", help="Measure it too, in fresh processes.")]
Page = Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")]
Published = Annotated[
    str, typer.Option(help="Models whose published figures are laid over pictures: mobile_sam,...")
]


@app.command()
def sweep(
    grid: Annotated[
        list[str],
        typer.Argument(help="'prune.mlp(ratio={0.25, 0.5}) | quantize.int8_weights', recipes, ..."),
    ],
    model: Model,
    data: Samples,
    out: Out,
    calibration: Calibration = None,
    limit: Limit = None,
    objectives: Objectives = "latency_ms,miou",
    device: Device = "cpu",
    prompts: Prompts = "box,point",
    rounds: Calls = None,
    threads: Threads = None,
    memory: Memory = False,
    html: Page = None,
    published: Published = "",
    to_json: Json = None,
) -> None:
    """Measure every chain of a grid beside the model; the same command again goes on.

    Python: sc.evaluate.sweep(grid, sc.load(model), data, out=out)
    """
    sam, samples, seen = load(model, device), opened(data, limit), opened(calibration)

    def run() -> Study:
        return sweep_over(
            grid,
            sam,
            samples,
            calibration=seen,
            objectives=_words(objectives),
            device=device,
            prompts=_words(prompts),
            rounds=rounds,
            threads=threads,
            memory=memory,
            out=out,
        )

    study = _interruptible(run, out)
    _write(study, out, html, _words(published), sam, samples, seen, to_json)


@app.command()
def search(
    model: Model,
    data: Samples,
    out: Out,
    space: Annotated[
        Path | None, typer.Option(help="A space as JSON; by default all that needs no training.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="'latency_ms<=50 on cpu', 'size_mb<=50%', ...; may be repeated."),
    ] = None,
    calibration: Calibration = None,
    limit: Limit = None,
    objectives: Objectives = "latency_ms,miou",
    chains: Annotated[int, typer.Option(help="Stop when so many were measured.", min=1)] = 32,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no further chain after so long.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is proposed.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="URL of an Optuna storage; a journal in --out by default.")
    ] = None,
    device: Device = "cpu",
    prompts: Prompts = "box,point",
    rounds: Calls = None,
    threads: Threads = None,
    memory: Memory = False,
    html: Page = None,
    published: Published = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space, write it to OUT/space.json.")
    ] = False,
    to_json: Json = None,
) -> None:
    """Search for chains that no other one beats; the same command again, also elsewhere, goes on.

    Python: sc.evaluate.search(space, budget, sc.load(model), data, out=out)
    """
    sam, samples, seen = load(model, device), opened(data, limit), opened(calibration)
    whole = Space.load(space) if space else Space.default(sam, calibration=seen is not None)
    if dry_run:
        whole.save(out / "space.json")
        show(*_space_tables(whole), to_json=to_json)
        say(f"written to {out / 'space.json'}: edit it, and give it as --space")
        return

    def run() -> Study:
        return search_for(
            whole,
            budget or (),
            sam,
            samples,
            calibration=seen,
            objectives=_words(objectives),
            chains=chains,
            seconds=None if minutes is None else 60 * minutes,
            seed=seed,
            storage=storage,
            device=device,
            prompts=_words(prompts),
            rounds=rounds,
            threads=threads,
            memory=memory,
            out=out,
        )

    study = _interruptible(run, out)
    _write(study, out, html, _words(published), sam, samples, seen, to_json)


@app.command()
def leaderboard(
    files: Annotated[list[Path], typer.Argument(help="Result files, or folders of studies.")],
    html: Page = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the Pareto picture of the first machine (PNG).")
    ] = None,
    to_json: Json = None,
) -> None:
    """Merge results of several files and machines: a table for each machine.

    Python: sc.evaluate.leaderboard("a.json", "b.json")
    """
    board = merge(*files)
    show(*(board.table(machine) for machine in board.machines), to_json=to_json)
    if html is not None:
        board.html(html)
        say(f"page: {html}")
    if picture is not None:
        write_whole(picture, png(board.pareto(board.machines[0])))
        say(f"picture: {picture}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _interruptible(run: Any, out: Path) -> Study:
    try:
        study: Study = run()
    except KeyboardInterrupt:
        say(f"Interrupted. Finished chains are in {out}; run the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from None
    return study


def _write(
    study: Study,
    out: Path,
    html: Path | None,
    published: list[str],
    sam: Any,
    samples: Any,
    seen: Any,
    to_json: str | None,
) -> None:
    """Tables, files, and the page with the worst masks of the front drawn again."""
    show(study.table(), *([study.refusals()] if study.refused else []), to_json=to_json)
    say(f"results, picture and recipes: {out}")
    if html is not None:
        names = {worst.name for worst in study.worst()}
        models = {n: study.recipe(n)(sam, data=seen, progress=False) for n in names}
        models[study.base["name"]] = sam
        study.html(html, data=samples, models=models, published=published)
        say(f"report: {html}")
    if published:
        write_whole(out / "front.png", png(study.pareto(published=published)))


def _space_tables(space: Space) -> list[Table]:
    slots = [
        (
            slot.name if option is slot.options[0] else "",
            option.type,
            ", ".join(
                f"{k}: {_domain(v.to_dict()) if k in option.domains() else v}"
                for k, v in option.params.items()
            ),
            NONE if slot.optional and option is slot.options[0] else "",
        )
        for slot in space.slots
        for option in slot.options
    ]
    columns = (
        Column("slot", align="left"),
        Column("technique", align="left"),
        Column("settings", align="left"),
        Column("or", align="left"),
    )
    why = (Column("technique", align="left"), Column("why it is not tried", align="left"))
    found = [Table(columns, slots, title="space")]
    return [*found, Table(why, list(space.left_out.items()))] if space.left_out else found


def _domain(found: dict[str, Any]) -> str:
    if "choices" in found:
        return " | ".join(map(str, found["choices"]))
    step = f", steps of {found['step']:g}" if "step" in found else ""
    return f"{found['low']:g} to {found['high']:g}{step}"
