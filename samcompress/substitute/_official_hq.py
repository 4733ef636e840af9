"""SAM-HQ on SAM's three encoders and on TinyViT."""

from __future__ import annotations

from ..core.build import ARCHITECTURES, SamConfig
from ..core.transform import Transform
from ..core.zoo import File, Published, register
from . import _hq, _official_sam, _official_small
from ._official_figures import figures
from .hq import HQ
from .tiny_vit import TinyViT

UPSTREAM = "https://github.com/SysCV/sam-hq"
URL = "https://huggingface.co/lkeab/hq-sam/resolve/main"
# Name, channels of the early features, parameters, GMAC.
SIZES = (
    ("vit_b", 768, 94_806_576, 486.04),
    ("vit_l", 1024, 313_676_080, 1492.84),
    ("vit_h", 1280, 642_686_000, 2980.54),
    ("vit_tiny", 160, 10_578_604, 38.77),
)
NOTE = (
    "For an ambiguous prompt it gives three masks, upstream the best-scored one of them. For fine "
    "masks alone: sc.substitute.HQ(hq_token_only=True)(model)."
)


def _vit() -> tuple[Transform, ...]:
    return (HQ(),)


def _tiny() -> tuple[Transform, ...]:
    return (TinyViT(), HQ())


for _name, _width, _parameters, _macs in SIZES:
    _small = _name == "vit_tiny"
    _file = f"sam_hq_{_name}.pth"
    _without = _official_small.TINY_VIT if _small else _official_sam.signature(_name)
    register(
        Published(
            name=f"sam_hq_{_name}",
            title="Light HQ-SAM" if _small else f"SAM-HQ ViT-{_name[-1].upper()}",
            base=SamConfig() if _small else ARCHITECTURES[_name],
            steps=_tiny if _small else _vit,
            files=(File(name=_file, url=f"{URL}/{_file}", page=UPSTREAM),),
            signature={
                **_without,
                "mask_decoder.hf_token.weight": (1, 256),
                "mask_decoder.compress_vit_feat.0.weight": (_width, 256, 2, 2),
            },
            convert=_hq.convert,
            parameters=_parameters,
            macs=_macs,
            input_size=1024,
            licence="Apache-2.0",
            paper="arXiv 2306.01567",
            upstream=UPSTREAM,
            figures=figures(f"sam_hq_{_name}"),
            note=f"{NOTE} {_official_small.CLASSIFIER}" if _small else NOTE,
        )
    )
