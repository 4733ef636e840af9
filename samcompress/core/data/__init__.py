"""Images with masks, all behind one `Sample`, decoded when asked for.

| function | reads |
|---|---|
| `shapes(n)` | nothing: drawn scenes with exact masks |
| `coco(images, annotations)` | COCO instances, and what is written in that form |
| `lvis(images, annotations)` | LVIS instances |
| `sa1b(paths)` | SA-1B: loose pairs or tar shards |
| `masks(folder)` | images with mask PNGs |
| `open(spec)` | any of these, by what is there |
| `join(a, b)` | several data sets as one |
"""

from __future__ import annotations

from ._coco import coco, lvis
from ._dataset import Dataset, Skipped, as_dataset, join
from ._masks import masks
from ._open import open_data as open  # noqa: A004 - always written data.open
from ._sa1b import sa1b
from ._sample import Instance, Sample
from ._shapes import shapes
from ._shapes_draw import KINDS

__all__ = [
    "KINDS",
    "Dataset",
    "Instance",
    "Sample",
    "Skipped",
    "as_dataset",
    "coco",
    "join",
    "lvis",
    "masks",
    "open",
    "sa1b",
    "shapes",
]
