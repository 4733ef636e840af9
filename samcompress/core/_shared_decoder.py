"""segment_anything's mask decoder for many prompts on one image: the same arithmetic, reordered.

What depends on the image alone is computed once; projections of the image's many tokens are moved
to the few tokens of the prompt, since (x W) q = x (W q); and only masks that are wanted are made.

Source: own; after segment_anything's `MaskDecoder` (Apache-2.0).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import (
    Attention,
    TwoWayAttentionBlock,
    TwoWayTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

# Of the image's tokens, of all prompts of a batch together: what a CPU's cache holds.
TOKENS = 4 << 20

# Bytes of enlarged features at a time.
WIDE = 8 << 20
WIDE_ELSEWHERE = 512 << 20


def sharable(decoder: nn.Module) -> bool:
    """Whether a mask decoder does what segment_anything's does, with weights that can be read."""
    if not isinstance(decoder, MaskDecoder) or _watched(decoder):
        return False
    kind = type(decoder)
    # A forward that wraps segment_anything's is another form of it.
    same = inspect.unwrap(kind.forward) is MaskDecoder.forward
    return same and kind.predict_masks is MaskDecoder.predict_masks and readable(decoder)


def readable(decoder: Any) -> bool:
    """Whether the parts of a mask decoder are segment_anything's, with weights that can be read."""
    inside = list(decoder.modules())[1:]
    if any(map(_watched, inside)) or len(decoder.output_upscaling) != 5:
        return False
    weights = (weight for module in inside for weight in module._parameters.values())
    if any(type(weight) not in (nn.Parameter, type(None)) for weight in weights):
        return False
    if any(type(part) is not kind for part, kind in _read(decoder)):
        return False
    first, _, _, second, _ = decoder.output_upscaling
    sides = {first.kernel_size, first.stride, second.kernel_size, second.stride}
    return sides == {(2, 2)} and len(decoder.transformer.layers) > 0


def _read(decoder: Any) -> Iterator[tuple[object, type]]:
    """What `OneImage` reads, or whose forward it writes out, and the type that it must have.

    A subclass may do anything else. All other parts are called.
    """
    transformer = decoder.transformer
    yield transformer, TwoWayTransformer
    attentions = []
    for block in transformer.layers:
        yield block, TwoWayAttentionBlock
        attentions += [block.cross_attn_token_to_image, block.cross_attn_image_to_token]
    for attention in (*attentions, transformer.final_attn_token_to_image):
        yield attention, Attention
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = getattr(attention, name)
            yield linear, nn.Linear
            yield linear.bias, nn.Parameter
    first, norm, act, second, act_again = decoder.output_upscaling
    yield norm, LayerNorm2d
    for conv, curve in ((first, act), (second, act_again)):
        yield conv, nn.ConvTranspose2d
        yield conv.bias, nn.Parameter
        # It is called with channels last, so it must not care where they are.
        yield curve, nn.GELU


