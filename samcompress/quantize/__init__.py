"""Fewer bits.

| technique | what it does | integers run | needs data |
|---|---|---|---|
| `Int8Weights` | stores weights as int8, one scale a channel | no | no |
| `Int4Weights` | stores weights as int4, one scale a group | no | only `method="gptq"` |
| `Int8Dynamic` | int8 weights times tokens rounded at run time | yes | no |
| `Int8Static` | the same with scales found on images | yes | yes |
| `Mixed` | `Int8Dynamic` where it disturbs least, under a budget | yes | yes |
| `BFloat16` | stores and computes in bfloat16 | - | no |
| `SmoothQuant` | moves outliers of tokens into weights, exactly | - | yes |
| `Bimodal` | folds keys with two peaks into one, exactly | - | yes |
| `FakeQuant` | simulates 2 to 8 bits by plain statistics | simulated | activations |
| `PTQ4SAM` | simulates with `Bimodal` and softmax levels that fit | simulated | yes |
| `PQSAM` | simulates with inputs clipped, shifted and scaled by groups | simulated | yes |
| `TinySAM` | simulates with scales chosen by the masks | simulated | yes |
| `Reconstruct` | mends a simulation: learns rounding unit by unit | simulated | yes |
| `QAT` | trains a simulation through its rounding | simulated | yes |
| `Float8Dynamic` | float8 weights times tokens rounded at run time, for GPUs | - | no |
"""

from .b_float16 import BFloat16
from .bimodal import Bimodal
from .fake_quant import FakeQuant
from .float8_dynamic import Float8Dynamic
from .int4_weights import Int4Weights
from .int8_dynamic import Int8Dynamic
from .int8_static import Int8Static
from .int8_weights import Int8Weights
from .mixed import Mixed
from .pqsam import PQSAM
from .ptq4_sam import PTQ4SAM
from .qat import QAT
from .reconstruct import Reconstruct
from .smooth_quant import SmoothQuant
from .tiny_sam import TinySAM

__all__ = [
    "PQSAM",
    "PTQ4SAM",
    "QAT",
    "BFloat16",
    "Bimodal",
    "FakeQuant",
    "Float8Dynamic",
    "Int4Weights",
    "Int8Dynamic",
    "Int8Static",
    "Int8Weights",
    "Mixed",
    "Reconstruct",
    "SmoothQuant",
    "TinySAM",
]
