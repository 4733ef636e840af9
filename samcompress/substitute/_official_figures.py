"""Published numbers of the models that `sc.load` opens by name.

Numbers of different settings do not compare; those of one paper in one setting do.
"""

from __future__ import annotations

from ..core.zoo import Figure

# What was measured on what.
BOX = "COCO val2017, one box of the annotations"
BOX_FIRST = f"{BOX}, first mask"
BOX_BEST = f"{BOX}, best-scored mask"
POINT_FIRST = "COCO val2017, one point in the middle, first mask"
POINT_RANDOM = "COCO val2017, one random point, best-scored mask"
COCO_DET = "COCO val2017, boxes of ViTDet"
COCO_FIRST = "COCO val2017, boxes of ViTDet-H, first mask"
COCO_BEST = "COCO val2017, boxes of ViTDet, best-scored mask of three"
LVIS_DET = "LVIS v1 val, boxes of ViTDet"
LVIS_BEST = "LVIS v1 val, boxes of ViTDet, best-scored mask of three"
FOCAL = "COCO val2017, boxes of FocalNet-DINO, single mask"
FOUR = "DIS, COIFT, HRSOD and ThinObject, one box of the annotations, single mask"
PROPOSALS = "LVIS v1 val, mask proposals from at most 320 boxes of its detector"
XEON = "encoder and one box, CPU Xeon Gold 6330, 14 virtual cores"
T4 = "GPU T4, 1024 px"
ORIN = "Jetson AGX Orin, TensorRT float16"
MAC = "MacBook M1 Pro, Core ML"
PHONE = "iPhone 14, Core ML, encoder and one prompt"
# Where it stands.
EDGE = "arXiv 2312.06660"
EVIT = "arXiv 2402.05008 and its README"
TINY = "arXiv 2312.13789"
ESAM = "arXiv 2312.00863"
HQ = "arXiv 2306.01567 and its README"
REPVIT = "arXiv 2312.05760"
V2 = "arXiv 2312.09579"
NANO = "README of NVIDIA-AI-IOT/nanosam"
SURVEY = "survey arXiv 2410.04960, table 4, second-hand"
SURVEY6 = "survey arXiv 2410.04960, table 6, second-hand"
SURVEY7 = "survey arXiv 2410.04960, table 7, second-hand"

