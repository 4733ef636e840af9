"""prune.unstructured: shares by row and layer, and the mathematics that prune.sparse24 uses too."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import random_sam
from pruning import SCENES, encode, toy
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core.predict import preprocess
from samcompress.prune._sparse_choice import BLOCK, lowest, reconstructed, two_of_four, zeros
from samcompress.prune._sparse_inputs import listening, products, squares, sums
from samcompress.prune._sparse_layers import Sparse24Linear, SparseLinear
from samcompress.prune.sparse24 import Sparse24
from samcompress.prune.unstructured import Unstructured

CRITERIA = ("magnitude", "wanda", "sparsegpt")
LIN1 = "image_encoder.blocks.0.mlp.lin1"
TECHNIQUES = (Sparse24(), Unstructured(), Unstructured(per="layer", ratio=0.3))


def run(sam: Any = None, data: Any = SCENES, **fields: Any) -> Any:
    return Unstructured(**fields)(random_sam() if sam is None else sam, data=data, progress=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77])
def test_share_of_each_row(criterion: Any, ratio: float) -> None:
    sparse = run(criterion=criterion, ratio=ratio, where="image_encoder.blocks.*.mlp.*")
    for name, layer in sparse.named_modules():
        if isinstance(layer, SparseLinear):
            assert set((layer.weight == 0).sum(1).tolist()) == {int(layer.in_features * ratio)}
            assert ".mlp." in name


@pytest.mark.parametrize("criterion", CRITERIA)
def test_share_of_each_layer(criterion: Any) -> None:
    weight = run(criterion=criterion, ratio=0.3, per="layer").get_submodule(LIN1).weight
    assert int((weight == 0).sum()) == int(weight.numel() * 0.3)
    assert len(set((weight == 0).sum(1).tolist())) > 1


def test_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 2, 4], [5, 8, 7, 6]])
    row = lowest(scores, 0, ratio=0.5, per="row")
    layer = lowest(scores, 0, ratio=0.5, per="layer")
    assert row.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert layer.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert zeros(100, 0.29) == 29
    # Columns chosen in portions have their share in all.
    parts = [lowest(drawn(2, 5), start, ratio=0.3, per="row").sum(1) for start in range(0, 20, 5)]
    assert [p.tolist() for p in parts] == [[1, 1], [2, 2], [1, 1], [2, 2]]


def test_more_zeros_in_a_second_step() -> None:
    first = run(ratio=0.3, criterion="magnitude")
    for criterion in CRITERIA:
        second = run(first, ratio=0.6, criterion=criterion)
        before, after = (m.get_submodule(LIN1).weight for m in (first, second))
        assert not after[before == 0].any()
        assert set((after == 0).sum(1).tolist()) == {19}
    assert len(sc.lineage(second)) == 2


def test_together_with_two_of_four() -> None:
    sparse = Sparse24(criterion="magnitude")(random_sam(), progress=False)
    both = run(sparse, ratio=0.75, criterion="magnitude").get_submodule(LIN1)
    assert isinstance(both, Sparse24Linear)  # at least two in each four still
    assert set((both.weight == 0).sum(1).tolist()) == {24}
    turned = Sparse24(criterion="magnitude")(run(ratio=0.2, criterion="magnitude"), progress=False)
    assert isinstance(turned.get_submodule(LIN1), Sparse24Linear)


# --- criteria -------------------------------------------------------------------------------------


def thinned(technique: Any, criterion: str, weight: Tensor, heard: Tensor | None) -> Tensor:
    """A layer of these weights that was fed something, through a technique."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    dataclasses.replace(technique, criterion=criterion)._thin("layer", layer, heard)
    return layer.weight.detach()


