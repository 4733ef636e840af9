"""The head for a heat map: its targets, its losses, and that it learns where objects are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.errors import ConfigError, NoEffectError
from samcompress.core.everything import Everything, samplers
from samcompress.core.everything.heat import HeatMap, losses, targets
from samcompress.core.predict import encode
from samcompress.distill.heat_head import HeatHead


def test_targets() -> None:
    masks = torch.zeros(3, 32, 32)
    masks[0, 4:24, 8:28] = 1
    masks[1, 28:29, 2:3] = 0.4  # less than a place
    masks[2, 12:16, 16:20] = 1  # on the first one
    heat, sides = targets(masks, (8, 8))
    assert heat.shape == (8, 8)
    assert sides.shape == (4, 8, 8)
    assert heat.max() == 1
    assert heat[7, 0] == 1
    assert heat[3, 4] == 1
    assert heat[0].max() == 0
    # Hot in the middle, cold at the border.
    assert heat[3, 4] > heat[2, 3] > heat[1, 3] > 0
    # Middle of cell 3, 3 of the first: 4 pixels a cell.
    x, y = 3.5, 3.5
    assert sides[:, 3, 3].tolist() == [x - 2, y - 1, 7 - x, 6 - y]
    assert sides[:, 7, 0].tolist() == [0.0, 0.5, 0.25, -0.25]
    tiny, _ = targets(masks[1:2], (8, 8))
    assert tiny.sum() == tiny[7, 0] == 1
    nothing, ones = targets(torch.zeros(0, 32, 32), (8, 8))
    assert not nothing.any()
    assert ones.shape == (4, 8, 8)


def test_losses() -> None:
    wanted, reach = torch.zeros(1, 4, 4), torch.ones(1, 4, 4, 4)
    wanted[0, 1, 1] = 1.0
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    right = losses(wanted, reach, wanted, reach, valid)
    assert right["heat"] == 0
    assert right["boxes"] < 1e-6
    heat = wanted.clone()
    heat[0, 3, 3], heat[0, 0, 0] = 0.8, 0.5
    wrong = losses(heat, 2 * reach, wanted, reach, valid)
    # One hot cell, and the three hardest cold ones.
    assert wrong["heat"] == pytest.approx((0.64 + 0.25) / 4)
    assert wrong["boxes"] == pytest.approx(0.75)
    valid[0, 3, 3] = False
    assert losses(heat, reach, wanted, reach, valid)["heat"] == pytest.approx(0.25 / 4)
    empty = losses(heat, reach, torch.zeros(1, 4, 4), reach, valid)
    assert all(np.isfinite(float(v)) for v in empty.values())


def test_head_ignores_further_channels() -> None:
    head = HeatMap(8, 4)
    features = torch.randn(2, 11, 5, 6, generator=torch.Generator().manual_seed(0))
    heat, sides = head(features)
    assert heat.shape == (2, 1, 5, 6)
    assert sides.shape == (2, 4, 5, 6)
    assert ((heat > 0) & (heat < 1)).all()
    assert (sides > 0).all()
    assert torch.equal(heat, head(features[:, :8])[0])


def test_it_learns_where_objects_are(trained: nn.Module, tmp_path: Path) -> None:
    data = sc.shapes(6, seed=1, size=128)
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    step = HeatHead(steps=40, batch_size=3, lr=3e-3, width=32)
    model = step(trained, data=data, progress=False)
    state = sc.lineage(model)[-1].state
    assert state["loss_after"] < 0.7 * state["loss_before"]
    assert not hasattr(trained, "heat_head")
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    points = hits = 0
    for sample in data:
        scene = samplers.Scene(sample.image, encode(model, [sample.image])[0], model)
        with torch.inference_mode():
            found, _, heat = samplers.peaks(scene)
        strong = found[heat > 0.5].astype(int)
        points += len(strong)
        hits += int(sample.masks().any(0)[strong[:, 1], strong[:, 0]].sum())
    assert points > 5
    assert hits > 0.8 * points
    folder = sc.save(model, tmp_path / "model") or tmp_path / "model"
    again = sc.load(folder)
    settings = Everything(sampler=samplers.Heat(tau=2.0), min_iou=0.3, min_stability=0.3)
    mine, theirs = (settings(m, data[0].image) for m in (model, again))
    assert mine.to_sam("uncompressed_rle") == theirs.to_sam("uncompressed_rle")
    assert 0 < mine.stats.prompts <= 256
    with pytest.raises(NoEffectError, match="has a head for a heat map"):
        step(model, data=data, progress=False)


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match="width is out of range"):
        HeatHead(width=0)
