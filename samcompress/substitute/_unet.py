"""A U-Net with attention at its coarsest levels as SAM's image encoder: after SqueezeSAM.

The image is halved five times, by convolutions with batch norm; at the two coarsest levels tokens
attend to each other; then the map is enlarged twice, each time joined by what was there on the way
down. The image has half the side in which prompts are given (512 pixels for 1024), so that the grid
of the embedding is SAM's.

From the paper's facts known to us: a U-Net with batch norm, attention at the coarsest levels, input
of 512 pixels, the whole 1/31.6 of SAM with ViT-H in size. Widths and depths are our choice, such
that with SAM's decoder the size fits. Left out: clicks and boxes as further channels of the image,
for which the image would have to be encoded anew at each prompt, the object's salience, and the
finer half of the way up, which SAM's mask decoder does instead.

Source: B. Varadarajan et al., "SqueezeSAM: User-friendly mobile interactive segmentation", 2023,
arXiv 2312.06736 (no public code or weights). U-Net: O. Ronneberger et al., 2015, arXiv 1505.04597.
Own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._blocks import Attend, Encoder, normed, refine


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net encoder.

    Attributes:
        channels: width of the five levels, of stride 2, 4, 8, 16 and 32.
        depths: blocks of attention at stride 16 and 32.
        head_dim: channels of one head.
        mlp_ratio: hidden width of their MLPs over the channels.
    """

    channels: tuple[int, int, int, int, int] = (32, 64, 128, 256, 384)
    depths: tuple[int, int] = (3, 4)
    head_dim: int = 32
    mlp_ratio: float = 4.0


CONFIGS: dict[str, UNetConfig] = {"squeeze": UNetConfig()}


def build(config: UNetConfig, image_size: int = 512, out_chans: int = 256) -> UNet:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of 32.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 32.
    """
    return UNet(config, image_size, out_chans)


class UNet(Encoder):
    """``(B, 3, S, S)`` images to ``(B, C, S / 8, S / 8)`` embeddings."""

    stride = 8

    def __init__(self, config: UNetConfig, image_size: int = 512, out_chans: int = 256) -> None:
        super().__init__(image_size)
        widths = config.channels
        self.down = nn.ModuleList(
            twice(inputs, width, stride=2)
            for inputs, width in zip((3, *widths), widths, strict=False)
        )
        self.attend = nn.ModuleList(
            nn.Sequential(
                *(Attend(width, width // config.head_dim, config.mlp_ratio) for _ in range(depth))
            )
            for width, depth in zip(widths[-2:], config.depths, strict=True)
        )
        pairs = list(zip(widths[:1:-1], widths[-2:1:-1], strict=False))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(twice(2 * b, b) for _, b in pairs)
        self.neck = nn.Sequential(
            nn.Conv2d(widths[2], out_chans, 1, bias=False), *refine(out_chans)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        levels = []
        for index, layer in enumerate(self.down):
            x = layer(x)
            if index > 2:
                x = self.attend[index - 3](x)
            levels.append(x)
        for enlarge, layer, beside in zip(self.enlarge, self.up, levels[-2:1:-1], strict=True):
            x = layer(torch.cat([enlarge(x), beside], 1))
        embedding: Tensor = self.neck(x)
        return embedding


def twice(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """U-Net's two 3 x 3 convolutions, each with batch norm and ReLU."""
    return nn.Sequential(
        normed(inputs, outputs, 3, stride, inplace=True), normed(outputs, outputs, 3, inplace=True)
    )
