"""MobileSAM and its kin, EdgeSAM, RepViT-SAM, NanoSAM and EfficientSAM."""

from __future__ import annotations

from typing import Any

from ..core.build import SamConfig
from ..core.transform import Transform
from ..core.zoo import File, Published, register
from . import _efficientsam, _repvit, _resnet, _tiny_vit
from ._official_figures import figures
from .conventions import Conventions
from .rep_vit import RepViT
from .res_net import ResNet
from .tiny_vit import TinyViT
from .vit import ViT

MOBILE = "https://github.com/ChaoningZhang/MobileSAM"
TINY = "https://github.com/xinghaochen/TinySAM"
EDGE = "https://github.com/chongzhou96/EdgeSAM"
EDGE_URL = "https://huggingface.co/spaces/chongzhou/EdgeSAM/resolve/main/weights"
REPVIT = "https://github.com/THU-MIG/RepViT"
NANO = "https://github.com/NVIDIA-AI-IOT/nanosam"
EFFICIENT = "https://github.com/yformer/EfficientSAM"

TINY_VIT: dict[str, tuple[int, ...]] = {
    "image_encoder.patch_embed.seq.2.c.weight": (64, 32, 3, 3),
    "image_encoder.layers.3.blocks.1.attn.attention_biases": (10, 49),
    "mask_decoder.iou_token.weight": (1, 256),
}
CLASSIFIER = (
    "Of the parameters, 321,640 are a classifier that the file carries and nothing runs; it is "
    "left out of the model."
)
BOXES = (
    "Its decoder was trained for boxes and one mask each. The detector that finds the boxes is not "
    "part of it."
)
# Files that belong to several models.
MOBILE_SAM = "mobile_sam.pt"
PROMPT_GUIDED = File(name="Prompt_guided_Mask_Decoder.pt", page=MOBILE)
MOBILE_URL = f"{MOBILE}/raw/master/weights/{MOBILE_SAM}"


def _tiny_vit_steps() -> tuple[Transform, ...]:
    return (TinyViT(),)


def _tiny_sam() -> tuple[Transform, ...]:
    return (TinyViT(), Conventions(of="tiny_sam"))


def _edge_sam() -> tuple[Transform, ...]:
    # Its predict() scores masks as SAM does, so no conventions of its own.
    return (RepViT(variant="m1"),)


def _repvit_sam() -> tuple[Transform, ...]:
    return (RepViT(variant="m2.3"),)


def _nano_sam() -> tuple[Transform, ...]:
    return (ResNet(), Conventions(of="nano_sam"))


def _efficient_sam_ti() -> tuple[Transform, ...]:
    return (ViT(variant="tiny"), Conventions(of="efficient_sam"))


def _efficient_sam_s() -> tuple[Transform, ...]:
    return (ViT(variant="small"), Conventions(of="efficient_sam"))


def _add(name: str, title: str, **facts: Any) -> None:
    """Register a model for images of 1024 pixels that starts from ViT-B's sizes."""
    register(
        Published(
            name=name,
            title=title,
            base=SamConfig(),
            input_size=1024,
            figures=figures(name),
            **{"licence": "Apache-2.0", **facts},
        )
    )


