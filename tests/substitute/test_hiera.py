"""SAM 2's encoder against transformers' and timm's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import random_sam, randomise
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.evaluate.macs import macs
from samcompress.substitute._hiera import CONFIGS, HieraConfig, build, convert
from samcompress.substitute.hiera import Hiera

timm = pytest.importorskip("timm")
SMALL = HieraConfig(
    width=16, heads=2, blocks=(1, 1, 2, 1), everywhere=(3,), background=5, windows=(8, 4, 6, 3)
)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def random(config: HieraConfig = SMALL, size: int = 64, channels: int = 16, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(build(config, size, channels), seed).eval()


def theirs(config: HieraConfig, channels: int = 256) -> Any:
    """transformers' encoder of these sizes."""
    models = pytest.importorskip("transformers")
    trunk = models.Sam2HieraDetConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        blocks_per_stage=list(config.blocks),
        embed_dim_per_stage=list(config.widths),
        num_attention_heads_per_stage=[config.heads << stage for stage in range(4)],
        window_size_per_stage=list(config.windows),
        global_attention_blocks=list(config.everywhere),
        window_positional_embedding_background_size=[config.background] * 2,
    )
    whole = models.Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=list(reversed(config.widths)),
        fpn_hidden_size=channels,
    )
    return models.Sam2VisionModel(whole).eval()


