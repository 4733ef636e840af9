"""Subnets of an encoder: what they compute and cost, and the search among them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from pruning import SCENES, encode, off, toy

import samcompress as sc
from samcompress.core._draws import generator
from samcompress.core.budget import Limit
from samcompress.core.sizes import parameter_count
from samcompress.core.timing import Rounds, Timing
from samcompress.prune import _search
from samcompress.prune._elastic import Size, Space, Subnet, cut, narrowed, sort_units
from samcompress.prune._search import Costs, costs_of, evolve, fitted
from samcompress.prune.supernet import Supernet


def macs_of(sam: Any) -> int:
    found = sc.evaluate.macs(sam)
    return found.encoder + found.decoder_per_prompt


def space_of(sam: Any, **fields: Any) -> Space:
    return Supernet(**{"blocks": 0.5, **fields})._space(sam)


def drawn(space: Space, count: int = 4) -> list[Subnet]:
    g = generator("subnets")
    return [space.smallest, *(space.draw(g) for _ in range(count))]


def shuffled(sam: Any) -> dict[str, list[list[int]]]:
    g = generator("order")
    units = {"heads": [b.attn.num_heads for b in sam.image_encoder.blocks]}
    units["mlp"] = [b.mlp.lin1.out_features for b in sam.image_encoder.blocks]
    return {k: [torch.randperm(n, generator=g).tolist() for n in v] for k, v in units.items()}


def every(space: Space) -> list[Subnet]:
    choices: list[list[Size | None]] = [
        [Size(heads, hidden) for heads in space.heads[i] for hidden in space.hidden[i]]
        + [None] * (i in space.free)
        for i in range(len(space.heads))
    ]
    return [s for s in itertools.product(*choices) if s.count(None) <= space.most]


# --- subnets --------------------------------------------------------------------------------------


def test_sorted_units_compute_the_same() -> None:
    sam = toy()
    before, order = encode(sam), shuffled(sam)
    weight = sam.image_encoder.blocks[0].mlp.lin1.weight.clone()
    sort_units(sam, order)
    assert off(encode(sam), before) < 1e-5
    assert torch.equal(sam.image_encoder.blocks[0].mlp.lin1.weight, weight[order["mlp"][0]])


def test_a_subnet_computes_what_is_cut_out() -> None:
    sam = toy()
    order = shuffled(sam)
    sort_units(sam, order)
    for subnet in drawn(space_of(sam)):
        with narrowed(sam.image_encoder, subnet):
            found = encode(sam)
        small = copy.deepcopy(sam)
        cut(small, subnet, order)
        assert off(found, encode(small)) < 1e-5
        sizes = [
            Size(b.attn.num_heads, b.mlp.lin1.out_features) for b in small.image_encoder.blocks
        ]
        assert sizes == [size for size in subnet if size]


def test_a_subnet_is_the_whole_with_what_it_lacks_set_to_zero() -> None:
    sam = toy()
    order = shuffled(sam)
    subnet: Subnet = (Size(1, 24), Size(3, 96), None, Size(2, 40))
    masked = copy.deepcopy(sam)
    with torch.no_grad():
        for i, (size, block) in enumerate(zip(subnet, masked.image_encoder.blocks, strict=True)):
            lacks = Size(0, 0) if size is None else size
            for head in order["heads"][i][lacks.heads :]:
                block.attn.proj.weight[:, 8 * head : 8 * head + 8] = 0
            block.mlp.lin2.weight[:, order["mlp"][i][lacks.hidden :]] = 0
            if size is None:
                block.attn.proj.bias.zero_()
                block.mlp.lin2.bias.zero_()
    sort_units(sam, order)
    with narrowed(sam.image_encoder, subnet):
        assert off(encode(sam), encode(masked)) < 1e-5


def test_the_largest_subnet_is_the_whole_encoder() -> None:
    sam = toy()
    with narrowed(sam.image_encoder, space_of(sam).largest):
        found = encode(sam)
    assert torch.equal(found, encode(sam))


def test_gradients_of_several_subnets_after_they_were_left() -> None:
    """And they are those of the models that are cut out."""
    sam = toy()
    order = shuffled(sam)
    sort_units(sam, order)
    images = torch.randn(1, 3, 64, 64, generator=generator("images"))
    total = torch.zeros(())
    first: Subnet = (Size(2, 48), None, Size(4, 24), Size(1, 96))
    last: Subnet = (Size(4, 24), Size(1, 96), Size(2, 48), None)
    expected = []
    for subnet in (first, last):
        with narrowed(sam.image_encoder, subnet):
            total = total + sam.image_encoder(images).square().mean()
        small = copy.deepcopy(sam)
        cut(small, subnet, {k: [list(range(len(u))) for u in v] for k, v in order.items()})
        small.image_encoder(images).square().mean().backward()
        expected.append(small.image_encoder.patch_embed.proj.weight.grad)
    total.backward()
    assert off(sam.image_encoder.patch_embed.proj.weight.grad, sum(expected)) < 1e-5
    assert not sam.image_encoder.blocks[2].mlp.lin1.weight.grad[48:].any()
    assert sam.image_encoder.blocks[2].mlp.lin1.weight.grad[:48].any()


def test_an_encoder_is_left_as_it_was_also_after_an_error() -> None:
    sam = toy()
    modules = list(sam.image_encoder.modules())
    before = [set(vars(module)) for module in modules]
    with pytest.raises(RuntimeError), narrowed(sam.image_encoder, space_of(sam).smallest):
        sam.image_encoder(torch.zeros(1, 3, 40, 40))
    assert [set(vars(module)) for module in modules] == before
    assert [b.attn.num_heads for b in sam.image_encoder.blocks] == [4] * 4


def test_steps_between_subnets() -> None:
    space = Space(heads=((1, 2), (2,)), hidden=((4, 8), (4, 6, 8)), free=(1,), most=1)
    whole = (Size(2, 8), Size(2, 8))
    assert space.largest == whole
    assert space.smallest == (Size(1, 4), None)
    assert space.near(whole, smaller=True) == [
        (Size(1, 8), Size(2, 8)),
        (Size(2, 4), Size(2, 8)),
        (Size(2, 8), Size(2, 6)),
        (Size(2, 8), None),
    ]
    assert space.near((Size(2, 4), None), smaller=True) == [(Size(1, 4), None)]
    assert space.near((Size(2, 4), None), smaller=False) == [
        (Size(2, 8), None),
        (Size(2, 4), Size(2, 4)),
    ]
    assert space.near(whole, smaller=False) == []


# --- costs ----------------------------------------------------------------------------------------


def test_costs_are_those_of_what_is_cut_out() -> None:
    sam = toy()
    order, space = shuffled(sam), space_of(sam)
    costs = {what: costs_of(sam, space, Limit(what, 1.0)) for what in ("macs", "parameters")}
    for subnet in drawn(space, 1):
        small = copy.deepcopy(sam)
        cut(small, subnet, order)
        assert costs["macs"].of(subnet) == macs_of(small)
        assert costs["parameters"].of(subnet) == parameter_count(small)


def test_the_cheapest_subnet() -> None:
    sam = toy()
    space = space_of(sam, heads=(0.5,), hidden=(0.75,))
    costs = costs_of(sam, space, Limit("macs", 1.0))
    assert costs.of(costs.cheapest(space)) == min(map(costs.of, every(space)))


def test_latency_is_a_sum_of_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = toy()
    space, timed = space_of(sam), []

    def block_ms(size: Size, window: int) -> float:
        return 10 * size.heads + 0.1 * size.hidden + (0 if window else 100)

    def clock(calls: Any, at: Any, rounds: Any) -> dict[Any, Timing]:
        found = {}
        for key, call in calls.items():
            call()
            if call.func is _search.narrow:
                block, size, _ = call.args
                ms = block_ms(size, block.window_size)
            else:  # all at once takes twice as long
                windows = (b.window_size for b in sam.image_encoder.blocks)
                sizes = zip(key, windows, strict=True)
                ms = 2 * (5 + sum(block_ms(size, window) for size, window in sizes if size))
            found[key] = Timing((ms,), ms, ms)
        timed.append(len(calls))
        return found

    monkeypatch.setattr(_search, "time_many", clock)
    costs = costs_of(sam, space, Limit.parse("latency_ms<=1"))
    assert timed == [2 * (len(space.heads[0]) + len(space.hidden[0]) - 1) + 2]
    subnet = (Size(2, 24), Size(4, 48), None, Size(3, 96))
    assert costs.of(subnet) == pytest.approx(2 * (5 + 200 + 90 + 16.8))
    quick = {"images": 2, "steps": 0, "population": 2, "generations": 0}
    small = Supernet(budget="latency_ms<=600", **quick)(sam, data=SCENES, progress=False)
    state = sc.lineage(small)[-1].state
    assert 500 < state["cost_after"] <= 600
    assert state["cost_before"] == pytest.approx(806.8)


def test_latency_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, the two ends cost what they took."""
    sam = toy()
    short = Rounds(warmup_calls=1, warmup_seconds=0, calls=5, seconds=0)
    monkeypatch.setattr(_search, "ROUNDS", short)
    space = space_of(sam)
    costs = costs_of(sam, space, Limit.parse("latency_ms<=50% on cpu"))
    assert 0 < costs.of(space.largest) < 10_000


