"""What the tests of real quantization share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core.checkpoint import load_folder
from samcompress.core.contract import dtype_of

DATA = sc.shapes(4, seed=3, size=(60, 80))
BOX = sc.Prompt(box=[5, 8, 60, 50])


def draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embedding(model: Any) -> torch.Tensor:
    encoder = model.image_encoder
    side = encoder.img_size
    with torch.no_grad():
        return encoder(draw(2, 3, side, side).to(dtype_of(encoder))).float()


def change(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def logits(model: Any) -> torch.Tensor:
    return sc.predict(model, [DATA[0].image], [[BOX]], multimask=True)[0].logits


def deep_sam() -> Any:
    """Twelve blocks, of which every third is global."""
    return random_sam(depth=12, embed_dim=64, num_heads=4, global_attn_indexes=(2, 5, 8, 11))


def same_after_loading(model: Any, folder: Path) -> Any:
    sc.save(model, folder)
    again: Any = load_folder(folder)
    assert torch.equal(embedding(again), embedding(model))
    assert torch.equal(logits(again), logits(model))
    return again


def unchanged_elsewhere(before: Any, after: Any, changed: list[str]) -> None:
    """Every tensor outside the changed layers is bit-identical."""
    was, now = before.state_dict(), after.state_dict()
    others = [n for n in was if not any(n.startswith(f"{c}.") for c in changed)]
    assert len(others) > 20
    for name in others:
        assert torch.equal(was[name], now[name]), name


def mask_iou(small: Any, model: Any) -> float:
    """Mean IoU of the masks of both, boxes of annotated shapes as prompts."""
    found = []
    for sample in sc.shapes(6, seed=11, size=(96, 128)):
        prompts = [sc.Prompt(box=instance.box) for instance in sample.instances]
        pair = [sc.predict(m, [sample.image], [prompts])[0].masks for m in (small, model)]
        both, either = (pair[0] & pair[1]).sum((1, 2, 3)), (pair[0] | pair[1]).sum((1, 2, 3))
        found.append(both / either.clamp_min(1))
    return float(torch.cat(found).mean())
