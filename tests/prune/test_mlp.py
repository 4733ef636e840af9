"""prune.mlp: the slice is exact, the scores are what they claim, the arithmetic holds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything.modeling.common import MLPBlock

import samcompress as sc
from samcompress.core import errors
from samcompress.core.predict import preprocess
from samcompress.core.sizes import parameter_count
from samcompress.evaluate.macs import macs
from samcompress.prune._groups import best, keep_hidden, kept_count, share_out
from samcompress.prune._importance import disturbed_taylor, hidden_scores, magnitude

ENCODER = "image_encoder.blocks.*.mlp"
DECODER = "mask_decoder.transformer.layers.*.mlp"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Backward passes of tensors this small lose far more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes() -> sc.Dataset:
    return sc.shapes(3, seed=5, size=(48, 64))


def run(**fields: Any) -> Any:
    data = fields.pop("data", None)
    sam = fields.pop("sam", None) or random_sam()
    return sc.prune.Mlp(**fields)(sam, data=data, progress=False)


def kept_of(model: torch.nn.Module) -> dict[str, list[int]]:
    return sc.lineage(model)[-1].state["kept"]


def encode(sam: Any) -> torch.Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return sam.image_encoder(images)


# --- the slice ------------------------------------------------------------------------------------


def test_removing_a_unit_is_masking_it() -> None:
    sam = random_sam()
    small = run(sam=sam, ratio=0.5, criterion="magnitude")
    by_row, by_column, without_bias = (copy.deepcopy(sam) for _ in range(3))
    for name, kept in kept_of(small).items():
        gone = sorted(set(range(96)) - set(kept))
        for masked in (by_row, without_bias):
            masked.get_submodule(name).lin1.weight.data[gone] = 0
        by_row.get_submodule(name).lin1.bias.data[gone] = 0
        by_column.get_submodule(name).lin2.weight.data[:, gone] = 0
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


def test_half_of_vit_b_is_the_size_known_from_arithmetic() -> None:
    sam = sc.SamConfig().build(empty=True)
    half = {f"image_encoder.blocks.{i}.mlp": list(range(1536)) for i in range(12)}
    sc.prune.Mlp().rebuild(sam, {"kept": half})
    assert parameter_count(sam.image_encoder) == 61_340_928
    assert parameter_count(sam) == 65_405_488


def test_dtype_and_flags_are_kept() -> None:
    sam = random_sam().to(torch.bfloat16).requires_grad_(False)
    small = run(sam=sam, criterion="taylor", data=sc.shapes(1, size=64))
    for parameter in small.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad


def test_saved_and_loaded(tmp_path: Any) -> None:
    small = run(where=(ENCODER, DECODER), criterion="random", scope="global")
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(encode(again), encode(small))
    assert kept_of(again) == kept_of(small)


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
    block = MLPBlock(1, 2)
    block.lin1.weight.data = torch.tensor([[1.0], [2.0]])
    block.lin2.weight.data = torch.tensor([[3.0, 4.0]])
    block.lin1.bias.data = torch.tensor([100.0, 0.0])
    assert magnitude(block).tolist() == [(1 + 9) / 2, (4 + 16) / 2]


def test_agrees_with_torch_pruning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp = pytest.importorskip("torch_pruning")
    block = random_sam().image_encoder.blocks[0].mlp
    theirs = copy.deepcopy(block)
    example = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    theirs(example).square().sum().backward()
    graph = tp.DependencyGraph().build_dependency(theirs, example)
    group = graph.get_pruning_group(theirs.lin1, tp.prune_linear_out_channels, idxs=list(range(96)))
    settings = {"group_reduction": "mean", "normalizer": None, "bias": False}
    by_size = tp.importance.GroupMagnitudeImportance(p=2, **settings)(group)
    torch.testing.assert_close(magnitude(block), by_size.detach())
    by_taylor = tp.importance.GroupTaylorImportance(**settings)(group)
    weights = (theirs.lin1.weight, theirs.lin2.weight)
    products = [(w * w.grad).abs().detach() for w in weights]
    torch.testing.assert_close(hidden_scores(*products), by_taylor.detach())
    # The same half is kept, and the same tensors are left.
    kept = best(magnitude(block), 48)
    assert kept == sorted(by_size.argsort(descending=True)[:48].tolist())
    gone = sorted(set(range(96)) - set(kept))
    graph.get_pruning_group(theirs.lin1, tp.prune_linear_out_channels, idxs=gone).prune()
    keep_hidden(block, kept)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])


def test_taylor_is_the_sum_it_claims_to_be(scenes: sc.Dataset) -> None:
    """Every weight by itself, from the two-pass loss against a disturbed target."""
    sam = random_sam()
    names = [f"image_encoder.blocks.{i}.mlp" for i in range(2)]
    noises: list[torch.Tensor] = []
    draw = torch.randn

    def spy(*size: Any, **options: Any) -> torch.Tensor:
        noises.append(draw(*size, **options))
        return noises[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samcompress.prune._importance.torch.randn", spy)
        found = disturbed_taylor(sam, names, scenes, seed=4)
    assert [tuple(noise.shape) for noise in noises] == 3 * [(1, 32, 8, 8)]
    squares: dict[str, np.ndarray] = {}
    for scene, noise in zip(scenes, noises, strict=True):
        image = preprocess(sam, scene.image)[0][None]
        target = sam.image_encoder(image).detach() + noise
        sam.zero_grad()
        (target - sam.image_encoder(image)).square().sum().backward()
        for name in names:
            for layer in ("lin1", "lin2"):
                gradient = sam.get_submodule(f"{name}.{layer}").weight.grad.double().numpy() / 2
                squares[name + layer] = squares.get(name + layer, 0) + gradient**2
    for name in names:
        block = sam.get_submodule(name)
        first, second = (w.weight.detach().double().numpy() for w in (block.lin1, block.lin2))
        for unit in range(96):
            score = 0.0
            for e in range(32):
                score += abs(first[unit, e]) * squares[name + "lin1"][unit, e] ** 0.5
                score += abs(second[e, unit]) * squares[name + "lin2"][e, unit] ** 0.5
            assert float(found[name][unit]) == pytest.approx(score / 2, rel=1e-4)


def test_taylor_does_not_depend_on_the_order_of_images(scenes: sc.Dataset) -> None:
    sam, names = random_sam(), ["image_encoder.blocks.0.mlp"]
    forth = disturbed_taylor(sam, names, list(scenes), seed=0)
    back = disturbed_taylor(sam, names, list(scenes)[::-1], seed=0)
    other = disturbed_taylor(sam, names, list(scenes), seed=1)
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=0)
    assert not torch.equal(forth[names[0]], other[names[0]])


def test_taylor_follows_its_units(scenes: sc.Dataset) -> None:
    sam, name = random_sam(), "image_encoder.blocks.1.mlp"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    shuffled = copy.deepcopy(sam)
    keep_hidden(shuffled.get_submodule(name), order)
    plain = disturbed_taylor(sam, [name], scenes, seed=0)[name]
    moved = disturbed_taylor(shuffled, [name], scenes, seed=0)[name]
    torch.testing.assert_close(moved, plain[order], rtol=1e-4, atol=0)


def test_taylor_finds_the_units_that_do_nothing(scenes: sc.Dataset) -> None:
    sam = random_sam()
    idle = [3, 17, 40, 41, 42, 60, 77, 95]
    sam.image_encoder.blocks[0].mlp.lin2.weight.data[:, idle] = 0  # large lin1 rows, no effect
    sam.image_encoder.blocks[0].mlp.lin1.weight.data[idle] *= 50
    small = run(sam=sam, ratio=8 / 96, data=scenes)
    assert not set(idle) & set(kept_of(small)["image_encoder.blocks.0.mlp"])
    by_size = kept_of(run(sam=sam, ratio=8 / 96, criterion="magnitude"))
    assert set(idle) <= set(by_size["image_encoder.blocks.0.mlp"])


def test_decoder(scenes: sc.Dataset) -> None:
    sam = random_sam()
    small = run(sam=sam, where=DECODER, ratio=0.5, data=scenes)
    assert [layer.mlp.lin1.out_features for layer in small.mask_decoder.transformer.layers] == [
        64
    ] * 2
    assert torch.equal(encode(small), encode(sam))
    names = [f"mask_decoder.transformer.layers.{i}.mlp" for i in range(2)]
    scores = disturbed_taylor(sam, names, scenes, seed=0)
    # ReLU leaves many units silent on three scenes, but not all.
    assert all(torch.isfinite(s).all() and (s > 0).float().mean() > 0.3 for s in scores.values())
    both = disturbed_taylor(sam, [*names, "image_encoder.blocks.0.mlp"], scenes, seed=0)
    assert both.keys() == {*names, "image_encoder.blocks.0.mlp"}


def test_at_most_so_many_images_are_read_and_reported(scenes: sc.Dataset) -> None:
    events: list[Any] = []
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
    assert "'taylor' | 'magnitude' | 'random'" in message(errors.ConfigError, criterion="l1")


def test_ratio_that_empties_a_layer() -> None:
    text = message(errors.ConfigError, ratio=0.95, criterion="magnitude")
    assert text.splitlines() == [
        "prune.mlp: nothing of an MLP would be left.",
        "  where     image_encoder.blocks.0.mlp with 96 hidden units",
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
        "  expected  torch.nn.Linear",
        "  try       prune first, e.g. sc.prune.Mlp() | sc.quantize.Int8Weights()",
    ]
    assert "prune.mlp comes after quantize.int8_weights" in message(
        errors.OrderError, sam=sam, criterion="magnitude"
    )


def test_no_mlp() -> None:
    text = message(errors.NoEffectError, where="image_encoder.blocks.*.attn", criterion="magnitude")
    assert text.startswith("prune.mlp matched no module it can act on.")
    assert "MLPBlock" in text


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
    assert text.startswith("prune.mlp could read none of its images.")
    assert "broken" in text


def skips() -> Any:
    from samcompress.core.data._dataset import Skips

    return Skips("skip")
