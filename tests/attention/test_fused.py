"""Fused attention against segment_anything's own blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import random_sam, randomise
from segment_anything.modeling.image_encoder import Block
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import samcompress as sc
from samcompress.attention import _rel_pos, fused
from samcompress.attention.fused import FusedBlock, FusedDecoder

WINDOWS = [(0, (12, 12)), (0, (9, 13)), (5, (9, 13)), (7, (14, 14)), (7, (10, 10))]
ANY_WINDOW = pytest.mark.parametrize(("window", "grid"), WINDOWS)


def block(dim: int = 128, window: int = 0, *, bias: bool = True, rel_pos: bool = True) -> Block:
    """Two heads; tables for a grid of 12 or the window, so that 9 x 13 resizes them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Block(
            dim,
            2,
            qkv_bias=bias,
            use_rel_pos=rel_pos,
            window_size=window,
            input_size=(12, 12),
        )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "rel_pos" in name or "bias" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


@ANY_WINDOW
@pytest.mark.parametrize("dim", [128, 160])  # heads of 64 and 80
@pytest.mark.parametrize("images", [1, 2])
def test_equals_segment_anything(
    dim: int,
    window: int,
    grid: tuple[int, int],
    images: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = block(dim, window)
    ours = FusedBlock(copy.deepcopy(eager))
    x = tokens(images, *grid, dim)
    with torch.no_grad():
        expected = eager(x)
        # Small limits cut along images, heads and rows; the last one does not cut at all.
        for limit in (1, 4096, 1 << 16, 1 << 30):
            monkeypatch.setattr(fused, "CACHED", limit)
            found = ours(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert relative(found, expected) < 2e-6


@ANY_WINDOW
@pytest.mark.parametrize(("bias", "rel_pos"), [(False, True), (True, False)])
def test_without_bias_or_tables(
    window: int, grid: tuple[int, int], bias: bool, rel_pos: bool
) -> None:
    eager = block(window=window, bias=bias, rel_pos=rel_pos)
    x = tokens(2, *grid, 128)
    with torch.no_grad():
        torch.testing.assert_close(FusedBlock(eager)(x), eager(x), rtol=0, atol=1e-5)


@ANY_WINDOW
def test_bfloat16_errs_no_more_than_eager(window: int, grid: tuple[int, int]) -> None:
    exact = block(window=window)
    eager = copy.deepcopy(exact).bfloat16()
    x = tokens(1, *grid, 128)
    with torch.no_grad():
        expected = exact(x)
        error = relative(FusedBlock(eager)(x.bfloat16()).float(), expected)
        assert error < 2e-2
        assert error < 1.5 * relative(eager(x.bfloat16()).float(), expected)


@ANY_WINDOW
def test_gradients(window: int, grid: tuple[int, int]) -> None:
    eager = block(window=window)
    ours = FusedBlock(copy.deepcopy(eager))
    inputs = [tokens(1, *grid, 128).requires_grad_() for _ in range(2)]
    for module, x in zip((eager, ours), inputs, strict=True):
        module(x).square().sum().backward()
    assert relative(inputs[1].grad, inputs[0].grad) < 1e-5
    for (name, p), (other, q) in zip(
        eager.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert name == other
        assert relative(q.grad, p.grad) < 1e-4, name


def test_padding_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = block(window=5)
    x = tokens(1, 9, 13, 128)
    ours = FusedBlock(eager)
    monkeypatch.setattr(
        fused, "pad", lambda x, size, bias: nn.functional.pad(x, (0, 0, 0, 2, 0, -x.shape[1] % 5))
    )
    with torch.no_grad():
        assert (ours(x) - eager(x)).abs().max() > 1e-3


def test_offsets_by_hand() -> None:
    table = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    assert _rel_pos.offsets(table, 3)[..., 0].tolist() == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]


def test_scores_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = block()
    ours = FusedBlock(eager)
    x = tokens(1, 24, 24, 128)
    monkeypatch.setattr(fused, "CACHED", 24 * 24 * 24 * 4)
    largest = {}
    for module in (eager, ours):
        with torch.no_grad(), Largest() as watch:
            module(x)
        largest[module] = watch.elements
    assert largest[eager] == 2 * 24**4
    assert largest[ours] <= 24 * 24 * 128 * 4  # the hidden layer of the MLP


def test_exports_without_a_loop_of_pieces() -> None:
    ours = FusedBlock(block(window=5)).eval()
    x = tokens(1, 9, 13, 128)
    with torch.no_grad():
        program = torch.export.export(ours, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), ours(x), rtol=0, atol=1e-5)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("scaled_dot_product" in name for name in names) == 1


def test_whole_encoder_keeps_names_and_function() -> None:
    sam = random_sam()
    small = sc.attention.Fused()(sam, progress=False)
    assert small.state_dict().keys() == sam.state_dict().keys()
    assert all(torch.equal(v, sam.state_dict()[k]) for k, v in small.state_dict().items())
    assert {type(b) for b in small.image_encoder.blocks} == {FusedBlock}
    assert {type(b) for b in sam.image_encoder.blocks} == {Block}
    assert sc.lineage(small)[-1].state == {
        "blocks": ["image_encoder.blocks.0", "image_encoder.blocks.1"],
        "decoder": True,
    }
    image = tokens(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = small.image_encoder(image), sam.image_encoder(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_counts_the_same_work_less_the_padding() -> None:
    sam = sc.build("tiny", image_size=112, depth=2, global_attn_indexes=(1,))  # windows fit
    assert sc.evaluate.macs(sc.attention.Fused()(sam)) == sc.evaluate.macs(sam)
    sam = sc.build("tiny")
    fewer = sc.evaluate.macs(sam).encoder - sc.evaluate.macs(sc.attention.Fused()(sam)).encoder
    padding = 21 * 21 - 16 * 16
    assert fewer == 2 * 4 * 64 * 64 * padding  # two window blocks, qkv and proj


def test_projections_may_be_replaced() -> None:
    sam = random_sam()
    int8 = sc.quantize.Int8Weights(min_size=0)
    plain, small = int8(sam), (sc.attention.Fused() | int8)(sam)
    image = tokens(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = small.image_encoder(image), plain.image_encoder(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_rest_of_a_partly_fused_model() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[0] = FusedBlock(sam.image_encoder.blocks[0])
    small = sc.attention.Fused()(sam, progress=False)
    assert {type(b) for b in small.image_encoder.blocks} == {FusedBlock}
    assert sc.lineage(small)[-1].state == {
        "blocks": ["image_encoder.blocks.1"],
        "decoder": True,
    }


def test_twice_is_an_error() -> None:
    small = sc.attention.Fused()(random_sam(), progress=False)
    with pytest.raises(sc.errors.NoEffectError) as caught:
        sc.attention.Fused()(small)
    assert str(caught.value) == (
        "attention.fused finds all that it knows fused already.\n"
        "  where     image_encoder, mask_decoder\n"
        "  try       leave out the second sc.attention.Fused()"
    )


class Convolutions(nn.Sequential):
    """An encoder without a ViT block."""

    img_size = 64


def test_other_models_are_an_error() -> None:
    sam = random_sam()
    sam.image_encoder = Convolutions(nn.Conv2d(3, 32, 8, stride=8))
    sam = sc.quantize.Int8Weights(min_size=0)(sam, progress=False)
    with pytest.raises(sc.errors.ModelError) as caught:
        sc.Pipeline([sc.attention.Fused()], any_order=True)(sam)
    assert str(caught.value) == (
        "attention.fused finds neither ViT blocks nor the mask decoder of segment_anything.\n"
        "  where     image_encoder, mask_decoder\n"
        "  got       Convolutions, MaskDecoder\n"
        "  expected  segment_anything's Block, or its MaskDecoder with plain linear layers\n"
        "  try       leave out sc.attention.Fused() for this model"
    )


def test_the_decoder_behind_another_encoder() -> None:
    sam = random_sam()
    sam.image_encoder = Convolutions(nn.Conv2d(3, 32, 8, stride=8))
    small = sc.attention.Fused()(sam, progress=False)
    assert type(small.mask_decoder) is FusedDecoder
    assert sc.lineage(small)[-1].state == {"blocks": [], "decoder": True}


@pytest.mark.slow
def test_vit_b() -> None:
    sam = randomise(sc.build("vit_b", image_size=512))
    small = sc.attention.Fused()(sam, progress=False)
    image = tokens(1, 3, 512, 512)
    with torch.inference_mode():
        found, expected = small.image_encoder(image), sam.image_encoder(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
