"""EfficientViT-SAM's encoder: the published variants, and the maths of its parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from zoo_goldens import Reference, check, embed, eps_of, error

import samcompress as sc
from samcompress.compile.backends import BACKENDS, Options
from samcompress.core.errors import ConfigError
from samcompress.core.framing import Framing
from samcompress.core.predict import Embedding, decode
from samcompress.substitute._efficientvit import (
    CONFIGS,
    EfficientViTConfig,
    build,
    convert,
    set_norm_eps,
)

pytest.importorskip("timm")

SMALL = EfficientViTConfig(
    widths=(8, 8, 16, 16, 32),
    depths=(1, 1, 1, 1, 1),
    neck_depth=1,
    neck_width=16,
    head_dim=8,
    image_size=64,
)
WIDE = EfficientViTConfig(
    widths=(8, 8, 8, 16, 16, 32),
    depths=(0, 1, 1, 1, 1, 1),
    kinds=("res", "fmb", "fmb", "fmb", "att@3", "att@3"),
    expands=(1, 4, 4, 4, 4, 6),
    fewer_norms=(False, False, False, False, True, True),
    neck_depth=1,
    neck_expand=4,
    neck_width=16,
    head_dim=8,
    image_size=64,
)
VARIANTS = {
    "efficientvit_sam_l0": "l0",
    "efficientvit_sam_l1": "l1",
    "efficientvit_sam_l2": "l2",
    "efficientvit_sam_xl0": "xl0",
    "efficientvit_sam_xl1": "xl1",
    "mobilesamv2_efficientvit_l2": "mobilesamv2_l2",
}


def some_fast(*names: str) -> list[Any]:
    """All variants, those not named marked slow."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]


