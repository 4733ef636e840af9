"""The published SlimSAMs: imported so that `sc.load` and `sc.build` know them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import nn

from ..core._infer import STATISTICS, fill, statistics
from ..core._weights import TensorDict
from ..core.adapters import state_from_transformers
from ..core.build import SamConfig
from ..core.history import Base, History, Step, describe, remember
from ..core.sizes import parameter_count, tensor_bytes
from ..core.transform import State, Transform
from ..core.zoo import Figure, File, Published, register
from .slim_sam import SlimSAM

UPSTREAM = "https://github.com/czg1225/SlimSAM"
PAPER = "arXiv 2312.05284"
LICENCE = "Apache-2.0"
POSITIONS = "image_encoder.pos_embed"
QUERIES = "image_encoder.blocks.0.attn.q.weight"  # apart from keys and values in no other model
# One width for all blocks, by percent.
BASES = {50: SamConfig(embed_dim=384), 77: SamConfig(embed_dim=168, mlp_ratio=696 / 168)}
# Where numbers were measured, and where they stand.
SA1B = "50 images of SA-1B, the annotated point, single mask, against SAM's own masks"
COCO = "COCO val2017, boxes of ViTDet, best-scored mask of three"
LVIS = "LVIS v1 val, boxes of ViTDet, best-scored mask of three"
DINO = "COCO val2017, boxes of GroundingDINO"
T4 = "GPU T4, 1024 px"
TINY, FSA = "arXiv 2312.13789", "FSANet, table IV"
# Metric, value, setting and source: of a uniform model, and what the README has of a global one.
UNIFORM: dict[int, tuple[tuple[str, float, str, str], ...]] = {
    50: (("AP", 0.435, DINO, FSA),),
    77: (
        ("AP", 0.413, COCO, TINY),
        ("AP", 0.383, LVIS, TINY),
        ("encoder, ms", 110, T4, TINY),
        ("AP", 0.421, DINO, FSA),
    ),
}
README = f"{PAPER} and its README"
GLOBAL: dict[int, tuple[tuple[str, float, str, str], ...]] = {
    50: (
        ("mIoU, point", 0.7233, SA1B, README),
        ("parameters, M", 26, "as counted there", README),
        ("MACs, G", 98, "with the decoder, without attention's products", README),
    ),
    77: (
        ("mIoU, point", 0.674, SA1B, README),
        ("parameters, M", 9.1, "as counted there", README),
        ("MACs, G", 23, "with the decoder, without attention's products", README),
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Split(Published):
    """A model whose blocks differ in width, which its file alone tells."""

    def fits(self, state: TensorDict) -> bool:
        """Whether the tensors of its signature are there, and queries apart from keys."""
        return super().fits(state) and QUERIES in state


def converted(state: TensorDict) -> TensorDict:
    """The tensors of a uniform model by our names; the Hub has them by those of transformers."""
    foreign = any(name.startswith("vision_encoder.") for name in state)
    return state_from_transformers(state) if foreign else dict(state)


def fused(state: TensorDict) -> TensorDict:
    """The same tensors with queries, keys and values in one layer."""
    found: TensorDict = {}
    for name, tensor in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            found[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            found[name] = tensor
    return found


def make(percent: int, state: TensorDict | None) -> Sam:
    """The model of a file of the global layout, `fused`, with the cut in its lineage.

    Without a file it has random weights, and as only a file tells its widths, those of the uniform
    model.

    Raises:
        CheckpointError: if the tensors do not fit.
    """
    title, (step,) = f"SlimSAM-{percent}, global", made_by(percent)
    base = SamConfig() if state is None else replace(SamConfig(), **statistics(state))
    sam = base.build(empty=state is not None)
    before = _sizes(sam)
    if state is None:
        with torch.device("meta"):
            cut = widths(sam, BASES[percent].build().state_dict())
    else:
        cut = widths(sam, state)
    step.rebuild(sam, cut)
    facts = {"before": before, "after": _sizes(sam), "seconds": 0.0}
    remember(sam, History(Base(base), (Step(step, cut, facts),)))
    describe(sam, source="random" if state is None else title)
    if state is not None:
        weights = {name: tensor for name, tensor in state.items() if name not in STATISTICS}
        fill(sam, weights, where=title, expected=f"the tensors of {title}")
    return sam


def made_by(percent: int) -> tuple[Transform, ...]:
    """What upstream did to make it."""
    return (SlimSAM.published(percent, scope="global"),)


def widths(sam: Any, state: Mapping[str, torch.Tensor]) -> State:
    """A cut that leaves as much of a SAM as there is of it in `state`: the first of all units."""

    def first(name: str, whole: int, divisor: int = 1) -> list[int]:
        tensor = state.get(f"image_encoder.{name}.bias")
        return list(range(whole if tensor is None else min(whole, len(tensor) // divisor)))

    encoder, kept, dims = sam.image_encoder, {}, {}
    kept["image_encoder"] = first("patch_embed.proj", encoder.neck[0].in_channels)
    for index, block in enumerate(encoder.blocks):
        name, parts = f"blocks.{index}", 3 * block.attn.num_heads
        kept[f"image_encoder.{name}.mlp"] = first(f"{name}.mlp.lin1", block.mlp.lin1.out_features)
        width = block.attn.qkv.out_features // parts
        dims[f"image_encoder.{name}.attn"] = first(f"{name}.attn.qkv", width, parts)
    return {"kept": kept, "heads": {}, "head_dims": dims}


def _sizes(sam: nn.Module) -> dict[str, int]:
    return {"parameters": parameter_count(sam), "bytes": tensor_bytes(sam)}


def _figures(rows: tuple[tuple[str, float, str, str], ...]) -> tuple[Figure, ...]:
    return tuple(Figure(metric=m, value=v, setting=s, source=o) for m, v, s, o in rows)


for _percent, _parameters, _macs in ((50, 27_961_776, 153.46), (77, 9_723_528, 46.56)):
    _base = BASES[_percent]
    _width = _base.embed_dim
    _common: dict[str, Any] = {
        "parameters": _parameters,
        "macs": _macs,
        "input_size": 1024,
        "licence": LICENCE,
        "paper": PAPER,
        "upstream": UPSTREAM,
    }
    register(
        Published(
            name=f"slim_sam_{_percent}",
            title=f"SlimSAM-{_percent}",
            base=_base,
            files=(File(name="model.safetensors", hub=f"Zigeng/SlimSAM-uniform-{_percent}"),),
            also=(f"SlimSAM-{_percent}-uniform.pth",),
            signature={
                POSITIONS: (1, 64, 64, _width),
                "image_encoder.blocks.11.attn.qkv.weight": (3 * _width, _width),
                "image_encoder.blocks.11.attn.rel_pos_h": (127, _width // 12),
                "image_encoder.blocks.11.mlp.lin1.bias": (int(_width * _base.mlp_ratio),),
            },
            convert=converted,
            figures=_figures(UNIFORM[_percent]),
            note=f"One width for all blocks, as in SlimSAM-{_percent}-uniform.pth. Its figures' "
            "sources do not say whether they are of this file or of the global one.",
            **_common,
        )
    )
    register(
        Split(
            name=f"slim_sam_{_percent}_global",
            title=f"SlimSAM-{_percent}, global",
            make=partial(make, _percent),
            steps=partial(made_by, _percent),
            files=(File(name=f"SlimSAM-{_percent}.pth", page=UPSTREAM),),
            signature={POSITIONS: (1, 64, 64, _width)},
            convert=fused,
            figures=_figures(GLOBAL[_percent]),
            note="Blocks differ in width, as its file alone tells: parameters and MACs are those "
            "of the uniform model.",
            **_common,
        )
    )
