"""How values show themselves: one table for terminal, Markdown and HTML, and the notebook cards."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .transform import Transform

WIDTH = 100
_NARROWEST = 16  # a text column is wrapped down to this before the table is split into blocks
_GAP = "  "
_MARKS = {
    # A red that is readable on white and on black: a notebook does not tell its theme.
    "red": "color:#d4433b;font-weight:600",
    "grey": "opacity:.6",
    "bold": "font-weight:600",
}

Mark = Literal["", "red", "grey", "bold"]


def number(x: object, *, sign: bool = False) -> str:
    """Three significant digits; whole numbers, which are counts, in full.

    Args:
        x: a number, or None, a boolean or text, which get their plain form.
        sign: write the plus of a positive number.

    Example:
        >>> number(0.77196), number(1234.5), number(93735472), number(None), number(2.5, sign=True)
        ('0.772', '1230', '93735472', '-', '+2.50')
    """
    if x is None:
        return "-"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if not isinstance(x, (int, float)):
        return str(x)
    plus = "+" if sign and x > 0 else ""
    if isinstance(x, int) or not math.isfinite(x):
        return f"{plus}{x}"
    digits = _decimals(x)
    return f"{plus}{x:.2e}" if digits is None else f"{plus}{round(x, digits):.{max(digits, 0)}f}"


def _decimals(x: float) -> int | None:
    """Decimals that leave three significant digits; None where only an exponent is readable."""
    exponent = int(f"{x:.2e}".split("e")[1])
    return None if x and not -5 < exponent < 6 else 2 - exponent


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Args:
        value: what `records` returns: a number, text, or None for "there is none".
        error: half the width of an interval, printed after ±.
        mark: ``"red"`` for what the reader must not overlook (a ``!`` says it without colour),
            ``"grey"`` for what another row makes needless, ``"bold"`` for the base.
        sign: write the plus of a positive number.
    """

    value: object
    error: float | None = None
    mark: Mark = ""
    sign: bool = False

    @property
    def text(self) -> str:
        """The value as every face of the table prints it."""
        shown = number(self.value, sign=self.sign)
        if self.error and isinstance(self.value, float):
            # Of a value near zero only the digits that its error leaves.
            digits = [_decimals(x) for x in (self.value, self.error)]
            least = max(0, min(d for d in (*digits, 6) if d is not None))
            shown = f"{self.value:{'+' * self.sign}.{least}f} ±{self.error:.{least}f}"
        return f"! {shown}" if self.mark == "red" else shown


