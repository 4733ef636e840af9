"""The application, and the options that several verbs take."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import samcompress as sc

from ..core.errors import SamCompressError
from ._shared import say

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
        help="tiny, a model of `samcompress list`, a .pth or .safetensors file, a folder, a Hub "
        "id; vit_b:random for random weights, vit_b:random@image_size=512 for other sizes."
    ),
]
Models = Annotated[
    list[str], typer.Argument(help="The base, then the others; as --model of apply.")
]
Data = Annotated[
    str | None,
    typer.Option(help="COCO root (PATH@val2017), SA-1B, masks folder, or shapes:64@seed=1."),
]
Calibration = Annotated[
    str | None, typer.Option(help="Other images, for what looks at some beforehand: as --data.")
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


def main() -> None:
    """Entry point; ``--debug`` may stand anywhere."""
    words = sys.argv[1:]
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    app(args=words, prog_name="samcompress")
