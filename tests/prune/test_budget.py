"""Budget: which cuts come first, how many are made, and that the budget is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import SCENES, answers, kept_of, on_meta, prune, toy

import samcompress as sc
from samcompress.core import budget as core_budget
from samcompress.core import errors
from samcompress.core.budget import Limit
from samcompress.core.checkpoint import fingerprint
from samcompress.core.timing import Rounds, Timing
from samcompress.prune import _budget
from samcompress.prune._budget import (
    Layer,
    after,
    by_damage,
    by_scores,
    by_share,
    choices,
    fewest,
    nearest,
    smaller,
    smallest,
    whole,
)
from samcompress.prune._groups import Group, step_of
from samcompress.prune.budget import Budget

QUICK: dict[str, Any] = {"criterion": "magnitude", "ratios": "equal"}
ATTN, MLP = "image_encoder.blocks.{}.attn", "image_encoder.blocks.{}.mlp"


def layer(name: str, units: int, *, step: int = 1, most: float = 0.7, pool: str = "") -> Layer:
    return Layer("mlp", Group(name, units, (), pool), choices(units, step, most))


def cost_of(sam: Any) -> dict[str, Any]:
    return sc.lineage(sam)[-1].state["cost"]


# --- in which order -------------------------------------------------------------------------------


def test_choices() -> None:
    assert choices(4, 1, 0.7) == (4, 3, 2)
    assert choices(4, 1, 0.75) == (4, 3, 2, 1)
    assert choices(100, 32, 0.999) == (100, 96, 64, 32)
    assert choices(96, 8, 0.5) == (96, 88, 80, 72, 64, 56, 48)
    assert choices(4, 8, 0.9) == (4,)


def test_equal_shares_go_together() -> None:
    cuts = by_share([layer("a", 4), layer("b", 8, step=2), layer("c", 4)])
    assert cuts == [{"a": 3, "b": 6, "c": 3}, {"a": 2, "b": 4, "c": 2}]


def test_scores_share_each_pool_evenly() -> None:
    layers = [layer("a", 4), layer("b", 4), layer("c", 4, pool="other")]
    scores = {
        # Of the same mean and deviation: three of a are as poor as can be, one of b is.
        "a": torch.tensor([0.0, 0.0, 0.0, 4.0]),
        "b": torch.tensor([0.0, 4.0, 4.0, 4.0]),
        "c": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    cuts = by_scores(layers, scores)
    assert cuts == [{"b": 3}, {"a": 3}, {"c": 3}, {"a": 2}, {"b": 2}, {"c": 2}]
    for count in range(len(cuts)):
        plan = after(whole(layers), cuts[:count])
        share = 1 - (plan["a"] + plan["b"]) / 8
        assert abs(share - (1 - plan["c"] / 4)) <= 0.25


def test_least_damage_for_what_it_saves_goes_first() -> None:
    layers = [layer("a", 4), layer("b", 4), layer("c", 4, pool="dear")]
    damage = {"a": {3: 1.0, 2: 3.0}, "b": {3: 3.0, 2: 4.0}, "c": {3: 6.0, 2: 12.0}}
    prices = {("mlp", ""): 1.0, ("mlp", "dear"): 4.0}
    # Per unit of cost: a 1, 2; c 1.5, 1.5; b 2, 2, for its hull runs straight below its first point.
    cuts = by_damage(layers, damage, prices)
    assert cuts == [{"a": 3}, {"c": 3}, {"c": 2}, {"a": 2}, {"b": 3}, {"b": 2}]


def test_between_measured_counts_damage_is_a_line() -> None:
    layers = [layer("a", 8), layer("b", 8)]
    damage = {"a": {6: 2.0, 3: 8.0}, "b": {3: 5.0}}
    cuts = by_damage(layers, damage, {("mlp", ""): 2.0})
    names = [next(iter(cut)) for cut in cuts]
    assert names == ["a", "a", "b", "b", "b", "b", "b", "a", "a", "a"]


def test_noise_below_zero_is_no_gain_and_what_saves_nothing_goes_last() -> None:
    layers = [layer("a", 4), layer("b", 4, pool="free")]
    damage = {"a": {2: 9.0}, "b": {3: -1.0, 2: 0.5}}
    cuts = by_damage(layers, damage, {("mlp", ""): 1.0, ("mlp", "free"): -0.1})
    assert cuts == [{"a": 3}, {"a": 2}, {"b": 3}, {"b": 2}]


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "expected"), [(9.0, 1), (8.5, 2), (0.0, 10), (9.5, 1)])
def test_exact_costs_are_met_with_the_fewest_cuts(bound: float, expected: int) -> None:
    assert fewest(10, bound, lambda count: 10.0 - count) == expected


@pytest.mark.parametrize("share", [0.9, 0.5, 0.35])
@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_measured_costs_end_just_below(share: float, power: float) -> None:
    asked: list[int] = []

    def cost(count: int) -> float:
        asked.append(count)
        return 1.0 - 0.7 * (count / 400) ** power

    found = nearest(400, share, cost, 1.0, 0.3)
    assert 0.95 * share <= cost(found) <= share
    assert len(asked) <= _budget.PROBES + 2


def test_noisy_costs_end_near() -> None:
    drawn = torch.Generator().manual_seed(0)
    for _ in range(50):
        seen: dict[int, list[float]] = {}

        def cost(count: int, seen: dict[int, list[float]] = seen) -> float:
            noise = 1 + 0.03 * float(torch.randn((), generator=drawn))
            seen.setdefault(count, []).append((1 - 0.7 * count / 300) * noise)
            return sorted(seen[count])[len(seen[count]) // 2]

        found = nearest(300, 0.5, cost, 1.0, 0.3)
        assert abs(1 - 0.7 * found / 300 - 0.5) <= 0.05


def test_few_cuts_and_a_jump() -> None:
    assert nearest(1, 0.5, lambda count: math.nan, 1.0, 0.2) == 1
    assert nearest(8, 0.5, lambda count: 0.9 if count < 5 else 0.1, 1.0, 0.1) == 5


# --- copies ---------------------------------------------------------------------------------------


def test_smaller_shares_what_stays() -> None:
    sam = toy()
    before = fingerprint(sam)
    layers = Budget(**QUICK).layers(sam, 0.7)
    small = smaller(sam, layers, {MLP.format(0): range(8)})
    assert small.image_encoder.blocks[0].mlp.lin1.out_features == 8
    own = dict(sam.named_parameters())
    cut = {n for n, p in small.named_parameters() if p is not own[n]}
    assert cut == {
        f"{MLP.format(0)}.{name}" for name in ("lin1.weight", "lin1.bias", "lin2.weight")
    }
    assert fingerprint(sam) == before


# --- budgets that are counted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "budget"),
    [
        ("equal", "macs<=70%"),
        ("scores", "parameters<=75%"),
        ("embedding", "macs<=60%"),
        ("masks", "parameters<=80%"),
    ],
)
def test_one_cut_fewer_would_be_too_much(ratios: Any, budget: str) -> None:
    sam = toy()
    step = Budget(
        budget=budget, ratios=ratios, criterion="random", images=1, axes=("heads", "mlp", "decoder")
    )
    small = prune(step, sam)
    limit = Limit.parse(budget)
    cost = cost_of(small)
    assert cost["unit"] == limit.quantity
    assert cost["before"] == limit.cost(sam)
    assert cost["after"] == limit.cost(small) <= cost["limit"] == limit.bound(limit.cost(sam))
    # All cuts of one share go together where shares are equal; else one cut is a small thing.
    assert cost["after"] > cost["limit"] - (0.15 if ratios == "equal" else 0.06) * cost["before"]
    assert cost["smallest"] <= cost["after"]


def test_absolute_budget() -> None:
    small = prune(Budget(budget="parameters<=100k", **QUICK))
    assert 90e3 < sum(p.numel() for p in small.parameters()) <= 100e3


def test_what_is_removed_is_what_the_state_says() -> None:
    small = prune(Budget(budget="macs<=60%", **QUICK, axes=("head_dims", "channels"), round_to=1))
    ratios = sc.lineage(small)[-1].state["ratios"]
    block = small.image_encoder.blocks[0]
    assert small.image_encoder.pos_embed.shape[-1] == round(32 * (1 - ratios["image_encoder"]))
    assert block.attn.qkv.out_features == round(96 * (1 - ratios[ATTN.format(0)]))
    assert len(kept_of(small)) == 5
    assert max(ratios.values()) <= 0.75


def test_layers_that_lose_nothing_are_not_in_the_state() -> None:
    # Silent units cost nothing, so all come from there.
    sam = toy()
    torch.nn.init.zeros_(sam.image_encoder.blocks[2].mlp.lin2.weight)
    small = prune(
        Budget(budget="parameters<=98%", criterion="random", axes=("mlp",), images=1), sam
    )
    assert list(kept_of(small)) == [MLP.format(2)]
    curve = sc.lineage(small)[-1].state["curve"]
    assert [error for _, error in curve[MLP.format(2)]] == [0.0] * 4
    assert all(error > 0 for _, error in curve[MLP.format(1)])


def test_cheap_heads_stay_longer() -> None:
    """A head in a window saves less than one that sees the whole map."""
    layers = Budget(**QUICK, axes=("heads",)).layers(toy(), 0.75)
    meter = _budget.Counter(toy(), layers, Limit.parse("macs<=50%"))
    _, prices = Budget(axes=("heads",), criterion="magnitude")._probe(meter, layers)
    assert prices["heads", "0"] > prices["heads", "3"] > 0


def test_deterministic_saved_and_loaded(tmp_path: Path) -> None:
    step = Budget(budget="macs<=70%", images=1)
    small, again = prune(step), prune(step)
    assert sc.lineage(small)[-1].state == sc.lineage(again)[-1].state
    assert fingerprint(small) == fingerprint(again)
    sc.save(small, tmp_path / "small")
    loaded = sc.load(tmp_path / "small")
    assert torch.equal(answers(loaded), answers(small))
    assert sc.lineage(loaded)[-1].state == sc.lineage(small)[-1].state


def test_chain() -> None:
    chain = (
        Budget(budget="macs<=70%", **QUICK)
        | sc.attention.Fused()
        | sc.quantize.Int8Weights(min_size=0)
    )
    assert answers(prune(chain)).isfinite().all()


def test_vit_b_is_halved() -> None:
    step = Budget(budget="macs<=50%", **QUICK)
    sam = on_meta()
    layers = step.layers(sam, step.max_ratio)
    meter = _budget.Counter(sam, layers, Limit.parse(step.budget))
    assert meter.base == pytest.approx(487.9e9, rel=2e-3)
    cuts = by_share(layers)
    count = fewest(
        len(cuts), meter.base / 2, lambda n: meter.costs(after(whole(layers), cuts[:n]))[0]
    )
    plan = after(whole(layers), cuts[:count])
    assert (plan[ATTN.format(0)], plan[MLP.format(11)]) == (6, 1472)
    assert meter.costs(smallest(layers))[0] < 0.3 * meter.base


# --- budgets that are timed -----------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time is one second for 1e9 multiply-accumulates, on a machine that gets slower and is noisy."""
    drawn = torch.Generator().manual_seed(0)
    noise = [0.0]
    calls = [0]

    def timed(limit: Limit, models: Mapping[Any, Any]) -> dict[Any, Timing]:
        calls[0] += 1
        slow = [
            1.2 ** calls[0] * (1 + noise[0] * float(torch.rand((), generator=drawn)))
            for _ in range(7)
        ]
        found = {}
        for name, model in models.items():
            work = Limit.parse("macs<=50%").cost(model) / 1e6
            own = [1 + noise[0] * float(torch.randn((), generator=drawn)) for _ in slow]
            found[name] = Timing(
                tuple(work * a * b for a, b in zip(slow, own, strict=True)), 0.0, 0.0
            )
        return found

    monkeypatch.setattr(Limit, "timed", timed)

    def set_noise(level: float) -> None:
        noise[0] = level

    return set_noise


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("ratios", ["scores", "embedding"])
def test_time_ends_within_a_tenth(
    noise: float, ratios: Any, clock: Callable[[float], None]
) -> None:
    clock(noise)
    sam = toy()
    step = Budget(budget="latency_ms<=60%", criterion="random", ratios=ratios, images=1, round_to=2)
    small = prune(step, sam)
    count = Limit.parse("macs<=50%").cost
    assert 0.54 <= count(small) / count(sam) <= 0.63
    cost = cost_of(small)
    assert cost["after"] <= cost["limit"] == 0.6 * cost["before"]
    assert cost["device"] == sc.core.devices.cpu_name()


