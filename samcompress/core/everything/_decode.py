"""The mask decoder for many prompts on one image, in two halves: first scores, then masks.

`Shared` is segment_anything's decoder in another order of the same arithmetic. What depends on the
image alone is computed once; projections of the image's many tokens are moved to the few tokens of
the prompt, since (x W) q = x (W q); and nothing is enlarged until it is known which masks are
wanted. `Plain` asks any other decoder as it is.

Source: own; the sharing is after segment_anything's `MaskDecoder` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import (
    Attention,
    TwoWayAttentionBlock,
    TwoWayTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract import dtype_of

# What `Shared` reads weights of, or whose forward it writes out; a subclass may do anything else.
KNOWN = (TwoWayTransformer, TwoWayAttentionBlock, Attention)

# Bytes of enlarged features at a time.
WIDE = 8 << 20
WIDE_ELSEWHERE = 512 << 20


@dataclass(frozen=True)
class Decoded:
    """Answers to P prompts, M masks each, before anything is enlarged.

    Attributes:
        scores: (P, M) float32, the IoU the model expects of each mask.
        low: from R rows and R masks of these, index tensors, to (R, 4h, 4w) logits.
    """

    scores: Tensor
    low: Callable[[Tensor, Tensor], Tensor]


class Decoder(Protocol):
    """Decodes prompts on one image."""

    def __call__(self, sparse: Tensor, dense: Tensor, *, multimask: bool) -> Decoded:
        """Decode P prompts.

        Args:
            sparse: (P, N, C) from the prompt encoder.
            dense: (P, C, h, w) from the prompt encoder; the same for all prompts.
            multimask: the masks of an ambiguous prompt, not the single one.
        """


def decoder_for(model: Any, features: Tensor) -> Decoder:
    """The fastest decoder that gives what the model's own gives.

    Args:
        model: a SAM.
        features: (1, C, h, w) from its image encoder.
    """
    features = features.to(dtype_of(model.mask_decoder))
    position = model.prompt_encoder.get_dense_pe().to(features.dtype)
    if sharable(model.mask_decoder):
        return Shared(model.mask_decoder, features, position)
    return Plain(model.mask_decoder, features, position)


def sharable(decoder: nn.Module) -> bool:
    """Whether a mask decoder is segment_anything's, with weights that can be read."""
    if not isinstance(decoder, MaskDecoder):
        return False
    kind = type(decoder)
    if (
        kind.predict_masks is not MaskDecoder.predict_masks
        or kind.forward is not MaskDecoder.forward
    ):
        return False
    transformer: Any = decoder.transformer
    parts = [module for module in transformer.modules() if isinstance(module, KNOWN)]
    blocks = list(transformer.layers) if type(transformer) is TwoWayTransformer else []
    attentions = [m for m in parts if isinstance(m, Attention)]
    linear = [getattr(a, f"{n}_proj") for a in attentions for n in ("q", "k", "v", "out")]
    if len(decoder.output_upscaling) != 5:
        return False
    first, norm, _, second, _ = decoder.output_upscaling
    exact = (
        *((module, KNOWN) for module in parts),
        *((block, (TwoWayAttentionBlock,)) for block in blocks),
        *((module, (nn.Linear,)) for module in linear),
        *((conv, (nn.ConvTranspose2d,)) for conv in (first, second)),
        (norm, (LayerNorm2d,)),
        *((head, (MLP,)) for head in decoder.output_hypernetworks_mlps),
    )
    if not blocks or any(type(module) not in kinds for module, kinds in exact):
        return False
    if not first.kernel_size == first.stride == second.kernel_size == second.stride == (2, 2):
        return False
    watched = (decoder, *parts, *linear, first, norm, second)
    return not any(m._forward_hooks or m._forward_pre_hooks for m in watched)


class Plain:
    """Any mask decoder, called as it is."""

    def __init__(self, decoder: Any, features: Tensor, position: Tensor) -> None:
        self.decoder, self.features, self.position = decoder, features, position

    def __call__(self, sparse: Tensor, dense: Tensor, *, multimask: bool) -> Decoded:
        """See `Decoder`."""
        logits, scores = self.decoder(
            image_embeddings=self.features,
            image_pe=self.position,
            sparse_prompt_embeddings=sparse.to(self.features.dtype),
            dense_prompt_embeddings=dense.to(self.features.dtype),
            multimask_output=multimask,
        )
        return Decoded(scores.float(), lambda rows, masks: logits[rows, masks])


class Shared:
    """segment_anything's mask decoder; equal to rounding."""

    def __init__(self, decoder: Any, features: Tensor, position: Tensor) -> None:
        self.decoder, self.grid = decoder, features.shape[-2:]
        self.embedding = _tokens(features)
        self.position = _tokens(position)
        self.source: Tensor | None = None

    def __call__(self, sparse: Tensor, dense: Tensor, *, multimask: bool) -> Decoded:
        """See `Decoder`."""
        if self.source is None:
            self._prepare(dense[:1].to(self.embedding))
        own = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse.to(own.dtype)], 1)
        hidden, keys = self._transform(tokens)
        chosen = slice(1, None) if multimask else slice(0, 1)
        scores = self.decoder.iou_prediction_head(hidden[:, 0])[:, chosen]

        def low(rows: Tensor, masks: Tensor) -> Tensor:
            wanted, place = torch.unique(rows, return_inverse=True)
            return self._masks(hidden[wanted], keys[wanted], chosen)[place, masks]

        return Decoded(scores.float(), low)

    def _prepare(self, dense: Tensor) -> None:
        """What of the first layer no prompt changes."""
        self.source = self.embedding + _tokens(dense)
        first = self.decoder.transformer.layers[0]
        placed = self.source + self.position
        asked, told = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        self.keys = _split(asked.k_proj(placed), asked).transpose(1, 2)
        self.values = _split(asked.v_proj(self.source), asked)
        self.queries = _split(told.q_proj(placed), told).transpose(1, 2)

    def _transform(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(P, T, C) tokens to (P, T, C) tokens and (P, h·w, C) image."""
        transformer = self.decoder.transformer
        assert self.source is not None
        queries, keys, placed = tokens, self.source, None
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

    def _ask(self, attn: Any, q: Tensor, image: Tensor, placed: Tensor | None) -> Tensor:
        """Tokens (P, T, C) attend to the image; `placed` is None in the first layer."""
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
        if placed is None:
            return torch.baddbmm(image.expand(count, -1, -1), weights, values)
        # In place, as nobody reads this image again.
        return image.baddbmm_(weights, values)

    def _masks(self, hidden: Tensor, keys: Tensor, tokens: slice) -> Tensor:
        """All masks of P prompts, (P, M, 4h, 4w)."""
        heads = list(enumerate(self.decoder.output_hypernetworks_mlps, 1))[tokens]
        weights = torch.stack([head(hidden[:, place]) for place, head in heads], 1)
        # Sixteen places a cell, with an eighth of its channels each.
        most = WIDE if keys.device.type == "cpu" else WIDE_ELSEWHERE
        step = max(1, most // (8 * keys[0].numel()))
        parts = zip(torch.split(keys, step), torch.split(weights, step), strict=True)
        return torch.cat([self._enlarged(*part) for part in parts])

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


def _tokens(x: Tensor) -> Tensor:
    """(1, C, h, w) to (1, h·w, C)."""
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
