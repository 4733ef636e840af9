"""TinyViT against the published variants' outputs and against timm's own blocks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from zoo_goldens import Reference, answer, check, embed, eps_of, parameters, sam_with

import samcompress as sc
from samcompress.core import errors
from samcompress.core.predict import Embedding
from samcompress.evaluate.macs import macs
from samcompress.substitute._one_mask import BestMask
from samcompress.substitute._tiny_vit import (
    CONFIGS,
    UNUSED,
    Attention,
    Block,
    TinyViT,
    TinyViTConfig,
    build,
    convert,
)

tiny_vit = pytest.importorskip("timm.models.tiny_vit")

SMALL = TinyViTConfig(
    embed_dims=(8, 16, 24, 32),
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 3, 4),
    window_sizes=(3, 3, 5, 3),
)


def small(seed: int = 0, size: int = 64) -> TinyViT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(build(SMALL, size, 32), seed).eval()


def images(size: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


# --- the published variants -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(shared: Path) -> tuple[dict[str, torch.Tensor], Embedding, dict[str, float]]:
    """The encoder of all variants has the same synthetic weights, so it runs once."""
    reference = Reference.of("mobilesam", shared)
    sam = sam_with(build(CONFIGS["5m"]))
    state = convert(reference.state())
    sam.load_state_dict(state, strict=True)
    embedding, found = embed(reference, sam)
    return state, embedding, found


@pytest.mark.parametrize("name", ["mobilesam", "tinysam", "mobilesamv2_tiny_vit"])
def test_encoder_of_published_variant(
    shared: Path, encoded: tuple[dict[str, torch.Tensor], Embedding, dict[str, float]], name: str
) -> None:
    state, embedding, found = encoded
    reference = Reference.of(name, shared)
    mine = {k: v for k, v in convert(reference.state()).items() if k.startswith("image_encoder.")}
    assert all(torch.equal(state[key], tensor) for key, tensor in mine.items())
    assert found["input"] == 0
    assert max(found.values()) < 1e-5
    features = embedding.features[0].numpy()
    assert reference.compare("embedding", "embedding", features) < 1e-5
    print(name, found)


@pytest.mark.parametrize("name", ["mobilesam", "tinysam", "mobilesamv2_tiny_vit"])
def test_masks_of_published_variant(
    shared: Path, encoded: tuple[dict[str, torch.Tensor], Embedding, dict[str, float]], name: str
) -> None:
    reference = Reference.of(name, shared)
    sam = sam_with(None)
    parts = ("prompt_encoder.", "mask_decoder.")
    state = {k: v for k, v in convert(reference.state()).items() if k.startswith(parts)}
    sam.load_state_dict(state, strict=True)
    found: dict[str, float] = {}
    if name == "mobilesamv2_tiny_vit":
        boxes = [[120.0, 80.0, 470.0, 390.0], [200.0, 100.0, 600.0, 460.0]]
        prompts = [sc.Prompt(box=box) for box in boxes]
        low, scores, full = answer(sam, encoded[1], prompts, multimask=False)
        found |= check(reference, "boxes", low[:, 0], scores[:, 0], full[:, 0])
    elif name == "tinysam":
        sam.mask_decoder = BestMask(sam.mask_decoder)
        for key, prompt in reference.prompts().items():
            low, scores, full = answer(sam, encoded[1], [prompt], multimask=True)
            found |= check(reference, key, low[0], scores[0], full[0])
    else:
        for key, prompt in reference.prompts().items():
            runs = [answer(sam, encoded[1], [prompt], multimask=m) for m in (False, True)]
            joined = [np.concatenate([a[0], b[0]]) for a, b in zip(*runs, strict=True)]
            found |= check(reference, key, *joined)
    assert max(found.values()) < 1e-5
    print(name, found)


@pytest.mark.parametrize("name", ["mobilesam", "tinysam", "mobilesamv2_tiny_vit"])
def test_parameters_are_those_of_the_manifest(shared: Path, name: str) -> None:
    reference = Reference.of(name, shared)
    with torch.device("meta"):
        sam = sam_with(build(CONFIGS["5m"]))
    rows = reference.manifest["tensors"]
    unused = sum(int(np.prod(shape)) for key, shape, *_ in rows if UNUSED.fullmatch(key))
    assert unused == 321_640
    expected = reference.manifest["parameters"]
    assert parameters(sam.image_encoder) + unused == expected["image_encoder"]
    assert parameters(sam.prompt_encoder) == expected["prompt_encoder"]
    assert parameters(sam.mask_decoder) == expected["mask_decoder"]
    assert parameters(sam) == 9_808_452  # published without the classifier: 9.8 million
    # The rest of the tensor list too, shape by shape.
    wanted = {key: tuple(shape) for key, shape, *_ in rows if not UNUSED.fullmatch(key)}
    found = convert({key: torch.empty(shape, device="meta") for key, shape in wanted.items()})
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in sam.state_dict().items()
    }


def test_macs_are_those_published() -> None:
    found = macs(sam_with(build(CONFIGS["5m"])))
    assert found.encoder == pytest.approx(38.77e9, rel=0.005)
    assert found.decoder_per_prompt == pytest.approx(1.81e9, rel=0.005)


def test_norms_have_the_published_eps() -> None:
    with torch.device("meta"):
        encoder = build(CONFIGS["5m"])
    assert eps_of(encoder, "BatchNorm2d") == {1e-5}
    assert eps_of(encoder, "LayerNorm") == {1e-5}
    assert eps_of(encoder, "LayerNorm2d") == {1e-6}


# --- against timm ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "grid"), [(3, (6, 9)), (3, (5, 7)), (7, (7, 7)), (7, (4, 4))])
def test_block_is_timms(window: int, grid: tuple[int, int]) -> None:
    mine = randomise(Block(24, 3, window, 4.0)).eval()
    timms = tiny_vit.TinyVitBlock(24, 3, window_size=window).eval()
    timms.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(2, 24, *grid, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = timms(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(mine(x), expected, rtol=1e-5, atol=1e-5)


def test_bias_is_numbered_by_first_appearance() -> None:
    attention = randomise(Attention(8, 2, 4))
    places = list(itertools.product(range(4), range(4)))
    numbers: dict[tuple[int, int], int] = {}
    bias = torch.empty(1, 2, 16, 16)
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        offset = (abs(a[0] - b[0]), abs(a[1] - b[1]))
        bias[0, :, i, j] = attention.attention_biases[:, numbers.setdefault(offset, len(numbers))]
    assert torch.equal(attention.bias(), bias)


# --- as a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64, 80, 112])
def test_any_multiple_of_16(size: int) -> None:
    encoder = small()
    encoder.resize(size)
    assert encoder.img_size == size
    x = images(size, 2)
    with torch.no_grad():
        found = encoder(x)
        assert found.shape == (2, 32, size // 16, size // 16)
        torch.testing.assert_close(found[:1], encoder(x[:1]), rtol=1e-4, atol=1e-5)
        assert torch.equal(found, small(size=size)(x))


def test_size_that_does_not_fit() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        build(SMALL, 100)
    text = str(caught.value)
    assert text.startswith("TinyViT does not work at this image size.")
    assert "100" in text
    assert "a multiple of 16" in text


def test_weights_loaded_after_a_run_are_used() -> None:
    encoder, other, x = small(0), small(1), images(64)
    with torch.no_grad():
        encoder(x)
        encoder.load_state_dict(other.state_dict())
        assert torch.equal(encoder(x), other(x))


def test_all_state_is_in_the_state_dict() -> None:
    encoder = small()
    with torch.device("meta"):
        twin = build(SMALL, 64, 32)
    twin = twin.to_empty(device="cpu").eval()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 7)
    twin.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        expected = encoder(images(64))
        assert torch.equal(twin(images(64)), expected)
        assert torch.equal(copy.deepcopy(encoder)(images(64)), expected)


def test_every_parameter_learns() -> None:
    encoder = small().train()
    encoder(images(64, 2)).square().mean().backward()
    still = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_can_be_exported() -> None:
    encoder = small()
    with torch.no_grad():
        program = torch.export.export(encoder, (images(64),)).module()
        torch.testing.assert_close(program(images(64)), encoder(images(64)))


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_wrong_names_are_not_hidden(change: str) -> None:
    encoder = small()
    state = {f"image_encoder.{k}": v for k, v in encoder.state_dict().items()}
    tensor = state.pop("image_encoder.neck.0.weight")
    if change == "renamed":
        state["image_encoder.neck.9.weight"] = tensor
    sam = sam_with(encoder, 64, out_chans=32)
    state |= {k: v for k, v in sam.state_dict().items() if not k.startswith("image_encoder.")}
    with pytest.raises(RuntimeError, match=r"neck\.0\.weight"):
        sam.load_state_dict(convert(state), strict=True)


def test_names_are_converted() -> None:
    names = {
        "image_encoder.patch_embed.seq.0.c.weight": "image_encoder.patch_embed.conv1.conv.weight",
        "image_encoder.patch_embed.seq.2.bn.bias": "image_encoder.patch_embed.conv2.bn.bias",
        "image_encoder.layers.1.blocks.0.local_conv.c.weight": (
            "image_encoder.layers.1.blocks.0.local_conv.conv.weight"
        ),
        "mask_decoder.iou_token.weight": "mask_decoder.iou_token.weight",
        "image_encoder.head.weight": None,
        "image_encoder.norm_head.bias": None,
    }
    one: dict[str, Any] = {name: torch.ones(1) for name in names}
    assert list(convert(one)) == [new for new in names.values() if new]