@pytest.mark.slow
def test_time_of_this_machine() -> None:
    sam = toy(image_size=256, embed_dim=64)
    small = prune(Budget(budget="latency_ms<=70% on cpu", **QUICK), sam)
    cost = cost_of(small)
    assert cost["smallest"] <= cost["after"] <= cost["limit"]


def test_the_clock_starts_for_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_budget, "ROUNDS", Rounds.quick())
    small = prune(Budget(budget="latency_ms<=99% on cpu", **QUICK, max_ratio=0.9))
    assert cost_of(small)["unit"] == "latency_ms"


# --- rounding -------------------------------------------------------------------------------------


def test_steps_by_device() -> None:
    def step(kind: str, units: int, device: str = "cpu") -> int:
        return step_of(kind, [Group("", units, (), device=device)])

    assert (step("mlp", 3072), step("channels", 768), step("head_units", 256)) == (32, 32, 32)
    assert (step("mlp", 3072, "cuda"), step("mlp", 256, "cuda")) == (64, 32)
    assert (step("head_dims", 64), step("head_dims", 80), step("head_dims", 16)) == (8, 8, 2)
    assert (step("heads", 12), step("token_heads", 8), step("mlp", 4)) == (1, 1, 1)


@pytest.mark.parametrize(
    "technique", [sc.prune.Mlp, sc.prune.Channels, sc.prune.Decoder, sc.prune.HeadDims]
)
def test_auto_rounding_of_the_others(technique: Any) -> None:
    small = prune(technique(ratio=0.4, criterion="magnitude", round_to="auto"))
    units = {"Mlp": (96, 8), "Channels": (32, 4), "HeadDims": (8, 1), "Decoder": (128, 16)}
    whole_, step = units[technique.__name__]
    assert len(next(iter(kept_of(small).values()))) == int(whole_ * 0.6) // step * step


