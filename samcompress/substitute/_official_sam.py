"""SAM itself: ViT-B, ViT-L and ViT-H."""

from __future__ import annotations

from ..core.build import ARCHITECTURES
from ..core.zoo import File, Published, register
from ._official_figures import figures

PAPER = "arXiv 2304.02643"
UPSTREAM = "https://github.com/facebookresearch/segment-anything"
URL = "https://dl.fbaipublicfiles.com/segment_anything"
# Name, hash in the file's name (the MD5's beginning), bytes, parameters, GMAC.
SIZES = (
    ("vit_b", "01ec64", 375_042_383, 93_735_472, 486.04),
    ("vit_l", "0b3195", 1_249_524_607, 312_342_832, 1492.84),
    ("vit_h", "4b8939", 2_564_550_879, 641_090_608, 2980.54),
)


def signature(name: str) -> dict[str, tuple[int, ...]]:
    """Tensors that a SAM of this size alone has: width, head width and number of blocks."""
    config = ARCHITECTURES[name]
    width, grid, last = config.embed_dim, config.grid, config.depth - 1
    head = width // config.num_heads
    return {
        "image_encoder.pos_embed": (1, grid, grid, width),
        f"image_encoder.blocks.{last}.attn.rel_pos_h": (2 * grid - 1, head),
        "mask_decoder.iou_token.weight": (1, config.out_chans),
    }


for _name, _hash, _size, _parameters, _macs in SIZES:
    _file = f"sam_{_name}_{_hash}.pth"
    register(
        Published(
            name=f"sam_{_name}",
            title=f"SAM ViT-{_name[-1].upper()}",
            base=ARCHITECTURES[_name],
            files=(File(name=_file, url=f"{URL}/{_file}", page=UPSTREAM, size=_size, md5=_hash),),
            signature=signature(_name),
            parameters=_parameters,
            macs=_macs,
            input_size=1024,
            licence="Apache-2.0",
            paper=PAPER,
            upstream=UPSTREAM,
            figures=figures(f"sam_{_name}"),
        )
    )
