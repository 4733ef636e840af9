"""EfficientFormerV2 as SAM's image encoder: after ESAM.

Four stages of inverted bottlenecks; the last blocks of the third and fourth attend to the whole
map, those of the third on a map of half the side. The embedding adds the levels of stride 16 and
32.

The trunk is timm's (Apache-2.0), with its tensor names. Only attention is computed here: timm keeps
the expanded position bias from the first call in eval mode, which weights loaded later would not
reach, and tables of indices that grow with the fourth power of the image's side.

ESAM says that EfficientFormerV2 is its encoder; which variant, from which stages and through which
neck the embedding is taken is not known to us and our choice.

Source: Y. Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed", 2022, arXiv
2212.08059 (reference code Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core._require import require
from ._blocks import Encoder, Pyramid

Ratios = tuple[int, ...]


@dataclass(frozen=True)
class EfficientFormerConfig:
    """Sizes of an EfficientFormerV2, one entry a stage.

    Attributes:
        channels: width.
        ratios: for each block the hidden width of its MLP over the channels.
        attending: how many of the last blocks of the third and fourth stage attend.
    """

    channels: tuple[int, int, int, int]
    ratios: tuple[Ratios, Ratios, Ratios, Ratios]
    attending: int


CONFIGS: dict[str, EfficientFormerConfig] = {
    "s0": EfficientFormerConfig(
        (32, 48, 96, 176), ((4,) * 2, (4,) * 2, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)), 2
    ),
    "s1": EfficientFormerConfig(
        (32, 48, 120, 224),
        ((4,) * 3, (4,) * 3, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
        2,
    ),
    "s2": EfficientFormerConfig(
        (32, 64, 144, 288),
        ((4,) * 4, (4,) * 4, (4, 4, *(3,) * 6, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4)),
        4,
    ),
    "l": EfficientFormerConfig(
        (40, 80, 192, 384),
        ((4,) * 5, (4,) * 5, (*(4,) * 4, *(3,) * 7, *(4,) * 4), (4, 4, 4, 3, 3, 3, 3, 4, 4, 4)),
        6,
    ),
}


def build(
    config: EfficientFormerConfig, image_size: int = 1024, out_chans: int = 256
) -> EfficientFormer:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of 32.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 32.
        MissingDependencyError: if timm is not installed.
    """
    return EfficientFormer(config, image_size, out_chans)


class EfficientFormer(Encoder):
    """``(B, 3, S, S)`` images to ``(B, C, S / 16, S / 16)`` embeddings."""

    def __init__(
        self, config: EfficientFormerConfig, image_size: int = 1024, out_chans: int = 256
    ) -> None:
        super().__init__(image_size)
        timm = require("timm.models.efficientformer_v2", extra="zoo", purpose="EfficientFormerV2")
        trunk = timm.EfficientFormerV2(
            depths=tuple(len(ratios) for ratios in config.ratios),
            embed_dims=config.channels,
            mlp_ratios=config.ratios,
            num_vit=config.attending,
            num_classes=0,
            img_size=32,  # of attention's tables only, which are made below
        )
        self.stem, self.stages = trunk.stem, trunk.stages
        cells = image_size // 32
        for name, part in list(self.stages.named_modules()):
            if isinstance(part, timm.Attention2d):
                self.stages.set_submodule(name, Attention(part, cells))
            elif isinstance(part, timm.Attention2dDownsample):
                self.stages.set_submodule(name, Attention(part, 2 * cells))
        self.neck = Pyramid(*config.channels[2:], out_chans)

    def levels(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stages, with strides 4, 8, 16 and 32."""
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        embedding: Tensor = self.neck(*self.levels(x)[2:])
        return embedding

    def resize(self, size: int) -> None:
        """Take images of another side, with attention's tables of distances stretched to match."""
        super().resize(size)
        for part in self.modules():
            if isinstance(part, Attention):
                part.resize(size // 32 * (1 + part.halves))


class Attention(nn.Module):
    """Attention over a whole map, with a bias for each distance.

    Args:
        parts: timm's module of one of two kinds, whose layers are taken over: one works on the map,
            or on its half and enlarges the result, and mixes the heads; the other has queries for
            every second row and column and so halves the map.
        cells: side of the map that keys are taken from.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    v_local: nn.Module
    talking_head1: nn.Module
    talking_head2: nn.Module
    stride_conv: nn.Module | None
    upsample: nn.Module | None
    act: nn.Module
    proj: nn.Module

    def __init__(self, parts: Any, cells: int) -> None:
        super().__init__()
        self.heads, self.cells = parts.num_heads, cells
        self.halves = not hasattr(parts, "talking_head1")
        self.stride_conv = self.upsample = None
        for name, layer in parts.named_children():
            setattr(self, name, layer)
        self.attention_biases = nn.Parameter(torch.zeros(self.heads, cells**2))

    def resize(self, cells: int) -> None:
        """Another side of the map: distances are stretched with it."""
        old, self.cells = self.attention_biases, cells
        side = round(old.shape[1] ** 0.5)
        table = old.detach().float().reshape(1, self.heads, side, side)
        table = F.interpolate(table, (cells, cells), mode="bilinear", align_corners=True)
        table = table.reshape(self.heads, -1).to(old.dtype)
        self.attention_biases = nn.Parameter(table, requires_grad=old.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, h, w)."""
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        local = self.v_local(v)
        q, k, v = (_split(part, self.heads) for part in (q, k, v))
        weights = (q * q.shape[-1] ** -0.5) @ k.mT + self.bias().to(q.dtype)
        if self.halves:
            weights = weights.softmax(-1)
        else:
            weights = self.talking_head2(self.talking_head1(weights).softmax(-1))
        out = (weights @ v).mT.reshape(local.shape) + local
        if self.upsample is not None:
            out = self.upsample(out)
        projected: Tensor = self.proj(self.act(out))
        return projected

    def bias(self) -> Tensor:
        """(1, heads, queries, keys), made anew at each call and so never out of date."""
        keys = torch.arange(self.cells, device=self.attention_biases.device)
        queries = keys[::2] if self.halves else keys
        apart = (queries[:, None] - keys).abs()
        table = self.attention_biases.reshape(self.heads, self.cells, self.cells)
        # Columns before rows: the large step then copies whole rows of keys.
        columns = table[:, :, apart].transpose(1, 2)  # (heads, x of query, rows apart, x of key)
        expanded = columns[:, :, apart].transpose(1, 2)  # (heads, y, x of query, y, x of key)
        return expanded.flatten(3).flatten(1, 2)[None]


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, heads * dim, h, w) to (B, heads, h * w, dim)."""
    batch, width, rows, columns = x.shape
    return x.reshape(batch, heads, width // heads, rows * columns).mT
