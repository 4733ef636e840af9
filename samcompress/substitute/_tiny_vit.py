"""TinyViT as SAM's image encoder: that of MobileSAM, TinySAM, MobileSAMv2 and light SAM-HQ.

Four stages over a convolutional stem: one of inverted bottlenecks, three of windowed attention. The
last merging of patches keeps the grid, so that the embedding has one cell for 16 x 16 pixels.

timm has the convolutional parts and the MLP. Its attention is not used: it keeps the expanded
position bias from the first call in eval mode, and weights loaded later would not reach it.

Source: K. Wu et al., "TinyViT", 2022, arXiv 2207.10666; as an encoder for SAM: C. Zhang et al.,
"Faster Segment Anything", 2023, arXiv 2306.14289. Official weights: Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn

from ..core._require import require
from ..core.errors import ConfigError

STRIDE = 16

# A classifier for ImageNet that the official files keep and that no encoder runs.
UNUSED = re.compile(r"image_encoder\.(norm_head|head)\.(weight|bias)")

RENAMED = (
    (re.compile(r"^(image_encoder\.patch_embed\.)seq\.0\."), r"\1conv1."),
    (re.compile(r"^(image_encoder\.patch_embed\.)seq\.2\."), r"\1conv2."),
    (re.compile(r"^(image_encoder\..*)\.c\."), r"\1.conv."),
)


@dataclass(frozen=True)
class TinyViTConfig:
    """Sizes of a TinyViT, one entry a stage; the first stage has no attention.

    Attributes:
        embed_dims: channels.
        depths: blocks.
        num_heads: attention heads.
        window_sizes: sides of the attention windows, in tokens.
        mlp_ratio: hidden width of the MLPs over the channels.
        expand_ratio: the same for the inverted bottlenecks.
    """

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 4.0
    expand_ratio: float = 4.0


CONFIGS: dict[str, TinyViTConfig] = {"5m": TinyViTConfig()}


def build(config: TinyViTConfig, image_size: int = 1024, out_chans: int = 256) -> TinyViT:
    """A TinyViT with random weights.

    Args:
        config: its sizes.
        image_size: side S of the input in pixels, a multiple of 16.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 16.
        MissingDependencyError: if timm is not installed.
    """
    return TinyViT(config, image_size, out_chans)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a whole SAM to those of one with a `TinyViT`; the classifier is left out.

    Args:
        state: with the prefixes ``image_encoder.``, ``prompt_encoder.`` and ``mask_decoder.``;
            names of the last two are SAM's own and stay.
    """
    found = {}
    for name, tensor in state.items():
        if UNUSED.fullmatch(name):
            continue
        new = name
        for pattern, replacement in RENAMED:
            new = pattern.sub(replacement, new)
        found[new] = tensor
    return found


class TinyViT(nn.Module):
    """``(B, 3, S, S)`` images to ``(B, C, S/16, S/16)`` embeddings.

    Args:
        config: sizes of the stages.
        image_size: side S of the input in pixels, a multiple of 16.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 16.
        MissingDependencyError: if timm is not installed.
    """

    stride = STRIDE

    def __init__(self, config: TinyViTConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        parts = _timm()
        self.resize(image_size)
        dims, last = config.embed_dims, len(config.depths) - 1
        self.patch_embed = parts.PatchEmbed(3, dims[0], act_layer=nn.GELU)
        self.layers = nn.ModuleList(
            Layer(
                [_block(config, index) for _ in range(depth)],
                # Two halvings in the stem and two here; the last merging only widens.
                None if index == last else _merging(dims, index, 2 if index < 2 else 1),
            )
            for index, depth in enumerate(config.depths)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def resize(self, size: int) -> None:
        """Take images of another side; no weight depends on it.

        Raises:
            ConfigError: if the size is not a multiple of 16.
        """
        if size < STRIDE or size % STRIDE:
            raise ConfigError(
                "TinyViT does not work at this image size.",
                got=size,
                expected=f"a multiple of {STRIDE}",
            )
        self.img_size = size

    def levels(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stages, each merged for the next, as (B, channels, height, width)."""
        x = self.patch_embed(x)
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        embedding: Tensor = self.neck(self.levels(x)[-1])
        return embedding


class Layer(nn.Module):
    """A stage: blocks, then merging of patches, if any."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, height, width)."""
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class Block(nn.Module):
    """Attention inside windows, a convolution of each channel, and an MLP.

    Args:
        dim: channels.
        heads: attention heads.
        window: side of a window in tokens.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        parts = _timm()
        self.window_size = window
        self.attn = Attention(dim, heads, window)
        self.local_conv = parts.ConvNorm(dim, dim, 3, 1, 1, groups=dim)
        self.mlp = parts.NormMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, height, width)."""
        batch, dim, *grid = x.shape
        tokens = _tokens(x).reshape(batch, *grid, dim)
        # The norm is the attention's, so padded tokens become its bias; trained weights rely on it.
        windows, padded = window_partition(tokens, self.window_size)
        mixed = self.attn(windows.flatten(1, 2)).reshape(windows.shape)
        tokens = tokens + window_unpartition(mixed, self.window_size, padded, tuple(grid))
        # No shortcut around the convolution.
        tokens = _tokens(self.local_conv(_map(tokens.flatten(1, 2), grid)))
        return _map(tokens + self.mlp(tokens), grid)


class Attention(nn.Module):
    """Attention of the tokens of a window, with a learned bias for every distance of two tokens.

    Args:
        dim: channels.
        heads: attention heads.
        window: side of the window in tokens.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = heads, window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (windows, window**2, dim) tokens."""
        # One head after the other, each with its query, key and value.
        split = self.qkv(self.norm(x)).unflatten(2, (self.num_heads, 3, -1))
        q, k, v = split.permute(3, 0, 2, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype))
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def bias(self) -> Tensor:
        """(1, heads, window**2, window**2), made anew at each call and so never out of date."""
        rows = torch.arange(self.window_size, device=self.attention_biases.device)
        apart = (rows[:, None] - rows).abs()
        distance = self.window_size * apart[:, None, :, None] + apart[None, :, None, :]
        # With four dimensions; with three, torch has no fast kernel on the CPU.
        return self.attention_biases[:, distance.flatten(0, 1).flatten(1)][None]


# With three dimensions: of four, OpenVINO takes a tenth of the encoder's time to change the order.
def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def _block(config: TinyViTConfig, stage: int) -> nn.Module:
    dim = config.embed_dims[stage]
    if stage == 0:
        block: nn.Module = _timm().MBConv(dim, dim, config.expand_ratio, nn.GELU, drop_path=0.0)
        return block
    return Block(dim, config.num_heads[stage], config.window_sizes[stage], config.mlp_ratio)


def _merging(dims: tuple[int, ...], stage: int, stride: int) -> nn.Module:
    dim, wider = dims[stage : stage + 2]
    merging: nn.Module = _timm().PatchMerging(dim, wider, act_layer=nn.GELU)
    # timm's always halves the grid.
    merging.conv2 = _timm().ConvNorm(wider, wider, 3, stride, 1, groups=wider)
    return merging


def _timm() -> Any:
    return require("timm.models.tiny_vit", extra="zoo", purpose="TinyViT")
