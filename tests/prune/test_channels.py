"""prune.channels: what is left computes as if the norms had never seen the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pruning import encode, gone, kept_of, off, prune, toy
from torch import Tensor, nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.prune._groups import KINDS
from samcompress.substitute.hq import HQ

HALF = sc.prune.Channels(ratio=0.5, criterion="magnitude", round_to=8)


class PartialNorm(nn.Module):
    """A layer norm over some channels; the others come out as zero."""

    def __init__(self, norm: nn.LayerNorm, kept: list[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        n, kept = self.norm, self.kept
        out = torch.zeros_like(x)
        out[..., kept] = F.layer_norm(
            x[..., kept], (len(kept),), n.weight[kept], n.bias[kept], n.eps
        )
        return out


def test_check4_removing_channels_is_masking_them_with_norms_over_the_kept() -> None:
    sam = toy()
    small = prune(HALF, sam)
    kept = kept_of(small)["image_encoder"]
    assert len(kept) == 16
    masked = copy.deepcopy(sam)
    for block in masked.image_encoder.blocks:
        block.norm1, block.norm2 = (PartialNorm(n, kept) for n in (block.norm1, block.norm2))
    masked.image_encoder.neck[0].weight.data[:, gone(kept, 32)] = 0
    assert off(encode(small), encode(masked)) < 1e-5


def test_check4_plain_masking_is_not_the_same() -> None:
    sam = toy()
    small = prune(HALF, sam)
    away = gone(kept_of(small)["image_encoder"], 32)
    zeroed = copy.deepcopy(sam)
    encoder = zeroed.image_encoder
    encoder.pos_embed.data[..., away] = 0
    for layer in (encoder.patch_embed.proj, *(m for b in encoder.blocks for m in written(b))):
        layer.weight.data[away] = 0
        layer.bias.data[away] = 0
    assert off(encode(zeroed), encode(small)) > 0.1


def written(block: Any) -> tuple[nn.Module, ...]:
    return block.norm1, block.attn.proj, block.norm2, block.mlp.lin2


def test_shapes() -> None:
    small = prune(HALF)
    encoder = small.image_encoder
    assert encoder.patch_embed.proj.weight.shape == (16, 3, 8, 8)
    assert encoder.patch_embed.proj.out_channels == encoder.neck[0].in_channels == 16
    assert encoder.pos_embed.shape == (1, 8, 8, 16)
    assert encoder.neck[0].weight.shape == (32, 16, 1, 1)
    for block in encoder.blocks:
        assert block.norm1.normalized_shape == block.norm2.normalized_shape == (16,)
        assert block.attn.qkv.weight.shape == (96, 16)
        assert block.attn.proj.weight.shape == (16, 32)
        assert block.mlp.lin1.weight.shape == (96, 16)
        assert block.mlp.lin2.weight.shape == (16, 96)
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.lin1, block.mlp.lin2):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
            assert layer.bias.shape == (layer.out_features,)


def test_score_of_a_channel_by_hand() -> None:
    sam = toy(depth=1, global_attn_indexes=(0,))
    encoder, block = sam.image_encoder, sam.image_encoder.blocks[0]
    group = KINDS["channels"].groups(sam, "image_encoder")[0]
    elements = {name: p.detach().abs() for name, p in sam.named_parameters()}
    writers = [encoder.patch_embed.proj.weight, block.attn.proj.weight, block.mlp.lin2.weight]
    readers = [block.attn.qkv.weight, block.mlp.lin1.weight, encoder.neck[0].weight]
    by_hand = sum(w.abs().flatten(1).sum(1) for w in writers)
    by_hand = by_hand + sum(
        w.abs().flatten(2).sum((0, 2)) if w.ndim > 2 else w.abs().sum(0) for w in readers
    )
    torch.testing.assert_close(group.reduce(elements), by_hand.detach() / 6)


def test_channels_are_free_not_tied_to_heads() -> None:
    kept = kept_of(prune(HALF))["image_encoder"]
    assert {k % 8 for k in kept} != {k % 8 for k in kept if k < 8}


def test_encoder_with_another_table_of_positions() -> None:
    sam = sc.substitute.ViT(variant="tiny")(toy(patch_size=16), progress=False)
    assert sam.image_encoder.pos_embed.ndim == 3
    small = prune(sc.prune.Channels(ratio=0.5, criterion="magnitude"), sam)
    assert small.image_encoder.pos_embed.shape == (1, 197, 96)
    assert encode(small).shape == encode(sam).shape


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], sam: Any, technique: Any = HALF) -> list[str]:
    with pytest.raises(error) as caught:
        prune(sc.Pipeline([technique], any_order=True), sam)
    return str(caught.value).splitlines()


def test_default_step_is_too_coarse_for_a_narrow_model() -> None:
    assert message(errors.ConfigError, toy(), sc.prune.Channels(criterion="magnitude")) == [
        "prune.channels: nothing of a module would be left.",
        "  where     image_encoder with 32 units",
        "  got       ratio=0.25, round_to=32",
        "  expected  at least 32 units left",
        "  try       a smaller ratio=, or round_to=1",
    ]


def test_sam_hq_reads_the_tokens() -> None:
    assert message(errors.ModelError, HQ()(toy(), progress=False)) == [
        "prune.channels cannot change tokens that the mask decoder reads too.",
        "  where     mask_decoder",
        "  got       HqMaskDecoder",
        "  expected  a decoder that reads the embedding alone",
        "  try       sc.prune.Mlp, sc.prune.Heads or sc.prune.HeadDims",
    ]


def test_after_fused_attention() -> None:
    assert message(errors.ModelError, sc.attention.Fused()(toy(), progress=False)) == [
        "prune.channels finds no ViT blocks of segment_anything.",
        "  where     image_encoder",
        "  got       ImageEncoderViT, FusedBlock",
        "  expected  an encoder made of segment_anything.modeling.image_encoder.Block",
        "  try       prune before modules are replaced; other encoders with sc.prune.Filters",
    ]


def test_convolutional_encoder() -> None:
    sam = sc.substitute.ResNet()(toy(), progress=False)
    assert "prune.channels finds no ViT blocks of segment_anything." in message(
        errors.ModelError, sam
    )


def test_patches_made_by_another_layer() -> None:
    sam = toy()
    sam.image_encoder.patch_embed.proj = nn.Identity()
    lines = message(errors.ModelError, sam)
    assert lines[:3] == [
        "prune.channels cannot cut a layer that was replaced.",
        "  where     image_encoder.patch_embed.proj",
        "  got       Identity",
    ]
