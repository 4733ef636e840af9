"""EfficientViT-SAM in five sizes, and MobileSAMv2 with its L2 encoder."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..core.build import SamConfig
from ..core.transform import Transform
from ..core.zoo import File, Published, register
from . import _efficientvit, _official_small
from ._official_figures import figures
from .conventions import Conventions
from .efficient_vit import EfficientViT

UPSTREAM = "https://github.com/mit-han-lab/efficientvit"
URL = "https://huggingface.co/mit-han-lab/efficientvit-sam/resolve/main"
NECK = "image_encoder.neck.middle.op_list.{}.main.spatial_conv.conv.weight"
COARSE = "image_encoder.neck.input_ops.0.op_list.0.conv.weight"
# A larger one has all tensors of the next smaller one, so its signature holds that one's.
_L = {COARSE: (256, 512, 1, 1), "mask_decoder.iou_token.weight": (1, 256)}
_XL = {COARSE: (256, 1024, 1, 1), "mask_decoder.iou_token.weight": (1, 256)}
L0 = {**_L, NECK.format(3): (256, 256, 3, 3)}
L1 = {**L0, NECK.format(7): (256, 256, 3, 3)}
L2 = {**L1, NECK.format(11): (256, 256, 3, 3)}
XL0 = {**_XL, NECK.format(5): (1024, 256, 3, 3)}
XL1 = {**XL0, NECK.format(11): (1024, 256, 3, 3)}
# Variant, signature, parameters, GMAC, image side.
SIZES: tuple[tuple[Any, dict[str, tuple[int, ...]], int, float, int], ...] = (
    ("l0", L0, 34_792_784, 34.77, 512),
    ("l1", L1, 47_650_128, 48.98, 512),
    ("l2", L2, 61_328_592, 68.55, 512),
    ("xl0", XL0, 116_957_904, 184.80, 1024),
    ("xl1", XL1, 203_346_128, 321.87, 1024),
)


def _steps(variant: Any) -> tuple[Transform, ...]:
    return (EfficientViT(variant=variant), Conventions(of="efficient_vit_sam"))


def _v2() -> tuple[Transform, ...]:
    return (EfficientViT(variant="mobilesamv2_l2"),)


for _variant, _signature, _parameters, _macs, _side in SIZES:
    _file = f"efficientvit_sam_{_variant}.pt"
    register(
        Published(
            name=f"efficient_vit_sam_{_variant}",
            title=f"EfficientViT-SAM {_variant.upper()}",
            base=SamConfig(),
            steps=partial(_steps, _variant),
            files=(File(name=_file, url=f"{URL}/{_file}", page=UPSTREAM),),
            signature=_signature,
            convert=_efficientvit.convert,
            parameters=_parameters,
            macs=_macs,
            input_size=_side,
            licence="Apache-2.0",
            paper="arXiv 2402.05008",
            upstream=UPSTREAM,
            figures=figures(f"efficient_vit_sam_{_variant}"),
            note="Prompts are given in a frame of 1024 px, whatever the image's side."
            if _side == 512
            else "",
        )
    )

register(
    Published(
        name="mobile_sam_v2_l2",
        title="MobileSAMv2, EfficientViT-L2 encoder",
        base=SamConfig(),
        steps=_v2,
        files=(
            File(
                name="l2.pt",
                page=_official_small.MOBILE,
                prefix="image_encoder.",
                only=("image_encoder.backbone.", "image_encoder.neck.", "image_encoder.norm."),
            ),
            _official_small.PROMPT_GUIDED,
        ),
        signature=L2,
        convert=_efficientvit.convert,
        parameters=61_328_592,
        macs=68.55,
        input_size=1024,
        licence="Apache-2.0",
        paper="arXiv 2312.09579",
        upstream=_official_small.MOBILE,
        figures=figures("mobile_sam_v2_l2"),
        note=f"{_official_small.BOXES} Images of 1024 px are scaled to 512 by the encoder itself.",
    )
)
