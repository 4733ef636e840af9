"""Hiera as a SAM's image encoder: that of SAM 2.

A trunk of four stages, each of half the resolution and twice the width of the one before: attention
inside windows, and over the whole map in three blocks. A neck brings all stages to one width and
adds the coarsest, enlarged, to the one before it, which is the embedding. The two finer ones are
for SAM 2's own decoder; see `HieraEncoder.levels`.

The trunk is timm's (Apache-2.0). Tensor names are those of the official checkpoints, but for the
two linear layers of an MLP, which have timm's.

Source: C. Ryali et al., "Hiera", 2023, arXiv 2306.00989; N. Ravi et al., "SAM 2", 2024, arXiv
2408.00714 (code and weights: Apache-2.0). Own code.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..core._require import require
from ..core.errors import ConfigError

STRIDE, MULTIPLE = 16, 32


@dataclass(frozen=True)
class HieraConfig:
    """Sizes of a Hiera image encoder.

    Attributes:
        width: channels of the first stage; each later stage has twice those of the one before.
        heads: attention heads of the first stage, doubled likewise.
        blocks: blocks of the four stages.
        everywhere: blocks whose attention sees the whole map, counted through all stages.
        background: side of the table of positions that is stretched over the image.
        windows: side of the attention windows of each stage, in tokens.
    """

    width: int = 96
    heads: int = 1
    blocks: tuple[int, int, int, int] = (1, 2, 7, 2)
    everywhere: tuple[int, ...] = (5, 7, 9)
    background: int = 7
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.width << stage for stage in range(4))


CONFIGS: dict[str, HieraConfig] = {
    "tiny": HieraConfig(),
    "small": HieraConfig(blocks=(1, 2, 11, 2), everywhere=(7, 10, 13)),
    "base_plus": HieraConfig(
        width=112, heads=2, blocks=(2, 3, 16, 3), everywhere=(12, 16, 20), background=14
    ),
    "large": HieraConfig(
        width=144, heads=2, blocks=(2, 6, 36, 4), everywhere=(23, 33, 43), windows=(8, 4, 16, 8)
    ),
}

# transformers' names, with or without the prefix of the whole model, and the official ones.
RENAMED = (
    (re.compile(r"^(?:vision_encoder\.)?backbone\."), "image_encoder.trunk."),
    (re.compile(r"^(?:vision_encoder\.)?(neck\.convs\.\d+)\."), r"image_encoder.\1.conv."),
    (re.compile(r"^(image_encoder\.trunk\.patch_embed\.)projection\."), r"\1proj."),
    (re.compile(r"^(image_encoder\.trunk\.blocks\.\d+\.)layer_norm([12])\."), r"\1norm\2."),
    (re.compile(r"^(image_encoder\.trunk\..*\.mlp\.)(?:proj_in|layers\.0)\."), r"\1fc1."),
    (re.compile(r"^(image_encoder\.trunk\..*\.mlp\.)(?:proj_out|layers\.1)\."), r"\1fc2."),
)


def build(config: HieraConfig, image_size: int = 1024, out_chans: int = 256) -> HieraEncoder:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of 32.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 32.
        MissingDependencyError: if timm is not installed.
    """
    return HieraEncoder(config, image_size, out_chans)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of SAM 2's image encoder to ours; what is not the image encoder's keeps its name.

    Args:
        state: of transformers' Sam2Model or Sam2VisionModel, or of an official checkpoint.
    """
    found = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in RENAMED:
            new = pattern.sub(replacement, new)
        found[new] = tensor
    return found


class HieraEncoder(nn.Module):
    """``(B, 3, S, S)`` to ``(B, C, S / 16, S / 16)``.

    Attributes:
        img_size: side S of the input.
        stride: pixels a cell of the embedding covers.
        multiple: S must be a multiple of this.
    """

    stride, multiple = STRIDE, MULTIPLE

    def __init__(self, config: HieraConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        self.resize(image_size)
        self.trunk = require("timm.models.hieradet_sam2", extra="zoo").HieraDet(
            embed_dim=config.width,
            num_heads=config.heads,
            stages=config.blocks,
            global_att_blocks=config.everywhere,
            global_pos_size=(config.background, config.background),
            window_spec=config.windows,
            num_classes=0,
        )
        self.trunk.head = nn.Identity()  # a norm that SAM 2 does not have
        self.neck = Neck(config.widths, out_chans)

    def resize(self, size: int) -> None:
        """Take images of another side; tables of positions are stretched in every call.

        Raises:
            ConfigError: if the size is not a multiple of 32.
        """
        if size < MULTIPLE or size % MULTIPLE:
            raise ConfigError(
                "Hiera does not work at this image size.",
                got=size,
                expected=f"a multiple of {MULTIPLE}",
            )
        self.img_size = size

    def levels(self, x: Tensor) -> list[Tensor]:
        """``(B, C, S / 4, S / 4)``, ``(B, C, S / 8, S / 8)`` and the embedding, of one image."""
        finest, finer, *coarse = self._stages(x)
        return [self.neck.convs[3](finest), self.neck.convs[2](finer), self.neck(*coarse)]

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        embedding: Tensor = self.neck(*self._stages(x)[2:])
        return embedding

    def _stages(self, x: Tensor) -> list[Tensor]:
        stages: list[Tensor] = self.trunk.forward_intermediates(x, intermediates_only=True)
        return stages


class Neck(nn.Module):
    """SAM 2's neck: one width for all stages, and the coarsest added to the one before it.

    Args:
        widths: channels of the stages, the finest first.
        out_chans: channels C of all levels.
    """

    def __init__(self, widths: tuple[int, ...], out_chans: int) -> None:
        super().__init__()
        # The coarsest first. Those of the two finest stages have no part in `forward`.
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(width, out_chans, 1)))
            for width in reversed(widths)
        )

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """The level of the third stage, from the outputs of the third and the last."""
        enlarged = F.interpolate(self.convs[0](coarse), scale_factor=2.0, mode="nearest")
        embedding: Tensor = self.convs[1](fine) + enlarged
        return embedding
