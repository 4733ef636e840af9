"""Convolutions, then RWKV blocks, as SAM's image encoder: after RWKV-SAM.

Two stages of inverted bottlenecks bring the image to an eighth, then blocks of Vision-RWKV work on
a sixteenth. Each mixes positions by the WKV operator, whose cost is linear in the number of tokens,
and channels by a gated MLP; both look at a mixture of each token and its neighbours.

From the paper's facts known to us: 64 and 128 channels in the convolutional stages, 384 in the
blocks of the small variant, an MLP ratio of 2, a projection to SAM's channels. Our choice: the
numbers of blocks, the stem, the width of the tiny variant. Left out: the paper's second decoder
path, which refines masks by the finer features.

Source: H. Yuan et al., "Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything
Model", 2024, arXiv 2406.19369 (reference code and weights: S-Lab License 1.0, non-commercial; not
used); blocks: Y. Duan et al., "Vision-RWKV", 2024, arXiv 2403.02308. Own code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._blocks import Encoder, Inverted, normed
from ._wkv import wkv


@dataclass(frozen=True)
class RWKVConfig:
    """Sizes of an RWKV image encoder.

    Attributes:
        width: channels of the RWKV blocks.
        depth: RWKV blocks.
        mlp_ratio: hidden width of their MLPs over `width`.
        channels: of the two convolutional stages.
        blocks: inverted bottlenecks in them.
    """

    width: int
    depth: int = 14
    mlp_ratio: int = 2
    channels: tuple[int, int] = (64, 128)
    blocks: tuple[int, int] = (1, 3)


CONFIGS: dict[str, RWKVConfig] = {
    "tiny": RWKVConfig(width=192),
    "small": RWKVConfig(width=384),
}


def build(config: RWKVConfig, image_size: int = 1024, out_chans: int = 256) -> RWKVEncoder:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of 16.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 16.
    """
    return RWKVEncoder(config, image_size, out_chans)


class RWKVEncoder(Encoder):
    """``(B, 3, S, S)`` images to ``(B, C, S / 16, S / 16)`` embeddings."""

    multiple = 16

    def __init__(self, config: RWKVConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__(image_size)
        inputs = config.channels[0] // 2
        self.stem = normed(3, inputs, 3, 2, activation_layer=nn.GELU)
        layers: list[nn.Module] = []
        for outputs, count in zip(config.channels, config.blocks, strict=True):
            layers.append(normed(inputs, outputs, 3, 2, activation_layer=None))
            layers += [Inverted(outputs) for _ in range(count)]
            inputs = outputs
        self.convolutions = nn.Sequential(*layers)
        self.embed = normed(inputs, config.width, 3, 2, activation_layer=None)
        self.blocks = nn.ModuleList(
            Block(config.width, config.mlp_ratio, index / config.depth)
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        tokens = self.embed(self.convolutions(self.stem(x))).permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens = block(tokens)
        embedding: Tensor = self.project(self.norm(tokens)).permute(0, 3, 1, 2)
        return embedding


class Block(nn.Module):
    """Positions, then channels.

    Args:
        dim: channels.
        mlp_ratio: hidden width of the channel mixer over `dim`.
        level: place among the blocks, from 0 to below 1; first values depend on it.
    """

    def __init__(self, dim: int, mlp_ratio: int, level: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.spatial = SpatialMix(dim, level)
        self.norm2 = nn.LayerNorm(dim)
        self.channel = ChannelMix(dim, mlp_ratio * dim, level)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, dim)."""
        x = x + self.spatial(self.norm1(x))
        out: Tensor = x + self.channel(self.norm2(x))
        return out


class SpatialMix(nn.Module):
    """The gated WKV average over all tokens."""

    def __init__(self, dim: int, level: float) -> None:
        super().__init__()
        self.mix_key, self.mix_value, self.mix_gate = (_mixture(dim, level) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        # Vision-RWKV's first values: from channels that see the whole image to some that see less.
        channel = torch.arange(dim)
        place = channel / max(dim - 1, 1)
        self.decay = nn.Parameter(8 * place ** (0.7 + 1.3 * level) - 5)
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, dim)."""
        near = shift(x)
        own = x - near
        key = self.key(near + own * self.mix_key).flatten(1, 2).mT
        value = self.value(near + own * self.mix_value).flatten(1, 2).mT
        gate = self.gate(near + own * self.mix_gate).sigmoid()
        # The decay over the whole image is learned, so it means the same at every image size.
        tokens = key.shape[-1]
        mixed = wkv(key, value, self.decay / tokens, self.bonus / tokens)
        out: Tensor = self.output(gate * mixed.mT.reshape(x.shape))
        return out


class ChannelMix(nn.Module):
    """A gated MLP whose hidden units are squared."""

    def __init__(self, dim: int, hidden: int, level: float) -> None:
        super().__init__()
        self.mix_key, self.mix_gate = (_mixture(dim, level) for _ in range(2))
        self.key = nn.Linear(dim, hidden, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, dim)."""
        near = shift(x)
        own = x - near
        hidden = self.key(near + own * self.mix_key).relu().square()
        gate = self.gate(near + own * self.mix_gate).sigmoid()
        out: Tensor = gate * self.value(hidden)
        return out


def shift(x: Tensor) -> Tensor:
    """Four quarters of the channels moved by a cell to the right, left, down and up.

    Args:
        x: (B, h, w, C); zeros enter at the borders, and up to three last channels stay.
    """
    quarter, height, width = x.shape[-1] // 4, x.shape[1], x.shape[2]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    starts = ((1, 0), (1, 2), (0, 1), (2, 1))
    moved = [
        padded[:, top : top + height, left : left + width, i * quarter : (i + 1) * quarter]
        for i, (top, left) in enumerate(starts)
    ]
    return torch.cat([*moved, x[..., 4 * quarter :]], -1)


def _mixture(dim: int, level: float) -> nn.Parameter:
    """How much of each channel is the token's own; the rest is its neighbour's."""
    return nn.Parameter((torch.arange(dim) / dim) ** (1 - level))
