"""One small instance of every encoder and of every published family, by name, with random weights.

Published sizes have millions of parameters; here each configuration has a few thousand, so that all
techniques can be tried on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from conftest import random_sam, randomise

import samcompress as sc
from samcompress.core._sam2 import Sam2Config
from samcompress.core.history import Base, History, remember
from samcompress.substitute import (
    _efficientformer,
    _efficientsam,
    _efficientvit,
    _hiera,
    _litevit,
    _repvit,
    _resnet,
    _rwkv,
    _tiny_vit,
    _unet,
)

SIZE, WIDTH = 128, 32
PARTS = sc.substitute

# Sizes in place of the published ones, by module and name.
SMALL: dict[tuple[Any, str], Any] = {
    (_tiny_vit, "5m"): _tiny_vit.TinyViTConfig(
        embed_dims=(8, 16, 24, 32),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        window_sizes=(7, 7, 7, 7),
    ),
    (_repvit, "m1"): _repvit.RepViTConfig(
        channels=(8, 16, 24, 32),
        blocks=("10", "010", "010", "01"),
        legacy=True,
        last_stride=2,
        fused=True,
    ),
    (_repvit, "m2.3"): _repvit.RepViTConfig(
        channels=(8, 16, 24, 32),
        blocks=("10", "010", "010", "01"),
        legacy=False,
        last_stride=1,
        fused=False,
    ),
    (_efficientvit, "l0"): _efficientvit.EfficientViTConfig(
        widths=(8, 8, 16, 16, 32), depths=(1,) * 5, neck_depth=1, neck_width=32, head_dim=8
    ),
    (_efficientsam, "tiny"): _efficientsam.EfficientSamConfig(embed_dim=48, num_heads=3, depth=4),
    (_resnet, "18"): _resnet.ResNetConfig(blocks=(1, 1, 1, 1), width=32),
    (_efficientformer, "s0"): _efficientformer.EfficientFormerConfig(
        (8, 16, 24, 32), ((2,), (2,), (2, 2), (2, 2)), 1
    ),
    (_litevit, "lite"): _litevit.LiteViTConfig((8, 16, 16, 20), (1, 1, 2, 1), 2, 2),
    (_unet, "squeeze"): _unet.UNetConfig((8, 8, 16, 32, 32), (1, 1), 16, 2.0),
    (_rwkv, "tiny"): _rwkv.RWKVConfig(24, 2, 2, (8, 16), (1, 1)),
    (_hiera, "tiny"): _hiera.HieraConfig(width=8, blocks=(1, 1, 2, 1), everywhere=(3,)),
}


@contextmanager
def small_sizes() -> Iterator[None]:
    """Until it ends, named variants have the sizes of `SMALL`."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), config in SMALL.items():
            patch.setitem(module.CONFIGS, name, config)
        yield


def plain(seed: int = 0) -> Any:
    """SAM itself, with cells of 16 pixels as most published models have."""
    deep = {"depth": 4, "global_attn_indexes": (1, 3)}
    return random_sam(seed=seed, image_size=SIZE, patch_size=16, **deep)


def _chain(*steps: Any) -> Callable[[], Any]:
    return lambda: sc.Pipeline(list(steps))(plain(), progress=False)


def _slim() -> Any:
    step = sc.get("prune.slim_sam", round_to=8, steps=2, batch_size=2, images=2)
    return step(plain(), data=sc.shapes(2, seed=3, size=(60, 80)), progress=False)


def _sam2(model_type: str, backbone: dict[str, Any], channels: list[int]) -> Any:
    pytest.importorskip("transformers")
    heads = {"num_attention_heads": 4, "attention_downsample_rate": 2}
    config = Sam2Config(
        model_type,
        {
            "vision_config": {
                "model_type": f"{model_type}_vision_model",
                "backbone_config": backbone,
                "backbone_channel_list": channels,
                "backbone_feature_sizes": [[SIZE // n, SIZE // n] for n in (4, 8, 16)],
                "fpn_hidden_size": WIDTH,
            },
            "prompt_encoder_config": {
                "hidden_size": WIDTH,
                "image_size": SIZE,
                "mask_input_channels": 8,
            },
            "mask_decoder_config": {"hidden_size": WIDTH, "mlp_dim": 40, **heads},
        },
    )
    sam = randomise(config.build())
    remember(sam, History(Base(config)))
    return sam


HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 4, 6, 2],
    "window_positional_embedding_background_size": [5, 5],
    "global_attention_blocks": [2, 4],
    "mlp_ratio": 2.0,
}
REPVIT = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m0_9",
    "model_args": {
        "features_only": True,
        "out_indices": [0, 1, 2, 3],
        "embed_dim": [8, 16, 24, 32],
        "depth": [1, 1, 1, 1],
    },
    "num_classes": 0,
    "label_names": [],
}

# Each makes one model; the names are those of the published families where there is one.
MODELS: dict[str, Callable[[], Any]] = {
    "mobile_sam": _chain(PARTS.TinyViT()),
    "tiny_sam": _chain(PARTS.TinyViT(), PARTS.Conventions(of="tiny_sam")),
    "repvit_sam": _chain(PARTS.RepViT(variant="m2.3")),
    "edge_sam": _chain(PARTS.RepViT(), PARTS.Conventions(of="edge_sam", stability=True)),
    "efficient_vit_sam": _chain(PARTS.EfficientViT(), PARTS.Conventions(of="efficient_vit_sam")),
    "efficient_sam": _chain(PARTS.ViT(), PARTS.Conventions(of="efficient_sam")),
    "nano_sam": _chain(PARTS.ResNet(), PARTS.Conventions(of="nano_sam")),
    "sam_hq": _chain(PARTS.HQ()),
    "sam_hq_vit_tiny": _chain(PARTS.TinyViT(), PARTS.HQ()),
    "slim_sam": _slim,
    "sam2": partial(_sam2, "sam2", HIERA, [64, 32, 16, 8]),
    "edgetam": partial(_sam2, "edgetam", REPVIT, [32, 24, 16, 8]),
    "efficient_former": _chain(PARTS.EfficientFormer()),
    "lite_vit": _chain(PARTS.LiteViT()),
    "u_net": _chain(PARTS.UNet()),
    "rwkv": _chain(PARTS.RWKV()),
    "hiera": _chain(PARTS.Hiera()),
    "timm": _chain(PARTS.Timm(model="test_efficientnet")),
}
