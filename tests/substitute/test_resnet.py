"""NanoSAM's encoder and conventions against reference outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norms import alive
from torch import Tensor, nn
from zoo_goldens import Reference, check, eps_of, error

import samcompress as sc
from samcompress.core.framing import Truncated
from samcompress.evaluate.macs import macs
from samcompress.substitute._resnet import (
    CONFIGS,
    ResNetConfig,
    UnpaddedPrompts,
    build,
    convert,
)

FRAMING = Truncated(1024, 1024)
SMALL = ResNetConfig(blocks=(1, 1, 1, 1), width=24)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def random(size: int = 64, out_chans: int = 16, seed: int = 0) -> Any:
    """A small encoder none of whose parts does nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = alive(build(SMALL, size, out_chans), seed)
        encoder.pos_embedding.data.normal_()
    return encoder


def nano(encoder: nn.Module) -> Any:
    """A SAM with this encoder and prompts without padding; its own encoder is thrown away."""
    config = sc.SamConfig(depth=1, embed_dim=8, num_heads=1, global_attn_indexes=())
    sam = config.build(empty=True)
    sam.image_encoder = encoder
    sam.prompt_encoder = UnpaddedPrompts(256, (64, 64), (1024, 1024), 16)
    return sam.eval()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def masks(sam: Any, features: Tensor, prompt: sc.Prompt, scale: tuple[float, float]) -> Any:
    """All four masks and scores, in the order of the tokens."""

    def placed(points: np.ndarray) -> Tensor:
        return torch.as_tensor(points * np.array(scale), dtype=torch.float32)[None]

    points = boxes = mask = None
    if prompt.points is not None:
        points = (placed(prompt.points), torch.as_tensor(prompt.labels)[None])
    if prompt.box is not None:
        boxes = placed(prompt.box.reshape(2, 2)).flatten(1)
    if prompt.mask is not None:
        mask = torch.as_tensor(prompt.mask)[None]
    sparse, dense = sam.prompt_encoder(points, boxes, mask)
    asked = 0 if prompt.points is None else len(prompt.points)
    assert sparse.shape[1] == asked + 2 * (boxes is not None)
    return sam.mask_decoder.predict_masks(
        image_embeddings=features,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )


def encoded(shared: Path, *, fused: bool) -> tuple[Reference, Any, Tensor, dict[str, float]]:
    """The image through preprocessing and encoder, with its errors."""
    reference = Reference.of("nanosam_resnet18", shared)
    with torch.device("meta"):
        encoder = build(CONFIGS["18"])
    sam = nano(encoder)
    sam.load_state_dict(convert(reference.state()), strict=True, assign=True)
    if fused:
        sam.image_encoder.fuse()
    pixels = sam.preprocess(FRAMING.resized(reference.image()))
    features = sam.image_encoder(pixels[None])
    mean = features[0].mean((1, 2)).numpy()
    return (
        reference,
        sam,
        features,
        {
            "input": reference.compare("input", "input", pixels.numpy()),
            "embedding": reference.compare("embedding", "embedding", features[0].numpy()),
            "channel mean": error(mean, reference.arrays["embedding_channel_mean"]),
        },
    )


@torch.no_grad()
def test_reference(shared: Path) -> None:
    reference, sam, features, errors = encoded(shared, fused=False)
    assert errors["input"] == 0
    size = reference.image().shape[:2]
    for key, prompt in reference.prompts().items():
        low, scores = masks(sam, features, prompt, FRAMING.scale(size))
        full = FRAMING.full_size(low, size)
        errors |= check(reference, key, low[0].numpy(), scores[0].numpy(), full[0].numpy())
    assert max(errors.values()) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_reference_fused(shared: Path) -> None:
    errors = encoded(shared, fused=True)[-1]
    assert max(errors.values()) < 1e-5


def test_sizes(shared: Path) -> None:
    manifest = Reference.of("nanosam_resnet18", shared).manifest
    with torch.device("meta"):
        sam = nano(build(CONFIGS["18"]))
    assert count(sam.image_encoder) == manifest["parameters"]["image_encoder"]
    assert count(sam) == manifest["parameters"]["total"]
    assert macs(sam).encoder / 1e9 == pytest.approx(manifest["macs"]["encoder_gmacs"], rel=5e-3)
    assert eps_of(sam.image_encoder, "BatchNorm2d") == {1e-5}


def test_names_of_a_training_checkpoint() -> None:
    encoder = random()
    state = encoder.state_dict()
    decoder = {"mask_decoder.iou_token.weight": torch.zeros(1)}
    found = convert({**state, **decoder})
    assert list(found) == [f"image_encoder.{name}" for name in state] + list(decoder)
    assert convert(found) == found


@pytest.mark.parametrize("size", [32, 96, 128])
def test_another_size(size: int) -> None:
    encoder = random()
    table = encoder.pos_embedding.detach().clone()
    encoder.pos_embedding.requires_grad_(False)
    encoder.resize(size)
    assert encoder.img_size == size
    assert encoder.pos_embedding.shape == (1, 16, size // 16, size // 16)
    assert not encoder.pos_embedding.requires_grad
    native = build(SMALL, size, 16).eval()
    native.load_state_dict(encoder.state_dict(), strict=True)
    x = numbers(2, 3, size, size)
    with torch.no_grad():
        found = encoder(x)
        assert torch.equal(native(x), found)
        close(torch.cat([encoder(x[:1]), encoder(x[1:])]), found)
        assert torch.equal(copy.deepcopy(encoder)(x), found)
    encoder.resize(64)
    if size == 128:  # nothing was lost: twice as fine and back
        assert (encoder.pos_embedding - table).abs().mean() < 0.5 * table.abs().mean()


def test_fused_is_the_same_function() -> None:
    encoder = random()
    fused = copy.deepcopy(encoder)
    fused.fuse()
    x = numbers(2, 3, 64, 64)
    with torch.no_grad():
        close(fused(x), encoder(x))
    assert not any("Norm" in type(m).__name__ for m in fused.modules())
    assert "backbone.layer2.0.downsample.0.bias" in fused.state_dict()
    again = random(seed=3)
    again.fuse()
    again.load_state_dict(fused.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))


def test_every_parameter_learns_and_the_graph_is_traceable() -> None:
    encoder = random()
    x = numbers(1, 3, 64, 64)
    graph = torch.export.export(encoder, (x,)).module()
    with torch.no_grad():
        close(graph(x), encoder(x))
    encoder.train()(numbers(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_no_padding_point(tiny_sam: Any) -> None:
    padded = tiny_sam.prompt_encoder
    plain = UnpaddedPrompts(32, (8, 8), (64, 64), 8)
    plain.load_state_dict(padded.state_dict(), strict=True)
    points = (torch.tensor([[[3.0, 4.0], [9.0, 2.0]]]), torch.tensor([[1, 0]]))
    box = torch.tensor([[2.0, 3.0, 30.0, 40.0]])
    with torch.no_grad():
        (found, _), (with_padding, _) = plain(points, None, None), padded(points, None, None)
        assert torch.equal(found, with_padding[:, :2])
        assert with_padding.shape[1] == 3
        assert torch.equal(plain(points, box, None)[0], padded(points, box, None)[0])
