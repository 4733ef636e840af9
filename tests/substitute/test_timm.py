from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from norms import alive
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.substitute._timm import Plan, TimmEncoder, planned, renormalising
from samcompress.substitute.timm import Timm

timm = pytest.importorskip("timm")

# One model a family: what its levels are for cells of 8 pixels, and what is resampled to get there.
FAMILIES = {
    "mobilenetv4_conv_small": ((2, 3, 4), (8, 16, 32), None),
    "efficientnet_lite0": ((2, 3, 4), (8, 16, 32), None),
    "repghostnet_050": ((2, 3, 4), (8, 16, 32), None),
    "fastvit_t8": ((1, 2, 3), (8, 16, 32), None),
    "convnext_atto": ((1, 2, 3), (8, 16, 32), None),
    "test_mambaout": ((1, 2, 3), (8, 16, 32), None),  # channels last
    "vit_tiny_patch16_224": ((11,), (16,), "bilinear, 8x8 -> 16x16"),
    "swin_tiny_patch4_window7_224": ((1, 2, 3), (8, 16, 32), None),
    "hiera_tiny_224": ((1, 2, 3), (8, 16, 32), None),
}
SMALL = "test_efficientnet"


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def random(name: str = SMALL, size: int = 64, grid: int = 8, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = TimmEncoder(name, size, grid, 16, planned(name, size, size // grid))
        return alive(made, seed)


def close(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= within * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_family(name: str) -> None:
    levels, strides, adapter = FAMILIES[name]
    small = Timm(model=name)(sc.build("tiny"), progress=False)
    (step,) = sc.lineage(small)
    assert step.state["adapter"] == adapter
    assert step.state["features"]["levels"] == list(levels)
    assert step.state["features"]["strides"] == list(strides)
    encoder = small.image_encoder
    assert (encoder.img_size, encoder.stride, encoder.multiple) == (128, 8, strides[-1])
    x = numbers(1, 3, 128, 128)
    found = encoder(x)
    assert found.shape == (1, 64, 16, 16)
    assert found.isfinite().all()
    if any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()):
        expected = alive(encoder)(x)
        encoder.fuse()
        close(encoder(x), expected)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


@torch.no_grad()
def test_levels_by_hand() -> None:
    """What the encoder is said to compute, from timm's model itself."""
    encoder = random()
    x = numbers(2, 3, 64, 64)
    plain = timm.create_model(SMALL, features_only=True, out_indices=(2, 3, 4)).eval()
    plain.load_state_dict(encoder.trunk.state_dict())
    fine, middle, coarse = (conv(m) for conv, m in zip(encoder.laterals, plain(x), strict=True))
    assert [m.shape[-1] for m in (fine, middle, coarse)] == [8, 4, 2]
    enlarged = [
        nn.functional.interpolate(m, (8, 8), mode="bilinear", align_corners=False)
        for m in (middle, coarse)
    ]
    assert torch.equal(encoder(x), encoder.neck(fine + enlarged[0] + enlarged[1]))


def test_which_levels() -> None:
    assert planned(SMALL, 64, 16).strides == (16, 32)
    assert planned(SMALL, 64, 16).levels == (3, 4)
    assert planned(SMALL, 64, 12).strides == (8, 16, 32)  # the nearest finer one
    assert planned(SMALL, 64, 64).strides == (32,)
    assert planned("test_vit", 64, 8) == Plan((5,), (64,), (16,))  # all finer ones are absent
    assert Plan((0, 1), (8, 8), (8, 32)).multiple(16) == 32
    assert Plan((0, 1), (8, 8), (14, 28)).multiple(16) == 16


@torch.no_grad()
def test_channels_last() -> None:
    encoder = random("test_mambaout")
    assert encoder.last
    x = numbers(1, 3, 64, 64)
    maps = encoder.trunk(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 8, 32), (4, 4, 48), (2, 2, 64)]


# --- other image sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, "test_vit", "test_byobnet", "test_mambaout"])
@torch.no_grad()
def test_another_size(name: str) -> None:
    encoder = random(name)
    encoder.resize(96)
    assert (encoder.img_size, encoder.grid, encoder.stride) == (96, 12, 8)
    native = random(name, 96, 12, seed=3)
    native.load_state_dict(encoder.state_dict(), strict=True)
    x = numbers(2, 3, 96, 96)
    found = encoder(x)
    assert found.shape == (2, 16, 12, 12)
    assert torch.equal(native(x), found)
    close(torch.cat([encoder(x[:1]), encoder(x[1:])]), found)


def test_position_tables_are_resized_not_drawn_anew() -> None:
    encoder = random("test_vit", 128, 16)
    table = encoder.trunk.model.pos_embed
    table.data.copy_(torch.linspace(-1, 1, table.shape[1])[None, :, None].expand_as(table))
    table.requires_grad_(False)
    encoder.resize(64)
    small = encoder.trunk.model.pos_embed
    assert small.shape[1] < table.shape[1]
    assert not small.requires_grad
    assert abs(float(small.mean() - table.mean())) < 0.05
    assert float(small.std()) > 0.4


@pytest.mark.parametrize("name", ["coat_lite_tiny", "efficientformerv2_s0"])
def test_a_model_of_one_size(name: str) -> None:
    """One refuses other sizes when it runs, one has tables of a size; timm changes neither."""
    with torch.device("meta"):
        encoder = TimmEncoder(name, 64, 8, 16, planned(name, 64, 8))
    with pytest.raises(errors.ConfigError) as caught:
        encoder.resize(128)
    assert str(caught.value) == (
        "timm cannot change the image size of this model.\n"
        f"  where     {name}\n"
        "  got       128\n"
        "  expected  64\n"
        "  try       sc.substitute.ImageSize(size=128) before sc.substitute.Timm"
    )
    assert encoder.img_size == 64


def test_image_size_after_it(tmp_path: Path) -> None:
    small = Timm(model="test_vit", fuse=True)(sc.build("tiny"), progress=False)
    step = sc.substitute.ImageSize(size=64)
    small = sc.Pipeline([step], any_order=True)(small, progress=False)
    image = sc.shapes(1)[0].image
    prompts = [[sc.Prompt(points=[[20, 30]])]]
    (found,) = sc.predict(small, [image], prompts)
    assert found.logits.shape == (1, 1, 32, 32)
    sc.save(small, tmp_path / "small")
    (again,) = sc.predict(sc.load(tmp_path / "small"), [image], prompts)
    assert torch.equal(again.logits, found.logits)


# --- what is refused ------------------------------------------------------------------------------


def test_no_such_model() -> None:
    with pytest.raises(errors.ModelError) as caught:
        Timm(model="mobilenetv4_conv_smal")(sc.build("tiny"))
    assert str(caught.value) == (
        "timm has no model of this name.\n"
        "  where     model\n"
        "  got       mobilenetv4_conv_smal\n"
        "  expected  one of timm.list_models()\n"
        "  try       mobilenetv4_conv_small, mobilenetv4_conv_small_050, mobilenetv4_conv_small_035"
    )


def test_a_model_without_features(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model

    def without(name: str, **options: Any) -> nn.Module:
        if name == "test_resnet":
            raise RuntimeError("features_only not implemented\nfor this")
        model: nn.Module = made(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", without)
    with pytest.raises(errors.ModelError) as caught:
        Timm(model="test_resnet")(sc.build("tiny"))
    assert str(caught.value) == (
        "timm cannot give features of this model.\n"
        "  where     test_resnet\n"
        "  got       RuntimeError: features_only not implemented\n"
        "  expected  a model that timm.create_model(..., features_only=True) makes and runs\n"
        "  try       another model, e.g. mobilenetv4_conv_small"
    )


def test_a_decoder_that_reads_more() -> None:
    sam: Any = random_sam()
    sam.mask_decoder.features = 8
    with pytest.raises(errors.ModelError) as caught:
        Timm(model=SMALL)(sam)
    assert str(caught.value) == (
        "substitute.timm: this mask decoder reads more than an embedding.\n"
        "  where     mask_decoder\n"
        "  got       MaskDecoder, which takes 8 further channels\n"
        "  expected  a decoder that takes the embedding alone, as SAM's\n"
        "  try       train the image encoder that is there, or start from another SAM"
    )


def test_image_sides_that_do_not_fit() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Timm(model=SMALL)(random_sam(image_size=48))
    assert str(caught.value) == (
        "substitute.timm: the image side does not fit this encoder.\n"
        "  where     image_encoder.img_size\n"
        "  got       48\n"
        "  expected  a multiple of 32\n"
        "  try       sc.substitute.ImageSize(size=...) before it"
    )
    with pytest.raises(errors.ConfigError) as caught:
        Timm(model="efficientformer_l1")(sc.build("tiny"))
    lines = str(caught.value).split("\n")
    assert lines[2].startswith("  got       128: RuntimeError: ")
    assert [*lines[:2], *lines[3:]] == [
        "this model of timm does not take images of this side.",
        "  where     efficientformer_l1",
        "  expected  a multiple of 32, for example 224",
        "  try       sc.substitute.ImageSize(size=...) before it",
    ]


# --- weights of timm ------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Weights of timm without a network: ones; and what was asked for."""
    asked: list[bool] = []
    made = timm.create_model

    def answer(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = made(name, pretrained=False, **options)
        asked.append(pretrained)
        if pretrained:
            for parameter in model.parameters():
                parameter.data.fill_(0.01)
        return model

    monkeypatch.setattr(timm, "create_model", answer)
    return asked


def test_pretrained(hub: list[bool], tmp_path: Path) -> None:
    sam = sc.build("tiny")
    small = Timm(model=SMALL, pretrained=True)(sam, progress=False)
    plain = Timm(model=SMALL)(sam, progress=False)
    assert hub.count(True) == 1
    assert all((p == 0.01).all() for p in small.image_encoder.trunk.parameters())
    for part in ("laterals", "neck"):  # what timm does not have is drawn from the seed
        mine = getattr(small.image_encoder, part).state_dict()
        drawn = getattr(plain.image_encoder, part).state_dict()
        assert all(torch.equal(mine[name], drawn[name]) for name in mine)
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert hub.count(True) == 1  # a saved model needs no download
    x = numbers(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(again.image_encoder(x), small.image_encoder(x))


@torch.no_grad()
def test_pixels_that_the_weights_expect(hub: list[bool]) -> None:
    sam: Any = sc.build("tiny")
    assert timm.get_pretrained_cfg("test_vit").mean == (0.5, 0.5, 0.5)
    assert renormalising(SMALL, sam.pixel_mean, sam.pixel_std) is None
    small: Any = Timm(model="test_vit", pretrained=True)(sam, progress=False)
    image = 255 * torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    found = small.image_encoder.pixels(small.preprocess(image))
    torch.testing.assert_close(found, (image / 255 - 0.5) / 0.5, rtol=0, atol=1e-5)
    again = sc.build("tiny")
    Timm(model="test_vit", pretrained=True).rebuild(again, sc.lineage(small)[0].state)
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again.image_encoder(found), small.image_encoder(found))


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network\nsecond line")
        model: nn.Module = made(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(errors.CheckpointError) as caught:
        Timm(model=SMALL, pretrained=True)(sc.build("tiny"))
    assert str(caught.value) == (
        "timm could not get the weights of this model.\n"
        f"  where     {SMALL}\n"
        "  got       OSError: no network\n"
        "  expected  weights on the Hub, or in its cache on this machine\n"
        "  try       Timm(model=..., pretrained=False), or run it once where there is a network"
    )


# --- as every encoder -----------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone() -> None:
    swap = Timm(model=SMALL)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    models = [
        s(random_sam(), progress=False) for s in (swap, swap, dataclasses.replace(swap, seed=1))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = (m.image_encoder.state_dict() for m in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_every_parameter_learns_and_the_graph_is_traceable() -> None:
    encoder = random()
    x = numbers(1, 3, 64, 64)
    graph = torch.export.export(encoder, (x,)).module()
    with torch.no_grad():
        close(graph(x), encoder(x))
    encoder.train()(numbers(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_nothing_of_a_call_is_kept() -> None:
    """Some of timm's attentions keep their expanded bias, which new weights would not reach."""
    encoder = random("efficientvit_m0", 64, 4)
    x = numbers(1, 3, 64, 64)
    before = encoder(x)
    twin = copy.deepcopy(encoder)  # not possible with a kept tensor of a graph
    for name, parameter in twin.named_parameters():
        if name.endswith("attention_biases"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    assert not torch.equal(twin(x), before)
    assert torch.equal(encoder(x), before)


def test_the_file_does_not_hide_the_package() -> None:
    assert sys.modules["samcompress.substitute.timm"].Timm is Timm
    assert sys.modules["timm"] is timm
    assert not hasattr(timm, "Timm")
