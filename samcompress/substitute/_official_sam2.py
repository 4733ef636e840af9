"""SAM 2.1 and EdgeTAM on single images, from the files that transformers made of the official ones.

Their base is a `Sam2Config`, and there are no steps. Files of SAM 2 have the tensors of SAM 2.1.
"""

from __future__ import annotations

from typing import Any

from ..core._sam2 import CONFIGS
from ..core.adapters import state_from_sam2
from ..core.zoo import Figure, File, Published, register

SAM2 = "https://github.com/facebookresearch/sam2"
HUB = "https://huggingface.co"
VIDEO = (
    "What links the frames of a video is left out; with it the published model has {} M parameters."
)
README = "README of facebookresearch/sam2"
EDGE = "arXiv 2501.07256"
A100 = "video at 1024 px, GPU A100, compiled"
CLICKS = "SA-23, {}"
BACKBONE = "vision_encoder.backbone"


def _figures(frames: float | None, clicks: tuple[float, float] | None) -> tuple[Figure, ...]:
    found = []
    if frames is not None:
        setting, source = A100, README
        found.append(Figure(metric="images a second", value=frames, setting=setting, source=source))
    if clicks is not None:
        found += [
            Figure(metric="mIoU, points", value=value, setting=CLICKS.format(asked), source=EDGE)
            for asked, value in zip(("one click", "five clicks"), clicks, strict=True)
        ]
    return tuple(found)


def _add(
    size: str,
    name: str,
    title: str,
    hub: str,
    *,
    whole: float,
    frames: float | None = None,
    clicks: tuple[float, float] | None = None,
    **facts: Any,
) -> None:
    url = f"{HUB}/{hub}/resolve/main/model.safetensors"
    register(
        Published(
            name=name,
            title=title,
            base=CONFIGS[size],
            files=(File(name=f"{name}.safetensors", url=url, page=f"{HUB}/{hub}"),),
            convert=state_from_sam2,
            input_size=CONFIGS[size].image_size,
            figures=_figures(frames, clicks),
            note=VIDEO.format(whole),
            **{"licence": "Apache-2.0", "paper": "arXiv 2408.00714", "upstream": SAM2, **facts},
        )
    )


def _hiera(size: str, width: int, blocks: int, **facts: Any) -> None:
    _add(
        size,
        f"sam2.1_hiera_{size}",
        f"SAM 2.1 {size.replace('_plus', '+')}",
        f"facebook/sam2.1-hiera-{size.replace('_', '-')}",
        signature={
            f"{BACKBONE}.patch_embed.projection.weight": (width, 3, 7, 7),
            f"{BACKBONE}.blocks.{blocks - 1}.attn.qkv.weight": (24 * width, 8 * width),
            "mask_decoder.obj_score_token.weight": (1, 256),
        },
        **facts,
    )


_hiera("tiny", 96, 12, parameters=31_440_721, macs=146.3, whole=38.9, frames=91.2)
_hiera("small", 96, 16, parameters=38_538_577, macs=180.2, whole=46.0, frames=84.8)
_hiera(
    "base_plus",
    112,
    24,
    parameters=73_328_401,
    macs=323.9,
    whole=80.8,
    frames=64.1,
    clicks=(0.619, 0.835),
)
_hiera("large", 144, 48, parameters=216_924_865, macs=912.5, whole=224.4, frames=39.5)
_add(
    "edgetam",
    "edgetam",
    "EdgeTAM",
    "yonigozlan/EdgeTAM-hf",
    signature={
        f"{BACKBONE}.timm_model.stem.conv1.c.weight": (24, 3, 3, 3),
        "mask_decoder.obj_score_token.weight": (1, 256),
    },
    parameters=9_120_641,
    macs=19.37,
    whole=13.9,
    clicks=(0.555, 0.817),
    paper="arXiv 2501.07256",
    upstream="https://github.com/facebookresearch/EdgeTAM",
)