@pytest.mark.parametrize("technique", TECHNIQUES, ids=repr)
def test_all_criteria_agree_where_inputs_are_alike(technique: Any) -> None:
    # In rows longer than a block SparseGPT shares the zeros out block by block.
    for columns in (BLOCK, *([300] if technique == Sparse24() else [])):
        weight = drawn(24, columns)
        expected = thinned(technique, "magnitude", weight, None)
        alike = torch.full((columns,), 7.0)
        assert torch.equal(thinned(technique, "wanda", weight, alike), expected)
        assert torch.equal(thinned(technique, "sparsegpt", weight, alike.diag()), expected)
        assert torch.equal(thinned(technique, "sparsegpt", weight, 0 * alike.diag()), expected)
    weight = drawn(24, 300)
    expected = thinned(technique, "magnitude", weight, None)
    assert torch.equal(thinned(technique, "wanda", weight, torch.ones(300)), expected)


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -2, 3, 4], [-1, 1, 1, 1]])
    norms = torch.tensor([9.0, 2, 1, 0.5])
    found = thinned(Sparse24(), "wanda", weight, norms.square())
    assert found.tolist() == [[1, -2, 0, 0], [-1, 1, 0, 0]]  # 9 4 3 2 and 9 2 1 0.5
    weight = torch.tensor([[1.0, -2, 3, 9], [-1, 1, 1, 1]])
    found = thinned(Unstructured(per="layer"), "wanda", weight, norms.square())
    assert found.tolist() == [[1, -2, 0, 9], [-1, 0, 0, 0]]  # 9 4 3 4.5 and 9 2 1 0.5


def naive(weight: Tensor, gram: Tensor, choose: Any, span: int) -> Tensor:
    """Optimal brain surgery on the columns that are left, each with an inverse of its own."""
    w, n = weight.double().clone(), weight.shape[1]
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(n)
    gone = torch.zeros_like(w, dtype=torch.bool)
    left = [torch.linalg.inv(damped[j:, j:]) for j in range(n)]
    for j in range(n):
        if j % span == 0:
            loss = [w[:, i].square() / left[i][0, 0] for i in range(j, min(j + span, n))]
            gone[:, j : j + span] = choose(torch.stack(loss, 1), j)
        # The rows that lose this weight: the others move as the inverse says.
        rows = gone[:, j]
        w[rows, j:] -= torch.outer(w[rows, j] / left[j][0, 0], left[j][0])
        w[rows, j] = 0
    return w


@pytest.mark.parametrize("technique", TECHNIQUES, ids=repr)
@pytest.mark.parametrize("columns", [24, BLOCK + 20])
def test_sparsegpt_against_a_naive_one(technique: Any, columns: int) -> None:
    x = drawn(300, columns, seed=1) @ drawn(columns, columns, seed=2) + 1
    weight, gram = drawn(10, columns), products(x)
    found = reconstructed(weight, gram, technique.choose, technique.span)
    expected = naive(weight, gram, technique.choose, technique.span)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=repr)
def test_each_criterion_is_better_than_the_one_before(technique: Any) -> None:
    x = drawn(500, 16, seed=1) @ drawn(16, 64, seed=2) + 0.3 * drawn(500, 64, seed=4)
    x *= 1 + 3 * drawn(64, seed=3).abs()  # few directions, unlike strengths
    weight = drawn(32, 64)
    heard = {"magnitude": None, "wanda": squares(x), "sparsegpt": products(x)}
    errors_of = [
        float((x @ (thinned(technique, name, weight, found) - weight).T).norm())
        for name, found in heard.items()
    ]
    assert errors_of[0] > errors_of[1] > 1.5 * errors_of[2]


# --- what layers are fed --------------------------------------------------------------------------


def heard(sam: Any, names: list[str], measure: Any = squares, data: Any = SCENES) -> Any:
    return {k: v for part in sums(sam, names, lambda: data, measure, 0) for k, v in part.items()}


PROJ = [f"image_encoder.blocks.{i}.attn.proj" for i in range(4)]


def test_padding_of_windows_has_no_say() -> None:
    sam = toy()
    # Fused attention pads after its projection, so its heads are joined without padding.
    fused = sc.attention.Fused()(sam, progress=False)
    names = [*PROJ, "image_encoder.blocks.2.attn.qkv", "image_encoder.blocks.2.mlp.lin2"]
    for measure in (squares, products):
        found, expected = heard(sam, names, measure), heard(fused, names, measure)
        assert found.keys() == set(names)
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    padded: list[Tensor] = []
    layer = sam.get_submodule(PROJ[0])
    handle = layer.register_forward_pre_hook(lambda m, args: padded.append(args[0]))
    encode(sam)
    handle.remove()
    assert padded[0][..., 0].numel() > 2 * 64  # tokens of two images, and padding
    assert padded[0].abs().amin(-1).min() > 0


