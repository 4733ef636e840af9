"""Fewer weights and tokens: what is removed is gone, except where a row says that it is a mask.

| technique | what it removes | needs data |
|---|---|---|
| `Mlp` | hidden units of the MLPs in image encoder or mask decoder | by `criterion` |
| `Heads` | heads of the image encoder's attention | by `criterion` |
| `HeadDims` | dimensions of those heads | by `criterion` |
| `Channels` | channels of the image encoder's tokens | by `criterion` |
| `Blocks` | whole blocks of the image encoder | by `criterion` |
| `Decoder` | hidden units and heads of the mask decoder | by `criterion` |
| `SlimSAM` | channels, then heads and hidden units, with training after each | yes |
| `MergeTokens` | keys of the encoder's global attention that are alike | no |
| `ClusterTokens` | tokens in later blocks of the image encoder, clustered | no |
| `SkipPadding` | the image encoder's work on padding; that of windows exactly | no |
| `Sparse24` | two of each four weights: GPU kernels, else a mask | by `criterion` |
| `Unstructured` | a share of the weights: a mask only | by `criterion` |
| `Supernet` | heads, units, blocks: the best subnet for a budget, after training all | yes |
| `Budget` | heads, units, channels: as many as a budget asks | by `criterion`, `ratios` |
| `Filters` | filters of convolutional image encoders, TinyViT, RepViT, ... | by `criterion` |
"""

from . import _official  # noqa: F401 - registers the published models
from ._sensitivity import Sensitivity, sensitivity
from .blocks import Blocks
from .budget import Budget
from .channels import Channels
from .cluster_tokens import ClusterTokens
from .decoder import Decoder
from .filters import Filters
from .head_dims import HeadDims
from .heads import Heads
from .merge_tokens import MergeTokens
from .mlp import Mlp
from .skip_padding import SkipPadding
from .slim_sam import SlimSAM
from .sparse24 import Sparse24
from .supernet import Supernet
from .unstructured import Unstructured

__all__ = [
    "Blocks",
    "Budget",
    "Channels",
    "ClusterTokens",
    "Decoder",
    "Filters",
    "HeadDims",
    "Heads",
    "MergeTokens",
    "Mlp",
    "Sensitivity",
    "SkipPadding",
    "SlimSAM",
    "Sparse24",
    "Supernet",
    "Unstructured",
    "sensitivity",
]
