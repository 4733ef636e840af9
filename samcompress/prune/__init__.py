"""Fewer weights: what is removed is gone from parameters, multiply-accumulates, bytes and time.

| technique | what it removes | needs data |
|---|---|---|
| `Mlp` | hidden units of the MLPs in image encoder or mask decoder | for `criterion="taylor"` |
"""

from .mlp import Mlp

__all__ = ["Mlp"]
