"""Encoders written after a paper: EfficientFormer, LiteViT, UNet and RWKV."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from norms import alive
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core.framing import Framing, framing_of
from samcompress.evaluate.macs import macs
from samcompress.substitute import _efficientformer, _litevit, _rwkv, _unet
from samcompress.substitute.efficient_former import EfficientFormer
from samcompress.substitute.lite_vit import LiteViT
from samcompress.substitute.rwkv import RWKV
from samcompress.substitute.u_net import UNet

SWAPS = [EfficientFormer(variant="s0"), LiteViT(), UNet(), RWKV(variant="tiny")]
swaps = pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.name)
SMALL = {
    "efficientformer": (
        _efficientformer,
        _efficientformer.EfficientFormerConfig(
            (8, 12, 16, 24), ((2,), (2,), (3, 2), (2, 3)), attending=1
        ),
    ),
    "litevit": (
        _litevit,
        _litevit.LiteViTConfig(channels=(8, 12, 16, 20), depths=(1, 1, 1, 2), heads=2),
    ),
    "unet": (
        _unet,
        _unet.UNetConfig(channels=(8, 8, 12, 16, 24), depths=(1, 2), head_dim=8),
    ),
    "rwkv": (
        _rwkv,
        _rwkv.RWKVConfig(width=18, depth=2, channels=(8, 12), blocks=(1, 1)),
    ),
}
small = pytest.mark.parametrize("name", SMALL)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def random(name: str, size: int = 64, out_chans: int = 12, seed: int = 0) -> Any:
    """A small encoder none of whose parts does nothing."""
    module, config = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = alive(module.build(config, size, out_chans), seed)
        for parameter_name, parameter in encoder.named_parameters():
            if parameter_name.endswith(("attention_biases", "gamma")):  # 0 and 1e-5
                parameter.data.normal_()
    return encoder


def close(found: Tensor, expected: Tensor, at_most: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= at_most * expected.abs().max()


@swaps
def test_fits_the_decoder(swap: Any) -> None:
    sam = random_sam()  # cells of 8 pixels, where all of these have 16 of the frame
    after = swap(sam, progress=False)
    (step,) = sc.lineage(after)
    assert step.state["adapter"] == "bilinear, 4x4 -> 8x8"
    assert step.state["channels"] == 32
    side = after.image_encoder.img_size
    assert side == (32 if swap.name == "substitute.u_net" else 64)
    assert framing_of(after) == Framing(side, 64)
    with torch.no_grad():
        assert after.image_encoder(torch.zeros(2, 3, side, side)).shape == (2, 32, 8, 8)


@swaps
def test_grid_of_the_same_size_is_left_alone(swap: Any) -> None:
    after = swap(sc.build("tiny", image_size=128, patch_size=16), progress=False)
    assert sc.lineage(after)[0].state["adapter"] is None
    assert type(after.image_encoder).__name__ != "OnGrid"


@swaps
def test_another_image_size(swap: Any) -> None:
    after = swap(random_sam(), progress=False)
    size = 3 * after.image_encoder.img_size
    after = sc.Pipeline([sc.substitute.ImageSize(size=size)], any_order=True)(after, progress=False)
    assert after.image_encoder.img_size == size
    image = sc.shapes(1)[0].image
    (found,) = sc.predict(after, [image], [[sc.Prompt(points=[[20, 30]])]])
    assert found.logits.shape == (1, 1, 96, 96)
    assert found.logits.isfinite().all()


@swaps
def test_fused_saved_and_loaded(swap: Any, tmp_path: Path) -> None:
    after = type(swap)(fuse=True)(random_sam(), progress=False)
    sc.save(after, tmp_path / "model")
    again = sc.load(tmp_path / "model")
    assert sc.lineage(again)[0].transform == type(swap)(fuse=True)
    image = sc.shapes(1)[0].image
    prompts = [[sc.Prompt(box=[5, 8, 60, 50])]]
    (expected,), (found,) = (sc.predict(m, [image], prompts) for m in (after, again))
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("swap", "expected"),
    [(SWAPS[0], 32), (SWAPS[1], 32), (SWAPS[2], 32), (SWAPS[3], 16)],
    ids=lambda value: getattr(value, "name", None),
)
def test_image_side_that_does_not_fit(swap: Any, expected: int) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        swap(random_sam(image_size=80 if expected == 32 else 72))
    got = {"substitute.u_net": 40, "substitute.rwkv": 72}.get(swap.name, 80)
    assert str(caught.value) == (
        f"{swap.label}: the image side does not fit this encoder.\n"
        "  where     image_encoder.img_size\n"
        f"  got       {got}\n"
        f"  expected  a multiple of {expected}\n"
        "  try       sc.substitute.ImageSize(size=...) before it"
    )


def test_module_at_a_size_that_does_not_fit() -> None:
    encoder = random("litevit")
    for act in (lambda: encoder.resize(80), lambda: random("litevit", size=0)):
        with pytest.raises(errors.ConfigError) as caught:
            act()
        assert str(caught.value).startswith(
            "LiteViT does not work at this image size.\n  got       "
        )
        assert str(caught.value).endswith("\n  expected  a multiple of 32")
    assert encoder.img_size == 64


# Parameters, and GMAC with and without the products of attention, at 1024 pixels (UNet: 512). No
# paper gives MACs. EfficientFormerV2 on its own: see test_efficientformer.
SIZES = {
    "efficientformer-s0": (3_968_784, 19.01, 10.95),
    "efficientformer-s1": (6_476_424, 24.39, 16.34),
    "efficientformer-s2": (12_926_576, 42.49, 29.07),
    "efficientformer-l": (26_414_624, 75.47, 56.68),
    "litevit-lite": (1_159_152, 5.88, 5.54),
    "unet-squeeze": (16_238_432, 16.40, 14.59),
    "rwkv-tiny": (5_489_440, 33.24, 31.74),
    "rwkv-small": (19_724_704, 92.92, 89.93),
}


LARGE = ("efficientformer-s2", "efficientformer-l", "rwkv-small")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in SIZES],
)
def test_sizes(name: str) -> None:
    part, variant = name.split("-")
    module = SMALL[part][0]
    with torch.device("meta"):
        encoder = module.build(module.CONFIGS[variant])
    config = sc.SamConfig(depth=1, embed_dim=8, num_heads=1, global_attn_indexes=())
    sam: Any = config.build(empty=True)
    sam.image_encoder = encoder
    parameters = sum(p.numel() for p in encoder.parameters())
    counted = macs(sam)
    assert (
        parameters,
        round(counted.encoder / 1e9, 2),
        round(counted.encoder_no_attention / 1e9, 2),
    ) == SIZES[name]
    if part == "litevit":  # Lite-SAM, arXiv 2407.08965: 1.16 million
        assert round(parameters / 1e6, 2) == 1.16
    if part == "unet":  # SqueezeSAM, arXiv 2312.06736 v3: 1/31.6 of SAM with ViT-H, 641.1 million
        whole = sum(p.numel() for p in sam.parameters())
        assert 641.1e6 / whole == pytest.approx(31.6, abs=0.05)


@small
@torch.no_grad()
def test_other_sizes(name: str) -> None:
    encoder = random(name)
    module, config = SMALL[name]
    for size in (96, 160):
        encoder.resize(size)
        native = module.build(config, size, 12).eval()
        native.load_state_dict(encoder.state_dict(), strict=True)
        x = numbers(2, 3, size, size)
        found = encoder(x)
        assert found.shape == (2, 12, size // encoder.stride, size // encoder.stride)
        assert torch.equal(native(x), found)
        assert torch.equal(copy.deepcopy(encoder)(x), found)
        close(torch.cat([encoder(x[:1]), encoder(x[1:])]), found)


@small
@torch.no_grad()
def test_fused_is_the_same_function(name: str) -> None:
    encoder = random(name)
    fused = copy.deepcopy(encoder)
    fused.fuse()
    x = numbers(2, 3, 64, 64)
    close(fused(x), encoder(x))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    again = random(name, seed=3)
    again.fuse()
    again.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(again(x), fused(x))
    again.fuse()  # once more changes nothing
    assert torch.equal(again(x), fused(x))


@small
def test_every_parameter_learns(name: str) -> None:
    encoder = random(name, size=96).train()
    for parameter in encoder.parameters():
        parameter.requires_grad_(True)
    out = encoder(numbers(2, 3, 96, 96))
    (out * numbers(*out.shape)).sum().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@small
@torch.no_grad()
def test_graph(name: str) -> None:
    encoder = random(name)
    x = numbers(1, 3, 64, 64)
    graph = torch.export.export(encoder, (x,)).module()
    close(graph(x), encoder(x))


@small
@torch.no_grad()
def test_half_precision(name: str) -> None:
    """Small numbers of the same size come out; nothing is computed in a type that was not asked."""
    encoder = random(name)
    x = numbers(1, 3, 64, 64)
    expected = encoder(x)
    found = encoder.to(torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    close(found.float(), expected, at_most=0.2)