def filled(shape: torch.Size) -> Tensor:
    """Numbers that keep activations of about one."""
    if len(shape) == 1:
        return 0.5 + 0.2 * numbers(*shape)
    return numbers(*shape) / shape[1:].numel() ** 0.5


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "size", "channels"), [(CONFIGS["tiny"], 256, 256), (SMALL, 96, 16)]
)
@torch.no_grad()
def test_equal_to_transformers(config: HieraConfig, size: int, channels: int) -> None:
    with torch.device("meta"):  # initialising twice would take longer than the test
        reference = theirs(config, channels)
        mine = nn.ModuleDict({"image_encoder": build(config, size, channels).eval()})
    state = {name: filled(tensor.shape) for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(state, strict=True, assign=True)
    mine.load_state_dict(convert(state), strict=True, assign=True)
    x = numbers(1, 3, size, size)
    expected = reference(x).fpn_hidden_states
    encoder: Any = mine["image_encoder"]
    found = encoder.levels(x)
    assert [level.shape[-1] for level in found] == [size // 4, size // 8, size // 16]
    for level, wanted in zip(found, expected, strict=True):
        close(level, wanted)
    assert torch.equal(encoder(x), found[2])


@pytest.mark.parametrize("variant", CONFIGS)
def test_sizes_are_those_of_transformers_and_timm(variant: str) -> None:
    with torch.device("meta"):
        mine, reference = build(CONFIGS[variant]), theirs(CONFIGS[variant])
        trunk = timm.create_model(f"sam2_hiera_{variant}")
    assert count(mine) == count(reference)
    published = {"tiny": 27219136, "small": 34316992, "base_plus": 69106816, "large": 212703280}
    assert count(mine) == published[variant]
    shapes = {f"image_encoder.{name}": t.shape for name, t in mine.state_dict().items()}
    assert shapes == {name: t.shape for name, t in convert(reference.state_dict()).items()}
    trunk.head = nn.Identity()
    assert {n: t.shape for n, t in trunk.state_dict().items()} == {
        n: t.shape for n, t in mine.trunk.state_dict().items()
    }
    for ours, timms in zip(mine.trunk.blocks, trunk.blocks, strict=True):
        for name in ("window_size", "q_stride"):
            assert getattr(ours, name) == getattr(timms, name)
        assert ours.attn.num_heads == timms.attn.num_heads
    assert {m.eps for m in mine.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_the_tiny_variant_is_the_default_of_transformers() -> None:
    default = pytest.importorskip("transformers").Sam2VisionConfig()
    mine = theirs_config = CONFIGS["tiny"]
    trunk = default.backbone_config
    assert tuple(trunk.blocks_per_stage) == mine.blocks
    assert tuple(trunk.global_attention_blocks) == mine.everywhere
    assert tuple(trunk.window_size_per_stage) == theirs_config.windows
    assert default.fpn_top_down_levels == [2, 3]
    assert (default.num_feature_levels, default.fpn_kernel_size) == (3, 1)


def test_work_at_1024_pixels() -> None:
    least = {"depth": 1, "embed_dim": 8, "num_heads": 1, "global_attn_indexes": ()}
    sam = sc.SamConfig(**least).build(empty=True)  # type: ignore[arg-type]
    with torch.device("meta"):
        sam.image_encoder = build(CONFIGS["tiny"])
    found = macs(sam)
    assert found.encoder / 1e9 == pytest.approx(143.0, rel=1e-3)
    assert found.encoder_no_attention / 1e9 == pytest.approx(100.3, rel=1e-3)


def test_official_names() -> None:
    mine = {f"image_encoder.{name}": t for name, t in random().state_dict().items()}
    official = {
        name.replace("mlp.fc1", "mlp.layers.0").replace("mlp.fc2", "mlp.layers.1"): tensor
        for name, tensor in mine.items()
    }
    assert set(official) != set(mine)
    decoder = {"sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight": torch.zeros(1)}
    found = convert({**official, **decoder})
    assert list(found) == [*mine, *decoder]
    assert all(found[name] is tensor for name, tensor in mine.items())
    assert convert(found) == found
    prefixed = convert({"vision_encoder.backbone.blocks.0.layer_norm1.weight": torch.zeros(1)})
    assert list(prefixed) == ["image_encoder.trunk.blocks.0.norm1.weight"]


@pytest.mark.parametrize("size", [32, 96, 128])
@torch.no_grad()
def test_another_size(size: int) -> None:
    encoder = random()
    encoder.resize(size)
    assert encoder.img_size == size
    native = build(SMALL, size, 16).eval()
    native.load_state_dict(encoder.state_dict(), strict=True)
    x = numbers(2, 3, size, size)
    found = encoder(x)
    assert found.shape == (2, 16, size // 16, size // 16)
    assert torch.equal(native(x), found)
    close(torch.cat([encoder(x[:1]), encoder(x[1:])]), found)
    assert torch.equal(copy.deepcopy(encoder)(x), found)


def test_a_size_that_does_not_fit() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        random().resize(48)
    assert str(caught.value) == (
        "Hiera does not work at this image size.\n  got       48\n  expected  a multiple of 32"
    )
    with pytest.raises(errors.ConfigError, match="the image side does not fit this encoder"):
        Hiera()(random_sam(image_size=48))


def test_what_learns_and_a_graph() -> None:
    encoder = random()
    x = numbers(1, 3, 64, 64)
    graph = torch.export.export(encoder, (x,)).module()
    with torch.no_grad():
        close(graph(x), encoder(x))
    encoder(x).square().sum().backward()
    still = {name for name, p in encoder.named_parameters() if p.grad is None}
    # The two finer levels are for a decoder that asks for them.
    assert still == {f"neck.convs.{i}.conv.{kind}" for i in (2, 3) for kind in ("weight", "bias")}
    sum(level.square().sum() for level in encoder.levels(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_in_a_sam() -> None:
    small = Hiera()(sc.build("tiny"), progress=False)
    (step,) = sc.lineage(small)
    assert step.state["adapter"] == "bilinear, 8x8 -> 16x16"
    image = sc.shapes(1)[0].image
    prompts = [[sc.Prompt(points=[[20, 30]])]]
    (found,) = sc.predict(small, [image], prompts)
    assert found.logits.shape == (1, 1, 64, 64)
    resized = sc.Pipeline([sc.substitute.ImageSize(size=64)], any_order=True)(small, progress=False)
    (found,) = sc.predict(resized, [image], prompts)
    assert found.logits.shape == (1, 1, 32, 32)