_add(
    "mobile_sam",
    "MobileSAM",
    steps=_tiny_vit_steps,
    files=(File(name=MOBILE_SAM, url=MOBILE_URL, page=MOBILE),),
    signature=TINY_VIT,
    convert=_tiny_vit.convert,
    parameters=10_130_092,
    macs=38.77,
    paper="arXiv 2306.14289",
    upstream=MOBILE,
    note=CLASSIFIER,
)
_add(
    "tiny_sam",
    "TinySAM",
    steps=_tiny_sam,
    files=(
        File(
            name="tinysam_42.3.pth",
            url=f"{TINY}/releases/download/3.0/tinysam_42.3.pth",
            page=TINY,
        ),
    ),
    signature=TINY_VIT,
    convert=_tiny_vit.convert,
    parameters=10_130_092,
    macs=38.77,
    paper="arXiv 2312.13789",
    upstream=TINY,
    note=f"Tensors as MobileSAM's: a file of another name needs model='tiny_sam'. {CLASSIFIER}",
)
_add(
    "mobile_sam_v2",
    "MobileSAMv2, TinyViT encoder",
    steps=_tiny_vit_steps,
    files=(
        File(
            name=MOBILE_SAM,
            folder="mobile_sam_v2",
            page=MOBILE,
            prefix="image_encoder.",
            only=tuple(
                f"image_encoder.{part}."
                for part in ("patch_embed", "layers", "norm_head", "head", "neck")
            ),
        ),
        PROMPT_GUIDED,
    ),
    signature=TINY_VIT,
    convert=_tiny_vit.convert,
    parameters=10_130_092,
    macs=38.77,
    paper="arXiv 2312.09579",
    upstream=MOBILE,
    note=f"{BOXES} {CLASSIFIER}",
)
EDGE_SAM = {
    "image_encoder.fuse_stage2.weight": (256, 192, 1, 1),
    "image_encoder.features.26.token_mixer.0.conv1.c.weight": (384, 1, 1, 1),
    "mask_decoder.iou_token.weight": (1, 256),
}
for _name, _title in (("edge_sam", "EdgeSAM"), ("edge_sam_3x", "EdgeSAM-3x")):
    _add(
        _name,
        _title,
        steps=_edge_sam,
        files=(File(name=f"{_name}.pth", url=f"{EDGE_URL}/{_name}.pth", page=EDGE),),
        signature=EDGE_SAM,
        convert=_repvit.convert,
        parameters=9_582_112,
        macs=20.05,
        licence="S-Lab License 1.0 (non-commercial)",
        paper="arXiv 2312.06660",
        upstream=EDGE,
        note="EdgeSAM and EdgeSAM-3x have the same tensors: their files are told apart by name.",
    )
_add(
    "repvit_sam",
    "RepViT-SAM",
    steps=_repvit_sam,
    files=(
        File(
            name="repvit_sam.pt",
            url=f"{REPVIT}/releases/download/v1.0/repvit_sam.pt",
            page=REPVIT,
        ),
    ),
    signature={
        "image_encoder.features.54.token_mixer.0.conv.c.weight": (640, 1, 3, 3),
        "image_encoder.neck.0.weight": (256, 640, 1, 1),
        "mask_decoder.iou_token.weight": (1, 256),
    },
    convert=_repvit.convert,
    parameters=27_223_480,
    macs=113.30,
    paper="arXiv 2312.05760",
    upstream=REPVIT,
)
_add(
    "nano_sam",
    "NanoSAM",
    steps=_nano_sam,
    files=(
        File(name="nanosam_resnet18.pth", page=NANO, prefix="image_encoder."),
        File(
            name=MOBILE_SAM,
            url=MOBILE_URL,
            page=MOBILE,
            only=("prompt_encoder.", "mask_decoder."),
        ),
    ),
    signature={
        "image_encoder.pos_embedding": (1, 256, 64, 64),
        "image_encoder.backbone.layer4.1.conv2.weight": (512, 512, 3, 3),
        "mask_decoder.iou_token.weight": (1, 256),
    },
    convert=_resnet.convert,
    parameters=19_895_664,
    macs=43.60,
    paper="no paper",
    upstream=NANO,
    note="NVIDIA publishes the encoder as ONNX. What is read here is a checkpoint of its training "
    "script (checkpoint.pth there), with the decoder of MobileSAM's file.",
)
for _size, _part, _steps, _width, _parameters, _macs in (
    ("Ti", "vitt", _efficient_sam_ti, 192, 10_223_204, 102.27),
    ("S", "vits", _efficient_sam_s, 384, 26_413_028, 245.62),
):
    _file = f"efficient_sam_{_part}.pt"
    # The larger file is offered packed.
    _zip = ".zip" if _size == "S" else ""
    _add(
        f"efficient_sam_{_size.lower()}",
        f"EfficientSAM-{_size}",
        steps=_steps,
        files=(
            File(name=_file, url=f"{EFFICIENT}/raw/main/weights/{_file}{_zip}", page=EFFICIENT),
        ),
        signature={
            "image_encoder.pos_embed": (1, 197, _width),
            "prompt_encoder.invalid_points.weight": (1, 256),
            "mask_decoder.iou_token.weight": (1, 256),
        },
        convert=_efficientsam.convert,
        parameters=_parameters,
        macs=_macs,
        paper="arXiv 2312.00863",
        upstream=EFFICIENT,
        note="Takes no mask as a prompt, and sees six points of it at most.",
    )
