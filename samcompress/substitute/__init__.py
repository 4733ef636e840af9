"""Another part, or another geometry, in the place of SAM's own.

| technique | what it does | needs data |
|---|---|---|
| `ImageSize` | runs the model at another input size, e.g. 512 instead of 1024 pixels | no |
"""

from .image_size import ImageSize

__all__ = ["ImageSize"]
