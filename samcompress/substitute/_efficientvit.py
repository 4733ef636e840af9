"""EfficientViT-SAM's image encoder: convolutions, linear attention, and a neck over three scales.

After Z. Zhang, H. Cai and S. Han, 2024, arXiv 2402.05008 (reference code Apache-2.0). Tensors have
the names of the official checkpoints. The decoder is SAM's, with another eps in its norms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..core._require import require
from ..core.errors import ConfigError

# Every norm's eps, the mask decoder's included (SAM: 1e-5 there).
NORM_EPS = 1e-6
# Keeps 0 / 0 out of linear attention where all kernels vanish; too small to change anything else.
ATTENTION_EPS = 1e-15
# Prompts live in a square of 16 pixels for each cell of the embedding, whatever the image's size.
CELL = 16
# Side of the depthwise convolution that makes linear attention's second scale.
ATTENTION = {"att": 5, "att@3": 3}

Kind = Literal["res", "fmb", "mb", "att", "att@3"]


@dataclass(frozen=True)
class EfficientViTConfig:
    """Sizes of an EfficientViT-SAM encoder; each stage halves the resolution.

    Args:
        widths: channels of the stages.
        depths: blocks of the stages, not counting the one that halves.
        kinds: what the blocks are: ``res`` two 3 x 3 convolutions, ``fmb`` fused MBConv, ``mb``
            MBConv, ``att`` and ``att@3`` linear attention with 5 x 5 or 3 x 3 aggregation.
        expands: how much wider the blocks are inside.
        fewer_norms: whether only the last convolution of a block is normalised.
        neck_depth: blocks of the neck.
        neck_expand: how much wider they are inside.
        neck_width: channels of the neck.
        head_dim: channels of one head of attention.
        image_size: side of the image the published weights take.
        shrink: the encoder itself scales its image by 1 / shrink first.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 1, 1, 4, 4)
    kinds: tuple[Kind, ...] = ("res", "fmb", "fmb", "mb", "att")
    expands: tuple[int, ...] = (1, 4, 4, 4, 6)
    fewer_norms: tuple[bool, ...] = (False, False, False, True, True)
    neck_depth: int = 4
    neck_expand: int = 1
    neck_width: int = 256
    head_dim: int = 32
    image_size: int = 512
    shrink: int = 1

    @property
    def stride(self) -> int:
        """Pixels of the image for each cell of the embedding, whose grid is the third last's."""
        return self.shrink << (len(self.widths) - 2)


_XL = EfficientViTConfig(
    widths=(32, 64, 128, 256, 512, 1024),
    depths=(0, 1, 1, 2, 3, 3),
    kinds=("res", "fmb", "fmb", "fmb", "att@3", "att@3"),
    expands=(1, 4, 4, 4, 4, 6),
    fewer_norms=(False, False, False, False, True, True),
    neck_depth=6,
    neck_expand=4,
    image_size=1024,
)
_L2 = EfficientViTConfig(depths=(1, 2, 2, 8, 8), neck_depth=12)
CONFIGS: dict[str, EfficientViTConfig] = {
    "l0": EfficientViTConfig(),
    "l1": EfficientViTConfig(depths=(1, 1, 1, 6, 6), neck_depth=8),
    "l2": _L2,
    "xl0": _XL,
    "xl1": replace(_XL, depths=(1, 2, 2, 4, 6, 6), neck_depth=12),
    # MobileSAMv2's: the same network, which takes SAM's image and scales it down by itself.
    "mobilesamv2_l2": replace(_L2, image_size=1024, shrink=2),
}


