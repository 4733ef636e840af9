"""Another part, or another geometry, in the place of SAM's own.

| technique | what it does | needs data |
|---|---|---|
| `ImageSize` | runs the model at another input size, e.g. 512 instead of 1024 pixels | no |
| `TinyViT` | the image encoder of MobileSAM and TinySAM | no |
| `RepViT` | the image encoder of EdgeSAM or RepViT-SAM | no |
| `EfficientViT` | an image encoder of EfficientViT-SAM | no |
| `ViT` | the image encoder of EfficientSAM | no |
| `ResNet` | the image encoder of NanoSAM | no |
| `Hiera` | the image encoder of SAM 2 | no |
| `EfficientFormer` | an image encoder after ESAM: EfficientFormerV2 | no |
| `LiteViT` | an image encoder after Lite-SAM: pools and attention | no |
| `UNet` | an image encoder after SqueezeSAM: a U-Net | no |
| `RWKV` | an image encoder after RWKV-SAM: linear in the number of tokens | no |
| `Conventions` | what published light SAMs do around their image encoder | no |
| `HQ` | SAM-HQ's token for fine masks | no |
| `Timm` | any of timm's feature extractors as image encoder | no |
| `LightDecoder` | a mask decoder with fewer layers, narrower inside | no |
"""

from . import _official  # noqa: F401 - registers the published models
from .conventions import Conventions
from .efficient_former import EfficientFormer
from .efficient_vit import EfficientViT
from .hiera import Hiera
from .hq import HQ
from .image_size import ImageSize
from .light_decoder import LightDecoder
from .lite_vit import LiteViT
from .rep_vit import RepViT
from .res_net import ResNet
from .rwkv import RWKV
from .timm import Timm
from .tiny_vit import TinyViT
from .u_net import UNet
from .vit import ViT

__all__ = [
    "HQ",
    "RWKV",
    "Conventions",
    "EfficientFormer",
    "EfficientViT",
    "Hiera",
    "ImageSize",
    "LightDecoder",
    "LiteViT",
    "RepViT",
    "ResNet",
    "Timm",
    "TinyViT",
    "UNet",
    "ViT",
]