# Metric, value, setting and source by name of the model.
TABLE: dict[str, tuple[tuple[str, float, str, str], ...]] = {
    "sam_vit_b": (
        ("AP", 0.434, COCO_BEST, TINY),
        ("AP", 0.408, LVIS_BEST, TINY),
        ("encoder, ms", 368.8, T4, TINY),
        ("latency, ms", 3294, XEON, SURVEY),
        ("mIoU, box", 0.706, FOUR, HQ),
        ("boundary mIoU, box", 0.623, FOUR, HQ),
        ("AP", 0.444, FOCAL, HQ),
    ),
    "sam_vit_l": (
        ("AP", 0.462, COCO_BEST, TINY),
        ("AP", 0.435, LVIS_BEST, TINY),
        ("encoder, ms", 1146, T4, TINY),
        ("mIoU, box", 0.795, FOUR, HQ),
        ("boundary mIoU, box", 0.711, FOUR, HQ),
        ("AP", 0.485, FOCAL, HQ),
    ),
    "sam_vit_h": (
        ("mIoU, box", 0.773, BOX_FIRST, EDGE),
        ("mIoU, point", 0.536, POINT_FIRST, EDGE),
        ("AP", 0.466, COCO_BEST, TINY),
        ("AP", 0.447, LVIS_BEST, TINY),
        ("encoder, ms", 2392, T4, TINY),
        ("latency, ms", 9470, XEON, SURVEY),
    ),
    "mobile_sam": (
        ("mIoU, box", 0.744, BOX_FIRST, EDGE),
        ("mIoU, point", 0.509, POINT_FIRST, EDGE),
        ("AP", 0.394, COCO_FIRST, EDGE),
        ("AP", 0.41, COCO_BEST, TINY),
        ("AP", 0.37, LVIS_BEST, TINY),
        ("encoder, ms", 38.4, T4, TINY),
        ("latency, ms", 424, XEON, SURVEY),
    ),
    "tiny_sam": (
        ("mIoU, box", 0.737, BOX, SURVEY6),
        ("AP", 0.423, COCO_BEST, TINY),
        ("AP", 0.389, LVIS_BEST, TINY),
        ("encoder, ms", 38.4, T4, TINY),
        ("latency, ms", 422, XEON, SURVEY),
    ),
    "mobile_sam_v2": (("AR@1000", 0.511, PROPOSALS, V2),),
    "mobile_sam_v2_l2": (("AR@1000", 0.563, PROPOSALS, V2),),
    "edge_sam": (
        ("mIoU, box", 0.767, BOX_FIRST, EDGE),
        ("mIoU, point", 0.48, POINT_FIRST, EDGE),
        ("AP", 0.422, COCO_FIRST, EDGE),
        ("latency, ms", 259, XEON, SURVEY),
        ("images a second", 38.7, PHONE, EDGE),
    ),
    "edge_sam_3x": (("AP", 0.427, COCO_FIRST, EDGE),),
    "repvit_sam": (
        ("mIoU, box", 0.751, BOX, SURVEY6),
        ("AP", 0.433, COCO_DET, SURVEY7),
        ("encoder, ms", 44.8, MAC, REPVIT),
        ("latency, ms", 1013, XEON, SURVEY),
    ),
    "nano_sam": (
        ("mIoU, box", 0.706, BOX_BEST, NANO),
        ("AP", 0.359, COCO_DET, SURVEY7),
        ("encoder, ms", 4.2, ORIN, NANO),
    ),
    "efficient_sam_ti": (
        ("mIoU, box", 0.757, BOX_BEST, ESAM),
        ("mIoU, point", 0.455, POINT_RANDOM, ESAM),
        ("AP", 0.423, COCO_DET, ESAM),
        ("AP", 0.399, LVIS_DET, ESAM),
        ("encoder, ms", 81, T4, TINY),
        ("latency, ms", 1159, XEON, SURVEY),
    ),
    "efficient_sam_s": (
        ("mIoU, box", 0.769, BOX_BEST, ESAM),
        ("mIoU, point", 0.5, POINT_RANDOM, ESAM),
        ("AP", 0.444, COCO_DET, ESAM),
        ("AP", 0.423, LVIS_DET, ESAM),
    ),
    "efficient_vit_sam_l0": (
        ("AP", 0.457, COCO_DET, EVIT),
        ("AP", 0.418, LVIS_DET, EVIT),
        ("encoder, ms", 8.2, ORIN, EVIT),
        ("latency, ms", 194, XEON, SURVEY),
    ),
    "efficient_vit_sam_l1": (
        ("AP", 0.462, COCO_DET, EVIT),
        ("AP", 0.421, LVIS_DET, EVIT),
        ("encoder, ms", 10.2, ORIN, EVIT),
    ),
    "efficient_vit_sam_l2": (
        ("AP", 0.466, COCO_DET, EVIT),
        ("AP", 0.427, LVIS_DET, EVIT),
        ("encoder, ms", 12.9, ORIN, EVIT),
    ),
    "efficient_vit_sam_xl0": (
        ("AP", 0.475, COCO_DET, EVIT),
        ("AP", 0.439, LVIS_DET, EVIT),
        ("encoder, ms", 22.5, ORIN, EVIT),
    ),
    "efficient_vit_sam_xl1": (
        ("AP", 0.478, COCO_DET, EVIT),
        ("AP", 0.444, LVIS_DET, EVIT),
        ("encoder, ms", 37.2, ORIN, EVIT),
        ("latency, ms", 1334, XEON, SURVEY),
        ("mIoU, box", 0.79927, BOX_BEST, EVIT),
    ),
    "sam_hq_vit_b": (
        ("mIoU, box", 0.863, FOUR, HQ),
        ("boundary mIoU, box", 0.781, FOUR, HQ),
        ("AP", 0.467, FOCAL, HQ),
    ),
    "sam_hq_vit_l": (
        ("mIoU, box", 0.891, FOUR, HQ),
        ("boundary mIoU, box", 0.818, FOUR, HQ),
        ("AP", 0.495, FOCAL, HQ),
    ),
    "sam_hq_vit_h": (
        ("mIoU, box", 0.893, FOUR, HQ),
        ("boundary mIoU, box", 0.815, FOUR, HQ),
        ("AP", 0.499, FOCAL, HQ),
    ),
    "sam_hq_vit_tiny": (("AP", 0.45, FOCAL, HQ),),
}


def figures(name: str) -> tuple[Figure, ...]:
    """What is published of a model."""
    return tuple(
        Figure(metric=metric, value=value, setting=setting, source=source)
        for metric, value, setting, source in TABLE.get(name, ())
    )
