"""A SAM of any size, out of segment_anything's own classes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

from .errors import ConfigError, ModelError, UnknownTransformError, closest


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM; the defaults are those of ``vit_b`` (arXiv 2304.02643).

    Attributes:
        image_size: padded side S of the input in pixels; a multiple of `patch_size`.
        patch_size: side of a patch; the embedding grid has ``S / patch_size`` cells a side.
        embed_dim: width of the image encoder's tokens.
        depth: number of encoder blocks.
        num_heads: attention heads a block.
        mlp_ratio: hidden width of the encoder's MLPs over `embed_dim`.
        window_size: side of an attention window in tokens; 0 makes every block global.
        global_attn_indexes: blocks with global attention.
        out_chans: channels C of the image embedding, the width of prompt encoder and decoder.
        mask_in_chans: channels of the mask prompt's convolutions.
        decoder_depth: layers of the two-way transformer.
        decoder_mlp_dim: hidden width of its MLPs.
        decoder_num_heads: its attention heads.
        num_multimask_outputs: masks a prompt besides the single one.
        iou_head_depth: layers of the head that predicts a mask's IoU.
        iou_head_hidden_dim: its hidden width.
        pixel_mean: mean subtracted from an RGB image in 0...255.
        pixel_std: standard deviation it is divided by.
    """

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    out_chans: int = 256
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_mlp_dim: int = 2048
    decoder_num_heads: int = 8
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        for name in ("global_attn_indexes", "pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        rules = {
            "image_size": (
                self.image_size > 0 and self.image_size % self.patch_size == 0,
                f"a multiple of patch_size={self.patch_size}",
            ),
            "embed_dim": (
                self.embed_dim % self.num_heads == 0,
                f"a multiple of num_heads={self.num_heads}",
            ),
            "out_chans": (
                self.out_chans % 8 == 0 and self.out_chans % (2 * self.decoder_num_heads) == 0,
                f"a multiple of 8 and of 2 x decoder_num_heads={self.decoder_num_heads}",
            ),
            "global_attn_indexes": (
                all(0 <= i < self.depth for i in self.global_attn_indexes),
                f"indexes below depth={self.depth}",
            ),
        }
        for name, (right, expected) in rules.items():
            if not right:
                raise ConfigError(
                    f"SamConfig.{name} does not fit.", got=getattr(self, name), expected=expected
                )

    @property
    def grid(self) -> int:
        """Cells a side of the image embedding."""
        return self.image_size // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    def build(self, *, empty: bool = False) -> Sam:
        """The model, in eval mode, on the CPU.

        Args:
            empty: leave all weights uninitialised, to be loaded; much faster for large models.
        """
        if not empty:
            return _assemble(self)
        with torch.device("meta"):
            sam = _assemble(self)
        sam = sam.to_empty(device="cpu")
        # Sam keeps these two out of its state dict, so nothing else would fill them.
        sam.pixel_mean = torch.tensor(self.pixel_mean).view(-1, 1, 1)
        sam.pixel_std = torch.tensor(self.pixel_std).view(-1, 1, 1)
        return sam


ARCHITECTURES: dict[str, SamConfig] = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": SamConfig(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
    "mini": SamConfig(
        image_size=256,
        patch_size=8,
        embed_dim=192,
        depth=8,
        num_heads=6,
        mlp_ratio=3.0,
        window_size=8,
        global_attn_indexes=(3, 7),
        out_chans=128,
        decoder_mlp_dim=512,
        iou_head_hidden_dim=128,
    ),
    "tiny": SamConfig(
        image_size=128,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=3.0,
        window_size=7,
        global_attn_indexes=(1, 3),
        out_chans=64,
        mask_in_chans=8,
        decoder_mlp_dim=128,
        decoder_num_heads=4,
        iou_head_hidden_dim=64,
    ),
}


def build(name: str = "vit_b", *, seed: int = 0, **sizes: Any) -> Sam:
    """A SAM with random weights.

    Args:
        name: ``vit_b``, ``vit_l``, ``vit_h``, ``mini``, ``tiny``, or a published model of
            `sc.list_models`.
        seed: of the weights; the global random state is left as it was.
        sizes: fields of `SamConfig` to change, e.g. ``image_size=512``; not for published models.

    Raises:
        UnknownTransformError: if no architecture has this name.
        ConfigError: if a field is unknown, the sizes do not fit together, or the model is a
            published one and has the sizes it was published with.
        MissingDependencyError: if a published model needs a package that is not installed.

    Example:
        >>> build("tiny", depth=2, global_attn_indexes=(1,)).image_encoder.img_size
        128
    """
    if name not in ARCHITECTURES:
        return _published(name, seed, sizes)
    known = {f.name for f in dataclasses.fields(SamConfig)}
    for key in sizes:
        if key not in known:
            raise ConfigError(
                f"SamConfig has no field {key!r}.", expected=", ".join(sorted(known)),
                fix=closest(key, known),
            )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dataclasses.replace(ARCHITECTURES[name], **sizes).build()