def model(config: EfficientViTConfig, size: int | None = None, channels: int = 256) -> Sam:
    """The encoder with SAM's own prompt encoder and mask decoder."""
    encoder = build(config, size or config.image_size, channels)
    frame = encoder.prompt_size
    heads = 8 if channels == 256 else 4
    transformer = TwoWayTransformer(2, channels, heads, 2048 if channels == 256 else 64)
    prompts = PromptEncoder(channels, (frame // 16,) * 2, (frame,) * 2, 16)
    decoder = MaskDecoder(transformer_dim=channels, transformer=transformer)
    sam = Sam(encoder, prompts, decoder).eval()
    sam.framing = Framing(encoder.img_size, frame)
    return sam


def small(config: EfficientViTConfig = SMALL, size: int | None = None) -> Sam:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config, size, 32)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- the published variants -----------------------------------------------------------------------


@pytest.mark.parametrize("name", some_fast("efficientvit_sam_l0"))
def test_same_outputs_as_the_original(name: str, shared: Path) -> None:
    reference = Reference.of(name, shared)
    config = CONFIGS[VARIANTS[name]]
    sam = model(config)
    if not name.startswith("mobilesamv2"):
        set_norm_eps(sam.mask_decoder)
    sam.load_state_dict(convert(reference.state()), strict=True)
    sam.eval()
    # Prompts live in the frame of 1024 pixels, not in that of the image.
    assert sam.framing.frame == 1024
    embedding, errors = embed(reference, sam)
    for key, low, scores in masks(reference, sam, embedding):
        full = sam.framing.full_size(torch.from_numpy(low)[None], embedding.size)[0].numpy()
        errors.update(check(reference, key, low, scores, full))
    assert len(errors) == 3 + 3 * (1 if name.startswith("mobilesamv2") else 5)
    assert max(errors.values()) < 1e-5, errors


def masks(
    reference: Reference, sam: Sam, embedding: Embedding
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Logits and scores of every key: token 0 and tokens 1 to 3 of a prompt, or one of each box."""
    if reference.name.startswith("mobilesamv2"):
        boxes = [[120, 80, 470, 390], [200, 100, 600, 460]]
        one = decode(sam, embedding, [sc.Prompt(box=box) for box in boxes], full_size=False)
        return [("boxes", one.logits[:, 0].numpy(), one.scores[:, 0].numpy())]
    found = []
    for key, prompt in reference.prompts().items():
        both = [decode(sam, embedding, [prompt], multimask=m, full_size=False) for m in (0, 1)]
        logits = np.concatenate([part.logits[0].numpy() for part in both])
        found.append((key, logits, np.concatenate([part.scores[0].numpy() for part in both])))
    return found


@pytest.mark.parametrize("name", some_fast("efficientvit_sam_l0", "efficientvit_sam_xl0"))
def test_parameters_and_work_as_published(name: str, shared: Path) -> None:
    manifest = Reference.of(name, shared).manifest
    with torch.device("meta"):
        sam = model(CONFIGS[VARIANTS[name]])
    counts = {n: sum(p.numel() for p in part.parameters()) for n, part in sam.named_children()}
    assert {**counts, "total": sum(counts.values())} == manifest["parameters"]
    encoder = sc.evaluate.macs(sam).encoder / 1e9
    assert encoder == pytest.approx(manifest["macs"]["encoder_gmacs"], rel=0.005)


@pytest.mark.parametrize("config", [SMALL, WIDE])
def test_every_norm_has_the_small_eps(config: EfficientViTConfig) -> None:
    sam = small(config)
    assert eps_of(sam.image_encoder, "BatchNorm2d") == {1e-6}
    assert eps_of(sam.image_encoder, "LayerNorm2d") == {1e-6}
    assert eps_of(sam.image_encoder, "LiteMLA") == {1e-15}
    assert eps_of(sam.mask_decoder, "LayerNorm") == {1e-5}
    set_norm_eps(sam.mask_decoder)
    assert (
        eps_of(sam.mask_decoder, "LayerNorm") == eps_of(sam.mask_decoder, "LayerNorm2d") == {1e-6}
    )


# --- parts ----------------------------------------------------------------------------------------


def attention(config: EfficientViTConfig = SMALL) -> Any:
    return small(config).image_encoder.backbone.stages[-1].op_list[1].context_module.main


@pytest.mark.parametrize(("config", "side"), [(SMALL, 5), (WIDE, 3)])
def test_linear_attention_is_attention_with_another_kernel(
    config: EfficientViTConfig, side: int
) -> None:
    layer, x = attention(config), noise(2, 32, 5, 6)
    qkv = layer.qkv(x)
    depthwise, grouped = layer.aggreg[0]
    assert depthwise.kernel_size == (side, side)
    heads = []
    for scale in (qkv, grouped(depthwise(qkv))):
        for q, k, v in (head.split(8, 1) for head in scale.split(24, 1)):
            # The matrix of all pairs, which the layer never makes.
            pairs = q.relu().flatten(2).transpose(1, 2) @ k.relu().flatten(2)
            shares = pairs / pairs.sum(-1, keepdim=True).clamp_min(1e-15)
            heads.append((shares @ v.flatten(2).transpose(1, 2)).transpose(1, 2))
    expected = layer.proj(torch.cat(heads, 1).unflatten(2, (5, 6)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_linear_attention_sums_in_float32_under_autocast(kind: torch.dtype) -> None:
    layer = attention()
    seen = []
    original = layer._attn

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return original(q, k, v)

    layer._attn = watched
    # Sums over so many large keys do not fit float16.
    x = 2000 * noise(1, 32, 32, 32)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", kind):
            found = layer(x)
    assert seen == [(torch.float32, False), (kind, False)]
    assert found.isfinite().all()
    assert error(found.float().numpy(), exact.numpy()) < 0.05


def test_queries_that_ask_for_nothing_give_nothing_in_a_graph_too(tmp_path: Path) -> None:
    """Optimisers of graphs drop a sum with so small an eps, and 0 / 0 is left."""
    onnx = BACKENDS["onnxruntime"]
    if onnx.unavailable() is not None:
        pytest.skip("onnx extra is not installed")
    layer, x = attention(), noise(1, 32, 4, 4)
    x[:, :, 1] = 0
    with torch.no_grad():
        expected = layer(x)
        options = Options(inputs=("x",), outputs=("found",))
        onnx.export(layer, (x,), tmp_path / "layer.onnx", dtype="float32", options=options)
        (found,) = onnx.load(tmp_path / "layer.onnx", device="cpu", threads=1)(x)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_activations_are_the_tanh_approximation() -> None:
    kinds = {
        type(m).__name__ for m in small().image_encoder.modules() if "GELU" in type(m).__name__
    }
    assert kinds == {"GELUTanh"}


def test_the_neck_brings_all_scales_to_the_finest() -> None:
    encoder = small().image_encoder
    features = encoder.backbone(noise(1, 3, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [(32, 2, 2), (16, 4, 4), (16, 8, 8)]
    assert encoder.neck(features).shape == (1, 32, 8, 8)


def test_an_encoder_that_shrinks_its_image_itself() -> None:
    plain = small().image_encoder
    shrinking = build(EfficientViTConfig(**{**vars(SMALL), "shrink": 2}), 128, 32)
    shrinking.load_state_dict(plain.state_dict(), strict=True)
    image = noise(1, 3, 128, 128)
    half = image.unflatten(2, (64, 2)).unflatten(4, (64, 2)).mean((3, 5))
    torch.testing.assert_close(shrinking(image), plain(half), rtol=0, atol=1e-5)
    assert (shrinking.prompt_size, plain.prompt_size) == (128, 128)


# --- contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "size", "grid"), [(SMALL, 64, 8), (SMALL, 104, 13), (WIDE, 64, 4), (WIDE, 176, 11)]
)
def test_any_multiple_of_the_stride(config: EfficientViTConfig, size: int, grid: int) -> None:
    sam = small(config, size)
    encoder = sam.image_encoder
    assert encoder(noise(2, 3, size, size)).shape == (2, 32, grid, grid)
    assert (encoder.img_size, encoder.prompt_size) == (size, 16 * grid)
    twin = small(config).image_encoder
    twin.resize(size)
    assert torch.equal(twin(noise(1, 3, size, size)), encoder(noise(1, 3, size, size)))


def test_a_size_between_the_strides() -> None:
    with pytest.raises(ConfigError) as caught:
        build(SMALL, 60)
    assert str(caught.value) == (
        "the image size does not fit EfficientViT.\n  got       60\n  expected  a multiple of 8"
    )


def test_a_sam_like_any_other() -> None:
    sam = small(WIDE)
    sc.core.check_sam(sam)
    image = sc.shapes(1, size=(40, 64))[0].image
    prompts = [[sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 39])]]
    found = sc.predict(sam, [image], prompts)[0]
    assert found.masks.shape == (2, 1, 40, 64)
    again = sc.predict(copy.deepcopy(sam), [image], prompts)[0]
    assert torch.equal(found.logits, again.logits)
    assert sc.evaluate.macs(sam).encoder > sc.evaluate.macs(sam).encoder_no_attention
    exported = torch.export.export(sam.image_encoder, (noise(1, 3, 64, 64),)).module()
    image = noise(1, 3, 64, 64)
    torch.testing.assert_close(exported(image), sam.image_encoder(image))
