"""Cutting units out of a SAM: which tensors lose what, so that what is left still computes.

Every function changes modules in place and leaves new, whole tensors, no masks. `kept` are indices
in ascending order. Apart from channels and blocks the result equals the full model in which what
reads the removed units is set to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def keep_hidden(block: Any, kept: Sequence[int]) -> None:
    """Hidden units of an `MLPBlock`.

    A unit is a row of ``lin1.weight`` (M, E), an element of ``lin1.bias`` (M,) and a column of
    ``lin2.weight`` (E, M).
    """
    index = _index(kept, block.lin1.weight)
    keep_outputs(block.lin1, index)
    keep_inputs(block.lin2, index)


def keep_head_units(mlp: Any, layer: int, kept: Sequence[int]) -> None:
    """Hidden units behind a layer of one of the mask decoder's heads, an `MLP` with ReLU."""
    index = _index(kept, mlp.layers[layer].weight)
    keep_outputs(mlp.layers[layer], index)
    keep_inputs(mlp.layers[layer + 1], index)


def keep_heads(attn: Any, kept: Sequence[int]) -> None:
    """Heads of an encoder's `Attention`, which has queries, keys and values in one layer.

    The tables of relative positions are shared by the heads and stay.
    """
    width = attn.qkv.out_features // 3 // attn.num_heads
    units = torch.arange(attn.num_heads * width).view(attn.num_heads, width)
    _keep_attention(attn, units[list(kept)].flatten())
    attn.num_heads = len(kept)


def keep_head_dims(attn: Any, kept: Sequence[int]) -> None:
    """Dimensions of all heads of an encoder's `Attention`, the same in each.

    The tables of relative positions lose the same columns. Attention is scaled by the width of a
    head, so the keys are multiplied by the ratio of the two scales; not the queries, which are
    compared with the tables too, unscaled.
    """
    heads, parts = attn.num_heads, attn.qkv.out_features // 3
    units = torch.arange(parts).view(heads, parts // heads)
    _keep_attention(attn, units[:, list(kept)].flatten())
    if attn.use_rel_pos:
        for name in ("rel_pos_h", "rel_pos_w"):
            table = getattr(attn, name)
            setattr(attn, name, _cut(table, 1, _index(kept, table)))
    old, attn.scale = attn.scale, len(kept) ** -0.5
    keys = slice(heads * len(kept), 2 * heads * len(kept))
    with torch.no_grad():
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            if tensor is not None:
                tensor[keys] *= old / attn.scale


def keep_token_heads(attn: Any, kept: Sequence[int]) -> None:
    """Heads of a mask decoder's `Attention`, which has a layer each for queries, keys, values."""
    width = attn.internal_dim // attn.num_heads
    units = torch.arange(attn.internal_dim).view(attn.num_heads, width)
    index = units[list(kept)].flatten().to(attn.q_proj.weight.device)
    for layer in (attn.q_proj, attn.k_proj, attn.v_proj):
        keep_outputs(layer, index)
    keep_inputs(attn.out_proj, index)
    attn.num_heads, attn.internal_dim = len(kept), len(index)


def keep_channels(encoder: Any, kept: Sequence[int]) -> None:
    """Channels of the tokens that run through all blocks of an `ImageEncoderViT`.

    Norms are over the channels, so this is not the same as setting the others to zero.
    """
    index = _index(kept, encoder.patch_embed.proj.weight)
    keep_outputs(encoder.patch_embed.proj, index)
    if encoder.pos_embed is not None:
        encoder.pos_embed = _cut(encoder.pos_embed, encoder.pos_embed.ndim - 1, index)
    for block in encoder.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight, norm.bias = (_cut(t, 0, index) for t in (norm.weight, norm.bias))
            norm.normalized_shape = (len(index),)
        keep_inputs(block.attn.qkv, index)
        keep_outputs(block.attn.proj, index)
        keep_inputs(block.mlp.lin1, index)
        keep_outputs(block.mlp.lin2, index)
    keep_inputs(encoder.neck[0], index)


def keep_blocks(encoder: Any, kept: Sequence[int]) -> None:
    """Whole blocks; those that stay keep their windows and close ranks."""
    encoder.blocks = nn.ModuleList(encoder.blocks[index] for index in kept)


def keep_outputs(layer: nn.Linear | nn.Conv2d, index: Tensor) -> None:
    """Keep only the outputs at `index` (n,) of a layer, bias included."""
    layer.weight = _cut(layer.weight, 0, index)
    if layer.bias is not None:
        layer.bias = _cut(layer.bias, 0, index)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(index))


def keep_inputs(layer: nn.Linear | nn.Conv2d, index: Tensor) -> None:
    """Keep only the inputs at `index` (n,) of a layer."""
    layer.weight = _cut(layer.weight, 1, index)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(index))


def _keep_attention(attn: Any, index: Tensor) -> None:
    """Keep `index` of the queries', keys' and values' outputs, and of what reads the values."""
    index = index.to(attn.qkv.weight.device)
    part = attn.qkv.out_features // 3
    keep_outputs(attn.qkv, torch.cat([index + j * part for j in range(3)]))
    keep_inputs(attn.proj, index)


def _index(kept: Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(kept, dtype=torch.long, device=like.device)


def _cut(tensor: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    values = tensor.detach().index_select(axis, index)
    return nn.Parameter(values, requires_grad=tensor.requires_grad)
