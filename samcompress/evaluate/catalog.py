"""What there is, as tables: techniques, architectures, recipes, published models, saved models."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from ..core.build import ARCHITECTURES
from ..core.checkpoint import is_ours, read_record
from ..core.display import Cell, Column, Table, needs, steps_table, summary_line
from ..core.errors import ConfigError
from ..core.load import SHIPPED, load
from ..core.models import list_models, tables
from ..core.pipeline import Pipeline, list_recipes, read_recipe
from ..core.registry import find, list_transforms
from ..core.zoo import find as find_model
from ..core.zoo import published
from .environment import Check
from .recipes import recipe
from .summary import summary

NAME = Column("name", align="left")
WHAT = Column("what it is", align="left")


def catalog(pattern: str = "*") -> tuple[Table, ...]:
    """Techniques, architectures, shipped recipes and published models: four tables, never one.

    Args:
        pattern: shell wildcards on their names, e.g. ``"quant*"``.

    Example:
        >>> [table.title for table in catalog("prune.*")]
        ['techniques', 'architectures', 'recipes', 'models']
    """
    techniques = [
        (name, summary_line(find(name)), _may_need(name)) for name in list_transforms(pattern)
    ]
    architectures = [
        (
            name,
            config.image_size,
            config.depth,
            config.embed_dim,
            "yes" if name in SHIPPED else "no",
        )
        for name, config in ARCHITECTURES.items()
        if fnmatch.fnmatch(name, pattern)
    ]
    ready = [
        (name.removesuffix(".json"), what, " | ".join(step.label for step in Pipeline.load(name)))
        for name, what in list_recipes().items()
        if fnmatch.fnmatch(name.removesuffix(".json"), pattern)
    ]
    sizes = (Column("image size", "px"), Column("blocks"), Column("width"))
    return (
        Table((NAME, WHAT, Column("may need", align="left")), techniques, title="techniques"),
        Table((NAME, *sizes, Column("weights shipped")), architectures, title="architectures"),
        Table((NAME, WHAT, Column("steps", align="left")), ready, title="recipes"),
        list_models(pattern),
    )


def describe(name: str | Path) -> tuple[str, tuple[Table, ...]]:
    """All about a technique, a published model, a recipe, or a folder that `sc.save` wrote.

    Args:
        name: ``"prune.mlp"``, one of `sc.list_models`, ``"small.json"`` or a chain in one line,
            ``"out/"``.

    Returns:
        Text to read, and tables; a folder's files are checked against their hashes.

    Raises:
        ConfigError: if there is no such thing.
        CheckpointError: if a file of the folder is missing or was changed.

    Example:
        >>> text, tables = describe("quantize.int8_weights")
        >>> tables[0].records()[0]["setting"]
        'where'
    """
    if Path(name).is_dir() and is_ours(Path(name)):
        return _checkpoint(Path(name))
    if name in list_transforms():
        kind = find(str(name))
        rows = [
            (field.name, "none" if field.default is MISSING else repr(field.default))
            for field in fields(kind)  # type: ignore[arg-type]
        ]
        settings = Table(
            (Column("setting", align="left"), Column("default", align="left")),
            rows,
            title=f"{kind.name}: phase {kind.phase}",
        )
        return inspect.getdoc(kind) or "", (settings,)
    if name in published():
        entry = find_model(str(name))
        return entry.title, tables(entry)
    pipeline = recipe(name)
    return repr(pipeline), (steps_table(pipeline, title=str(name)),)


def recipe_text(name: str) -> str:
    """The JSON of a shipped recipe, to copy and edit.

    Raises:
        ConfigError: if there is none of this name.
    """
    return read_recipe(name)[0]


def health(checks: Sequence[Check]) -> Table:
    """What `doctor` found, as a table."""
    rows = [
        (
            check.name,
            Cell(check.status, mark="" if check.ok else "red"),
            check.detail + (f"; to mend it: {check.fix}" if check.fix else ""),
        )
        for check in checks
    ]
    columns = (
        Column("what", align="left"),
        Column("state", align="left"),
        Column("detail", align="left"),
    )
    return Table(columns, rows, title="this machine")


def _checkpoint(folder: Path) -> tuple[str, tuple[Table, ...]]:
    record = read_record(folder)
    model = load(folder)
    base = record["base"]
    history = [
        (
            step["type"],
            step["facts"]["before"]["parameters"] / 1e6,
            step["facts"]["after"]["parameters"] / 1e6,
            step["facts"]["before"]["bytes"] / 1e6,
            step["facts"]["after"]["bytes"] / 1e6,
            step["facts"]["seconds"],
        )
        for step in record["steps"]
        if step.get("facts")
    ]
    files = [
        (name, facts["bytes"] / 1e6, facts["sha256"]) for name, facts in record["files"].items()
    ]
    text = (
        f"base weights: {base.get('source') or 'not recorded'}, "
        f"licence: {base.get('licence') or 'not recorded'}; "
        f"saved by samcompress {record['samcompress']}, torch {record['torch']}"
    )
    return text, (
        summary(model).table(),
        Table(
            (
                Column("step", align="left"),
                Column("parameters before", "M"),
                Column("after", "M"),
                Column("size before", "MB"),
                Column("size after", "MB"),
                Column("took", "s"),
            ),
            history,
            title="history",
        ),
        Table(
            (Column("file", align="left"), Column("size", "MB"), Column("SHA-256", align="left")),
            files,
            title="files, as hashed on saving and found unchanged",
        ),
    )


def _may_need(name: str) -> str:
    """What the technique needs with its default settings."""
    try:
        return ", ".join(needs(find(name).from_params({})))
    except ConfigError:
        return ""