def test_rounding_that_is_none() -> None:
    for value in (0, "fine", 2.5, True):
        with pytest.raises(
            errors.ConfigError, match=r'round_to is out of range\.\n.*\n.*at least 1, or "auto"'
        ):
            sc.prune.Mlp(round_to=value)


# --- refusals -------------------------------------------------------------------------------------


def message(kind: type[Exception], sam: Any = None, data: Any = SCENES, **fields: Any) -> list[str]:
    with pytest.raises(kind) as caught:
        prune(Budget(**{**QUICK, **fields}), sam, data)
    return str(caught.value).splitlines()


def test_unreachable() -> None:
    assert message(errors.ConfigError, budget="parameters<=20k") == [
        "prune.budget cannot make the model so small.",
        "  where     budget='parameters<=20k' of 116 k parameters",
        "  got       at most 20.0 k parameters",
        "  expected  at least 84.2 k parameters, with axes=('heads', 'mlp') and max_ratio=0.75",
        "  try       a larger budget=, more axes=, or a larger max_ratio=",
    ]


def test_met_already() -> None:
    assert message(errors.NoEffectError, budget="parameters<=1M") == [
        "prune.budget: the model meets its budget already.",
        "  got       116 k parameters",
        "  expected  more than 1.00 M parameters",
        '  try       budget="parameters<=50%"',
    ]


