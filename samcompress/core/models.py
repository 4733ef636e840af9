"""The published models as tables: which there are, and what is known of one."""

from __future__ import annotations

import fnmatch

from .display import Column, Table
from .zoo import File, Published, find, published


def list_models(pattern: str = "*") -> Table:
    """All published models that `sc.load` opens by name.

    Args:
        pattern: shell wildcards on the names, e.g. ``"efficient*"``.

    Example:
        >>> import samcompress as sc
        >>> [column.name for column in sc.list_models().columns]
        ['name', 'parameters', 'MACs', 'input', 'licence', 'paper']
    """
    rows = [
        (
            entry.name,
            entry.parameters / 1e6,
            float(entry.macs),
            entry.input_size,
            entry.licence,
            entry.paper,
        )
        for entry in published().values()
        if fnmatch.fnmatch(entry.name, pattern)
    ]
    columns = (
        Column("name", align="left"),
        Column("parameters", "M"),
        Column("MACs", "G"),
        Column("input", "px"),
        Column("licence", align="left"),
        Column("paper", align="left"),
    )
    notes = ("MACs: of the image encoder for one image.",) if rows else ()
    return Table(columns, rows, title="models", notes=notes)


def model_info(name: str) -> Published:
    """What is known of a published model: sizes, licence, paper, published accuracy, files.

    Args:
        name: one of `list_models`.

    Returns:
        The facts as attributes; it prints itself as tables.

    Raises:
        UnknownTransformError: if there is no such model.
    """
    return find(name)


def tables(entry: Published) -> tuple[Table, ...]:
    """Facts, published figures and files of a model; without the tables that would be empty."""
    facts = {
        "model": entry.title,
        "parameters": f"{entry.parameters:,}",
        "MACs of the image encoder": f"{float(entry.macs):.4g} G",
        "input": f"{entry.input_size} x {entry.input_size} px",
        "made of": " | ".join(map(repr, entry.steps())) or ("a SAM" if entry.base else ""),
        "licence of the weights": entry.licence,
        "paper": entry.paper,
        "upstream": entry.upstream,
        "note": entry.note,
    }
    what = (Column("what", align="left"), Column("value", align="left"))
    figures = [
        (figure.metric, figure.value, figure.setting, figure.source) for figure in entry.figures
    ]
    found = (
        Table(what, [(k, v) for k, v in facts.items() if v], title=entry.name),
        Table(
            (
                Column("published", align="left"),
                Column("value"),
                Column("setting", align="left"),
                Column("source", align="left"),
            ),
            figures,
            title="published figures",
        ),
        Table(
            (
                Column("file", align="left"),
                Column("size", "MB"),
                Column("hash", align="left"),
                Column("from", align="left"),
            ),
            [_file(file) for file in entry.files],
            title="official files",
        ),
    )
    return tuple(table for table in found if table.rows)


def card(entry: Published) -> str:
    """The tables as text."""
    return "\n\n".join(table.text() for table in tables(entry))


def html_card(entry: Published) -> str:
    """The tables as HTML."""
    return "".join(table.html() for table in tables(entry))


def _file(file: File) -> tuple[object, ...]:
    known = [
        f"{kind} {value}" for kind, value in (("md5", file.md5), ("sha256", file.sha256)) if value
    ]
    source = file.hub and f"https://huggingface.co/{file.hub}"
    by_hand = f"{file.page} (by hand)"
    size = None if file.size is None else file.size / 1e6
    return file.name, size, ", ".join(known) or None, source or file.url or by_hand
