"""A ResNet as a SAM's image encoder: that of NanoSAM.

The last stage of a ResNet-18, a head of plain convolutions that enlarges it once, and a learned map
of positions added at the end, without a norm. The trunk is torchvision's; tensor names are those of
NanoSAM's training checkpoints.

Source: NVIDIA, NanoSAM, 2023, github.com/NVIDIA-AI-IOT/nanosam (Apache-2.0); no paper. Own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as Trunk

from ._fold import batch_norm_pairs, fold_batch_norms
from .image_size import resize_positions

PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet image encoder.

    Attributes:
        blocks: basic blocks in each stage, 64, 128, 256 and 512 channels wide.
        width: channels of the head.
    """

    blocks: tuple[int, int, int, int]
    width: int = 256


CONFIGS: dict[str, ResNetConfig] = {"18": ResNetConfig(blocks=(2, 2, 2, 2))}  # NanoSAM


def build(config: ResNetConfig, image_size: int = 1024, out_chans: int = 256) -> ResNetEncoder:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of the encoder's `multiple`.
        out_chans: channels C of the embedding.
    """
    return ResNetEncoder(config, image_size, out_chans)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours.

    Args:
        state: the entry ``model`` of a training checkpoint, which holds the encoder alone; names
            that say their part of the model already are kept. The decoder is that of MobileSAM's
            ``mobile_sam.pt``.
    """
    return {
        name if name.startswith(PARTS) else f"{PARTS[0]}{name}": tensor
        for name, tensor in state.items()
    }


class ResNetEncoder(nn.Module):
    """``(B, 3, S, S)`` to ``(B, C, S / 16, S / 16)``.

    Attributes:
        img_size: side S of the input.
        stride: pixels a cell of the embedding covers.
        multiple: S must be a multiple of this.
    """

    stride, multiple = 16, 32

    def __init__(self, config: ResNetConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        self.img_size = image_size
        self.backbone = _LastStage(BasicBlock, list(config.blocks))
        wide = config.width
        self.up_1 = nn.Sequential(
            nn.Conv2d(512, wide, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(wide, wide, 3, stride=2, padding=1, output_padding=1),
            nn.GELU(),
        )
        self.proj = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1), nn.GELU(), nn.Conv2d(wide, out_chans, 1)
        )
        grid = image_size // self.stride
        self.pos_embedding = nn.Parameter(torch.zeros(1, out_chans, grid, grid))

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        embedding: Tensor = self.proj(self.up_1(self.backbone(x))) + self.pos_embedding
        return embedding

    def resize(self, size: int) -> None:
        """Take another image size, with the map of positions resized to match.

        Args:
            size: new side S, a multiple of `multiple`.
        """
        table, old = self.pos_embedding.permute(0, 2, 3, 1), self.pos_embedding
        resized = resize_positions(table, size // self.stride).permute(0, 3, 1, 2).contiguous()
        self.pos_embedding = nn.Parameter(resized, requires_grad=old.requires_grad)
        self.img_size = size

    def fuse(self) -> None:
        """Fold all batch norms, in place.

        The result computes what the encoder computes in eval mode, to rounding.
        """
        kind = self.pos_embedding.dtype
        example = torch.empty(1, 3, self.img_size, self.img_size, dtype=kind, device="meta")
        fold_batch_norms(self, batch_norm_pairs(self, example))


class _LastStage(Trunk):  # type: ignore[misc]
    """torchvision's ResNet up to the map of its last stage, with stride 32."""

    def __init__(self, block: type[BasicBlock], layers: list[int]) -> None:
        super().__init__(block, layers)
        del self.avgpool, self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Features of 512 channels."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


class UnpaddedPrompts(PromptEncoder):  # type: ignore[misc]
    """Prompt encoder that adds no padding point where a prompt has no box.

    Same tensors as segment_anything's. That NanoSAM puts the corners of a box before the points,
    not behind them, changes nothing: the decoder does not see the order of its tokens.
    """

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        embedded: Tensor = super()._embed_points(points, labels, pad=False)
        return embedded
