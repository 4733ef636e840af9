"""The published models with official files: imported so that `sc.load` and `sc.build` know them."""

# Order matters: of models with equal tensors the first is recognised in a file of another name.
from . import _official_sam, _official_small, _official_efficientvit, _official_hq  # isort: skip
from . import _official_sam2, _official_fastsam  # isort: skip

__all__ = [
    "_official_efficientvit",
    "_official_fastsam",
    "_official_hq",
    "_official_sam",
    "_official_sam2",
    "_official_small",
]
