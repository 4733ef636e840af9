"""Train a smaller SAM to do what the original does.

| technique | learns | from |
|---|---|---|
| `Encoder` | the image encoder | the original's image embeddings, with unlabelled images |
"""

from __future__ import annotations

from .encoder import Encoder

__all__ = ["Encoder"]
