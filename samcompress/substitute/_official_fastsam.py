"""FastSAM, which proposes masks and is no SAM."""

from __future__ import annotations

from functools import partial

from ..core.zoo import Figure, File, Published, register
from ._fastsam import CONFIGS, convert, make

UPSTREAM = "https://github.com/CASIA-IVA-Lab/FastSAM"
PAPER = "arXiv 2306.12156"
NOTE = (
    "No SAM: model.propose(image) gives all masks of an image, and prompts can only choose among "
    "them. Its weights are under the AGPL, unlike this package."
)
BY_BOX = "boxes of ViTDet, mask of highest IoU with the box"
# Metric, value, setting and source.
TABLE = (
    ("AP", 0.379, f"COCO val2017, {BY_BOX}", "arXiv 2312.00863"),
    ("AP", 0.345, f"LVIS v1 val, {BY_BOX}", "arXiv 2312.00863"),
    ("AR@1000 of boxes", 0.637, "COCO val2017, one pass", PAPER),
    ("AR@1000 of boxes", 0.571, "LVIS v1 val, one pass", PAPER),
    ("latency, ms", 40, "GPU RTX 3090, any number of prompts", PAPER),
    ("encoder, ms", 153.6, "GPU T4, 1024 px", "arXiv 2312.13789"),
)
FIGURES = tuple(Figure(metric=m, value=v, setting=s, source=o) for m, v, s, o in TABLE)

for _size, _name, _figures, _parameters, _macs in (
    ("x", "FastSAM-x.pt", FIGURES, 71_751_811, 419.75),
    ("s", "FastSAM-s.pt", (), 11_790_483, 51.09),
):
    register(
        Published(
            name=f"fast_sam_{_size}",
            title=f"FastSAM-{_size}",
            make=partial(make, CONFIGS[_size]),
            files=(File(name=_name, page=UPSTREAM),),
            signature={
                "0.conv.weight": (CONFIGS[_size].channels[0], 3, 3, 3),
                "22.proto.cv3.conv.weight": (32, CONFIGS[_size].channels[2], 1, 1),
                "22.dfl.conv.weight": (1, 16, 1, 1),
            },
            convert=convert,
            parameters=_parameters,
            macs=_macs,
            input_size=1024,
            licence="AGPL-3.0",
            paper=PAPER,
            upstream=UPSTREAM,
            figures=_figures,
            note=NOTE,
        )
    )