class EfficientViT(nn.Module):
    """Image encoder: ``(B, 3, S, S)`` to ``(B, C, S / stride, S / stride)``.

    Args:
        config: sizes.
        image_size: side S of the image, a multiple of ``config.stride``.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the image size is not such a multiple.
        MissingDependencyError: if timm is not installed.
    """

    def __init__(self, config: EfficientViTConfig, image_size: int, out_chans: int = 256) -> None:
        super().__init__()
        blocks = _Blocks(config.head_dim)
        self.stride = config.stride
        self.shrink = config.shrink
        self.backbone = Backbone(config, blocks)
        self.neck = Neck(config, blocks, out_chans)
        self.norm = require("timm.layers", extra="zoo").LayerNorm2d(out_chans, eps=NORM_EPS)
        self.resize(image_size)

    def resize(self, size: int) -> None:
        """Take images of another size; there are no tables to change."""
        if size < 1 or size % self.stride:
            raise ConfigError(
                "the image size does not fit EfficientViT.",
                got=size,
                expected=f"a multiple of {self.stride}",
            )
        self.img_size = size

    @property
    def prompt_size(self) -> int:
        """Side of the square in which prompts are given: 1024 for the published models."""
        return self.img_size // self.stride * CELL

    def forward(self, x: Tensor) -> Tensor:
        """Encode normalised, padded images."""
        if self.shrink > 1:
            size = (x.shape[-2] // self.shrink, x.shape[-1] // self.shrink)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        embedding: Tensor = self.norm(self.neck(self.backbone(x)))
        return embedding


class Backbone(nn.Module):
    """All stages; gives the outputs of the last three, the coarsest first."""

    def __init__(self, config: EfficientViTConfig, blocks: _Blocks) -> None:
        super().__init__()
        inputs = (3, *config.widths)
        plan = zip(
            inputs, config.widths, config.depths, config.kinds, config.expands, config.fewer_norms,
            strict=False,
        )  # fmt: skip
        self.stages = nn.ModuleList(Chain(blocks.stage(*stage)) for stage in plan)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of three scales."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[:-4:-1]


class Neck(nn.Module):
    """Bring three scales to the finest one, add them, and refine the sum."""

    def __init__(self, config: EfficientViTConfig, blocks: _Blocks, out_chans: int) -> None:
        super().__init__()
        width, expand = config.neck_width, config.neck_expand
        self.input_ops = nn.ModuleList(
            Chain([blocks.conv(channels, width, 1)]) for channels in config.widths[:-4:-1]
        )
        self.middle = Chain(
            blocks.residual(blocks.fused(width, width, 1, expand, False))
            for _ in range(config.neck_depth)
        )
        last = blocks.conv(width, out_chans, 1, bias=True, norm_layer=None)
        self.output_ops = nn.ModuleList([Chain([last])])

    def forward(self, features: list[Tensor]) -> Tensor:
        """Fuse the features."""
        size = features[-1].shape[-2:]
        coarse, middle, fine = (op(x) for op, x in zip(self.input_ops, features, strict=True))
        coarse, middle = (
            F.interpolate(x, size, mode="bicubic", align_corners=False) for x in (coarse, middle)
        )
        out: Tensor = self.output_ops[0](self.middle(coarse + (middle + fine)))
        return out


class Chain(nn.Module):
    """Modules one after the other, under the name they have in the checkpoints."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all of them."""
        for module in self.op_list:
            x = module(x)
        return x


class _Blocks:
    """timm's blocks of EfficientViT, with the activation and the eps of EfficientViT-SAM.

    Args:
        head_dim: channels of one head of attention.
    """

    def __init__(self, head_dim: int) -> None:
        self.timm: Any = require("timm.models.efficientvit_mit", extra="zoo")
        self.act: Any = require("timm.layers", extra="zoo").GELUTanh
        self.norm: Any = partial(nn.BatchNorm2d, eps=NORM_EPS)
        self.head_dim = head_dim

    def stage(
        self, inputs: int, width: int, depth: int, kind: Kind, expand: int, fewer: bool
    ) -> list[nn.Module]:
        """A block that halves the resolution, four times as wide inside, and `depth` more."""
        if kind == "res":
            first = self.conv(inputs, width, 3, stride=2, act_layer=self.act)
        else:
            local = self.fused if kind == "fmb" else self.inverted
            first = self.timm.ResidualBlock(local(inputs, width, 2, 4 * expand, fewer))
        return [first, *(self._block(width, kind, expand, fewer) for _ in range(depth))]

    def conv(self, inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Module:
        """Convolution and norm, without activation unless given."""
        options = {"norm_layer": self.norm, "act_layer": None, **options}
        module: nn.Module = self.timm.ConvNormAct(inputs, outputs, kernel, **options)
        return module

    def residual(self, main: nn.Module) -> nn.Module:
        """Add the input to the output."""
        module: nn.Module = self.timm.ResidualBlock(main, nn.Identity())
        return module

    def fused(self, inputs: int, width: int, stride: int, expand: int, fewer: bool) -> nn.Module:
        """A wide 3 x 3 convolution and one back."""
        module: nn.Module = self.timm.FusedMBConv(
            inputs, width, stride=stride, expand_ratio=expand, **self._inside(2, fewer)
        )
        return module

    def inverted(self, inputs: int, width: int, stride: int, expand: int, fewer: bool) -> nn.Module:
        """A wide 1 x 1 convolution, a depthwise one, and one back."""
        module: nn.Module = self.timm.MBConv(
            inputs, width, stride=stride, expand_ratio=expand, **self._inside(3, fewer)
        )
        return module

    def _block(self, width: int, kind: Kind, expand: int, fewer: bool) -> nn.Module:
        if kind == "res":
            return self.residual(self.timm.ConvBlock(width, width, **self._inside(2, fewer)))
        if kind == "fmb":
            return self.residual(self.fused(width, width, 1, expand, fewer))
        local = self.residual(self.inverted(width, width, 1, expand, fewer))
        if kind == "mb":
            return local
        # timm computes this attention in float32 under autocast too: sums over the whole image
        # overflow in float16.
        attention = self.timm.LiteMLA(
            width,
            width,
            dim=self.head_dim,
            norm_layer=(None, self.norm),
            scales=(ATTENTION[kind],),
            eps=ATTENTION_EPS,
        )
        attention._attn = attend
        return AttentionBlock(self.residual(attention), local)

    def _inside(self, convolutions: int, fewer: bool) -> dict[str, Any]:
        """Bias, norm and activation of a block's convolutions; the last has no activation."""
        before = convolutions - 1
        return {
            "use_bias": (fewer,) * before + (False,),
            "norm_layer": (None if fewer else self.norm,) * before + (self.norm,),
            "act_layer": (self.act,) * before + (None,),
        }


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention as timm's, safe where all kernels vanish in an exported graph too.

    Optimisers of graphs take a sum with 1e-15 for one with 0 and leave it out; a maximum stays.

    Args:
        q: (B, heads, N, D), not negative.
        k: (B, heads, N, D), not negative.
        v: (B, heads, N, D + 1), the last channel 1.

    Returns:
        (B, heads, N, D), in the type of `v`.
    """
    out = q.float() @ (k.float().transpose(-1, -2) @ v.float())
    return (out[..., :-1] / out[..., -1:].clamp(min=ATTENTION_EPS)).to(v.dtype)


class AttentionBlock(nn.Module):
    """Linear attention over the whole map, then convolutions."""

    def __init__(self, context: nn.Module, local: nn.Module) -> None:
        super().__init__()
        self.context_module = context
        self.local_module = local

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        out: Tensor = self.local_module(self.context_module(x))
        return out


def build(config: EfficientViTConfig, image_size: int, out_chans: int = 256) -> EfficientViT:
    """An encoder with random weights, in eval mode."""
    return EfficientViT(config, image_size, out_chans).eval()


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official checkpoint's tensors under our names, which are the same."""
    return dict(state)


def set_norm_eps(module: nn.Module, eps: float = NORM_EPS) -> None:
    """Give every norm of SAM's mask decoder the eps that EfficientViT-SAM was trained with."""
    for part in module.modules():
        if isinstance(part, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            part.eps = eps
