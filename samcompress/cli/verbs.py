"""All verbs but `train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import samcompress as sc

from ..core.errors import ConfigError
from ..core.files import write_whole
from ..evaluate import catalog as listing
from ..evaluate import demo as demonstration
from ..evaluate.recipes import preflight, recipe
from ._app import (
    INTERRUPTED,
    Calibration,
    Data,
    Json,
    Limit,
    Model,
    Models,
    Recipe,
    Size,
    app,
    recipes,
)
from ._shared import load, named, opened, say, show, show_preflight, source_of, write_report
from .train import train


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcards, e.g. 'prune.*'.")] = "*",
    to_json: Json = None,
) -> None:
    """List techniques, architectures, recipes and published models.

    Python: sc.list_transforms(), sc.ARCHITECTURES, sc.list_recipes(), sc.list_models()
    """
    show(*listing.catalog(pattern), to_json=to_json)


@app.command()
def info(
    name: Annotated[
        str,
        typer.Argument(help="prune.mlp, mobile_sam, small.json, or a saved model's folder."),
    ],
    to_json: Json = None,
) -> None:
    """Show a technique's card, a published model's facts, a recipe's steps, a model's history.

    Python: help(type(sc.get(name))), sc.model_info(name), sc.Pipeline.load(name), sc.lineage(model)
    """
    text, tables = listing.describe(name)
    if to_json != "-":
        print(text, end="\n\n")
    show(*tables, to_json=to_json)


@recipes.command("list")
def recipe_list(to_json: Json = None) -> None:
    """List the recipes that ship with the package.

    Python: sc.list_recipes()
    """
    show(listing.catalog()[2], to_json=to_json)


@recipes.command("cp")
def recipe_cp(name: str, file: Path) -> None:
    """Copy a shipped recipe to a file, to be edited.

    Python: sc.Pipeline.load(name).save(file)
    """
    if file.exists():
        raise ConfigError("the file is there already.", got=str(file), fix="give another name")
    write_whole(file, listing.recipe_text(name).encode())
    print(file)


@recipes.command("check")
def recipe_check(
    file: Recipe, model: Model = "tiny", data: Data = None, to_json: Json = None
) -> None:
    """Check a recipe, and how it fits a model.

    Python: sc.Pipeline.load(file).check(sc.load(model), data=data)
    """
    show_preflight(preflight(recipe(file), load(model), data=opened(data)), to_json)


@app.command()
def apply(
    chain: Recipe,
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder for the new model.")] = None,
    data: Data = None,
    limit: Limit = None,
    image_size: Size = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    workdir: Annotated[
        Path | None, typer.Option(help="Caches and checkpoints; a training resumes from here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all steps, run none.")] = False,
    to_json: Json = None,
) -> None:
    """Apply a recipe to a model and save the result.

    Python: sc.save(sc.Pipeline.load(recipe)(sc.load(model), data=sc.data.open(data)), out)
    """
    pipeline = recipe(chain, image_size=image_size)
    sam, samples = load(model, device), opened(data, limit)
    if dry_run:
        show_preflight(preflight(pipeline, sam, data=samples), to_json)
    elif out is None:
        raise typer.BadParameter("--out is needed, or --dry-run.")
    else:
        sc.save(pipeline(sam, data=samples, workdir=workdir), out)
        show(*listing.describe(out)[1][:2], to_json=to_json)
        say(f"saved to {out}; next: samcompress bench {model} {out} --data ...")


app.command()(train)


@app.command()
def bench(
    models: Models,
    data: Annotated[str, typer.Option(help="As for apply.")],
    device: Annotated[str, typer.Option(help="One or several: cpu,cuda,mps,edge-tpu.")] = "cpu",
    prompts: Annotated[
        str | None,
        typer.Option(help="box, point, clicks-3, random-3, ...; box,point without --preset."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Protocols of papers' tables: edgesam-box,sam-click, ...")
    ] = None,
    detections: Annotated[
        Path | None, typer.Option(help="A detector's boxes (COCO's result JSON), for AP of masks.")
    ] = None,
    everything: Annotated[
        int | None,
        typer.Option(help="Segment everything by a grid of N x N points, for AR@1000.", min=1),
    ] = None,
    limit: Limit = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few timed calls, no memory.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Exactly N timed calls.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for times.", min=1)] = None,
    processes: Annotated[
        int | None, typer.Option(help="Time in N new processes, at least 5, for intervals.", min=1)
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="Also exported: onnxruntime,openvino:int8; or all.")
    ] = None,
    calibration: Calibration = None,
    energy: Annotated[bool, typer.Option("--energy", help="Joules of an image.")] = False,
    on: Annotated[
        str | None, typer.Option(help="Another machine: ssh:me@pi, or 'cmd:COMMAND'.")
    ] = None,
    to_json: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the Pareto picture (PNG).")] = None,
) -> None:
    """Measure models: accuracy, size, speed, memory. The first is the base.

    With --json FILE each finished row is kept; the same command again goes on from there.

    Python: sc.evaluate.benchmark({"base": base, ...}, data, out="r.json").html("r.html")
    """
    sources, samples = named(models), opened(data, limit)
    file = None if to_json in (None, "-") else to_json
    often = sc.evaluate.Rounds.quick() if quick else sc.evaluate.Rounds()
    often = sc.evaluate.Rounds.exactly(rounds) if rounds else often
    try:
        report = sc.evaluate.benchmark(
            {name: source_of(source) for name, source in sources.items()},
            samples,
            prompts=prompts.split(",") if prompts else None,
            presets=preset.split(",") if preset else (),
            detections=detections,
            everything=everything,
            devices=device.split(","),
            rounds=replace(often, processes=processes or 1),
            memory=not quick,
            energy=energy,
            backends=backends.split(",") if backends else (),
            calibration=opened(calibration),
            on=on,
            threads=threads,
            out=file,
        )
    except KeyboardInterrupt:
        kept = f"Finished rows are in {file}; run the same command again to go on."
        lost = "Nothing was kept; --json FILE keeps finished rows."
        say(f"Interrupted. {kept if file else lost}")
        raise typer.Exit(INTERRUPTED) from None
    if to_json == "-":
        print(report.json(), end="")
    else:
        show(*(report.table(name) for name in report.devices))
    write_report(report, html, picture, samples, sources)


@app.command()
def compare(first: Path, second: Path, to_json: Json = None) -> None:
    """Compare two results of the same data and conditions, object by object.

    Python: sc.evaluate.compare(first, second)
    """
    show(sc.evaluate.compare(first, second).table(), to_json=to_json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="As --model of apply.")],
    to: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    backend: Annotated[str, typer.Option(help="The runtime.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of the image encoder.")] = "float32",
    data: Data = None,
) -> None:
    """Export both halves, reload them, compare them with PyTorch.

    Python: sc.save(sc.compile.Export(backend=backend)(sc.load(model)), to)
    """
    step = sc.get("compile.export", backend=backend, precision=precision)
    exported = step(load(model), data=opened(data))
    sc.save(exported, to)
    state = sc.lineage(exported)[-1].state
    if state.get("unchecked"):
        print(f"exported to {to}; not compared with PyTorch: {state['unchecked']}")
        return
    errors = ", ".join(f"{name} {value:.2g}" for name, value in state["errors"].items())
    print(f"exported to {to}, reloaded and compared with PyTorch")
    print(f"largest relative difference: {errors} (allowed: {state['tolerance']:.2g})")


@app.command()
def doctor(to_json: Json = None) -> None:
    """Check versions, devices and backends; say what mends each fault.

    Python: sc.evaluate.doctor()
    """
    checks = sc.evaluate.doctor()
    show(listing.health(checks), to_json=to_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("samcompress-demo"),
) -> None:
    """Compress and measure the shipped model by several chains; offline, about a minute.

    Python: samcompress.evaluate.demo.demo(out)
    """
    done = demonstration.demo(out, say=say)
    show(done.report.table())
    print(f"\nWritten: {', '.join(map(str, done.files))}\n\n{demonstration.NEXT}")