def _watched(module: nn.Module) -> bool:
    """Whether somebody is to see what the module is called with, or runs in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def prompts_at_once(features: Tensor) -> int:
    """Prompts in one call that suit the device: 64; on a CPU what its cache holds.

    Args:
        features: (1, C, h, w) of the image.
    """
    if features.device.type != "cpu":
        return 64
    return min(64, max(4, TOKENS // (4 * features[0].numel())))


class OneImage:
    """A mask decoder on one image; equal to segment_anything's to rounding.

    Args:
        decoder: one that is `readable`.
        features: (1, C, h, w) from the image encoder.
        position: (1, C, h, w), the positional encoding of the grid.
        dense: from the prompt encoder, (1, C, h, w) for all prompts or (P, C, h, w) for P.
    """

    def __init__(self, decoder: Any, features: Tensor, position: Tensor, dense: Tensor) -> None:
        self.decoder, self.grid = decoder, features.shape[-2:]
        self.position = _tokens(position)
        self.source = _tokens(features) + _tokens(dense)
        self.placed: Tensor | None = None
        placed = self.source + self.position
        if len(dense) > 1:
            self.placed = placed
            return
        # What of the first layer no prompt changes.
        first = decoder.transformer.layers[0]
        asked, told = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        self.keys = _split(asked.k_proj(placed), asked).transpose(1, 2)
        self.values = _split(asked.v_proj(self.source), asked)
        self.queries = _split(told.q_proj(placed), told).transpose(1, 2)

    def transform(self, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """(P, N, C) prompts to what `scores` and `masks` read: (P, T, C) and (P, h·w, C)."""
        transformer = self.decoder.transformer
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], 1)
        queries, keys, placed = tokens, self.source, self.placed
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                q = queries + tokens
                queries = queries + layer.self_attn(q=q, k=q, v=queries)
            queries = layer.norm1(queries)
            asked = layer.cross_attn_token_to_image
            queries = layer.norm2(queries + self._ask(asked, queries + tokens, keys, placed))
            queries = layer.norm3(queries + layer.mlp(queries))
            told = layer.cross_attn_image_to_token
            keys = layer.norm4(self._tell(told, queries + tokens, queries, keys, placed))
            placed = keys + self.position
        last = transformer.final_attn_token_to_image
        queries = queries + self._ask(last, queries + tokens, keys, placed)
        return transformer.norm_final_attn(queries), keys

    def scores(self, hidden: Tensor, *, multimask: bool) -> Tensor:
        """(P, M), the IoU the model expects of each mask."""
        found: Tensor = self.decoder.iou_prediction_head(hidden[:, 0])
        return found[:, _chosen(multimask)]

    def masks(self, hidden: Tensor, keys: Tensor, *, multimask: bool) -> Tensor:
        """(P, M, 4h, 4w) logits."""
        heads = list(enumerate(self.decoder.output_hypernetworks_mlps, 1))[_chosen(multimask)]
        weights = torch.stack([head(hidden[:, place]) for place, head in heads], 1)
        # Sixteen places a cell, with an eighth of its channels each.
        most = WIDE if keys.device.type == "cpu" else WIDE_ELSEWHERE
        step = max(1, most // (8 * keys[0].numel()))
        parts = zip(torch.split(keys, step), torch.split(weights, step), strict=True)
        return torch.cat([self._enlarged(*part) for part in parts])

    def _ask(self, attn: Any, q: Tensor, image: Tensor, placed: Tensor | None) -> Tensor:
        """Tokens (P, T, C) attend to the image; `placed` is None where all prompts share it."""
        count, length = q.shape[:2]
        heads = attn.num_heads
        q = attn.q_proj(q).view(count, length, heads, -1)
        q = q / q.shape[-1] ** 0.5
        if placed is None:
            # (heads, P·T, d) against keys and values that all prompts share.
            weights = torch.bmm(q.flatten(0, 1).transpose(0, 1), self.keys).softmax(-1)
            found = torch.bmm(weights, self.values).transpose(0, 1)
            shared: Tensor = attn.out_proj(found.reshape(count, length, -1))
            return shared
        # The bias of the keys adds the same to all weights of a token, which softmax ignores.
        key = _by_head(attn.k_proj, heads)
        moved = torch.einsum("pthd,hdc->phtc", q, key).flatten(1, 2)
        weights = torch.bmm(moved, placed.transpose(1, 2)).softmax(-1)
        seen = torch.bmm(weights, image).view(count, heads, length, -1)
        value = _by_head(attn.v_proj, heads)
        found = torch.einsum("phtc,hdc->pthd", seen, value).flatten(2)
        own: Tensor = attn.out_proj(found + attn.v_proj.bias)
        return own

    def _tell(
        self, attn: Any, k: Tensor, v: Tensor, image: Tensor, placed: Tensor | None
    ) -> Tensor:
        """The image (P or 1, h·w, C) attends to tokens (P, T, C), and is added."""
        count, length = k.shape[:2]
        heads = attn.num_heads
        k = attn.k_proj(k).view(count, length, heads, -1)
        k = k / k.shape[-1] ** 0.5
        if placed is None:
            # (heads, P·T, d) with queries that all prompts share.
            weights = torch.bmm(k.flatten(0, 1).transpose(0, 1), self.queries)
            weights = weights.view(heads, count, length, -1).transpose(0, 1)
        else:
            query = _by_head(attn.q_proj, heads)
            moved = torch.einsum("pthd,hdc->phtc", k, query).flatten(1, 2)
            bias = torch.einsum("pthd,hd->pht", k, attn.q_proj.bias.view(heads, -1))
            scores = torch.baddbmm(bias.flatten(1)[..., None], moved, placed.transpose(1, 2))
            weights = scores.view(count, heads, length, -1)
        weights = weights.softmax(2).flatten(1, 2).transpose(1, 2)
        out = attn.out_proj.weight.view(attn.embedding_dim, heads, -1)
        v = attn.v_proj(v).view(count, length, heads, -1)
        values = torch.einsum("pthd,chd->phtc", v, out).flatten(1, 2)
        # The weights of each head have the sum 1.
        values += attn.out_proj.bias / heads
        if image is self.source:
            return torch.baddbmm(image.expand(count, -1, -1), weights, values)
        # In place, as nobody reads this image again.
        return image.baddbmm_(weights, values)

    def _enlarged(self, keys: Tensor, weights: Tensor) -> Tensor:
        """(P, h·w, C) image and (P, M, C') weights to (P, M, 4h, 4w).

        Transposed convolutions whose kernel is their stride see one cell each: linear layers that
        give four cells for one, put in their places once, at the end.
        """
        first, norm, act, second, act_again = self.decoder.output_upscaling
        count = len(keys)
        x = F.linear(keys, *_four(first)).view(count, -1, 4, first.out_channels)
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = act_again(F.linear(x, *_four(second))).view(count, -1, second.out_channels)
        masks = torch.bmm(weights, x.transpose(1, 2))
        h, w = self.grid
        masks = masks.view(count, -1, h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(count, -1, 4 * h, 4 * w)


def _chosen(multimask: bool) -> slice:
    """The masks of an ambiguous prompt, or the single one."""
    return slice(1, None) if multimask else slice(0, 1)


def _tokens(x: Tensor) -> Tensor:
    """(P, C, h, w) to (P, h·w, C)."""
    return x.flatten(2).transpose(1, 2)


def _split(x: Tensor, attn: Any) -> Tensor:
    """(1, n, heads·d) to (heads, n, d)."""
    return x[0].view(len(x[0]), attn.num_heads, -1).transpose(0, 1)


def _four(conv: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that a transposed 2 by 2 convolution is."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return weight, conv.bias.repeat(4)


def _by_head(linear: Any, heads: int) -> Tensor:
    """Weights of a projection to heads, (heads, d, C)."""
    weight: Tensor = linear.weight
    return weight.view(heads, -1, weight.shape[1])
