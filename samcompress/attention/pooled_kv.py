"""Fewer keys and values by pooling them: spatial reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from segment_anything.modeling.transformer import Attention as TokenAttention
from torch import Tensor, nn

from ..core.contract import embedding_shape, parts
from ..core.errors import ConfigError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State
from ._blocks import (
    Approximate,
    Approximation,
    attention,
    find,
    joined,
    made_like,
    renamed,
    split,
)
from ._rel_pos import offsets

Pool = Literal["avg", "max", "conv"]
READERS = "attn_token_to_image"  # how the decoder's attention to the image is called


@register
@dataclass(frozen=True, kw_only=True)
class PooledKV(Approximate, family="attention", phase=30):
    """Average keys and values over cells of tokens; every token still asks.

    Use it where global attention takes the time and the whole map must stay in sight: of the
    approximations it starts nearest to the original, often near enough without training. In the
    mask decoder it spares projections as well, for each prompt. It brings little where linear
    layers take the time, and does not suit tasks where single tokens matter, as thin objects.

    Args:
        size: side of a cell in tokens, >= 2; of size² keys one is left.
        pool: ``avg``; ``max`` of each channel; ``conv``, weights a channel, which start as ``avg``
            and are trained by a distillation after it.
        blocks: "global", "windowed" (cells inside windows) or "all" blocks of the image encoder.
        where: blocks of the image encoder to take from. With ``mask_decoder.**`` the decoder's
            attention from prompts to the image is taken too.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if `where` matches no attention that can be pooled and is not.
        ModelError: if the image encoder has no ViT block of segment_anything.

    Effect:
        Same parameters. By default the encoder of ``vit_b`` at 1024 px falls from 486 to 408 GMAC.
        In the decoder it spares a third of the work of each prompt. What that costs in mIoU is
        in the card.

    Composes with:
        After what cuts weights. `Fused` before or after it; distillation after it, then
        quantisation and export.

    Source:
        Spatial reduction: Wang et al. 2021, PVT, arXiv 2102.12122. Pooled keys: Fan et al. 2021,
        MViT, arXiv 2104.11227. Ours averages the position terms with the keys, exactly. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.attention.PooledKV(size=2)(sc.build("tiny"))
        >>> small.image_encoder.blocks[1].attn.size
        2
    """

    size: int = 2
    pool: Pool = "avg"

    def validate(self) -> None:
        """Check the range."""
        if self.size < 2:
            raise ConfigError(
                f"{self.label}: size is out of range.", got=self.size, expected=">= 2"
            )

    def make(self, attn: Any, window: int) -> Approximation:
        """Attention with pooled keys."""
        return PooledAttention(attn, window, self.size, self.pool)

    def check(self, model: nn.Module) -> None:
        """Find attention to pool."""
        self._found(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Pool the keys of all attention found."""
        blocks, readers = self._found(model)
        return renamed(model, lambda: self.rebuild(model, {"blocks": blocks, "decoder": readers}))

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same in the named modules; their parts and weights move over."""
        super().rebuild(model, state)
        _, *grid = embedding_shape(model)
        for name in state["decoder"]:
            old = model.get_submodule(name)
            model.set_submodule(name, PooledReader(old, (grid[0], grid[1]), self.size, self.pool))
        return state

    def _found(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of blocks of the encoder, and of attention of the decoder."""
        parts(model)
        kinds = (TokenAttention, PooledReader)
        try:
            inside = self.where.select(model, kinds, step=self.label)
        except NoEffectError:
            inside = []
        readers = [(n, m) for n, m in inside if n.endswith(READERS)]
        free = [name for name, module in readers if isinstance(module, TokenAttention)]
        try:
            blocks = find(self.label, model, self.where, self.blocks)
        except NoEffectError:
            if not free:
                raise
            blocks = []
        return blocks, free


class PooledAttention(Approximation):
    """SAM's attention with keys and values of whole cells.

    Args:
        attn: the attention whose parts are taken over.
        window_size: side of a window in tokens; 0 for the whole map.
        size: side of a cell; with 1 nothing is changed.
        pool: how a cell is brought to one.
    """

    def __init__(self, attn: Any, window_size: int, size: int, pool: Pool = "avg") -> None:
        super().__init__(attn, window_size)
        self.size = size
        self.pool = Cells(2 * self.proj.in_features, size, pool, like=self.proj)

    def mix(self, qkv: Tensor) -> Tensor:
        """Attend to cells: (B, h, w, 3·n·d) to (B, h, w, n·d)."""
        asked, others = qkv.tensor_split((self.proj.in_features,), -1)
        (q,) = self.heads(asked)
        k, v = self.heads(self.pool(others))
        # A mean of products with a query is the product with the mean.
        size = q.shape[2:4]
        rows, columns = self.terms(
            q, lambda table, axis: averaged(offsets(table, size[axis]), 1, self.size)
        )
        # Where cells are unequal each counts as often as it has tokens.
        if size[0] % self.size:
            rows = rows + members(size[0], self.size, q).log()
        if size[1] % self.size:
            columns = columns + members(size[1], self.size, q).log()
        return joined(attention(q, k, v, rows, columns))


