"""What encoders written after a paper share: base class, blocks and necks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from ..core.errors import ConfigError
from ._fold import batch_norm_pairs, fold_batch_norms

# Convolution, batch norm and, unless `activation_layer=None`, an activation.
normed: Any = partial(Conv2dNormActivation, inplace=None)


class Encoder(nn.Module):
    """An image encoder without tables that depend on the image's size.

    Attributes:
        img_size: side S of the image.
        stride: pixels a cell of the embedding covers.
        multiple: S must be a multiple of this.
    """

    stride = 16
    multiple = 32

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self._check(image_size)
        self.img_size = image_size

    def resize(self, size: int) -> None:
        """Take images of another side.

        Raises:
            ConfigError: if the size is not a multiple of `multiple`.
        """
        self._check(size)
        self.img_size = size

    def fuse(self) -> None:
        """Fold all batch norms, in place.

        The result computes what the encoder computes in eval mode, to rounding.
        """
        kind = next(self.parameters()).dtype
        example = torch.empty(1, 3, self.img_size, self.img_size, dtype=kind, device="meta")
        fold_batch_norms(self, batch_norm_pairs(self, example))

    def _check(self, size: int) -> None:
        if size < self.multiple or size % self.multiple:
            raise ConfigError(
                f"{type(self).__name__} does not work at this image size.",
                got=size,
                expected=f"a multiple of {self.multiple}",
            )


class Inverted(nn.Module):
    """An inverted bottleneck: widen, mix each channel's neighbours, narrow.

    Args:
        dim: channels.
        expand: how much wider it is inside.
    """

    def __init__(self, dim: int, expand: int = 4) -> None:
        super().__init__()
        wide = expand * dim
        self.layers = nn.Sequential(
            normed(dim, wide, 1, activation_layer=nn.GELU),
            normed(wide, wide, 3, groups=wide, activation_layer=nn.GELU),
            normed(wide, dim, 1, activation_layer=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, h, w)."""
        out: Tensor = x + self.layers(x)
        return out


class Attend(nn.Module):
    """segment_anything's ViT block over the whole map, told positions by a convolution.

    Args:
        dim: channels.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.block = Block(dim, heads, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, h, w)."""
        tokens = (x + self.position(x)).permute(0, 2, 3, 1)
        out: Tensor = self.block(tokens).permute(0, 3, 1, 2)
        return out


class Pyramid(nn.Module):
    """Two levels of features, the coarser one enlarged twice, added up and refined.

    Args:
        fine: channels of the finer level.
        coarse: channels of the coarser one.
        outputs: channels of the result.
        groups: of the 3 x 3 convolution.
    """

    def __init__(self, fine: int, coarse: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.fine = nn.Conv2d(fine, outputs, 1, bias=False)
        self.coarse = nn.Conv2d(coarse, outputs, 1, bias=False)
        self.refine = refine(outputs, groups)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Fuse (B, fine, 2h, 2w) and (B, coarse, h, w)."""
        enlarged = F.interpolate(self.coarse(coarse), scale_factor=2.0, mode="bilinear")
        out: Tensor = self.refine(self.fine(fine) + enlarged)
        return out


def refine(channels: int, groups: int = 1) -> nn.Sequential:
    """SAM's neck behind its first convolution."""
    return nn.Sequential(
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False),
        LayerNorm2d(channels),
    )
