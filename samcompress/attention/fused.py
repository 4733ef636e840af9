"""Exact attention with less memory traffic: the same weights, the same masks, sooner."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.image_encoder import (
    Block,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from ..core._shared_decoder import OneImage, prompts_at_once, readable, sharable
from ..core.contract import parts
from ..core.errors import ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._rel_pos import attend, terms
from ._takeover import OwnAttention, OwnBlock
from ._window import pad

# Bytes of scores made at a time. On a CPU they are read while still in the cache; elsewhere, and in
# graphs that unroll the pieces, fewer and larger ones are faster. Chosen by timing vit_b, 1024 px.
CACHED = 16 << 20
AT_ONCE = 256 << 20


@register
@dataclass(frozen=True, kw_only=True)
class Fused(Transform, family="attention", phase=30):
    """Encode in cache-sized pieces and decode what prompts share once, exactly.

    Use it on every SAM that runs in PyTorch: it costs no accuracy and no training. It brings most
    at large image sizes, where the scores of global attention do not fit in the cache, and for many
    prompts on an image; little on small encoders, whose time goes to the linear layers. Encoders
    without ViT blocks stay as they are, and so do decoders that do not do what SAM's does.

    Args:
        None: there is nothing to choose.

    Raises:
        ModelError: if neither ViT blocks nor the mask decoder are segment_anything's.
        NoEffectError: if they are fused already.

    Effect:
        Same parameters, same names, same function up to rounding (3e-6 in the embedding of
        ``vit_b``). Encoder of ``vit_b`` on one thread of an AMD EPYC, fp32, against
        segment_anything: 1.53 times as fast at 1024 px with 0.12 of its extra peak memory, 1.42
        times at 512 px. Mask decoder of ``vit_b`` there, 16 prompts of three masks: 4.4 times as
        fast with 0.24 of the extra memory, off by 6e-7 (relative L2), and 7.3 times after
        `BFloat16`; one prompt 1.8 and 2.6 times, and no gain for one on the small map of ``tiny``.

    Composes with:
        Everything: blocks and decoder keep their parts, so pruning, distillation, quantization and
        export act on them as before. Put it after a change of the image size. The decoder is
        segment_anything's again where its linear layers are replaced (`Int8Weights`), in training
        and in graphs.

    Source:
        Fused attention in tiles: FlashAttention, Dao et al. 2022, arXiv 2205.14135, through
        PyTorch's `scaled_dot_product_attention`. Decomposed relative positions: MViTv2, Li et al.
        2021, arXiv 2112.01526. Own code (Apache-2.0); unlike segment-anything-fast (Apache-2.0), no
        kernel for one GPU model, and windows are padded after the projection.

    Example:
        >>> import samcompress as sc
        >>> sam = sc.build("tiny")
        >>> fused = sc.attention.Fused()(sam)
        >>> image = torch.zeros(1, 3, 128, 128)
        >>> torch.allclose(fused.image_encoder(image), sam.image_encoder(image), atol=1e-5)
        True
    """

    def check(self, model: nn.Module) -> None:
        """Find blocks or a decoder to replace."""
        encoder, _, decoder = parts(model)
        kinds = {type(module) for module in (*encoder.modules(), decoder)}
        if Block in kinds or _fusable(decoder):
            return
        if kinds & {FusedBlock, FusedDecoder}:
            raise NoEffectError(
                f"{self.label} finds all that it knows fused already.",
                where="image_encoder, mask_decoder",
                fix="leave out the second sc.attention.Fused()",
            )
        raise ModelError(
            f"{self.label} finds neither ViT blocks nor the mask decoder of segment_anything.",
            where="image_encoder, mask_decoder",
            got=f"{type(encoder).__name__}, {type(decoder).__name__}",
            expected="segment_anything's Block, or its MaskDecoder with plain linear layers",
            fix="leave out sc.attention.Fused() for this model",
        )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Replace every ViT block and the mask decoder."""
        blocks = [n for n, m in model.named_modules() if type(m) is Block]
        return self.rebuild(
            model, {"blocks": blocks, "decoder": _fusable(parts(model).mask_decoder)}
        )

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Replace the named blocks, and the decoder; their parts and weights move over."""
        for name in state["blocks"]:
            model.set_submodule(name, FusedBlock(model.get_submodule(name)))
        # Models saved by earlier versions say nothing of it.
        if state.get("decoder", False):
            model.get_submodule("mask_decoder").__class__ = FusedDecoder
        return state


def _fusable(decoder: nn.Module) -> bool:
    return type(decoder) is MaskDecoder and sharable(decoder)


class FusedBlock(OwnBlock):
    """A ViT block with `FusedAttention`; takes over the parts of a segment_anything `Block`."""

    def __init__(self, block: Block) -> None:
        super().__init__(block, FusedAttention(block.attn, block.window_size))


class FusedAttention(OwnAttention):
    """Attention with decomposed relative positions, over the whole map or inside windows."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) tokens to (B, h, w, C)."""
        qkv = self.qkv(x)
        if self.window_size:
            # One row of windows at a time needs no padded copy of the whole map.
            step = self.window_size if _limit(qkv) == CACHED else x.shape[1]
            mixed = torch.cat([self._windows(part) for part in qkv.split(step, 1)], 1)
        else:
            mixed = self._heads(qkv)
        out: Tensor = self.proj(mixed)
        return out

    def _windows(self, qkv: Tensor) -> Tensor:
        """Attention inside windows: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        size, inner = self.window_size, tuple(qkv.shape[1:3])
        # Padded tokens take part, with the bias as key and value; trained weights rely on it.
        windows, outer = window_partition(pad(qkv, size, self.qkv.bias), size)
        whole: Tensor = window_unpartition(self._heads(windows), size, outer, inner)
        return whole

    def _heads(self, qkv: Tensor) -> Tensor:
        """Attention of every head: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        split = qkv.reshape(*qkv.shape[:3], 3, self.num_heads, -1)
        q, k, v = split.permute(3, 0, 4, 1, 2, 5).unbind(0)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if self.use_rel_pos:
            rows, columns = terms(q, self.rel_pos_h, self.rel_pos_w)
            out = attend(q, k, v, rows, columns, _limit(qkv))
        else:
            out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v).reshape(q.shape)
        return out.permute(0, 2, 3, 1, 4).flatten(3)


