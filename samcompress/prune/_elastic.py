"""Subnets of an image encoder: what they are, and how an encoder computes as one of them.

Units are in order of importance, so a subnet takes the first of each module: all subnets share one
set of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core._draws import generator
from ..core._objective import Objective
from ._cut import keep_blocks
from ._groups import KINDS, kept_count
from .blocks import BLOCKS

T = TypeVar("T")
MODULES = {"heads": "attn", "mlp": "mlp"}  # of a block, by the kind of their units


class Size(NamedTuple):
    """What is left of a block."""

    heads: int
    hidden: int


Subnet = tuple[Size | None, ...]  # of each block; None where it is left out
Order = Mapping[str, Sequence[Sequence[int]]]  # of each kind and block, its units by importance


@dataclass(frozen=True)
class Space:
    """All subnets.

    Attributes:
        heads: of each block, how many heads a subnet may have, ascending.
        hidden: the same of hidden units.
        free: blocks that may be left out, those that do least first.
        most: at most so many of them are.
    """

    heads: tuple[tuple[int, ...], ...]
    hidden: tuple[tuple[int, ...], ...]
    free: tuple[int, ...]
    most: int

    @property
    def largest(self) -> Subnet:
        """The whole encoder."""
        return tuple(Size(h[-1], m[-1]) for h, m in zip(self.heads, self.hidden, strict=True))

    @property
    def smallest(self) -> Subnet:
        """The least of each block, without those that do least."""
        out = self.free[: self.most]
        return tuple(None if i in out else self.least(i) for i in range(len(self.heads)))

    def least(self, block: int) -> Size:
        """The smallest size of a block."""
        return Size(self.heads[block][0], self.hidden[block][0])

    def size(self, block: int, drawn: torch.Generator) -> Size:
        """Any size of a block."""
        return Size(pick(self.heads[block], drawn), pick(self.hidden[block], drawn))

    def draw(self, drawn: torch.Generator) -> Subnet:
        """Any subnet; each number of blocks is as likely as any other."""
        count = pick(range(self.most + 1), drawn)
        order = torch.randperm(len(self.free), generator=drawn).tolist()
        out = {self.free[place] for place in order[:count]}
        sizes = [self.size(i, drawn) for i in range(len(self.heads))]
        return tuple(None if i in out else size for i, size in enumerate(sizes))

    def near(self, subnet: Subnet, *, smaller: bool) -> list[Subnet]:
        """Those that differ in one step of one block."""
        found: list[tuple[int, Size | None]] = []
        more_out = smaller and sum(size is None for size in subnet) < self.most
        for i, size in enumerate(subnet):
            if size is None:
                found += [] if smaller else [(i, self.least(i))]
                continue
            for field, options in (("heads", self.heads[i]), ("hidden", self.hidden[i])):
                place = options.index(getattr(size, field)) + (-1 if smaller else 1)
                if 0 <= place < len(options):
                    found.append((i, size._replace(**{field: options[place]})))
            if more_out and i in self.free:
                found.append((i, None))
        return [(*subnet[:i], size, *subnet[i + 1 :]) for i, size in found]


def pick(items: Sequence[T], drawn: torch.Generator) -> T:
    """One of some items, all alike."""
    return items[int(torch.randint(len(items), (), generator=drawn))]


def options(units: int, ratios: Sequence[float], round_to: int) -> tuple[int, ...]:
    """How many of a module's units may be left: all, or all but some share of them.

    Example:
        >>> options(12, (0.25, 0.5, 0.99), 1)
        (6, 9, 12)
    """
    return tuple(sorted({units, *(kept_count(units, r, round_to) for r in ratios)} - {0}))


def sort_units(model: nn.Module, order: Order) -> None:
    """Put units in order, most important first; what the model computes stays the same."""
    for kind, found in order.items():
        for block, units in enumerate(found):
            KINDS[kind].cut(model, f"{BLOCKS}.{block}.{MODULES[kind]}", units)


def cut(model: Any, subnet: Subnet, order: Order) -> dict[str, list[int]]:
    """Cut a subnet out of a model with sorted units, which get back to where they were.

    Returns:
        Modules that lost something, by the names they have now, and the places their units had
        before they were sorted.
    """
    kept: dict[str, list[int]] = {}
    blocks = [i for i, size in enumerate(subnet) if size is not None]
    if len(blocks) < len(subnet):
        keep_blocks(model.image_encoder, blocks)
        kept[BLOCKS] = blocks
    sizes = [size for size in subnet if size is not None]
    for place, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        for (kind, module), count in zip(MODULES.items(), size, strict=True):
            units, name = order[kind][block], f"{BLOCKS}.{place}.{module}"
            KINDS[kind].cut(model, name, sorted(range(count), key=units.__getitem__))
            if count < len(units):
                kept[name] = sorted(units[:count])
    return kept


@contextmanager
def narrowed(encoder: Any, subnet: Subnet) -> Iterator[None]:
    """Let an encoder with sorted units compute as a subnet of it, with gradients if wanted.

    Gradients keep only the inputs of blocks and compute what is inside again, since those of
    several subnets are kept at a time. They can be taken after the context has ended.
    """
    for block, size in zip(encoder.blocks, subnet, strict=True):
        block.forward = _skip if size is None else partial(_run, block, size)
    try:
        yield
    finally:
        for block in encoder.blocks:
            del block.forward


def _skip(x: Tensor) -> Tensor:
    return x


def _run(block: Any, size: Size, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        found: Tensor = checkpoint(
            narrow, block, size, x, use_reentrant=False, preserve_rng_state=False
        )
        return found
    return narrow(block, size, x)


def narrow(block: Any, size: Size, x: Tensor) -> Tensor:
    """(B, h, w, E) through the first units of a block."""
    attn, mlp = block.attn, block.mlp
    heads, part = attn.num_heads, attn.qkv.out_features // 3
    width, hidden = part // heads * size.heads, size.hidden
    layers = {
        attn.qkv: (_first(attn.qkv.weight, width), _first(attn.qkv.bias, width)),
        attn.proj: (attn.proj.weight[:, :width], attn.proj.bias),
        mlp.lin1: (mlp.lin1.weight[:hidden], mlp.lin1.bias[:hidden]),
        mlp.lin2: (mlp.lin2.weight[:, :hidden], mlp.lin2.bias),
    }
    for layer, (weight, bias) in layers.items():
        layer.forward = partial(F.linear, weight=weight, bias=bias)
    attn.num_heads = size.heads
    try:
        found: Tensor = Block.forward(block, x)
        return found
    finally:
        attn.num_heads = heads
        for layer in layers:
            del layer.forward


def _first(tensor: Tensor | None, width: int) -> Tensor | None:
    """The first `width` rows of queries, keys and values each."""
    return None if tensor is None else torch.cat([part[:width] for part in tensor.chunk(3)])


class Sandwich(Objective):
    """In each step the largest subnet, the smallest and some drawn ones learn from one teacher.

    Args:
        whole: judges the encoder by a batch; its student is the model with sorted units.
        space: all subnets.
        count: drawn ones a step.
        seed: of those.
    """

    def __init__(self, whole: Objective, space: Space, *, count: int, seed: int) -> None:
        super().__init__(whole.student, whole.source)
        self._whole = (whole,)  # a tuple, as the student must not be there twice
        self.space, self.count, self.seed = space, count, seed

    def forward(self, drawn: Any, step: int) -> dict[str, Tensor]:
        """Terms ``largest``, ``smallest`` and ``drawn 1`` and so on, which add up to a mean."""
        subnets = {"largest": self.space.largest, "smallest": self.space.smallest}
        for number in range(self.count):
            g = generator(self.seed, "subnet", step, number)
            subnets[f"drawn {number + 1}"] = self.space.draw(g)
        return {name: self._judge(subnet, drawn, step) for name, subnet in subnets.items()}

    def _judge(self, subnet: Subnet, drawn: Any, step: int) -> Tensor:
        with narrowed(self.student.get_submodule("image_encoder"), subnet):
            terms = self._whole[0](drawn, step)
        return torch.stack(list(terms.values())).sum() / (2 + self.count)