@dataclass(frozen=True)
class Column:
    """Header of a column.

    Args:
        name: heading, unique within the table.
        unit: printed under the name.
        align: where cells stand; numbers to the right.
        group: columns with the same group stand under a common heading and are kept together.
    """

    name: str
    unit: str = ""
    align: Literal["left", "right"] = "right"
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table that prints itself as text, Markdown or HTML.

    A row shorter than `columns` lets its last cell run over the columns that are left.

    Args:
        columns: headers.
        rows: cells; plain values are taken as `Cell(value)`.
        title: printed above.
        notes: printed below, one a line.

    Example:
        >>> print(Table((Column("name", align="left"), Column("size", "MB")), [("base", 4.1)]))
        name  size
              (MB)
        ----  ----
        base  4.10
    """

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    notes: tuple[str, ...] = field(default=())

    def cells(self) -> list[list[Cell]]:
        """The rows, every value as a `Cell`."""
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

    def records(self) -> list[dict[str, object]]:
        """The values behind the table, one dictionary a row; errors under ``"name ±"``."""
        found = []
        for row in self.cells():
            record: dict[str, object] = {}
            for column, cell in zip(self.columns, row, strict=False):
                record[column.name] = cell.value
                if cell.error is not None:
                    record[f"{column.name} ±"] = cell.error
            found.append(record)
        return found

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.html()

    # --- text ---

    def text(self, width: int = WIDTH) -> str:
        """Fixed-width text of at most `width` columns.

        Long text is wrapped; what then is still too wide goes on below, under its first column.
        """
        # Headers in as few lines as the smallest number of blocks leaves room for.
        choices = (self._widths(width, lines) for lines in (1, 2, 3, 99))
        layouts = [(widths, self._blocks(widths, width)) for widths in choices]
        widths, found = min(layouts, key=lambda layout: len(layout[1]))
        blocks = [self._block(widths, ids) for ids in found]
        parts = [*textwrap.wrap(self.title, width), "\n\n".join(blocks)]
        for note in self.notes:
            parts += textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(parts)

    def _widths(self, width: int, lines: int) -> list[int]:
        widths, count = [], len(self.columns)
        for i, column in enumerate(self.columns):
            words = [*_header(column.name, lines), f"({column.unit})" if column.unit else ""]
            # The last cell of a short row runs on, and so needs no room in this column.
            words += [_short(row[i]) for row in self.cells() if i < len(row) - (len(row) < count)]
            widths.append(max(map(len, words)))
        texts = [i for i, c in enumerate(self.columns) if c.align == "left"]
        while sum(widths) + len(_GAP) * (len(widths) - 1) > width and texts:
            widest = max(texts, key=lambda i: widths[i])
            if widths[widest] <= _NARROWEST:
                break
            widths[widest] -= 1
        return widths

    def _blocks(self, widths: list[int], width: int) -> list[list[int]]:
        """Column numbers of each block, packed by group, the first column in every block."""
        groups = itertools.groupby(range(1, len(widths)), key=lambda i: self.columns[i].group)
        packs = [list(ids) for _, ids in groups]
        if not _fits([0, *itertools.chain(*packs)], widths, width):
            packs = [p for pack in packs for p in _cut(pack, widths, width)]
        blocks = [[0]]
        for pack in packs:
            if len(blocks[-1]) > 1 and not _fits(blocks[-1] + pack, widths, width):
                blocks.append([0])
            blocks[-1] += pack
        return blocks

    def _block(self, widths: list[int], ids: list[int]) -> str:
        columns = [self.columns[i] for i in ids]
        sizes = [widths[i] for i in ids]
        heads = [
            textwrap.wrap(c.name, w) + ([f"({c.unit})"] if c.unit else [])
            for c, w in zip(columns, sizes, strict=True)
        ]
        lines = _grid(heads, columns, sizes)
        lines.append(_GAP.join("-" * size for size in sizes))
        for row in self.cells():
            if len(row) < len(self.columns) and len(ids) > len(row):
                room = sum(sizes[len(row) - 1 :]) + len(_GAP) * (len(ids) - len(row))
                kept = [*columns[: len(row) - 1], Column("", align="left")]
                spans = [*sizes[: len(row) - 1], room]
                texts = [textwrap.wrap(c.text, w) for c, w in zip(row, spans, strict=True)]
                lines += _grid(texts, kept, spans)
            else:
                shown = (row[i].text if i < len(row) else "" for i in ids)
                wrapped = zip(shown, sizes, strict=True)
                texts = [textwrap.wrap(t, w, break_on_hyphens=False) for t, w in wrapped]
                lines += _grid(texts, columns, sizes)
        return "\n".join(lines)

    # --- Markdown and HTML ---

    def markdown(self) -> str:
        """A Markdown table; red cells and bold ones are bold."""
        lines = [f"**{_md(self.title)}**", ""] if self.title else []
        lines.append(
            _pipes(_md(f"{c.name} ({c.unit})" if c.unit else c.name) for c in self.columns)
        )
        lines.append(_pipes("---" if c.align == "left" else "---:" for c in self.columns))
        for row in self.cells():
            strong = ("red", "bold")
            shown = [f"**{_md(c.text)}**" if c.mark in strong else _md(c.text) for c in row]
            lines.append(_pipes(shown + [""] * (len(self.columns) - len(row))))
        if self.notes:
            lines += ["", "\n\n".join(map(_md, self.notes))]
        return "\n".join(lines)

    def html(self) -> str:
        """An HTML table that takes its colours from the page, light or dark."""
        head = []
        if any(c.group for c in self.columns):
            groups = (
                (g, len([*same])) for g, same in itertools.groupby(c.group for c in self.columns)
            )
            names = (f'<th colspan="{n}" style="{_GROUP}">{escape(g)}</th>' for g, n in groups)
            head.append(f"<tr>{''.join(names)}</tr>")
        titles = (
            f'<th style="{_css(c)};vertical-align:bottom">{escape(c.name)}'
            + (f'<br><small style="opacity:.7">{escape(c.unit)}</small>' if c.unit else "")
            + "</th>"
            for c in self.columns
        )
        head.append(f"<tr>{''.join(titles)}</tr>")
        body = [f"<tr>{''.join(self._html_cells(row))}</tr>" for row in self.cells()]
        caption = f"<caption style={_CAPTION}>{escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<div><small>{escape(n)}</small></div>" for n in self.notes)
        return (
            f'<div style="color-scheme:light dark;color:inherit;overflow-x:auto">'
            f'<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">{caption}'
            f"<thead>{''.join(head)}</thead>\n<tbody>{chr(10).join(body)}</tbody></table>{notes}</div>"
        )

    def _html_cells(self, row: list[Cell]) -> Iterator[str]:
        for i, (column, cell) in enumerate(zip(self.columns, row, strict=False)):
            span = len(self.columns) - i if i == len(row) - 1 else 1
            if span > 1:
                column = Column(column.name, align="left")
            style = ";".join(filter(None, (_css(column), _MARKS.get(cell.mark))))
            wide = f' colspan="{span}"' if span > 1 else ""
            text = escape(cell.text).replace("! ", "!&nbsp;")  # errors may wrap, flags not
            yield f'<td{wide} style="{style}">{text}</td>'


_GROUP = "text-align:center;font-weight:400;opacity:.75"
_CAPTION = '"text-align:left;font-weight:600;padding:.3em 0"'


def _header(name: str, lines: int) -> list[str]:
    """A name on at most so many lines, in the narrowest way."""
    widths = range(max(map(len, name.split())), len(name) + 1)
    return next(found for w in widths if len(found := textwrap.wrap(name, w)) <= lines)


def _short(cell: Cell) -> str:
    # Two words such as "not measured" may stand on two lines in a column of numbers.
    return max(cell.text.split(), key=len) if cell.value == "not measured" else cell.text


def _fits(ids: list[int], widths: list[int], width: int) -> bool:
    return sum(widths[i] for i in ids) + len(_GAP) * (len(ids) - 1) <= width


def _cut(pack: list[int], widths: list[int], width: int) -> list[list[int]]:
    """A group that is too wide by itself, cut where it no longer fits beside the first column."""
    parts: list[list[int]] = [[]]
    for i in pack:
        if parts[-1] and not _fits([0, *parts[-1], i], widths, width):
            parts.append([])
        parts[-1].append(i)
    return parts


def _grid(texts: Sequence[list[str]], columns: Sequence[Column], sizes: Sequence[int]) -> list[str]:
    """Cells of one row, each a list of lines, side by side."""
    lines = []
    for parts in itertools.zip_longest(*texts, fillvalue=""):
        padded = (
            f"{part:<{size}}" if column.align == "left" else f"{part:>{size}}"
            for part, column, size in zip(parts, columns, sizes, strict=True)
        )
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _css(column: Column) -> str:
    return f"text-align:{column.align};padding:.15em .45em"


def _pipes(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _md(text: str) -> str:
    for plain, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("\n", " ")):
        text = text.replace(plain, safe)
    return text


# --- cards ---


def summary_line(thing: object) -> str:
    """First line of a docstring, without its full stop; empty where there is none."""
    return (inspect.getdoc(thing) or "").split("\n")[0].rstrip(".")


def section(thing: object, title: str) -> str:
    """One section of a Google-style docstring as plain text; empty where it is absent."""
    found = re.search(
        rf"^{title}:\s*(.*?)(?=^\w[\w ]*:\s|\Z)", inspect.getdoc(thing) or "", re.M | re.S
    )
    return textwrap.dedent(found[1]).strip() if found else ""


def transform_card(transform: Transform) -> str:
    """HTML card of a technique: what it does, its settings, where it comes from."""
    kind = type(transform)
    settings = Table(
        (Column("setting", align="left"), Column("value", align="left")),
        [(k, repr(v)) for k, v in transform.params().items()],
    )
    source = " ".join(section(kind, "Source").split())
    parts = [
        f"<b>{escape(transform.label)}</b>: {escape(summary_line(kind))}",
        settings.html() if settings.rows else "",
        f"<small>{_links(source)}</small>" if source else "",
    ]
    return _card(parts)


def pipeline_card(pipeline: Pipeline) -> str:
    """HTML card of a pipeline: its steps in order, their phase and what they need."""
    return _card(["<b>Pipeline</b>", steps_table(pipeline).html()])


def steps_table(pipeline: Pipeline, *, title: str = "") -> Table:
    """The steps of a pipeline, their settings and what they need."""
    columns = (
        Column("step"),
        Column("technique", align="left"),
        Column("phase"),
        Column("settings", align="left"),
        Column("needs", align="left"),
    )
    rows = [
        (i, step.label, step.phase, repr(step).partition("(")[2][:-1], ", ".join(needs(step)))
        for i, step in enumerate(pipeline, 1)
    ]
    return Table(columns, rows, title=title)


def needs(step: Transform) -> list[str]:
    """What a step needs beside the model: data, optional packages."""
    return ["data"] * step.needs_data + [f"samcompress[{extra}]" for extra in step.extras]


def _card(parts: list[str]) -> str:
    inner = "".join(f"<div>{part}</div>" for part in parts if part)
    style = "color-scheme:light dark;color:inherit;display:inline-block;padding:.5em .8em"
    return f'<div style="{style};border:1px solid #8888;border-radius:6px">{inner}</div>'


def _links(text: str) -> str:
    """Escaped text with its arXiv ids made into links."""
    link = r'<a href="https://arxiv.org/abs/\1" style="color:inherit">arXiv \1</a>'
    return re.sub(r"arXiv[: ]\s*(\d{4}\.\d{4,5})", link, escape(text))