def _published(name: str, seed: int, sizes: dict[str, Any]) -> Sam:
    from .zoo import published

    known = published()
    if name not in known:
        raise UnknownTransformError(
            f"there is no architecture {name!r}.",
            expected=f"{', '.join(ARCHITECTURES)}, or a name of sc.list_models()",
            fix=closest(name, (*ARCHITECTURES, *known)),
        )
    if sizes:
        side = sizes.get("image_size", 512)
        raise ConfigError(
            f"{name} has the sizes it was published with.",
            got=", ".join(f"{key}={value!r}" for key, value in sizes.items()),
            expected="no sizes",
            fix=f'sc.substitute.ImageSize(size={side})(sc.build("{name}")) for another input',
        )
    sam: Sam = known[name].build(seed=seed)
    return sam


def _assemble(c: SamConfig) -> Sam:
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=c.image_size,
            patch_size=c.patch_size,
            embed_dim=c.embed_dim,
            depth=c.depth,
            num_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            out_chans=c.out_chans,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=c.window_size,
            global_attn_indexes=c.global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=c.out_chans,
            image_embedding_size=(c.grid, c.grid),
            input_image_size=(c.image_size, c.image_size),
            mask_in_chans=c.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=c.num_multimask_outputs,
            transformer=TwoWayTransformer(
                depth=c.decoder_depth,
                embedding_dim=c.out_chans,
                mlp_dim=c.decoder_mlp_dim,
                num_heads=c.decoder_num_heads,
            ),
            transformer_dim=c.out_chans,
            iou_head_depth=c.iou_head_depth,
            iou_head_hidden_dim=c.iou_head_hidden_dim,
        ),
        pixel_mean=list(c.pixel_mean),
        pixel_std=list(c.pixel_std),
    )
    return sam.eval()


def config_of(sam: nn.Module) -> SamConfig:
    """The sizes of a live SAM that nothing has been removed from.

    Raises:
        ModelError: if its parts are not segment_anything's, or of sizes no `SamConfig` describes.
    """
    try:
        config = _read(sam)
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as err:
        raise ModelError(
            "the sizes of this model cannot be read off it.",
            got=f"{type(sam).__name__}: {err}",
            expected="a segment_anything Sam with its own three parts",
            fix="start from sc.build or sc.load, and let samcompress make the changes",
        ) from err
    except ConfigError as err:
        raise ModelError(
            "this SAM has sizes that no SamConfig describes.",
            got=f"{err.what.removesuffix('.')}: {err.got}, not {err.expected}",
            expected="the modules and shapes of a plain SAM",
            fix="start from sc.build or sc.load, and let samcompress make the changes",
        ) from err
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in _assemble(config).state_dict().items()}
    found = {k: v.shape for k, v in sam.state_dict().items()}
    odd = [k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)]
    if odd:
        raise ModelError(
            "this SAM has parts that no SamConfig describes.",
            where=", ".join(sorted(odd)[:3]) + (" ..." if len(odd) > 3 else ""),
            expected="the modules and shapes of a plain SAM",
            fix="start from sc.build or sc.load, and let samcompress make the changes",
        )
    return config


def _read(sam: Any) -> SamConfig:
    encoder, prompt, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    blocks = encoder.blocks
    windows = {b.window_size for b in blocks} - {0}
    layer = decoder.transformer.layers[0]
    width = encoder.patch_embed.proj.out_channels
    return SamConfig(
        image_size=encoder.img_size,
        patch_size=encoder.patch_embed.proj.kernel_size[0],
        embed_dim=width,
        depth=len(blocks),
        num_heads=blocks[0].attn.num_heads,
        mlp_ratio=_ratio(blocks[0].mlp.lin1.out_features, width),
        window_size=max(windows, default=0),
        global_attn_indexes=tuple(i for i, b in enumerate(blocks) if b.window_size == 0),
        out_chans=encoder.neck[0].out_channels,
        mask_in_chans=prompt.mask_downscaling[3].out_channels,
        decoder_depth=len(decoder.transformer.layers),
        decoder_mlp_dim=layer.mlp.lin1.out_features,
        decoder_num_heads=layer.self_attn.num_heads,
        num_multimask_outputs=decoder.num_multimask_outputs,
        iou_head_depth=len(decoder.iou_prediction_head.layers),
        iou_head_hidden_dim=decoder.iou_prediction_head.layers[0].out_features,
        pixel_mean=tuple(_round(v) for v in sam.pixel_mean.flatten().tolist()),
        pixel_std=tuple(_round(v) for v in sam.pixel_std.flatten().tolist()),
    )


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    # The constructor truncates width x ratio; step up where rounding would lose a unit.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _round(value: float) -> float:
    return float(f"{value:.7g}")
