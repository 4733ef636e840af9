"""Fewer bits.

| technique | what it does | integers run | needs data |
|---|---|---|---|
| `Int8Weights` | stores weights as int8, one scale a channel | no | no |
"""

from .int8_weights import Int8Weights

__all__ = ["Int8Weights"]
