"""SAMs that SlimSAM slims in a moment, and what is asked of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.prune._slim import places
from samcompress.prune.slim_sam import SlimSAM

BLOCKS = "image_encoder.blocks"
# Nothing that a test of a cut alone needs: no data, no training.
BLIND: dict[str, Any] = {"criterion": "random", "align": False, "round_to": 8}
SHORT: dict[str, Any] = {"steps": 2, "batch_size": 2, "images": 2, "round_to": 8}


def run(sam: nn.Module | None = None, data: Any = None, **fields: Any) -> Any:
    return SlimSAM(**fields)(sam or slimmable(), data=data, progress=False)


def slimmable(**sizes: Any) -> Any:
    """A SAM of which both heads and dimensions of heads go at a ratio of 0.6: 4 heads of 24."""
    return random_sam(**{"embed_dim": 96, "num_heads": 4, **sizes})


def state_of(model: nn.Module) -> dict[str, Any]:
    return sc.lineage(model)[-1].state


def meta(config: sc.SamConfig) -> Any:
    with torch.device("meta"):
        return config.build()


def planned(step: SlimSAM, sam: Any) -> dict[str, Any]:
    """A state with as many units as the step leaves, the first of each."""
    step.check(sam)
    left = {
        kind: {group.name: (group, step._left(group, kind)) for group in step.groups(sam, kind)}
        for kind in step.targets
    }
    return {
        "kept": {
            name: places(group, range(counts[0]))
            for kind in ("channels", "mlp")
            for name, (group, counts) in left[kind].items()
        },
        "heads": {name: list(range(both[0])) for name, (_, both) in left["heads"].items()},
        "head_dims": {name: list(range(both[1])) for name, (_, both) in left["heads"].items()},
    }


def slimmed(step: SlimSAM, name: str = "vit_b") -> Any:
    sam = meta(sc.ARCHITECTURES[name])
    step.rebuild(sam, planned(step, sam))
    return sam


def geometry(sam: Any, block: int = 0) -> tuple[int, int, int, int]:
    """Channels, heads, dimensions of each, hidden units."""
    attn, mlp = sam.image_encoder.blocks[block].attn, sam.image_encoder.blocks[block].mlp
    channels, width = attn.qkv.in_features, attn.qkv.out_features // 3
    return channels, attn.num_heads, width // attn.num_heads, mlp.lin1.out_features


def part(state: dict[str, Any], *names: str) -> dict[str, list[int]]:
    return {name: kept for name, kept in state["kept"].items() if name in names}


def lopsided() -> Any:
    """A SAM whose last block has one dominant head, and few hidden units that matter."""
    sam = slimmable(depth=4, global_attn_indexes=(1, 3))
    with torch.no_grad():
        sam.image_encoder.blocks[3].attn.proj.weight[:, :24] *= 30
        sam.image_encoder.blocks[3].mlp.lin2.weight[:, :16] *= 30
    return sam


def encode(sam: Any) -> torch.Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return sam.image_encoder(images)


def middle_of(folder: Path) -> Any:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return sc.load(found)
