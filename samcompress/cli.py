"""The command line; each verb is one Python call, which its ``--help`` shows.

Exit codes: 0 done, 1 an error of ours (one message), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.text
import typer
from typer.core import TyperGroup

import samcompress as sc

from .core.build import ARCHITECTURES
from .core.display import Table
from .core.errors import ConfigError, SamCompressError
from .core.files import write_whole
from .core.load import SHIPPED
from .evaluate import catalog as listing
from .evaluate import demo as demonstration
from .evaluate.plots import png
from .evaluate.recipes import preflight, recipe

INTERRUPTED = 130


class Verbs(TyperGroup):
    """Turns our errors into one message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Verbs in the order they are written below, which is the order one meets them."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except SamCompressError as err:
            if ctx.params.get("debug"):
                raise
            say(f"{type(err).__name__}: {err}")
            raise typer.Exit(1) from err
        except KeyboardInterrupt:
            say("Interrupted; nothing half-written was left behind.")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Verbs,
    help="Make Segment Anything Models small and fast, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
recipes = typer.Typer(help="Ready chains, to copy and edit.", no_args_is_help=True)
app.add_typer(recipes, name="recipe", rich_help_panel=None)

Model = Annotated[
    str,
    typer.Option(
        help="tiny, a .pth or .safetensors file, a folder, a Hub id; vit_b:random for random "
        "weights, vit_b:random@image_size=512 for other sizes."
    ),
]
Models = Annotated[
    list[str], typer.Argument(help="The base, then the others; as --model of apply.")
]
Data = Annotated[
    str | None,
    typer.Option(help="COCO root (PATH@val2017), SA-1B, masks folder, or shapes:64@seed=1."),
]
Limit = Annotated[int | None, typer.Option(help="Use only the first N images.", min=1)]
Size = Annotated[int | None, typer.Option(help="Change the model's input side first.", min=1)]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write as JSON; - for standard output.")
]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A file, the name of a shipped recipe, or 'prune.mlp(ratio=0.5) | attention.fused'.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(sc.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options that stand before a verb."""


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcards, e.g. 'prune.*'.")] = "*",
    to_json: Json = None,
) -> None:
    """List techniques, architectures and recipes.

    Python: sc.list_transforms(pattern), sc.ARCHITECTURES, sc.list_recipes()
    """
    show(*listing.catalog(pattern), to_json=to_json)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="prune.mlp, small.json, or a saved model's folder.")],
    to_json: Json = None,
) -> None:
    """Show a technique's card, a recipe's steps, or a model's history and hashes.

    Python: help(type(sc.get(name))), sc.Pipeline.load(name), sc.lineage(sc.load(folder))
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


@app.command()
def bench(
    models: Models,
    data: Annotated[str, typer.Option(help="As for apply.")],
    device: Annotated[str, typer.Option(help="One or several: cpu,cuda.")] = "cpu",
    prompts: Annotated[str, typer.Option(help="box, point, clicks-3, random-3, ...")] = "box,point",
    limit: Limit = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few timed calls, no memory.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads for times.", min=1)] = None,
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
    try:
        report = sc.evaluate.benchmark(
            {name: source_of(source) for name, source in sources.items()},
            samples,
            prompts=prompts.split(","),
            devices=device.split(","),
            rounds=sc.evaluate.Rounds.quick() if quick else None,
            memory=not quick,
            threads=threads,
            out=file,
        )
    except KeyboardInterrupt:
        kept = f"Finished rows are in {file}; run the same command again to go on."
        say(
            f"Interrupted. {kept if file else 'Nothing was kept; --json FILE keeps finished rows.'}"
        )
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
) -> None:
    """Export both halves, reload them, compare them with PyTorch.

    Python: sc.save(sc.compile.Export(backend=backend)(sc.load(model)), to)
    """
    exported = sc.get("compile.export", backend=backend)(load(model))
    sc.save(exported, to)
    state = sc.lineage(exported)[-1].state
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


# --- what the verbs share ---


def say(text: str) -> None:
    """A line for the person, kept apart from the output."""
    print(text, file=sys.stderr, flush=True)


def show(*tables: Table, to_json: str | None = None) -> None:
    """Print tables, the flagged cells in red, or their values as JSON."""
    if to_json is not None:
        values = [{"title": t.title, "rows": t.records(), "notes": list(t.notes)} for t in tables]
        text = json.dumps(values[0] if len(values) == 1 else values, indent=1, default=str)
        if to_json == "-":
            print(text)
            return
        write_whole(Path(to_json), f"{text}\n".encode())
    console = rich.console.Console(highlight=False, soft_wrap=True)
    for table in tables:
        shown = rich.text.Text(f"{table.text()}\n" if table is not tables[-1] else table.text())
        shown.highlight_regex(r"! \S+", "bold red")
        console.print(shown)


def show_preflight(table: Table, to_json: str | None) -> None:
    """Print it; exit 1 unless every step is ready."""
    show(table, to_json=to_json)
    if any(row["ready"] != "yes" for row in table.records()):
        raise typer.Exit(1)


def opened(data: str | None, limit: int | None = None) -> Any:
    """The data of a ``--data`` option."""
    if data is None:
        return None
    found = sc.data.open(data)
    return found if limit is None else found.subset(limit)


def load(source: str, device: str = "cpu") -> Any:
    """A model by what the user typed."""
    found = source_of(source)
    return sc.load(found, device) if isinstance(found, str) else found.to(device)


def source_of(source: str) -> Any:
    """``vit_b:random@image_size=512`` as a model of random weights; anything else as it is."""
    name, random, sizes = source.partition(":random")
    if not random and source in ARCHITECTURES and source not in SHIPPED:
        raise ConfigError(
            f"{source} names an architecture, which has no weights.",
            expected="a checkpoint, a folder, or a Hub id such as facebook/sam-vit-base",
            fix=f"{source}:random for random weights",
        )
    if not random:
        return source
    try:
        fields = [word.split("=") for word in sizes.removeprefix("@").split(",") if word]
        values = {key: json.loads(value) for key, value in fields}
    except ValueError as err:
        raise ConfigError(
            "these sizes are not understood.", got=source, expected="vit_b:random@image_size=512"
        ) from err
    say(f"{source}: random weights, of use for times and sizes only")
    return sc.build(name, **values)


def named(models: Sequence[str]) -> dict[str, str]:
    """Models by the names tables use: the last part of a path, numbered where two are alike."""
    found: dict[str, str] = {}
    for source in models:
        name = Path(source).name if Path(source).exists() else source
        alike = sum(name == other.partition(" (")[0] for other in found)
        found[f"{name} ({alike + 1})" if alike else name] = source
    return found


def write_report(
    report: sc.evaluate.Report,
    html: Path | None,
    picture: Path | None,
    data: Any,
    sources: dict[str, str],
) -> None:
    """Write the page, with the worst masks drawn, and the picture."""
    device = report.devices[0]
    if html is not None:
        names = {worst.name for worst in report.worst(6, device=device)}
        base = report.base(device)
        names |= {base["name"]} if base and names else set()
        report.html(html, data=data, models={name: load(sources[name]) for name in names})
        say(f"report: {html}")
    if picture is not None:
        write_whole(picture, png(report.pareto(device=device)))
        say(f"picture: {picture}")


def main() -> None:
    """Entry point; ``--debug`` may stand anywhere."""
    words = sys.argv[1:]
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    app(args=words, prog_name="samcompress")
