"""Images with masks: drawn, COCO, LVIS, SA-1B, or a folder of one's own.

| function | reads |
|---|---|
| `shapes(n)` | nothing: drawn scenes with exact masks |
"""

from __future__ import annotations

from ._dataset import Dataset, Skipped, as_dataset
from ._sample import Instance, Sample
from ._shapes import shapes
from ._shapes_draw import KINDS

__all__ = ["KINDS", "Dataset", "Instance", "Sample", "Skipped", "as_dataset", "shapes"]
