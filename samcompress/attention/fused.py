"""Exact attention with less memory traffic: the same weights, the same masks, sooner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Block,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

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
    """Compute the encoder's attention in cache-sized pieces, exactly.

    Use it on every ViT SAM that runs in PyTorch: it costs no accuracy and no training. It brings
    most at large image sizes, where the scores of global attention do not fit in the cache, and
    little on small encoders, whose time goes to the linear layers.

    Args:
        None: there is nothing to choose.

    Raises:
        ModelError: if the image encoder has no segment_anything ViT block.
        NoEffectError: if every block is fused already.

    Effect:
        Same parameters, same names, same function up to rounding (3e-6 in the embedding of
        ``vit_b``). Encoder of ``vit_b`` on one thread of an AMD EPYC, fp32, against
        segment_anything: 1.53 times as fast at 1024 px with 0.12 of its extra peak memory, 1.42
        times at 512 px.

    Composes with:
        Everything: the blocks keep their parts, so pruning, distillation, quantization and export
        act on them as before. Put it after a change of the image size.

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
        """Find blocks to replace."""
        encoder = parts(model).image_encoder
        kinds = {type(module) for module in encoder.modules()}
        if Block in kinds:
            return
        if FusedBlock in kinds:
            raise NoEffectError(
                "attention.fused finds every block fused already.",
                where="image_encoder",
                fix="leave out the second sc.attention.Fused()",
            )
        raise ModelError(
            "attention.fused finds no ViT block of segment_anything.",
            where="image_encoder",
            got=type(encoder).__name__,
            expected="an encoder made of segment_anything.modeling.image_encoder.Block",
            fix="leave out sc.attention.Fused() for this encoder",
        )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Replace every ViT block."""
        blocks = [n for n, m in model.named_modules() if type(m) is Block]
        return self.rebuild(model, {"blocks": blocks})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Replace the named blocks; their parts and weights move over."""
        for name in state["blocks"]:
            model.set_submodule(name, FusedBlock(model.get_submodule(name)))
        return state


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


def _limit(x: Tensor) -> int:
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return CACHED if x.device.type == "cpu" and not traced else AT_ONCE
