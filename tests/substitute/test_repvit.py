"""RepViT encoders: reference outputs, equality with timm's network, re-parameterisation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norms import alive
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_goldens import Reference, answer, check, embed, eps_of

import samcompress as sc
from samcompress.evaluate.macs import macs
from samcompress.substitute._repvit import CONFIGS, RepViTConfig, build, convert, merged
from samcompress.substitute._stability import StabilityDecoder, choose, stability_score

timm = pytest.importorskip("timm.models.repvit")

SMALL = {
    "first": RepViTConfig((8, 16, 24, 32), ("10", "010", "0100", "01"), True, 2, True),
    "second": RepViTConfig((8, 16, 24, 32), ("10", "010", "0100", "01"), False, 1, False),
}
PLAIN = {"first": replace(SMALL["first"], fused=False), "second": SMALL["second"]}
VARIANTS = {"edgesam": "m1", "repvit_sam": "m2.3"}


def sam_with(encoder: nn.Module, **sizes: Any) -> Any:
    """A SAM with another image encoder; its own is kept small, it is thrown away."""
    config = sc.SamConfig(depth=1, embed_dim=8, num_heads=1, global_attn_indexes=(), **sizes)
    sam = config.build(empty=True)
    sam.image_encoder = encoder
    return sam.eval()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random(config: RepViTConfig, size: int = 64, out_chans: int = 16, seed: int = 0) -> Any:
    """An encoder none of whose parts does nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return alive(build(config, size, out_chans), seed)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- reference outputs ----------------------------------------------------------------------------


def loaded(name: str, shared: Path) -> tuple[Reference, Any]:
    reference = Reference.of(name, shared)
    with torch.device("meta"):
        encoder = build(CONFIGS[VARIANTS[name]])
    sam = sam_with(encoder)
    sam.load_state_dict(convert(reference.state()), strict=True, assign=True)
    return reference, sam


