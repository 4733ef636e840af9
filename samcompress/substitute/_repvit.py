"""RepViT as a SAM's image encoder: that of EdgeSAM and that of RepViT-SAM.

Convolutions only. Each block mixes positions by a 3x3 depthwise convolution with parallel 1x1 and
identity branches, which `RepViTEncoder.fuse` makes one convolution, then channels by two 1x1
convolutions. Tensor names are those of both projects' checkpoints.

The parts of a block are timm's (Apache-2.0).

Source: A. Wang et al., "RepViT", 2023, arXiv 2307.09283; as encoders for SAM: A. Wang et al.,
"RepViT-SAM", 2023, arXiv 2312.05760 (weights: Apache-2.0); C. Zhou et al., "EdgeSAM", 2023, arXiv
2312.06660 (reference code and weights: S-Lab License 1.0, non-commercial). Own code.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from ..core._require import require
from ._fold import batch_norm_pairs, fold, fold_batch_norms


@dataclass(frozen=True)
class RepViTConfig:
    """Sizes of a RepViT image encoder.

    Attributes:
        channels: width of each of the four stages; the first is also the stem's.
        blocks: for each stage one digit a block, 1 where the block has squeeze and excitation. The
            first block of each stage but the first changes the width, and halves the map.
        legacy: the first revision's depthwise block, without a batch norm behind the sum of its
            branches but with one on each.
        last_stride: stride of the first block of the last stage.
        fused: add the last two stages, the last one enlarged, instead of taking the last one; for
            ``last_stride=2``.
    """

    channels: tuple[int, int, int, int]
    blocks: tuple[str, str, str, str]
    legacy: bool
    last_stride: int
    fused: bool


CONFIGS: dict[str, RepViTConfig] = {
    # EdgeSAM and EdgeSAM-3x.
    "m1": RepViTConfig(
        channels=(48, 96, 192, 384),
        blocks=("100", "0100", "0" + "10" * 7 + "0", "010"),
        legacy=True,
        last_stride=2,
        fused=True,
    ),
    # RepViT-SAM.
    "m2.3": RepViTConfig(
        channels=(80, 160, 320, 640),
        blocks=("1010100", "01010100", "0" + "10" * 17 + "0", "010"),
        legacy=False,
        last_stride=1,
        fused=False,
    ),
}


def build(config: RepViTConfig, image_size: int = 1024, out_chans: int = 256) -> RepViTEncoder:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of the encoder's `multiple`.
        out_chans: channels C of the embedding.
    """
    return RepViTEncoder(config, image_size, out_chans)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours, which are the same.

    Args:
        state: contents of ``edge_sam.pth``, ``edge_sam_3x.pth`` or ``repvit_sam.pt``.
    """
    return dict(state)


class RepViTEncoder(nn.Module):
    """``(B, 3, S, S)`` to ``(B, C, S / 16, S / 16)``.

    Attributes:
        img_size: side S of the input.
        stride: pixels a cell of the embedding covers.
        multiple: S must be a multiple of this.
    """

    stride = 16

    def __init__(self, config: RepViTConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        self.img_size = image_size
        self.multiple = 16 * config.last_stride
        self.fused = config.fused
        width = config.channels[0]
        layers: list[nn.Module] = [_stem(width)]
        for stage, (out, digits) in enumerate(zip(config.channels, config.blocks, strict=True)):
            for index, digit in enumerate(digits):
                stride = None
                if stage and not index:
                    stride = config.last_stride if stage == 3 else 2
                layers.append(_Block(width, out, stride, digit == "1", config.legacy))
                width = out
        self.features = nn.ModuleList(layers)
        self.third = sum(map(len, config.blocks[:3]))  # where in `features` the third stage ends
        if config.fused:
            self.fuse_stage2 = nn.Conv2d(config.channels[2], out_chans, 1, bias=False)
            enlarged = nn.Sequential(
                nn.Conv2d(width, out_chans, 1, bias=False),
                nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False),
            )
            self.fuse_stage3 = nn.Sequential(OrderedDict(op_list=enlarged))
            width = out_chans
        self.neck = nn.Sequential(
            nn.Conv2d(width, out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == self.third:
                finer = x
        if self.fused:
            x = self.fuse_stage2(finer) + self.fuse_stage3(x)
        embedding: Tensor = self.neck(x)
        return embedding

    def resize(self, size: int) -> None:
        """Take another image size; there is no position table to resize.

        Args:
            size: new side S, a multiple of `multiple`.
        """
        self.img_size = size

    def fuse(self) -> None:
        """Make each block's branches one convolution and fold all batch norms, in place.

        The result computes what the encoder computes in eval mode, to rounding. Training goes on
        without batch norms and branches. Nothing happens where there is nothing to fuse.
        """
        branched = require("timm.models.repvit", extra="zoo").RepVggDw
        for name, part in list(self.named_modules()):
            if isinstance(part, branched):
                self.set_submodule(name, merged(part))
        side = self.multiple
        kind = next(self.parameters()).dtype
        example = torch.empty(1, 3, side, side, dtype=kind, device="meta")
        fold_batch_norms(self, batch_norm_pairs(self, example))


@torch.no_grad()
def merged(block: nn.Module) -> nn.Conv2d:
    """One depthwise convolution in the place of three branches and their batch norms.

    Args:
        block: timm's RepVggDw of either revision, in which x becomes
            ``norm(conv(x) + conv1(x) + x)``; the first revision has norms inside both branches, the
            second inside the first branch and behind the sum.
    """
    old = next(block.parameters())
    parts: Any = copy.deepcopy(block).to(torch.promote_types(old.dtype, torch.float32))
    whole, small = _folded(parts.conv), _folded(parts.conv1)
    middle = whole.kernel_size[0] // 2
    whole.weight[:, :, middle, middle] += small.weight[:, :, 0, 0] + 1
    whole.bias += small.bias
    if isinstance(parts.bn, nn.BatchNorm2d):
        fold(whole, parts.bn)
    result: nn.Conv2d = whole.to(old.dtype).requires_grad_(old.requires_grad)
    return result


def _folded(branch: Any) -> Any:
    if not isinstance(branch, nn.Conv2d):
        fold(branch.c, branch.bn)
        branch = branch.c
    return branch


def _normed(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, **options: Any) -> Any:
    """Convolution and batch norm, as timm's module of the names ``c`` and ``bn``."""
    make = require("timm.models.repvit", extra="zoo").ConvNorm
    return make(inputs, outputs, kernel, stride, kernel // 2, **options)


def _stem(width: int) -> nn.Module:
    return nn.Sequential(
        _normed(3, width // 2, 3, stride=2), nn.GELU(), _normed(width // 2, width, 3, stride=2)
    )


class _Block(nn.Module):
    """Positions, then channels with a residual.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of a block that changes the width; None for one that keeps it.
        excited: squeeze and excitation after the depthwise convolution.
        legacy: see `RepViTConfig`.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int | None, excited: bool, legacy: bool
    ) -> None:
        super().__init__()
        timm = require("timm.models.repvit", extra="zoo")
        gate = timm.SqueezeExcite(inputs, 0.25) if excited else nn.Identity()
        if stride is None:
            self.token_mixer = nn.Sequential(timm.RepVggDw(inputs, 3, legacy), gate)
        else:
            depthwise = _normed(inputs, inputs, 3, stride=stride, groups=inputs)
            self.token_mixer = nn.Sequential(depthwise, gate, _normed(inputs, outputs))
        hidden = 2 * outputs
        self.channel_mixer = nn.ModuleDict(
            {
                "m": nn.Sequential(
                    _normed(outputs, hidden), nn.GELU(), _normed(hidden, outputs, bn_weight_init=0)
                )
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix one map."""
        x = self.token_mixer(x)
        mixed: Tensor = x + self.channel_mixer["m"](x)
        return mixed
