"""Where masks are kept while an image is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._runs import Counts
from .segments import Segments

# The attributes of `Segments`, and where the mask's runs end.
ROW = np.dtype(
    [
        ("boxes", np.int64, 4),
        ("scores", np.float32),
        ("predicted_iou", np.float32),
        ("stability", np.float32),
        ("points", np.float64, 2),
        ("prompt_boxes", np.float64, 4),
        ("end", np.int64),
    ]
)


class Shelf:
    """Masks as run lengths, in two arrays that grow.

    Thousands of small arrays would come to lie between the large tensors of each batch, and keep
    the allocator from using their room again: the process would grow to many times what it needs.
    """

    def __init__(self) -> None:
        self.rows: NDArray[Any] = np.empty(1 << 10, ROW)
        self.runs: Counts = np.empty(1 << 16, np.int32)
        self.count = self.used = 0

    def add(self, counts: Sequence[Counts], **fields: NDArray[Any] | float) -> None:
        """Keep some masks.

        Args:
            counts: their run lengths.
            fields: by the names of `ROW`; a number stands for all of them.
        """
        ends = self.used + np.cumsum([len(c) for c in counts])
        last = self.count + len(counts)
        self.rows = _room(self.rows, self.count, last)
        self.runs = _room(self.runs, self.used, int(ends[-1]))
        self.runs[self.used : ends[-1]] = np.concatenate(counts)
        new = self.rows[self.count : last]
        new["end"] = ends
        for name, values in fields.items():
            new[name] = values
        self.count, self.used = last, int(ends[-1])

    def segments(self, size: tuple[int, int]) -> Segments:
        """All of them, in the order in which they came."""
        rows = self.rows[: self.count]
        columns: dict[str, Any] = {n: rows[n].copy() for n in ROW.names or () if n != "end"}
        # The last part is what is not used yet.
        counts = np.split(self.runs, rows["end"])[:-1]
        return Segments(size, tuple(counts), **columns)


def _room(array: NDArray[Any], used: int, needed: int) -> NDArray[Any]:
    if needed <= len(array):
        return array
    larger = np.empty(max(needed, 2 * len(array)), array.dtype)
    larger[:used] = array[:used]
    return larger
