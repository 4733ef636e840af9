"""Convolutions, pooling and attention in a very small image encoder: after Lite-SAM's LiteViT.

Blocks in the first three stages mix neighbourhoods by pools of several sizes, as PoolFormer does by
one; the last stage attends to the whole map. The embedding adds the levels of stride 16 and 32.

From the paper's facts known to us: a hybrid of convolution and attention, multi-scale pooling, 1.16
million parameters. Widths, depths, the pools' sizes, where attention is and the neck are our
choice, such that the whole encoder has that many. Left out: AutoPPN, which proposes prompts.

Source: J. Fu et al., "Lite-SAM Is Actually What You Need for Segment Everything", 2024, arXiv
2407.08965 (no public code or weights); PoolFormer: W. Yu et al., 2021, arXiv 2111.11418. Own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._blocks import Attend, Encoder, Pyramid, normed
from ._fold import fold

SIDES = (3, 5, 7)


@dataclass(frozen=True)
class LiteViTConfig:
    """Sizes of a LiteViT, one entry a stage; the last stage attends.

    Attributes:
        channels: width.
        depths: blocks.
        mlp_ratio: hidden width of the MLPs over the channels.
        heads: of attention.
    """

    channels: tuple[int, int, int, int] = (32, 64, 96, 160)
    depths: tuple[int, int, int, int] = (1, 3, 6, 1)
    mlp_ratio: int = 4
    heads: int = 5


CONFIGS: dict[str, LiteViTConfig] = {"lite": LiteViTConfig()}


def build(config: LiteViTConfig, image_size: int = 1024, out_chans: int = 256) -> LiteViT:
    """The encoder with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: side S of the input in pixels, a multiple of 32.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the size is not a multiple of 32.
    """
    return LiteViT(config, image_size, out_chans)


class LiteViT(Encoder):
    """``(B, 3, S, S)`` images to ``(B, C, S / 16, S / 16)`` embeddings."""

    def __init__(self, config: LiteViTConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__(image_size)
        width, ratio = config.channels[0], config.mlp_ratio
        self.stem = normed(3, width // 2, 3, 2, activation_layer=nn.GELU)
        stages = []
        inputs = width // 2
        for stage, (width, depth) in enumerate(zip(config.channels, config.depths, strict=True)):
            halve = normed(inputs, width, 3, 2, activation_layer=nn.GELU if not stage else None)
            blocks: list[nn.Module] = [
                Attend(width, config.heads, ratio) if stage == 3 else PoolBlock(width, ratio)
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(halve, *blocks))
            inputs = width
        self.stages = nn.ModuleList(stages)
        # Channels are mixed when the levels are brought together; here only neighbours are.
        self.neck = Pyramid(*config.channels[2:], out_chans, groups=out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        x = self.stem(x)
        for stage in self.stages:
            finer, x = x, stage(x)
        embedding: Tensor = self.neck(finer, x)
        return embedding

    def fuse(self) -> None:
        """Make the pools of each block one convolution and fold all batch norms, in place.

        The result computes what the encoder computes in eval mode, to rounding.
        """
        for name, part in list(self.named_modules()):
            if isinstance(part, Pools):
                self.set_submodule(name, part.merged())
        super().fuse()


class PoolBlock(nn.Module):
    """Neighbourhoods, then channels."""

    def __init__(self, dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.pools = Pools(dim)
        self.mlp = nn.Sequential(
            normed(dim, mlp_ratio * dim, 1, activation_layer=nn.GELU),
            normed(mlp_ratio * dim, dim, 1, activation_layer=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, h, w)."""
        x = x + self.pools(x)
        out: Tensor = x + self.mlp(x)
        return out


class Pools(nn.Module):
    """The cell itself and means of 3, 5 and 7 cells a side, weighted for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d((1 + len(SIDES)) * dim, dim, 1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, h, w)."""
        # Cells outside count as zeros, so that `merged` is the same at the borders.
        scales = [x, *(F.avg_pool2d(x, side, 1, side // 2) for side in SIDES)]
        out: Tensor = self.norm(self.mix(torch.stack(scales, 2).flatten(1, 2)))
        return out

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """One depthwise convolution that computes the same in eval mode."""
        old = self.mix.weight
        dim, largest = old.shape[0], max(SIDES)
        kernels = torch.zeros(1 + len(SIDES), largest, largest, dtype=old.dtype, device=old.device)
        for kernel, side in zip(kernels, (1, *SIDES), strict=True):
            edge = (largest - side) // 2
            kernel[edge : largest - edge, edge : largest - edge] = side**-2
        whole = nn.Conv2d(dim, dim, largest, padding=largest // 2, groups=dim, bias=False)
        weight = torch.einsum("cs,sij->cij", old.flatten(1), kernels)[:, None]
        whole.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        fold(whole, self.norm)
        return whole.train(self.training)