def test_padding_of_the_image_is_there() -> None:
    sam, name = toy(), "image_encoder.blocks.0.mlp.lin1"
    seen: list[Tensor] = []
    layer = sam.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for sample in SCENES:
        sam.image_encoder(preprocess(sam, sample.image)[0][None])
    handle.remove()
    assert seen[0].shape[1:3] == (8, 8)
    x = torch.cat(seen).flatten(0, 2)
    found = heard(sam, [name], products)[name]
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heard(sam, [name])[name], found.diagonal(), rtol=1e-4, atol=1e-4)


def test_later_blocks_are_fed_by_thinned_ones() -> None:
    later = "image_encoder.blocks.2.mlp.lin2"
    sam = toy()
    dense = heard(sam, [LIN1, later])[later]
    first = Sparse24(criterion="wanda", where=LIN1)(sam, data=SCENES, progress=False)
    expected = heard(first, [later])[later]
    found = {}
    for part in sums(twin := toy(), [later, LIN1], lambda: SCENES, squares, 0):
        if LIN1 in part:
            twin.get_submodule(LIN1).weight.data.copy_(first.get_submodule(LIN1).weight)
        found |= part
    torch.testing.assert_close(found[later], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense, expected, rtol=1e-2)


def test_layers_of_the_decoder() -> None:
    sam = random_sam()
    name = "mask_decoder.transformer.layers.0.mlp.lin1"
    found = [heard(sam, [name, LIN1])[name] for _ in range(2)]
    assert torch.equal(*found)
    assert (found[0] > 0).all()
    sparse = run(sam, where=("mask_decoder.transformer.**",), criterion="sparsegpt")
    assert torch.equal(encode(sparse), encode(sam))
    assert isinstance(sparse.get_submodule(name), SparseLinear)


def test_no_hook_is_left() -> None:
    sam = toy()
    with pytest.raises(RuntimeError, match="stop"), listening(sam, PROJ, squares):
        raise RuntimeError("stop")
    assert not any(m._forward_pre_hooks for m in sam.modules())


def test_at_most_so_many_images_are_read_and_reported() -> None:
    events: list[Any] = []
    scenes = sc.shapes(3, seed=5, size=(48, 64))
    step = Unstructured(images=2, criterion="wanda")
    found = step(random_sam(), data=scenes, progress=events.append)
    assert [(e.label, e.done, e.total) for e in events] == [("images", 1, 2), ("images", 2, 2)]
    again = step(random_sam(), data=scenes[:2], progress=False)
    assert torch.equal(encode(found), encode(again))
    Unstructured(criterion="magnitude")(random_sam(), progress=events.append)
    assert [(e.label, e.done, e.total) for e in events[2:]] == [
        ("layers", i, 4) for i in (1, 2, 3, 4)
    ]


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Unstructured(ratio=ratio)
    assert str(caught.value).startswith("prune.unstructured: ratio is out of range.")
    assert "0 < ratio < 1" in str(caught.value)


@pytest.mark.parametrize(("ratio", "per"), [(0.5, "row"), (0.3, "row"), (0.4, "layer")])
def test_nothing_would_change(ratio: float, per: Any) -> None:
    sparse = run(criterion="magnitude")
    with pytest.raises(errors.NoEffectError) as caught:
        run(sparse, ratio=ratio, per=per, criterion="wanda")
    assert str(caught.value).splitlines() == [
        "prune.unstructured would set nothing to zero.",
        "  where     Where(include=('image_encoder.blocks.*.mlp.*',), exclude=())",
        "  got       layers that have as many zeros already, or so few weights that none would go",
        "  try       leave this step out, or choose other layers with where=",
    ]
    with pytest.raises(errors.NoEffectError, match="so few weights"):
        run(ratio=0.001, criterion="magnitude")


def test_two_of_four_takes_whole_runs() -> None:
    assert two_of_four(torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4]])).int().tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0]
    ]
