"""prune.mlp: the slice is exact, the scores are what they claim, the arithmetic holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import random_sam
from pruning import SCENES, encode, gone, kept_of, prune
from segment_anything.modeling.common import MLPBlock

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import parameter_count
from samcompress.evaluate.macs import macs
from samcompress.prune._cut import keep_hidden
from samcompress.prune._groups import KINDS, best, kept_count, share_out
from samcompress.prune._importance import element_scores

ENCODER = "image_encoder.blocks.*.mlp"
DECODER = "mask_decoder.transformer.layers.*.mlp"


def run(**fields: Any) -> Any:
    sam, data = fields.pop("sam", None) or random_sam(), fields.pop("data", None)
    return prune(sc.prune.Mlp(**fields), sam, data=data)


def scored(sam: Any, names: list[str], criterion: Any = "disturbed_taylor") -> dict[str, Any]:
    groups = [group for name in names for group in KINDS["mlp"].groups(sam, name)]
    weights = [member.weight for group in groups for member in group.members]
    elements = element_scores(sam, weights, criterion, SCENES)
    return {group.name: group.reduce(elements) for group in groups}


# --- the slice ------------------------------------------------------------------------------------


def test_check1_removing_a_unit_is_masking_it() -> None:
    sam = random_sam()
    small = run(sam=sam, ratio=0.5, criterion="magnitude")
    by_row, by_column, without_bias = (copy.deepcopy(sam) for _ in range(3))
    for name, kept in kept_of(small).items():
        away = gone(kept, 96)
        for masked in (by_row, without_bias):
            masked.get_submodule(name).lin1.weight.data[away] = 0
        by_row.get_submodule(name).lin1.bias.data[away] = 0
        by_column.get_submodule(name).lin2.weight.data[:, away] = 0
    found = encode(small)
    torch.testing.assert_close(found, encode(by_row), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, encode(by_column), rtol=0, atol=1e-5)
    assert (found - encode(without_bias)).abs().max() > 1e-3  # the bias alone passes through GELU


def test_slice_by_hand() -> None:
    block = MLPBlock(2, 4)
    block.lin1.weight.data = torch.arange(8.0).view(4, 2)
    block.lin1.bias.data = torch.arange(4.0)
    block.lin2.weight.data = torch.arange(8.0).view(2, 4)
    bias = block.lin2.bias.clone()
    keep_hidden(block, [1, 3])
    assert block.lin1.weight.tolist() == [[2, 3], [6, 7]]
    assert block.lin1.bias.tolist() == [1, 3]
    assert block.lin2.weight.tolist() == [[1, 3], [5, 7]]
    assert torch.equal(block.lin2.bias, bias)
    assert (block.lin1.out_features, block.lin2.in_features) == (2, 2)
    assert block.lin2.weight.is_contiguous()


def test_everything_falls_by_the_formula() -> None:
    sam = random_sam()
    small = run(sam=sam, ratio=0.5, criterion="magnitude")
    units = 2 * 48  # two blocks of 96 lose half
    assert parameter_count(sam) - parameter_count(small) == units * (32 + 1 + 32)
    assert macs(sam).encoder - macs(small).encoder == units * 64 * 2 * 32  # 64 tokens
    facts = sc.lineage(small)[-1].facts
    assert facts["before"]["bytes"] - facts["after"]["bytes"] == 4 * units * 65


def test_dtype_and_flags_are_kept() -> None:
    sam = random_sam().to(torch.bfloat16).requires_grad_(False)
    small = run(sam=sam, data=sc.shapes(1, size=64))
    for parameter in small.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad


def test_saved_and_loaded(tmp_path: Any) -> None:
    small = run(where=(ENCODER, DECODER), criterion="random", scope="global")
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(encode(again), encode(small))
    assert kept_of(again) == kept_of(small)


def test_recipes_of_version_1_mean_what_they_meant() -> None:
    for params, criterion in (
        ({"criterion": "taylor"}, "disturbed_taylor"),
        ({"criterion": "random"}, "random"),
        ({}, "disturbed_taylor"),
    ):
        entry = {"type": "prune.mlp", "version": 1, "params": params}
        assert next(iter(sc.Pipeline.from_dict([entry]))) == sc.prune.Mlp(criterion=criterion)
    labelled = sc.Pipeline([sc.prune.Mlp(criterion="taylor")])
    assert sc.Pipeline.from_json(labelled.to_json()) == labelled


# --- how many, and which --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "ratio", "round_to", "kept"),
    [
        (3072, 0.25, 8, 2304),
        (3072, 0.77, 32, 704),
        (100, 0.5, 8, 48),
        (10, 0.9, 1, 1),  # 10 x (1 - 0.9) is below 1 in binary
        (10, 0.7, 1, 3),
        (3072, 0.0001, 1, 3071),
        (8, 0.25, 8, 0),
    ],
)
def test_kept_count(units: int, ratio: float, round_to: int, kept: int) -> None:
    assert kept_count(units, ratio, round_to) == kept


def test_best_is_stable_and_in_order() -> None:
    assert best(torch.tensor([1.0, 5.0, 5.0, 3.0, 5.0]), 3) == [1, 2, 4]
    assert best(torch.tensor([2.0, 2.0, 2.0]), 2) == [0, 1]


def test_a_larger_ratio_keeps_a_part_of_what_a_smaller_keeps() -> None:
    some, few = (kept_of(run(ratio=r, criterion="magnitude")) for r in (0.25, 0.75))
    for name in some:
        assert set(few[name]) < set(some[name])


def test_random_follows_its_seed() -> None:
    first, same, other = (kept_of(run(criterion="random", seed=s)) for s in (1, 1, 2))
    assert first == same != other
    assert len({tuple(kept) for kept in first.values()}) == 2  # another draw for each block


def test_share_out_by_hand() -> None:
    scores = {"a": torch.tensor([4.0, 0.0, 0.0, 0.0]), "b": torch.tensor([4.0, 4.0, 0.0, 0.0])}
    # At mean 0, deviation 1: a is 1.73 and three of -0.58, b is two of 1 and two of -1.
    assert share_out(scores, 3, 1) == {"a": 1, "b": 2}
    assert share_out(scores, 4, 1) == {"a": 2, "b": 2}
    assert share_out(scores, 6, 1) == {"a": 4, "b": 2}
    assert share_out(scores, 0, 1) == {"a": 1, "b": 1}  # every layer keeps its best portion


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
def test_global_meets_the_total_within_a_step(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        "plain": torch.rand(96, generator=generator),
        "skewed": torch.rand(120, generator=generator) ** 8,
        "odd": torch.rand(61, generator=generator),
        "constant": torch.ones(64),
    }
    total = sum(kept_count(len(s), ratio, 8) for s in scores.values())
    counts = share_out(scores, total, 8)
    assert total - 8 < sum(counts.values()) <= total
    assert all(8 <= counts[name] <= len(scores[name]) for name in scores)


def test_global_takes_more_where_less_matters() -> None:
    sam = random_sam()
    first = sam.image_encoder.blocks[0].mlp
    for weight in (first.lin1.weight, first.lin2.weight.T):
        weight.data[:16] *= 30  # sixteen units stand out, the other eighty do not
    small = run(sam=sam, ratio=0.5, criterion="magnitude", scope="global")
    kept = kept_of(small)
    counts = [len(kept[f"image_encoder.blocks.{i}.mlp"]) for i in range(2)]
    assert sum(counts) == 96
    assert counts[0] != counts[1]
    assert set(range(16)) <= set(kept["image_encoder.blocks.0.mlp"])


# --- scores ---------------------------------------------------------------------------------------


def test_magnitude_by_hand() -> None:
    sam = random_sam()
    block = sam.image_encoder.blocks[0].mlp
    block.lin1.bias.data *= 100  # says nothing about what matters
    [found] = scored(sam, ["image_encoder.blocks.0.mlp"], "magnitude").values()
    for unit in (0, 50, 95):
        row, column = block.lin1.weight.detach()[unit], block.lin2.weight.detach()[:, unit]
        assert float(found[unit]) == pytest.approx(float(row @ row + column @ column) / 2)


def test_taylor_finds_the_units_that_do_nothing() -> None:
    sam = random_sam()
    idle = [3, 17, 40, 41, 42, 60, 77, 95]
    sam.image_encoder.blocks[0].mlp.lin2.weight.data[:, idle] = 0  # large lin1 rows, no effect
    sam.image_encoder.blocks[0].mlp.lin1.weight.data[idle] *= 50
    for criterion in ("disturbed_taylor", "taylor"):
        small = run(sam=sam, ratio=8 / 96, data=SCENES, criterion=criterion)
        assert not set(idle) & set(kept_of(small)["image_encoder.blocks.0.mlp"])
    by_size = kept_of(run(sam=sam, ratio=8 / 96, criterion="magnitude"))
    assert set(idle) <= set(by_size["image_encoder.blocks.0.mlp"])


def test_decoder() -> None:
    sam = random_sam()
    small = run(sam=sam, where=DECODER, ratio=0.5, data=SCENES)
    hidden = [layer.mlp.lin1.out_features for layer in small.mask_decoder.transformer.layers]
    assert hidden == [64, 64]
    assert torch.equal(encode(small), encode(sam))
    names = [f"mask_decoder.transformer.layers.{i}.mlp" for i in range(2)]
    scores = scored(sam, names)
    # ReLU leaves many units silent on two scenes, but not all.
    assert all(torch.isfinite(s).all() and (s > 0).float().mean() > 0.3 for s in scores.values())
    both = scored(sam, [*names, "image_encoder.blocks.0.mlp"])
    assert both.keys() == {*names, "image_encoder.blocks.0.mlp"}


def test_encoder_and_decoder_are_ranked_apart() -> None:
    small = run(where=(ENCODER, DECODER), criterion="random", scope="global", ratio=0.5)
    totals = {"image_encoder": 0, "mask_decoder": 0}
    for name, kept in kept_of(small).items():
        totals[name.partition(".")[0]] += len(kept)
    assert totals == {"image_encoder": 96, "mask_decoder": 128}


def test_at_most_so_many_images_are_read_and_reported() -> None:
    events: list[Any] = []
    scenes = sc.shapes(3, seed=5, size=(48, 64))
    sc.prune.Mlp(images=2)(random_sam(), data=scenes, progress=events.append)
    assert [(e.step, e.label, e.done, e.total) for e in events] == [
        ("prune.mlp", "images", 1, 2),
        ("prune.mlp", "images", 2, 2),
    ]


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], **fields: Any) -> str:
    with pytest.raises(error) as caught:
        run(**fields)
    return str(caught.value)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_ratio_out_of_range(ratio: float) -> None:
    text = message(errors.ConfigError, ratio=ratio)
    assert text.startswith("prune.mlp: ratio is out of range.")
    assert "0 < ratio < 1" in text


@pytest.mark.parametrize("name", ["round_to", "images"])
def test_counts_out_of_range(name: str) -> None:
    text = message(errors.ConfigError, **{name: 0})
    assert text.startswith(f"prune.mlp: {name} is out of range.")
    assert "at least 1" in text


def test_unknown_criterion() -> None:
    known = "'disturbed_taylor' | 'taylor' | 'activation' | 'magnitude' | 'random'"
    assert known in message(errors.ConfigError, criterion="l1")


def test_ratio_that_empties_a_layer() -> None:
    text = message(errors.ConfigError, ratio=0.95, criterion="magnitude")
    assert text.splitlines() == [
        "prune.mlp: nothing of a module would be left.",
        "  where     image_encoder.blocks.0.mlp with 96 units",
        "  got       ratio=0.95, round_to=8",
        "  expected  at least 8 units left",
        "  try       a smaller ratio=, or round_to=1",
    ]
    assert len(kept_of(run(ratio=0.95, round_to=1, criterion="magnitude"))) == 2


def test_after_quantisation() -> None:
    sam = sc.quantize.Int8Weights(min_size=0)(random_sam(), progress=False)
    pipe = sc.Pipeline([sc.prune.Mlp(criterion="magnitude")], any_order=True)
    with pytest.raises(errors.ModelError) as caught:
        pipe(sam, progress=False)
    assert str(caught.value).splitlines() == [
        "prune.mlp cannot cut a layer that was replaced.",
        "  where     image_encoder.blocks.0.mlp.lin1",
        "  got       Int8Linear",
        "  expected  torch.nn.Linear or torch.nn.Conv2d",
        "  try       prune first, then quantize",
    ]
    assert "prune.mlp comes after quantize.int8_weights" in message(
        errors.OrderError, sam=sam, criterion="magnitude"
    )


def test_no_mlp() -> None:
    text = message(errors.NoEffectError, where="image_encoder.blocks.*.attn", criterion="magnitude")
    assert text.splitlines() == [
        "prune.mlp matched no module it can act on.",
        "  where     Where(include=('image_encoder.blocks.*.attn',), exclude=())",
        "  got       Attention",
        "  expected  MLPBlock of segment_anything",
        "  try       prune before modules are replaced; other encoders with sc.prune.Filters",
    ]


def test_weights_that_are_not_finite() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[1].mlp.lin1.weight.data[5, 0] = float("nan")
    text = message(errors.ModelError, sam=sam, criterion="magnitude")
    assert text.startswith("prune.mlp: the importance of units is not a finite number.")
    assert "image_encoder.blocks.1.mlp" in text
    assert "1 of 96 scores" in text


def test_no_readable_image() -> None:
    class Broken(sc.Sample):
        @property
        def image(self) -> Any:
            raise errors.DataError("the file is gone.")

    data = sc.Dataset([Broken("x", "x.jpg", (4, 4))], "broken", skips=skips())
    text = message(errors.DataError, data=data)
    assert text.splitlines() == [
        "prune.mlp could read none of its images.",
        "  where     broken",
        "  got       image of x: the file is gone",
        "  try       mend the data, or use a criterion that needs none",
    ]


def skips() -> Any:
    from samcompress.core.data._dataset import Skips

    return Skips("skip")
