"""Fewer weights: what is removed is gone from parameters, multiply-accumulates, bytes and time.

| technique | what it removes | needs data |
|---|---|---|
| `Mlp` | hidden units of the MLPs in image encoder or mask decoder | by `criterion` |
| `Heads` | heads of the image encoder's attention | by `criterion` |
| `HeadDims` | dimensions of those heads | by `criterion` |
| `Channels` | channels of the image encoder's tokens | by `criterion` |
| `Blocks` | whole blocks of the image encoder | by `criterion` |
| `Decoder` | hidden units and heads of the mask decoder | by `criterion` |
| `SlimSAM` | channels, then heads and hidden units, with training after each | yes |
"""

from . import _official  # noqa: F401 - registers the published models
from .blocks import Blocks
from .channels import Channels
from .decoder import Decoder
from .head_dims import HeadDims
from .heads import Heads
from .mlp import Mlp
from .slim_sam import SlimSAM

__all__ = ["Blocks", "Channels", "Decoder", "HeadDims", "Heads", "Mlp", "SlimSAM"]
