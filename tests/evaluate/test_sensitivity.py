"""Sensitivity: one block at a time, refusals kept, rows behind it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import random_sam
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core.where import Where
from samcompress.evaluate.sensitivity import blocks, sensitivity


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return random_sam()


def test_one_block_at_a_time(sam: nn.Module) -> None:
    cut = sc.prune.Mlp(criterion="magnitude")
    found = sensitivity(
        cut, sam, sc.shapes(1, size=64), values={"ratio": (0.25, 0.75)}, progress=False
    )
    assert found.blocks == ["image_encoder.blocks.0", "image_encoder.blocks.1"]
    assert found.values == [0.25, 0.75]
    for spot in found.spots:
        assert 0 <= spot.agreement <= 1
        assert 0 < spot.saved < 1
        row = next(r for r in found.study.rows if r["name"] == f"{spot.block} {spot.value}")
        (step,) = row["recipe"]["steps"]
        assert step["params"]["where"]["include"] == [f"{spot.block}.mlp"]
    by_ratio = {spot.value: spot.saved for spot in found.spots}
    assert by_ratio[0.75] > by_ratio[0.25]
    assert [c.name for c in found.table().columns][:2] == ["block", "ratio 0.25: IoU to base"]
    ax = found.picture().axes[0]
    assert len(ax.texts) == 4


def test_refused_blocks_keep_their_place(sam: nn.Module) -> None:
    found = sensitivity(
        sc.quantize.Int8Weights(min_size=100_000), sam, sc.shapes(1, size=64), progress=False
    )
    assert {spot.agreement for spot in found.spots} == {None}
    assert all(spot.reason.startswith(spot.block) for spot in found.spots)
    assert "refused" in repr(found)
    assert {t.get_text() for t in found.picture().axes[0].texts} == {"refused"}


def test_modules_by_block(sam: nn.Module) -> None:
    found = blocks(Where(("image_encoder.**", "mask_decoder.transformer.**")), sam)
    assert list(found)[:3] == [
        "image_encoder.patch_embed",
        "image_encoder.blocks.0",
        "image_encoder.blocks.1",
    ]
    assert "mask_decoder.transformer.layers.0" in found
    assert "image_encoder.blocks" not in found
    assert all(name.startswith(part) for part, names in found.items() for name in names)


def test_what_makes_no_sense(sam: nn.Module) -> None:
    data: Any = sc.shapes(1, size=64)
    with pytest.raises(errors.ConfigError, match="acts on the whole model"):
        sensitivity(sc.attention.Fused(), sam, data)
    with pytest.raises(errors.ConfigError, match="values are of one field"):
        sensitivity(sc.prune.Mlp(), sam, data, values={"ratio": (0.5,), "seed": (1,)})
