"""EfficientSAM: the published variants, and its own conventions by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch.nn import functional as F
from zoo_goldens import Reference, check, embed, eps_of

import samcompress as sc
from samcompress.core.errors import ConfigError, ModelError
from samcompress.core.framing import Stretched
from samcompress.core.predict import decode
from samcompress.substitute._efficientsam import (
    CONFIGS,
    EfficientSamConfig,
    MaskDecoder,
    PromptEncoder,
    TwoWayBlock,
    build,
    convert,
    positions,
)

VARIANTS = {"efficientsam_vitt": "tiny", "efficientsam_vits": "small"}
SMALL = EfficientSamConfig(embed_dim=32, num_heads=2, depth=2)


def model(config: EfficientSamConfig, size: int = 1024) -> Sam:
    prompts = PromptEncoder(256, (size // 16,) * 2, (size,) * 2)
    sam = Sam(build(config, size), prompts, MaskDecoder()).eval()
    sam.framing = Stretched(size, size)
    return sam


def small(size: int = 64) -> Sam:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prompts = PromptEncoder(32, (size // 16,) * 2, (size,) * 2)
        decoder = MaskDecoder(32, mlp_dim=64, num_heads=4, iou_head_hidden_dim=32)
        sam = Sam(build(SMALL, size, 32), prompts, decoder).eval()
    sam.framing = Stretched(size, size)
    return sam


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- the published variants -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("efficientsam_vitt", True),
        pytest.param("efficientsam_vitt", False, marks=pytest.mark.slow),
        pytest.param("efficientsam_vits", True, marks=pytest.mark.slow),
    ],
)
def test_same_outputs_as_the_original(name: str, fused: bool, shared: Path) -> None:
    reference = Reference.of(name, shared)
    sam = model(CONFIGS[VARIANTS[name]])
    sam.load_state_dict(convert(reference.state()), strict=True)
    if fused:
        sam = sc.attention.Fused()(sam, progress=False, consume=True)
    embedding, errors = embed(reference, sam)
    for key, prompt in reference.prompts().items():
        if prompt.mask is not None:
            continue
        both = [decode(sam, embedding, [prompt], multimask=m, full_size=False) for m in (0, 1)]
        low = torch.cat([part.logits[0] for part in both])
        scores = np.concatenate([part.scores[0].numpy() for part in both])
        full = sam.framing.full_size(low[None], embedding.size)[0].numpy()
        errors.update(check(reference, key, low.numpy(), scores, full))
    assert len(errors) == 3 + 4 * 3
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_work_as_published(name: str, shared: Path) -> None:
    manifest = Reference.of(name, shared).manifest
    with torch.device("meta"):
        sam = model(CONFIGS[VARIANTS[name]])
    counts = {n: sum(p.numel() for p in part.parameters()) for n, part in sam.named_children()}
    assert {**counts, "total": sum(counts.values())} == manifest["parameters"]
    work = sc.evaluate.macs(sam)
    assert work.encoder / 1e9 == pytest.approx(manifest["macs"]["encoder_gmacs"], rel=0.005)
    one = manifest["macs"]["decode_one_point_gmacs"]
    assert work.decoder_per_prompt / 1e9 == pytest.approx(one, rel=0.005)


def test_eps_of_the_norms() -> None:
    sam = small()
    assert eps_of(sam.image_encoder, "LayerNorm") == {1e-6}
    assert eps_of(sam.image_encoder, "LayerNorm2d") == {1e-6}
    assert eps_of(sam.mask_decoder, "LayerNorm") == eps_of(sam.mask_decoder, "GroupNorm") == {1e-5}


# --- positions ------------------------------------------------------------------------------------


def test_positions_of_the_pretraining_grid_are_the_table() -> None:
    table = noise(1, 197, 4)
    assert torch.equal(positions(table, 14, 14).flatten(1, 2), table[:, 1:])


def test_positions_between_those_of_the_table() -> None:
    rows = noise(14)
    table = torch.cat([torch.tensor([99.0]), rows.repeat(14)]).view(1, 197, 1)
    wide = positions(table, 14, 28)[0, 7, :, 0]
    # Cell 12 of 28 lies a quarter before cell 6 of 14; cubic weights by hand, coefficient -0.75.
    weights = torch.tensor([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    torch.testing.assert_close(wide[12], weights @ rows[4:8])
    torch.testing.assert_close(wide[13], weights.flip(0) @ rows[5:9])


@pytest.mark.parametrize("size", [32, 64, 224])
def test_another_size(size: int) -> None:
    sam = small(size)
    encoder = sam.image_encoder
    assert encoder(noise(2, 3, size, size)).shape == (2, 32, size // 16, size // 16)
    twin = small().image_encoder
    twin.resize(size)
    assert twin.img_size == size
    assert torch.equal(twin(noise(1, 3, size, size)), encoder(noise(1, 3, size, size)))


def test_a_size_between_the_patches() -> None:
    with pytest.raises(ConfigError) as caught:
        build(SMALL, 60)
    assert str(caught.value) == (
        "the image size does not fit the patches of EfficientSAM.\n"
        "  got       60\n"
        "  expected  a multiple of 16"
    )


# --- prompts --------------------------------------------------------------------------------------


def fourier(prompts: PromptEncoder, x: float, y: float) -> torch.Tensor:
    place = torch.tensor([2 * (x + 0.5) / 64 - 1, 2 * (y + 0.5) / 64 - 1])
    angles = 2 * math.pi * place @ prompts.pe_layer.positional_encoding_gaussian_matrix
    return torch.cat([angles.sin(), angles.cos()])


def test_six_points_by_hand() -> None:
    prompts = small().prompt_encoder
    points = torch.tensor([[[20.0, 30.0], [5.0, 6.0]]]), torch.tensor([[1.0, 0.0]])
    sparse, dense = prompts(points=points, boxes=torch.tensor([[1.0, 2.0, 50.0, 60.0]]), masks=None)
    assert sparse.shape == (1, 6, 32)
    nothing = fourier(prompts, -1, -1) + prompts.invalid_points.weight[0]
    expected = [
        fourier(prompts, 1, 2) + prompts.bbox_top_left_embeddings.weight[0],
        fourier(prompts, 50, 60) + prompts.bbox_bottom_right_embeddings.weight[0],
        fourier(prompts, 20, 30) + prompts.point_embeddings.weight[0],
        fourier(prompts, 5, 6),  # a negative point is its position only
        nothing,
        nothing,
    ]
    torch.testing.assert_close(sparse[0], torch.stack(expected), rtol=0, atol=1e-5)
    assert dense.shape == (1, 32, 4, 4)
    assert not dense.any()
    alone, _ = prompts(points=None, boxes=None, masks=None)
    torch.testing.assert_close(alone[0], nothing.expand(6, 32), rtol=0, atol=1e-5)


def test_points_beyond_the_sixth_are_not_seen() -> None:
    prompts = small().prompt_encoder
    coords, labels = 64 * torch.rand(3, 9, 2), torch.ones(3, 9)
    many, _ = prompts(points=(coords, labels), boxes=None, masks=None)
    six, _ = prompts(points=(coords[:, :6], labels[:, :6]), boxes=None, masks=None)
    assert torch.equal(many, six)


def test_no_mask_as_a_prompt() -> None:
    with pytest.raises(ModelError) as caught:
        small().prompt_encoder(points=None, boxes=None, masks=torch.zeros(1, 1, 16, 16))
    assert str(caught.value) == (
        "EfficientSAM takes no mask as a prompt.\n"
        "  where     prompt_encoder\n"
        "  got       masks of shape (1, 1, 16, 16)\n"
        "  expected  points and boxes\n"
        "  try       leave out the mask"
    )


# --- decoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_two_way_block_against_its_sentence(first: bool) -> None:
    block = TwoWayBlock(16, 2, 32, torch.nn.GELU, skip_first_layer_pe=first).eval()
    tokens, image, place, grid = noise(1, 3, 16), noise(1, 9, 16), noise(1, 3, 16), noise(1, 9, 16)
    q = tokens if first else tokens + place
    q = block.norm1(q + block.self_attn(q, q, q))
    q = block.norm2(q + block.cross_attn_token_to_image(q + place, image + grid, image))
    q = block.norm3(q + block.mlp.lin2(F.gelu(block.mlp.lin1(q))))
    k = block.norm4(image + block.cross_attn_image_to_token(image + grid, q + place, q))
    found = block(queries=tokens, keys=image, query_pe=place, key_pe=grid)
    torch.testing.assert_close(found, (q, k))


def test_one_mask_is_token_0_and_three_are_the_others() -> None:
    decoder = small().mask_decoder
    given = {
        "image_embeddings": noise(1, 32, 4, 4),
        "image_pe": noise(1, 32, 4, 4),
        "sparse_prompt_embeddings": noise(2, 6, 32),
        "dense_prompt_embeddings": torch.zeros(2, 32, 4, 4),
    }
    every, scores = decoder.predict_masks(**given)
    for multimask, tokens in ((False, slice(0, 1)), (True, slice(1, 4))):
        low, iou = decoder(**given, multimask_output=multimask)
        assert torch.equal(low, every[:, tokens])
        assert torch.equal(iou, scores[:, tokens])
    assert every.shape == (2, 4, 16, 16)


# --- contract -------------------------------------------------------------------------------------


def test_a_sam_like_any_other() -> None:
    sam = small()
    sc.core.check_sam(sam)
    image = sc.shapes(1, size=(48, 64))[0].image
    prompts = [
        [
            sc.Prompt(points=[[20, 30]]),
            sc.Prompt(points=[[20, 30], [9, 9]], labels=[1, 0], box=[5, 8, 60, 39]),
        ]
    ]
    found = sc.predict(sam, [image], prompts)[0]
    assert found.masks.shape == (2, 1, 48, 64)
    again = sc.predict(copy.deepcopy(sam), [image], prompts)[0]
    assert torch.equal(found.logits, again.logits)
    exported = torch.export.export(sam.image_encoder, (noise(1, 3, 64, 64),)).module()
    inputs = noise(1, 3, 64, 64)
    torch.testing.assert_close(exported(inputs), sam.image_encoder(inputs))


def test_techniques_find_the_parts_they_know() -> None:
    sam = small()
    fused = sc.attention.Fused()(sam, progress=False)
    image = noise(1, 3, 64, 64)
    torch.testing.assert_close(fused.image_encoder(image), sam.image_encoder(image))
    for where in ("image_encoder.blocks.*.mlp", "mask_decoder.transformer.layers.*.mlp"):
        pruned = sc.prune.Mlp(ratio=0.5, where=where, criterion="magnitude")(sam, progress=False)
        assert sum(p.numel() for p in pruned.parameters()) < sum(
            p.numel() for p in sam.parameters()
        )
