"""SAM's image encoder with fewer tokens in its blocks."""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from ..core.errors import ModelError
from ._clusters import Clusters
from ._token_blocks import LATER, Part, TokenBlock

Size = tuple[int, int]


class TokenViT(ImageEncoderViT):  # type: ignore[misc]
    """SAM's ViT, some of whose blocks see clusters of tokens, or little of the photo's padding.

    Attributes:
        clusters: how tokens are clustered; None if they are not.
        start: the first block that sees clusters.
        margin: rows and columns of padding that the blocks see; None if they see all of it.
    """

    clusters: Clusters | None
    start: int
    margin: int | None

    @classmethod
    def of(cls, encoder: nn.Module) -> TokenViT:
        """An encoder with the weights, names and modes of another, which is not to be used after.

        Args:
            encoder: an `ImageEncoderViT`, or one of these.
        """
        made = cls.__new__(cls)
        made.__dict__.update(encoder.__dict__)
        if not isinstance(encoder, TokenViT):
            made.clusters, made.start, made.margin = None, 0, None
        return made

    @property
    def approximates(self) -> bool:
        """Whether it gives something else than the encoder it was made of."""
        return self.clusters is not None or self.margin is not None

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, C, h, w)."""
        tokens = self.patch_embed(x)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        # What is padding depends on values, which a graph of fixed shapes cannot look at.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if self.margin is None or traced or torch.compiler.is_compiling() or x.is_meta:
            tokens = self._through(tokens)
        else:
            tokens = self._sparing(tokens, photos(x, tokens.shape[1]), self.margin)
        embedding: Tensor = self.neck(tokens.permute(0, 3, 1, 2))
        return embedding

    def _through(self, x: Tensor, part: Part | None = None) -> Tensor:
        """All blocks: (B, h, w, C) to the same; `part` as for `TokenBlock`."""
        tokens, clustered = x, None
        for index, block in enumerate(self.blocks):
            if self.clusters is not None and index == self.start:
                tokens, clustered = x, self.clusters(x)
                x = clustered.centres
                part = part and self.clusters.part(part)
            x = block(x, part) if isinstance(block, TokenBlock) else block(x)
        return x if clustered is None else clustered.back(tokens, x)

    def _sparing(self, tokens: Tensor, sizes: list[Size], margin: int) -> Tensor:
        """All blocks, where a margin of padding stands for all of it.

        Args:
            tokens: (B, h, w, C).
            sizes: how many rows and columns of each image show the photo.
            margin: rows and columns of padding.
        """
        grid, made = tokens.shape[1], torch.empty_like(tokens)
        for size in sorted(set(sizes)):
            which = [i for i, other in enumerate(sizes) if other == size]
            height, width = (min(length + margin, grid) for length in size)
            x = tokens[which, :height, :width]
            if (height, width) == (grid, grid):
                made[which] = self._through(x)
                continue
            rows, columns = (stands_for(length, margin, grid).to(x) for length in size)
            change = self._through(x, Part(grid, rows, columns)) - x
            # All padding changes as the last of the margin does.
            down, across = (
                torch.arange(grid, device=x.device).clamp_max(n - 1) for n in (height, width)
            )
            made[which] = tokens[which] + change[:, down][:, :, across]
        return made


def stands_for(photo: int, margin: int, grid: int) -> Tensor:
    """How many rows of tokens each stands for: one in the photo, in the margin its share.

    Example:
        >>> stands_for(3, 2, 9), stands_for(4, 2, 5)
        (tensor([1., 1., 1., 3., 3.]), tensor([1., 1., 1., 1., 1.]))
    """
    seen = min(margin, grid - photo)
    share = (grid - photo) / max(seen, 1)
    return torch.tensor([1.0] * photo + [share] * seen)


def photos(x: Tensor, grid: int) -> list[Size]:
    """How far photos reach, in tokens: what follows at the right and below is exactly zero.

    Args:
        x: (B, 3, S, S) normalised images, padded with zeros.
        grid: tokens along a side.

    Returns:
        Height and width of each; the whole grid where nothing but zeros is found.
    """
    patch = x.shape[-1] // grid
    filled = (x != 0).any(1)
    place = torch.arange(1, x.shape[-1] + 1, device=x.device)
    reach = torch.stack([(filled.any(axis) * place).amax(1) for axis in (2, 1)], 1)
    return [(-(-h // patch) or grid, -(-w // patch) or grid) for h, w in reach.tolist()]


def check_vit(label: str, encoder: Any) -> None:
    """Check that it is known how tokens go through an image encoder and each of its blocks.

    Raises:
        ModelError: if it is not.
    """
    kind = type(encoder)
    known = kind in (ImageEncoderViT, TokenViT)
    odd = {type(b) for b in encoder.blocks} - {Block, TokenBlock} if known else set()
    if odd or not known:
        raise ModelError(
            f"{label} does not know how tokens go through this image encoder.",
            where="image_encoder",
            got=", ".join([kind.__name__, *sorted(found.__name__ for found in odd)]),
            expected="ImageEncoderViT and Block of segment_anything",
            fix=LATER if odd else "sc.prune.MergeTokens(), which changes blocks alone",
        )