# --- search ---------------------------------------------------------------------------------------


def flat() -> tuple[Space, Costs]:
    """Six blocks of 4 sizes each; a unit costs 1 in each."""
    space = Space(((1, 2),) * 6, ((2, 4),) * 6, (2, 3), 1)
    return space, Costs(0.0, ({1: 1.0, 2: 2.0},) * 6, ({2: 2.0, 4: 4.0},) * 6)


def weighed(subnet: Subnet) -> float:
    """Each block matters twice as much as the one before."""
    return -sum(2**i * (size.heads + size.hidden) for i, size in enumerate(subnet) if size)


def search(limit: float, seed: int = 0, **settings: Any) -> dict[Subnet, float]:
    space, costs = flat()
    settings = {"population": 8, "generations": 12, **settings}
    return evolve(weighed, space, costs, limit, **settings, seed=seed, track=iter)


def test_the_search_keeps_the_budget_and_finds_the_best() -> None:
    space, costs = flat()
    found = search(24)
    assert all(costs.of(subnet) <= 24 for subnet in found)
    assert len(found) <= 8 * 13
    valid = [subnet for subnet in every(space) if costs.of(subnet) <= 24]
    assert min(found.values()) == min(map(weighed, valid))
    assert min(found.values()) < min(search(24, generations=0).values())


def test_the_search_is_a_function_of_its_seed() -> None:
    assert list(search(20).items()) == list(search(20).items())
    assert list(search(20)) != list(search(20, seed=1))


def test_a_fitted_subnet_can_grow_no_further() -> None:
    space, costs = flat()
    for limit in (costs.of(costs.cheapest(space)), 19.0, 30.0):
        g = generator("fitted")
        for start in (space.largest, space.smallest, space.draw(g)):
            subnet = fitted(start, space, costs, limit, g)
            assert costs.of(subnet) <= limit
            assert all(costs.of(s) > limit for s in space.near(subnet, smaller=False))


def test_a_dead_end_leads_to_the_cheapest() -> None:
    """Where the cheap one of two blocks was left out, and only the dear one would do."""
    space = Space(((1,),) * 4, ((1,),) * 4, (1, 2), 1)
    costs = Costs(0.0, tuple({1: c} for c in (1.0, 2.0, 5.0, 1.0)), ({1: 0.0},) * 4)
    stuck = (Size(1, 1), None, Size(1, 1), Size(1, 1))
    assert fitted(stuck, space, costs, 4.0, generator(0))[2] is None