class Cells(nn.Module):
    """Brings each cell of a map to one token.

    Args:
        channels: of the map.
        size: side of a cell; cells at the right and below may be cut off.
        pool: how.
        like: a layer on whose device, and in whose type, weights are made.
    """

    def __init__(self, channels: int, size: int, pool: Pool, like: Any) -> None:
        super().__init__()
        self.size = size
        self.pool = pool
        if pool == "conv":
            shape = (channels, 1, size, size)
            self.weight = nn.Parameter(torch.full(shape, 1 / size**2, **made_like(like)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, ceil(h / size), ceil(w / size), C)."""
        if self.pool == "avg":
            return averaged(averaged(x, 1, self.size), 2, self.size)
        missing = [-n % self.size for n in x.shape[1:3]]
        fill = 0.0 if self.pool == "conv" else float("-inf")
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]), value=fill)
        if self.pool == "max":
            cut = x.reshape(len(x), x.shape[1] // self.size, self.size, -1, self.size, x.shape[3])
            return cut.amax((2, 4))
        found = F.conv2d(x.permute(0, 3, 1, 2), self.weight, stride=self.size, groups=x.shape[3])
        found = found.permute(0, 2, 3, 1)
        tall, broad = (
            members(n - gone, self.size, x) / self.size
            for n, gone in zip(x.shape[1:3], missing, strict=True)
        )
        return found / (tall[:, None, None] * broad[:, None])


class PooledReader(nn.Module):
    """The mask decoder's attention from prompts to the image, of which cells are left.

    The image is pooled before the projections of keys and values, which are linear: averaging after
    them would give the same for more work.

    Args:
        attn: a segment_anything `Attention` of the decoder, whose projections are taken over.
        grid: height and width of the image's map.
        size: side of a cell.
        pool: how a cell is brought to one.
    """

    approximates = True

    def __init__(self, attn: Any, grid: tuple[int, int], size: int, pool: Pool = "avg") -> None:
        super().__init__()
        self.embedding_dim: int = attn.embedding_dim
        self.internal_dim: int = attn.internal_dim
        self.num_heads: int = attn.num_heads
        self.q_proj = attn.q_proj
        self.k_proj = attn.k_proj
        self.v_proj = attn.v_proj
        self.out_proj = attn.out_proj
        self.grid = grid
        self.size = size
        self.pool = Cells(self.embedding_dim, size, pool, like=attn.out_proj)
        self.training = attn.training

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(P, N, C) prompts ask (P, h·w, C) keys and values; (P, N, C)."""
        k, v = (self.pool(split(x, 1, *self.grid)).flatten(1, 2) for x in (k, v))
        q, k, v = (
            split(project(x), 2, self.num_heads, -1).transpose(1, 2)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        counts = [members(length, self.size, q) for length in self.grid]
        uneven = any(length % self.size for length in self.grid)
        weight = (counts[0][:, None] * counts[1]).log().flatten()[None] if uneven else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=weight)
        found: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return found


def members(length: int, size: int, like: Tensor) -> Tensor:
    """How many places each cell along an axis has.

    Example:
        >>> members(8, 3, torch.zeros(1))
        tensor([3., 3., 2.])
    """
    full = like.new_full((length // size,), float(size))
    rest = length % size
    return torch.cat([full, full.new_full((1,), float(rest))]) if rest else full


def averaged(x: Tensor, axis: int, size: int) -> Tensor:
    """Means of cells along an axis; the last cell may be cut off.

    Example:
        >>> averaged(torch.arange(5.0), 0, 2)
        tensor([0.5000, 2.5000, 4.0000])
    """
    length = x.shape[axis]
    rest = length % size
    if rest == length:
        return x.mean(axis, keepdim=True)
    whole = split(x.narrow(axis, 0, length - rest), axis, -1, size).mean(axis + 1)
    if not rest:
        return whole
    last = x.narrow(axis, length - rest, rest).mean(axis, keepdim=True)
    return torch.cat([whole, last], axis)
