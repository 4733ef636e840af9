"""Padding that is not computed: of windows, and of the photo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from segment_anything.modeling.image_encoder import Block
from torch import nn

from ..core.contract import parts
from ..core.errors import ConfigError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._token_blocks import GlobalAttention, TokenBlock, WindowAttention, check_kind
from ._token_vit import TokenViT, check_vit


@register
@dataclass(frozen=True, kw_only=True)
class SkipPadding(Transform, family="prune", phase=25):
    """Leave out the image encoder's work on padding.

    SAM pads twice: a photo that is not square with zeros to a square, and maps whose sides are no
    multiple of a window with empty tokens to whole windows. The second can be left out exactly,
    which `attention.Fused` does for the most part too, in the same time. The first is a third of
    the work for a photo of 3:2, and leaving it out changes the embedding: use it where photos are
    far from square and the loss has been measured.

    Args:
        window: leave out the padding of windows, exactly.
        photo: leave out the photo's own padding, all but `margin`.
        margin: rows and columns of padding tokens that are computed, >= 1; they stand for the rest.

    Raises:
        ConfigError: if `margin` is out of range, or there is nothing to do.
        NoEffectError: if windows fit the map, or padding is left out already.
        ModelError: if the image encoder has no ViT block of segment_anything, or if `photo`, is not
            segment_anything's ViT.

    Effect:
        Same parameters. Of windows: same function up to rounding; ``vit_b`` at 1024 px falls from
        486 to 468 GMAC in the encoder (`attention.Fused`: 471), and a block with windows takes 0.83
        of segment_anything's time on one thread of an AMD EPYC (`attention.Fused`: 0.80). Of
        photos: of 3:4 the embedding of `tiny` changes by 33 %, where the photo is by 10 %, and the
        mIoU of its boxes falls by 0.003; of 1:2 by 27 %, 22 % and 0.014.

    Composes with:
        After what cuts weights; before `attention.Fused`, which then takes the blocks that are
        left, distillation, quantisation and export. Goes together with the other techniques for
        tokens. An exported or compiled graph has fixed shapes: it computes the photo's padding.

    Source:
        Own design and code. One key for many of one kind: the proportional attention of token
        merging, D. Bolya et al., 2022, arXiv 2210.09461.

    Example:
        >>> import samcompress as sc
        >>> import torch
        >>> sam, image = sc.build("tiny"), torch.rand(1, 3, 128, 128)
        >>> small = sc.prune.SkipPadding()(sam)
        >>> torch.allclose(small.image_encoder(image), sam.image_encoder(image), atol=1e-5)
        True
    """

    window: bool = True
    photo: bool = False
    margin: int = 2

    def validate(self) -> None:
        """Check that there is something to do."""
        if not (self.window or self.photo):
            raise ConfigError(
                f"{self.label}: there is no padding to skip.",
                where="window and photo",
                got="window=False, photo=False",
                expected="one of them True",
                fix="leave out window=False",
            )
        if self.margin < 1:
            raise ConfigError(
                f"{self.label}: margin is out of range.",
                where="margin",
                got=self.margin,
                expected="at least 1",
                fix=f"margin={type(self).margin}",
            )

    def check(self, model: nn.Module) -> None:
        """Find padding."""
        check_kind(self.label, model)
        encoder: Any = parts(model).image_encoder
        if self.photo:
            check_vit(self.label, encoder)
        done = getattr(encoder, "margin", None) is not None
        if (done or not self.photo) and not self._blocks(model):
            raise NoEffectError(
                f"{self.label} finds no padding to skip.",
                where="image_encoder",
                got="padding that is skipped already, or windows that fit the map",
                fix="leave this step out",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Replace the blocks that would see padding."""
        return self.rebuild(model, {"blocks": self._blocks(model)})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Replace the named blocks; their parts and weights move over."""
        for name in state["blocks"]:
            block: Any = model.get_submodule(name)
            kind = WindowAttention if block.window_size else GlobalAttention
            model.set_submodule(name, TokenBlock(block, kind(block.attn)))
        if self.photo:
            sam: Any = model
            sam.image_encoder = TokenViT.of(sam.image_encoder)
            sam.image_encoder.margin = self.margin
        return state

    def _blocks(self, model: nn.Module) -> list[str]:
        """Names of blocks whose attention is to be another."""
        sam: Any = model
        grid, encoder = sam.prompt_encoder.image_embedding_size[0], sam.image_encoder
        sides: dict[nn.Module, int] = {}
        if isinstance(encoder, TokenViT) and encoder.clusters:
            count = encoder.clusters.count(grid)
            sides = dict.fromkeys(encoder.blocks[encoder.start :], count)
        found = []
        for name, block in model.named_modules():
            if type(block) is not Block:
                continue
            size = block.window_size
            if size and self.window and (self.photo or sides.get(block, grid) % size):
                found.append(name)
            elif not size and self.photo:
                # Of a part of the map the tables must not be stretched to its size.
                found.append(name)
        return found