class FusedDecoder(MaskDecoder):  # type: ignore[misc]
    """segment_anything's mask decoder, which computes once what prompts on an image share.

    Where weights cannot be read, somebody watches, gradients are wanted or the call is traced, it
    is segment_anything's own.
    """

    @functools.wraps(MaskDecoder.forward)
    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """(P, M, 4h, 4w) logits and (P, M) scores of P prompts on one image."""
        sparse, dense = sparse_prompt_embeddings, dense_prompt_embeddings
        if not self._shares(image_embeddings, image_pe, sparse, dense):
            own: tuple[Tensor, Tensor] = super().forward(
                image_embeddings, image_pe, sparse, dense, multimask_output
            )
            return own
        step = prompts_at_once(image_embeddings)
        see = functools.partial(OneImage, self, image_embeddings, image_pe)
        # Without a mask among the prompts it is the same for all.
        same = dense.stride(0) == 0 or len(dense) == 1
        images = repeat(see(dense[:1])) if same else map(see, torch.split(dense, step))
        masks, scores = [], []
        for image, part in zip(images, torch.split(sparse, step), strict=False):
            hidden, keys = image.transform(part)
            masks.append(image.masks(hidden, keys, multimask=multimask_output))
            scores.append(image.scores(hidden, multimask=multimask_output))
        return torch.cat(masks), torch.cat(scores)

    def _shares(self, *embeddings: Tensor) -> bool:
        image, position, sparse, dense = embeddings
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if traced or torch.compiler.is_compiling():
            return False
        if not (len(image) == len(position) == 1 and len(dense) in (1, len(sparse))):
            return False
        if len({x.dtype for x in (self.iou_token.weight, *embeddings)}) > 1:
            return False
        at = image.device.type
        if torch.amp.is_autocast_available(at) and torch.is_autocast_enabled(at):
            return False
        tensors = (*embeddings, *self.parameters()) if torch.is_grad_enabled() else ()
        return not any(x.requires_grad for x in tensors) and readable(self)


def _limit(x: Tensor) -> int:
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return CACHED if x.device.type == "cpu" and not traced else AT_ONCE