def test_not_a_budget_and_a_device_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message(errors.ConfigError, budget="half")[0] == "this is not a budget."
    found = message(errors.ConfigError, budget="latency_ms<=5 on cuda")
    assert found[0] == "the device 'cuda' is not there."


@pytest.mark.parametrize("axes", [(), ("blocks",), ("mlp", "mlp")])
def test_axes_that_are_none(axes: tuple[str, ...]) -> None:
    assert message(errors.ConfigError, axes=axes) == [
        "prune.budget: axes has a value it cannot take.",
        f"  got       {axes!r}",
        "  expected  some of 'heads', 'head_dims', 'mlp', 'channels', 'decoder', each once",
    ]


def test_attention_is_cut_in_one_way() -> None:
    assert message(errors.ConfigError, axes=("heads", "head_dims")) == [
        "prune.budget cuts each attention in one way.",
        "  got       axes=('heads', 'head_dims')",
        '  try       "heads" here, and sc.prune.HeadDims as a step of its own',
    ]


@pytest.mark.parametrize("value", [0, 1, 1.5])
def test_max_ratio_out_of_range(value: float) -> None:
    assert (
        message(errors.ConfigError, max_ratio=value)[0]
        == "prune.budget: max_ratio is out of range."
    )


def test_nothing_can_go() -> None:
    assert message(errors.NoEffectError, axes=("mlp",), round_to=128) == [
        "prune.budget finds no module that can lose anything.",
        "  got       at most 96 units in each, round_to=128",
        "  try       round_to=1, or other axes=",
    ]


def test_no_data() -> None:
    assert (
        message(errors.DataError, data=None, ratios="embedding")[0] == "prune.budget needs images."
    )


def test_masks_without_objects() -> None:
    images = [sc.Sample.from_arrays("plain", SCENES[0].image, [])]
    assert message(errors.DataError, data=images, ratios="masks", budget="macs<=70%") == [
        "prune.budget needs annotated objects to compare masks with.",
        "  got       images without any",
        "  expected  data with masks",
        '  try       "embedding" instead of "masks" needs images only',
    ]
