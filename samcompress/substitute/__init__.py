"""Another part, or another geometry, in the place of SAM's own.

| technique | what it does | needs data |
|---|---|---|
| `ImageSize` | runs the model at another input size, e.g. 512 instead of 1024 pixels | no |
| `TinyViT` | the image encoder of MobileSAM and TinySAM | no |
| `RepViT` | the image encoder of EdgeSAM or RepViT-SAM | no |
| `EfficientViT` | an image encoder of EfficientViT-SAM | no |
| `ViT` | the image encoder of EfficientSAM | no |
| `ResNet` | the image encoder of NanoSAM | no |
"""

from .efficient_vit import EfficientViT
from .image_size import ImageSize
from .rep_vit import RepViT
from .res_net import ResNet
from .tiny_vit import TinyViT
from .vit import ViT

__all__ = ["EfficientViT", "ImageSize", "RepViT", "ResNet", "TinyViT", "ViT"]
