"""What subnets cost, and the search for a good one that costs no more than it may."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core._draws import generator
from ..core.budget import ROUNDS, Limit
from ..core.devices import device
from ..core.sizes import parameter_count
from ..core.timing import Work, evaluating, time_many
from ._elastic import Size, Space, Subnet, narrow, narrowed, pick

Table = tuple[dict[int, float], ...]
FRESH = 0.1  # share of a child's blocks that are drawn anew
PARENTS = 4  # one of so many of a generation has children
TRIES = 10  # times as many draws as children wanted, where most were seen before


@dataclass(frozen=True)
class Costs:
    """What subnets cost: a sum over blocks.

    Attributes:
        base: the cost of what is outside the blocks.
        heads: of each block, the cost for each number of heads, with all that has no units.
        hidden: of each block, the cost for each number of hidden units.
    """

    base: float
    heads: Table
    hidden: Table

    def of(self, subnet: Subnet) -> float:
        """The cost of a subnet."""
        return self.base + sum(self.block(i, size) for i, size in enumerate(subnet) if size)

    def block(self, number: int, size: Size) -> float:
        """The cost of a block."""
        return self.heads[number][size.heads] + self.hidden[number][size.hidden]

    def scaled(self, factor: float) -> Costs:
        """The same times a factor."""
        heads, hidden = (
            tuple({n: factor * cost for n, cost in block.items()} for block in table)
            for table in (self.heads, self.hidden)
        )
        return Costs(factor * self.base, heads, hidden)

    def cheapest(self, space: Space) -> Subnet:
        """The subnet that costs least."""
        sizes = [
            Size(min(heads, key=heads.__getitem__), min(hidden, key=hidden.__getitem__))
            for heads, hidden in zip(self.heads, self.hidden, strict=True)
        ]
        dear = sorted(space.free, key=lambda i: -self.block(i, sizes[i]))[: space.most]
        return tuple(None if i in dear else size for i, size in enumerate(sizes))


def costs_of(model: Any, space: Space, limit: Limit) -> Costs:
    """What the subnets of a SAM cost, in the quantity of a budget.

    Raises:
        ConfigError: if the budget's device is not there.
    """
    if limit.quantity == "latency_ms":
        return _timed(model, space, limit)
    return _counted(model, space, limit)


def _counted(model: Any, space: Space, limit: Limit) -> Costs:
    macs, encoder = limit.quantity == "macs", model.image_encoder
    heads: list[dict[int, float]] = []
    hidden: list[dict[int, float]] = []
    for block, *counts in zip(encoder.blocks, space.heads, space.hidden, strict=True):
        attn, mlp = block.attn, block.mlp
        # All that a unit takes along; of what a module adds up, its last bias, nothing.
        one_head = (_numbers(attn.qkv, macs) + attn.proj.weight.numel()) / attn.num_heads
        one_unit = (_numbers(mlp.lin1, macs) + mlp.lin2.weight.numel()) / mlp.lin1.out_features
        fixed = 0.0
        if macs:
            one_head, one_unit = _multiplied(block, encoder, one_head, one_unit)
        else:
            units = one_head * attn.num_heads + one_unit * mlp.lin1.out_features
            fixed = parameter_count(block) - units
        heads.append({n: fixed + n * one_head for n in counts[0]})
        hidden.append({n: n * one_unit for n in counts[1]})
    inside = Costs(0.0, tuple(heads), tuple(hidden))
    return replace(inside, base=limit.cost(model) - inside.of(space.largest))


def _numbers(layer: nn.Linear, macs: bool) -> int:
    """Numbers of a layer; without its bias if they are to be multiplied."""
    bias = 0 if macs or layer.bias is None else layer.bias.numel()
    return layer.weight.numel() + bias


def _multiplied(block: Any, encoder: Any, head: float, unit: float) -> tuple[float, float]:
    """Multiply-accumulates of a head and of a hidden unit that have so many weights."""
    grid = encoder.img_size // encoder.patch_embed.proj.stride[0]
    side = block.window_size or grid
    padded = (-(-grid // side) * side) ** 2
    width = block.attn.qkv.out_features // 3 // block.attn.num_heads
    positions = 2 * padded * side * width if block.attn.use_rel_pos else 0
    return padded * head + 2 * padded * side**2 * width + positions, grid**2 * unit


def _timed(model: Any, space: Space, limit: Limit) -> Costs:
    """Milliseconds for an image and a box.

    Each block is timed in each number of heads, and in each of hidden units; blocks alike share
    that. The sums are then brought to what the largest and the smallest subnet really take, as what
    parts take by themselves does not quite add up.
    """
    at = device(limit.place(model))
    twin = copy.deepcopy(model).to(at.torch_device)
    encoder, whole, least = twin.image_encoder, space.largest, space.smallest
    calls: dict[object, Callable[[], object]] = {}
    with evaluating([twin]), torch.inference_mode():
        work = Work(twin)
        tokens = encoder.patch_embed(work.pixels)
        for i, block in enumerate(encoder.blocks):
            for size in _lines(space, i):
                calls[_alike(block, size)] = partial(narrow, block, size, tokens)
        for subnet in (whole, least):
            calls[subnet] = partial(_through, work, subnet)
        ms = {key: timing.median_ms for key, timing in time_many(calls, at, ROUNDS).items()}
    heads: list[dict[int, float]] = []
    hidden: list[dict[int, float]] = []
    for i, (block, full) in enumerate(zip(encoder.blocks, whole, strict=True)):
        assert full is not None
        took = {size: ms[_alike(block, size)] for size in _lines(space, i)}
        heads.append({n: took[full._replace(heads=n)] for n in space.heads[i]})
        hidden.append({n: took[full._replace(hidden=n)] - took[full] for n in space.hidden[i]})
    parts = Costs(0.0, tuple(heads), tuple(hidden))
    if whole != least:
        parts = parts.scaled((ms[whole] - ms[least]) / (parts.of(whole) - parts.of(least)))
    return replace(parts, base=ms[whole] - parts.of(whole))


def _through(work: Work, subnet: Subnet) -> None:
    with narrowed(work.model.image_encoder, subnet):
        work.end_to_end()


def _lines(space: Space, block: int) -> set[Size]:
    """The sizes of a block that lack units of one kind alone."""
    whole = space.largest[block]
    assert whole is not None
    lines = {whole._replace(heads=n) for n in space.heads[block]}
    return lines | {whole._replace(hidden=n) for n in space.hidden[block]}


def _alike(block: Any, size: Size) -> tuple[object, ...]:
    """Equal for blocks that take the same time at a size."""
    return block.window_size, block.attn.qkv.weight.shape, block.attn.num_heads, size


def evolve(
    error: Callable[[Subnet], float],
    space: Space,
    costs: Costs,
    limit: float,
    *,
    population: int,
    generations: int,
    seed: int,
    track: Callable[[Iterable[Subnet]], Iterator[Subnet]],
) -> dict[Subnet, float]:
    """Look for the subnet of least error among those that cost no more than `limit`.

    The first generation is drawn. Of each further one, a subnet takes each block from one of two
    parents, which are among the best so far, or anew. All are then shrunk at random until they cost
    little enough, and grown at random while they do.

    Args:
        error: of a subnet.
        space: all subnets.
        costs: what they cost.
        limit: at least what the cheapest costs.
        population: new subnets in each generation.
        generations: after the first.
        seed: of all that is drawn.
        track: counts subnets that are tried.

    Returns:
        The error of each subnet that was tried, in that order.
    """
    drawn = generator(seed, "search")
    seen: dict[Subnet, float] = {}

    def draw() -> Subnet:
        return space.draw(drawn)

    def breed() -> Subnet:
        best = sorted(seen, key=seen.__getitem__)[: max(2, population // PARENTS)]
        return _child(pick(best, drawn), pick(best, drawn), space, drawn)

    def tried() -> Iterator[Subnet]:
        for number in range(generations + 1):
            found: dict[Subnet, None] = {}
            for _ in range(TRIES * population):
                subnet = fitted((breed if number else draw)(), space, costs, limit, drawn)
                if subnet not in seen:
                    found[subnet] = None
                if len(found) == population:
                    break
            yield from found

    for subnet in track(tried()):
        seen[subnet] = error(subnet)
    return seen


def fitted(
    subnet: Subnet, space: Space, costs: Costs, limit: float, drawn: torch.Generator
) -> Subnet:
    """Shrink a subnet at random until it costs no more than `limit`; then grow it while it does."""
    while costs.of(subnet) > limit:
        steps = space.near(subnet, smaller=True)
        subnet = pick(steps, drawn) if steps else costs.cheapest(space)
    while True:
        steps = [s for s in space.near(subnet, smaller=False) if costs.of(s) <= limit]
        if not steps:
            return subnet
        subnet = pick(steps, drawn)


def _child(a: Subnet, b: Subnet, space: Space, drawn: torch.Generator) -> Subnet:
    """Each block of one of two subnets, a few anew."""
    whose = torch.rand(len(a), generator=drawn).tolist()
    anew = torch.rand(len(a), generator=drawn).tolist()
    fresh = space.draw(drawn)
    child = [
        fresh[i] if anew[i] < FRESH else (a if whose[i] < 0.5 else b)[i] for i in range(len(a))
    ]
    while sum(size is None for size in child) > space.most:
        back = pick([i for i, size in enumerate(child) if size is None], drawn)
        child[back] = space.size(back, drawn)
    return tuple(child)
