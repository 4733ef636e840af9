from __future__ import annotations

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import errors
from samcompress.core.build import ARCHITECTURES, SamConfig, config_of


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit_b", 93_735_472), ("vit_l", 312_342_832), ("vit_h", 641_090_608)],
)
def test_official_sizes(name: str, parameters: int) -> None:
    sam = ARCHITECTURES[name].build(empty=True)
    assert sum(p.numel() for p in sam.parameters()) == parameters
    assert config_of(sam) == ARCHITECTURES[name]


def test_seed_and_global_random_state() -> None:
    state = torch.get_rng_state()
    first, second, third = sc.build("tiny"), sc.build("tiny"), sc.build("tiny", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.image_encoder.neck[0].weight, second.image_encoder.neck[0].weight)
    assert not torch.equal(first.image_encoder.neck[0].weight, third.image_encoder.neck[0].weight)


def test_config_of_any_size() -> None:
    config = config_of(random_sam(mlp_ratio=2.7, image_size=48, pixel_mean=(1.0, 2.0, 3.3)))
    assert config_of(config.build(empty=True)) == config
    assert SamConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 100}, "SamConfig.image_size does not fit.\n  got       100\n  expected  a multiple of patch_size=16"),
        ({"num_heads": 5}, "SamConfig.embed_dim does not fit"),
        ({"global_attn_indexes": (12,)}, "indexes below depth=12"),
        ({"out_chans": 20}, "SamConfig.out_chans does not fit"),
        ({"imagesize": 1}, "SamConfig has no field 'imagesize'"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(sizes: dict, message: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        sc.build("vit_b", **sizes)
    assert message in str(caught.value)


def test_unknown_architecture() -> None:
    with pytest.raises(errors.UnknownTransformError, match="no architecture 'vit_x'"):
        sc.build("vit_x")


def test_config_of_a_changed_model() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[0].mlp.lin1 = torch.nn.Linear(32, 7)
    with pytest.raises(errors.ModelError, match="no SamConfig describes"):
        config_of(sam)
    with pytest.raises(errors.ModelError, match="cannot be read off"):
        config_of(torch.nn.Linear(1, 1))
