"""What the tests of pruning share: a toy SAM, the six techniques, and how to look at results."""

from __future__ import annotations

from typing import Any

import torch
from conftest import random_sam
from torch import Tensor, nn

import samcompress as sc
from samcompress.core.build import ARCHITECTURES

# Each technique as it fits the toy; all scores but those that need labels or nothing.
TECHNIQUES: dict[str, Any] = {
    "mlp": sc.prune.Mlp(ratio=0.5),
    "heads": sc.prune.Heads(ratio=0.5),
    "head_dims": sc.prune.HeadDims(ratio=0.5, round_to=1),
    "channels": sc.prune.Channels(ratio=0.5, round_to=8),
    "decoder": sc.prune.Decoder(ratio=0.5),
    "blocks": sc.prune.Blocks(),
}
SLICES = [name for name in TECHNIQUES if name != "blocks"]
SCENES = sc.shapes(2, seed=5, size=(48, 64))
ATTENTION = [f"image_encoder.blocks.{i}.attn" for i in range(4)]


def toy(**sizes: Any) -> Any:
    """Four blocks, two of them global, four heads of eight; windows are padded; no table is even."""
    sam = random_sam(**{"depth": 4, "num_heads": 4, "global_attn_indexes": (1, 3), **sizes})
    drawn = torch.Generator().manual_seed(2)
    for name, parameter in sam.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=drawn))
    return sam


def on_meta(name: str = "vit_b") -> Any:
    """A large SAM without storage."""
    with torch.device("meta"):
        return ARCHITECTURES[name].build()


def prune(technique: Any, sam: Any = None, data: Any = SCENES, **run: Any) -> Any:
    return technique(toy() if sam is None else sam, data=data, progress=False, **run)


def kept_of(model: nn.Module) -> dict[str, list[int]]:
    return sc.lineage(model)[-1].state["kept"]


def gone(kept: list[int], units: int) -> list[int]:
    return sorted(set(range(units)) - set(kept))


def encode(sam: Any) -> Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return sam.image_encoder(images)


def answers(sam: Any) -> Tensor:
    """Logits and scores of two prompts on a scene, one after the other."""
    prompts = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 40])]
    found = sc.predict(sam, [SCENES[0].image], [prompts], multimask=True)[0]
    return torch.cat([found.logits.flatten(1), found.scores], 1)


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
