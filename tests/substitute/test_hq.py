"""SAM-HQ: published variants' outputs, the appended features, the decoder's modes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam, randomise
from segment_anything.modeling import ImageEncoderViT
from torch.utils.flop_counter import FlopCounterMode
from zoo_goldens import Reference, answer, check, embed, eps_of, parameters, sam_with

import samcompress as sc
from samcompress.core.build import SamConfig, config_of
from samcompress.substitute._hq import CONFIGS, HqConfig, HqMaskDecoder, HqViT, build, convert
from samcompress.substitute._tiny_vit import UNUSED, TinyViT, TinyViTConfig

PUBLISHED = {"sam_hq_vit_tiny": "vit_tiny", "sam_hq_vit_b": "vit_b"}
TINY = HqConfig(TinyViTConfig((8, 16, 24, 32), (1, 1, 2, 1), (1, 2, 3, 4), (3, 3, 5, 3)))


def hq_sam(config: HqConfig, image_size: int = 1024) -> Any:
    sam = sam_with(build(config, image_size), image_size)
    sam.mask_decoder = HqMaskDecoder(sam.mask_decoder, config.features)
    return sam


def small() -> Any:
    """A SAM-HQ of 64 pixels and 32 channels, on ViT, with random weights in every table."""
    sam: Any = random_sam(depth=3)
    config = config_of(sam)
    encoder = HqViT(config, config.image_size, config.out_chans)
    encoder.load_state_dict(sam.image_encoder.state_dict(), strict=True)
    sam.image_encoder = encoder.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam.mask_decoder = HqMaskDecoder(sam.mask_decoder, config.embed_dim)
    return sam


def image(size: int = 64, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def asked(sam: Any, prompts: int = 3) -> dict[str, torch.Tensor]:
    boxes = 64 * torch.rand(prompts, 4, generator=torch.Generator().manual_seed(6))
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    return {
        "image_embeddings": sam.image_encoder(image()),
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }


# --- the published variants -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sam_hq_vit_tiny", pytest.param("sam_hq_vit_b", marks=pytest.mark.slow)]
)
def test_published_variant(shared: Path, name: str) -> None:
    reference = Reference.of(name, shared)
    if "tiny" in name:
        pytest.importorskip("timm")
    config = CONFIGS[PUBLISHED[name]]
    assert config.features == reference.manifest["config"]["vit_dim"]
    sam = hq_sam(config)
    sam.load_state_dict(convert(reference.state()), strict=True)
    embedding, found = embed(reference, sam)
    assert embedding.features.shape == (1, 256 + config.features, 64, 64)
    for key, prompt in reference.prompts().items():
        both = [answer(sam, embedding, [prompt], multimask=m) for m in (False, True)]
        sam.mask_decoder.hq_token_only = True
        only = answer(sam, embedding, [prompt], multimask=False)
        sam.mask_decoder.hq_token_only = False
        # Upstream keeps the best of the three.
        best = int(both[1][1][0].argmax())
        rows = [
            np.stack([single[0, 0], fine[0, 0], three[0, best]])
            for single, fine, three in zip(both[0], only, both[1], strict=True)
        ]
        found |= check(reference, key, *rows)
    assert found["input"] == 0
    assert max(found.values()) < 1e-5
    print(name, found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_manifest(shared: Path, name: str) -> None:
    manifest = Reference.of(name, shared).manifest
    if "tiny" in name:
        pytest.importorskip("timm")
    with torch.device("meta"):
        sam = hq_sam(CONFIGS[PUBLISHED[name]])
    rows = manifest["tensors"]
    unused = sum(int(np.prod(shape)) for key, shape, *_ in rows if UNUSED.fullmatch(key))
    assert unused == (321_640 if "tiny" in name else 0)
    assert parameters(sam.image_encoder) + unused == manifest["parameters"]["image_encoder"]
    assert parameters(sam.mask_decoder) == manifest["parameters"]["mask_decoder"]
    assert parameters(sam) + unused == manifest["parameters"]["total"]
    found = convert({key: torch.empty(shape, device="meta") for key, shape, *_ in rows})
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in sam.state_dict().items()
    }


@pytest.mark.parametrize(("name", "gmacs"), [("sam_hq_vit_tiny", 5.85), ("sam_hq_vit_b", 8.40)])
def test_macs_of_the_decoder_are_those_published(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        decoder = HqMaskDecoder(sam_with(None).mask_decoder, CONFIGS[PUBLISHED[name]].features)
        grid = (64, 64)
        with FlopCounterMode(display=False) as counter:
            decoder(
                image_embeddings=torch.empty(1, 256 + decoder.features, *grid),
                image_pe=torch.empty(1, 256, *grid),
                sparse_prompt_embeddings=torch.empty(1, 2, 256),
                dense_prompt_embeddings=torch.empty(1, 256, *grid),
                multimask_output=False,
            )
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(("name", "gmacs"), [("vit_tiny", 38.77), ("vit_b", 486.04)])
def test_macs_of_the_encoder_are_those_published(name: str, gmacs: float) -> None:
    if name == "vit_tiny":
        pytest.importorskip("timm")
    with torch.device("meta"):
        encoder = build(CONFIGS[name])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, 1024, 1024))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005)


def test_norms_have_the_published_eps() -> None:
    with torch.device("meta"):
        sam = hq_sam(CONFIGS["vit_b"])
    assert eps_of(sam.image_encoder, "LayerNorm") == {1e-6}
    assert eps_of(sam.mask_decoder, "LayerNorm") == {1e-5}
    assert eps_of(sam, "LayerNorm2d") == {1e-6}


@pytest.mark.parametrize(("name", "tap"), [("vit_b", 2), ("vit_l", 5), ("vit_h", 7)])
def test_tap_is_the_first_global_block(name: str, tap: int) -> None:
    with torch.device("meta"):
        assert build(CONFIGS[name]).tap == tap


# --- encoders -------------------------------------------------------------------------------------


@torch.no_grad()
def test_vit_appends_its_first_global_block() -> None:
    config = SamConfig(
        image_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, window_size=3,
        global_attn_indexes=(1, 3), out_chans=16,
    )  # fmt: skip
    encoder = randomise(build(HqConfig(config), 64, 16)).eval()
    plain = config.build().image_encoder
    assert isinstance(plain, ImageEncoderViT)
    plain.load_state_dict(encoder.state_dict(), strict=True)
    tokens: list[torch.Tensor] = []
    with plain.blocks[1].register_forward_hook(lambda *args: tokens.append(args[2])):
        expected = plain(image(count=2))
    found = encoder(image(count=2))
    assert torch.equal(found[:, :16], expected)
    assert torch.equal(found[:, 16:], tokens[0].permute(0, 3, 1, 2))


@torch.no_grad()
def test_tiny_vit_appends_its_second_stage() -> None:
    pytest.importorskip("timm")
    encoder = randomise(build(TINY, 64, 16)).eval()
    plain = TinyViT(TINY.encoder, 64, 16).eval()
    plain.load_state_dict(encoder.state_dict(), strict=True)
    stages: list[torch.Tensor] = []
    with plain.layers[1].register_forward_hook(lambda *args: stages.append(args[2])):
        expected = plain(image())
    found = encoder(image())
    assert found.shape == (1, 16 + 24, 4, 4)
    assert torch.equal(found[:, :16], expected)
    assert torch.equal(found[:, 16:], stages[0])
    encoder.resize(96)
    assert encoder(image(96)).shape == (1, 40, 6, 6)


@torch.no_grad()
def test_techniques_for_a_vit_work_on_it() -> None:
    sam = small()
    assert sc.attention.Fused().apply(sam, None) == {
        "blocks": [f"image_encoder.blocks.{i}" for i in range(3)],
        "decoder": False,
    }
    torch.testing.assert_close(
        sam.image_encoder(image()), small().image_encoder(image()), rtol=1e-4, atol=1e-5
    )
    sc.substitute.ImageSize().rebuild(sam, {"size": 96})
    assert sam.image_encoder(image(96)).shape == (1, 32 + 32, 12, 12)
    frame = sc.shapes(1)[0].image
    found = sc.predict(sam, [frame], [[sc.Prompt(points=[[9, 9]])]], multimask=True)
    assert found[0].logits.shape == (1, 3, 48, 48)


# --- the decoder ----------------------------------------------------------------------------------


@torch.no_grad()
def test_batch_of_prompts_is_each_prompt() -> None:
    sam = small()
    whole = asked(sam)
    masks, scores = sam.mask_decoder(**whole, multimask_output=True)
    assert masks.shape == (3, 3, 32, 32)
    assert scores.shape == (3, 3)
    for index in range(3):
        one = whole | {k: v[index : index + 1] for k, v in whole.items() if "prompt" in k}
        alone = sam.mask_decoder(**one, multimask_output=True)
        torch.testing.assert_close(alone[0][0], masks[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[1][0], scores[index], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fine_mask_is_added_to_each_or_stands_alone() -> None:
    sam = small()
    decoder, inputs = sam.mask_decoder, asked(sam)
    added, scores = decoder.predict_masks(**inputs)
    decoder.hq_token_only = True
    fine, same = decoder.predict_masks(**inputs)
    assert torch.equal(scores, same)
    assert torch.equal(fine, fine[:, :1].expand_as(fine))
    assert decoder(**inputs, multimask_output=False)[0].shape == (3, 1, 32, 32)
    # With a weightless fine mask the coarse ones are left: tokens times upscaled embedding.
    decoder.hq_token_only = False
    decoder.hf_mlp.layers[-1].weight.zero_()
    decoder.hf_mlp.layers[-1].bias.zero_()
    coarse, _ = decoder.predict_masks(**inputs)
    torch.testing.assert_close(coarse + fine, added, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_early_features_reach_the_fine_mask_only() -> None:
    sam = small()
    inputs = asked(sam)
    other = inputs["image_embeddings"].clone()
    other[:, 32:] += 1
    before, scores = sam.mask_decoder.predict_masks(**inputs)
    after, same = sam.mask_decoder.predict_masks(**inputs | {"image_embeddings": other})
    assert torch.equal(scores, same)
    change = after - before
    assert change.abs().amax() > 1e-4
    torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=1e-3, atol=1e-5)


def test_parts_move_over() -> None:
    sam: Any = random_sam()
    sam.mask_decoder.to(torch.float64).train()
    before = {k: v.clone() for k, v in sam.mask_decoder.state_dict().items()}
    decoder = HqMaskDecoder(sam.mask_decoder, 5)
    after = decoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {t.dtype for t in after.values()} == {torch.float64}
    assert all(module.training for module in decoder.modules())
    twin = copy.deepcopy(decoder)
    assert twin.hf_token.weight is not decoder.hf_token.weight
    assert twin.features == 5


@torch.no_grad()
def test_can_be_exported() -> None:
    sam = small()
    inputs = asked(sam) | {"multimask_output": True}
    program = torch.export.export(sam.mask_decoder, (), inputs).module()
    torch.testing.assert_close(program(**inputs)[0], sam.mask_decoder(**inputs)[0])
    encoder = torch.export.export(sam.image_encoder, (image(),)).module()
    torch.testing.assert_close(encoder(image()), sam.image_encoder(image()))
