"""Cheaper attention: exact, or approximate from the same weights.

| Technique | What it does | Accuracy |
|---|---|---|
| `Fused` | attention in cache-sized pieces; what prompts share decoded once | exact |
| `Windowed` | global blocks attend inside windows | approximate; distil |
| `Dilated` | tokens a fixed distance apart meet | approximate; distil |
| `PooledKV` | keys and values averaged over cells, in the decoder too | approximate |
| `Neighborhood` | each token attends to the square around it | approximate; distil |
| `Linear` | ReLU linear attention at several scales | distillation a must |
| `RWKV` | bidirectional average with decays | distillation a must |
"""

from .dilated import Dilated
from .fused import Fused
from .linear import Linear
from .neighborhood import Neighborhood
from .pooled_kv import PooledKV
from .rwkv import RWKV
from .windowed import Windowed

__all__ = [
    "RWKV",
    "Dilated",
    "Fused",
    "Linear",
    "Neighborhood",
    "PooledKV",
    "Windowed",
]