@pytest.mark.parametrize("name", ["edgesam", pytest.param("repvit_sam", marks=pytest.mark.slow)])
def test_reference(name: str, shared: Path) -> None:
    reference, sam = loaded(name, shared)
    embedding, errors = embed(reference, sam)
    for key, prompt in reference.prompts().items():
        one, three = (answer(sam, embedding, [prompt], multimask=m) for m in (False, True))
        low, scores, full = (np.concatenate([one[i][0], three[i][0]]) for i in range(3))
        errors |= check(reference, key, low, scores, full)
        if name == "edgesam":
            stability = reference.arrays[f"{key}__stability"]  # counts pixels, hence 1e-3
            assert np.abs(stability_score(torch.from_numpy(low)).numpy() - stability).max() < 1e-3
    assert errors.pop("input") == 0
    assert max(errors.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_reference_fused(name: str, shared: Path) -> None:
    reference, sam = loaded(name, shared)
    sam.image_encoder.fuse()
    _, errors = embed(reference, sam)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes(name: str, shared: Path) -> None:
    manifest = Reference.of(name, shared).manifest
    with torch.device("meta"):
        sam = sam_with(build(CONFIGS[VARIANTS[name]]))
    assert count(sam.image_encoder) == manifest["parameters"]["image_encoder"]
    assert count(sam) == manifest["parameters"]["total"]
    assert macs(sam).encoder / 1e9 == pytest.approx(manifest["macs"]["encoder_gmacs"], rel=5e-3)
    assert eps_of(sam.image_encoder, "BatchNorm2d") == {manifest["config"]["bn_eps"]} == {1e-5}
    assert eps_of(sam.image_encoder, "LayerNorm2d") == {1e-6}
    stages = manifest["config"]["stages"]
    config = CONFIGS[VARIANTS[name]]
    assert [list(config.channels), list(config.blocks)] == [stages["channels"], stages["se"]]


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", PLAIN)
def test_same_as_the_whole_network_of_timm(revision: str) -> None:
    # timm groups the same layers otherwise, in the same order; it has no stride for the last stage.
    config = replace(PLAIN[revision], blocks=("100", "0100", "010100", "010"), last_stride=2)
    ours = random(config)
    ours.neck = nn.Identity()
    theirs = timm.RepVit(
        embed_dim=config.channels, depth=(2, 2, 4, 2), legacy=config.legacy, num_classes=0
    )
    state = ours.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    x = numbers(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.eval().forward_features(x))


@pytest.mark.parametrize("revision", SMALL)
@pytest.mark.parametrize("size", [32, 64, 96])
def test_another_size(revision: str, size: int) -> None:
    encoder = random(SMALL[revision])
    encoder.resize(size)
    assert encoder.img_size == size
    assert size % encoder.multiple == 0
    x = numbers(2, 3, size, size)
    with torch.no_grad():
        found = encoder(x)
        assert found.shape == (2, 16, size // 16, size // 16)
        close(torch.cat([encoder(x[:1]), encoder(x[1:])]), found)
        assert torch.equal(copy.deepcopy(encoder)(x), found)


def test_the_last_two_stages_are_added() -> None:
    encoder = random(SMALL["first"])
    seen = {}
    for name in ("features.9", "features.11"):
        encoder.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        found = encoder(numbers(1, 3, 64, 64))
        finer, last = seen.values()
        assert (finer.shape[1:], last.shape[1:]) == ((24, 4, 4), (32, 2, 2))
        last = F.conv2d(last, encoder.fuse_stage3.op_list[0].weight)
        large = F.interpolate(last, (4, 4), mode="bicubic")
        close(found, encoder.neck(encoder.fuse_stage2(finer) + large))


def test_predicts_and_counts_as_part_of_a_sam() -> None:
    encoder = random(SMALL["second"], out_chans=32)
    sam = sc.build("tiny", image_size=64, patch_size=16, out_chans=32)
    sam.image_encoder = encoder
    scene = sc.shapes(1, size=(40, 64))[0]
    found = sc.predict(sam.eval(), [scene.image], [[sc.Prompt(points=[[20, 30]])]], multimask=True)
    assert found[0].masks.shape == (1, 3, 40, 64)
    assert macs(sam).encoder > 0


@pytest.mark.parametrize("revision", SMALL)
def test_every_parameter_learns_and_the_graph_is_traceable(revision: str) -> None:
    encoder = random(SMALL[revision])
    x = numbers(1, 3, 64, 64)
    graph = torch.export.export(encoder, (x,)).module()
    with torch.no_grad():
        close(graph(x), encoder(x))
    encoder.train()(numbers(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


# --- re-parameterisation --------------------------------------------------------------------------


def test_one_convolution_for_three_branches() -> None:
    x = numbers(2, 6, 5, 7)
    for legacy in (True, False):
        block = alive(timm.RepVggDw(6, 3, legacy))

        def norm(y: Tensor, of: Any) -> Tensor:
            return F.batch_norm(y, of.running_mean, of.running_var, of.weight, of.bias, eps=1e-5)

        with torch.no_grad():
            large = norm(F.conv2d(x, block.conv.c.weight, padding=1, groups=6), block.conv.bn)
            if legacy:
                small = norm(F.conv2d(x, block.conv1.c.weight, groups=6), block.conv1.bn)
                expected = large + small + x
            else:
                small = F.conv2d(x, block.conv1.weight, block.conv1.bias, groups=6)
                expected = norm(large + small + x, block.bn)
            close(merged(block)(x), expected)


@pytest.mark.parametrize("revision", SMALL)
def test_fused_is_the_same_function(revision: str) -> None:
    encoder = random(SMALL[revision])
    fused = copy.deepcopy(encoder)
    fused.fuse()
    x = numbers(2, 3, 64, 64)
    with torch.no_grad():
        close(fused(x), encoder(x))
    kinds = {type(m).__name__ for m in fused.modules()}
    assert not kinds & {"BatchNorm2d", "RepVggDw"}
    assert count(fused) < count(encoder)
    assert not any("running" in name for name in fused.state_dict())
    assert [n for n in fused.state_dict() if ".1.token_mixer.0" in n] == [
        "features.1.token_mixer.0.weight",
        "features.1.token_mixer.0.bias",
    ]

    # Saved tensors of a fused model go into another that was fused with other weights.
    again = random(SMALL[revision], seed=3)
    again.fuse()
    again.load_state_dict(fused.state_dict(), strict=True)
    again.fuse()  # nothing left to do
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))


def test_fusing_keeps_mode_type_and_flags() -> None:
    encoder = random(SMALL["second"]).to(torch.bfloat16).train().requires_grad_(False)
    encoder.fuse()
    assert all(m.training for m in encoder.modules())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in encoder.parameters())


# --- EdgeSAM's decoder ----------------------------------------------------------------------------


def test_one_three_or_four_masks() -> None:
    masks, scores = numbers(2, 4, 8, 8), numbers(2, 4)
    for count, tokens in ((1, [0]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        found, best = choose(masks, scores, count)
        assert torch.equal(found, masks[:, tokens])
        assert torch.equal(best, scores[:, tokens])


def test_stability_by_hand() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.5, -0.5]], [[-3.0, -1.0], [-2.0, -9.0]]])
    assert stability_score(logits).tolist() == [0.25, 0.0]  # above 1: one; above -1: four, none
    assert stability_score(logits, offset=0.4, threshold=0.5).tolist() == [pytest.approx(2 / 3), 0]


def test_a_decoder_that_scores_by_stability(tiny_sam: Any) -> None:
    embedding = numbers(1, 32, 8, 8)
    sparse, dense = tiny_sam.prompt_encoder(None, torch.tensor([[8.0, 8, 40, 50]]), None)
    asked = {
        "image_embeddings": embedding,
        "image_pe": tiny_sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }
    names = list(tiny_sam.mask_decoder.state_dict())
    with torch.no_grad():
        masks, scores = tiny_sam.mask_decoder(**asked, multimask_output=True)
        decoder = StabilityDecoder(tiny_sam.mask_decoder)
        found, stability = decoder(**asked, multimask_output=True)
    assert list(decoder.state_dict()) == names
    assert torch.equal(found, masks)
    assert torch.equal(stability, stability_score(masks))
    assert not torch.equal(stability, scores)
