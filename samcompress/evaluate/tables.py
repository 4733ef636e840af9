"""Results side by side, if they were made by the same rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..core.display import Cell, Column, Table
from .stats import comparable


class Result(Protocol):
    """What stands in one row: an `Accuracy`, an `AveragePrecision`, a `Recall`."""

    @property
    def protocol(self) -> str:
        """Id of the rules."""

    def cells(self) -> Mapping[str, Any]:
        """The numbers, by the names they have in tables."""


def table(results: Mapping[str, Result]) -> Table:
    """One table of several models' results.

    Args:
        results: by the names of the rows.

    Raises:
        ConfigError: if two were made by different rules: on other data, by other prompts, with the
            boxes of another detector.
        DataError: if there is none.

    Example:
        >>> import samcompress as sc
        >>> scenes = sc.shapes(2)
        >>> found = {n: sc.evaluate.accuracy(sc.build("tiny", seed=n), scenes) for n in (0, 1)}
        >>> [column.name for column in table(found).columns][:3]
        ['name', 'mIoU', 'mIoU S']
    """
    protocol = comparable({str(name): result.protocol for name, result in results.items()})
    rows = {str(name): result.cells() for name, result in results.items()}
    names = list(dict.fromkeys(key for cells in rows.values() for key in cells))
    return Table(
        (Column("name", align="left"), *map(Column, names)),
        [[name, *(cells.get(key, Cell(None)) for key in names)] for name, cells in rows.items()],
        notes=(protocol,),
    )
