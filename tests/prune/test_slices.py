"""What all techniques of pruning promise: how many, which, and what becomes of the rest."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import ATTENTION, SLICES, TECHNIQUES, answers, encode, kept_of, off, prune, toy

import samcompress as sc
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint
from samcompress.prune import _cut
from samcompress.prune._groups import kept_count, share_out

every = pytest.mark.parametrize("name", list(TECHNIQUES))
each_slice = pytest.mark.parametrize("name", SLICES)


def without_data(name: str, **fields: Any) -> Any:
    criterion = "random" if name == "blocks" else "magnitude"
    return replace(TECHNIQUES[name], criterion=criterion, **fields)


# --- how many -------------------------------------------------------------------------------------


@each_slice
@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_check10_ratio_out_of_range(name: str, ratio: float) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        without_data(name, ratio=ratio)
    assert str(caught.value).splitlines() == [
        f"prune.{name}: ratio is out of range.",
        f"  got       {float(ratio)}",
        "  expected  0 < ratio < 1",
    ]


@each_slice
@pytest.mark.parametrize("field", ["round_to", "images"])
def test_counts_out_of_range(name: str, field: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"prune.{name}: {field} is out of range"):
        without_data(name, **{field: 0})


@each_slice
def test_check10_ratio_that_leaves_nothing(name: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        prune(without_data(name, ratio=0.999, round_to=1))
    assert f"prune.{name}: nothing of a module would be left." in str(caught.value)
    assert "at least 1 units left" in str(caught.value)


@each_slice
def test_check10_a_larger_ratio_keeps_a_part_of_what_a_smaller_keeps(name: str) -> None:
    sam = toy()
    some, few = (kept_of(prune(without_data(name, ratio=r), sam)) for r in (0.25, 0.74))
    assert some.keys() == few.keys()
    assert all(set(few[module]) < set(some[module]) for module in some)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.77])
@pytest.mark.parametrize("step", [1, 4, 8])
def test_check11_global_meets_the_total_within_a_step(ratio: float, step: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    scores = {
        "plain": torch.rand(96, generator=drawn),
        "skewed": torch.rand(120, generator=drawn) ** 8,
        "odd": torch.rand(61, generator=drawn),
        "constant": torch.ones(64),
    }
    total = sum(kept_count(len(s), ratio, step) for s in scores.values())
    counts = share_out(scores, total, step)
    assert total - step < sum(counts.values()) <= total
    assert all(step <= counts[name] <= len(scores[name]) for name in scores)


@pytest.mark.parametrize("name", ["mlp", "heads", "head_dims", "decoder"])
def test_check11_constant_scores_do_not_stop_it(name: str) -> None:
    sam = toy()
    for parameter in (*sam.image_encoder.parameters(), *sam.mask_decoder.parameters()):
        parameter.data.fill_(0.1)
    small = prune(without_data(name, scope="global"), sam)
    even = kept_of(prune(without_data(name), sam))
    assert sum(map(len, kept_of(small).values())) <= sum(map(len, even.values()))
    assert all(kept_of(small).values())


def test_check11_pools_do_not_mix() -> None:
    """Heads of the decoder that matter a lot leave its hidden units as they were."""
    sam = toy()
    loud = copy.deepcopy(sam)
    for name, parameter in loud.named_parameters():
        if "mask_decoder.transformer.layers.0.self_attn" in name:
            parameter.data *= torch.linspace(1, 50, len(parameter)).view(
                -1, *[1] * (parameter.ndim - 1)
            )
    technique = without_data("decoder", scope="global")
    plain, other = (kept_of(prune(technique, model)) for model in (sam, loud))
    differ = {module for module in plain if plain[module] != other[module]}
    assert differ
    assert all("self_attn" in module for module in differ)


# --- what becomes of the model --------------------------------------------------------------------


@every
def test_check12_the_input_stays_as_it_was(name: str) -> None:
    sam = toy()
    sam.image_encoder.blocks[0].requires_grad_(False)
    sam.image_encoder.train()
    before = fingerprint(sam)
    trainable = {n: p.requires_grad for n, p in sam.named_parameters()}
    small = prune(without_data(name), sam)
    assert fingerprint(sam) == before
    assert {n: p.requires_grad for n, p in sam.named_parameters()} == trainable
    storage = {p.untyped_storage().data_ptr() for p in sam.parameters()}
    assert not any(p.untyped_storage().data_ptr() in storage for p in small.parameters())
    assert all(p.is_contiguous() and p.is_leaf for p in small.parameters())
    # New tensors are whole: none is a view of a larger one.
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in small.parameters())
    for module in small.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert {n: p.requires_grad for n, p in small.named_parameters()}.items() <= trainable.items()
    assert small.image_encoder.training
    assert all(block.training for block in small.image_encoder.blocks)
    assert not small.mask_decoder.training


@every
def test_check13_a_frozen_model_is_pruned_too(name: str) -> None:
    technique = replace(TECHNIQUES[name], images=1)
    free, frozen = toy(), toy().requires_grad_(False)
    small = prune(technique, frozen)
    assert kept_of(small) == kept_of(prune(technique, free))
    assert not any(p.requires_grad for p in small.parameters())


@every
def test_check12_works_where_the_model_is(name: str, device: str) -> None:
    small = prune(replace(TECHNIQUES[name], images=1), toy().to(device))
    assert {p.device.type for p in small.parameters()} == {torch.device(device).type}
    assert all(module.training is False for module in small.modules())


@every
def test_under_no_grad(name: str) -> None:
    technique = replace(TECHNIQUES[name], images=1)
    expected = kept_of(prune(technique))
    with torch.no_grad():
        assert kept_of(prune(technique)) == expected


@every
def test_small_types_stay(name: str) -> None:
    sam = toy()
    sam.image_encoder.to(torch.bfloat16)
    sam.mask_decoder.to(torch.bfloat16)
    small = prune(replace(TECHNIQUES[name], images=1), sam)
    kinds = {n: p.dtype for n, p in sam.named_parameters()}
    assert all(p.dtype == kinds[n] for n, p in small.named_parameters())
    assert answers(small).isfinite().all()


@every
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    small = prune(without_data(name))
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(answers(again), answers(small))
    assert kept_of(again) == kept_of(small)


@each_slice
@pytest.mark.parametrize("criterion", ["disturbed_taylor", "taylor", "activation", "random"])
def test_every_criterion(name: str, criterion: Any) -> None:
    technique = replace(TECHNIQUES[name], criterion=criterion, images=1)
    assert technique.needs_data == (criterion != "random")
    small = prune(technique)
    assert sc.lineage(small)[-1].facts["after"]["parameters"] < sum(
        p.numel() for p in toy().parameters()
    )
    assert answers(small).isfinite().all()


@each_slice
def test_weights_that_are_not_finite(name: str) -> None:
    sam = toy()
    for parameter in sam.parameters():
        parameter.data.view(-1)[0] = float("nan")
    with pytest.raises(errors.ModelError) as caught:
        prune(without_data(name), sam)
    assert f"prune.{name}: the importance of units is not a finite number." in str(caught.value)
    assert "a model with finite weights and outputs" in str(caught.value)


# --- in company -----------------------------------------------------------------------------------


def cuts() -> list[Any]:
    def of_heads(sam: Any) -> None:
        for name in ATTENTION:
            _cut.keep_heads(sam.get_submodule(name), [0, 2, 3])

    def of_dims(sam: Any) -> None:
        for name in ATTENTION:
            _cut.keep_head_dims(sam.get_submodule(name), [1, 2, 4, 7])

    def of_units(sam: Any) -> None:
        for block in sam.image_encoder.blocks:
            _cut.keep_hidden(block.mlp, range(0, 96, 2))

    def of_channels(sam: Any) -> None:
        _cut.keep_channels(sam.image_encoder, range(1, 32, 2))

    return [of_heads, of_dims, of_units, of_channels]


def test_check14_cuts_commute() -> None:
    sam = toy()
    made = []
    for order in itertools.permutations(cuts()):
        small = copy.deepcopy(sam)
        for cut in order:
            cut(small)
        made.append(small.state_dict())
    for state in made[1:]:
        assert state.keys() == made[0].keys()
        # The keys' factor is applied before or after the columns go: the same products.
        assert all(torch.equal(state[key], made[0][key]) for key in state)


def test_check14_all_of_pruning_then_fused_attention_and_bytes(tmp_path: Path) -> None:
    chain = sc.Pipeline([without_data(name) for name in ("blocks", *SLICES)])
    small = prune(chain)
    fused = prune(sc.attention.Fused(), small)
    assert off(answers(fused), answers(small)) < 1e-4
    bytes_ = prune(sc.quantize.Int8Weights(min_size=0), fused)
    sc.save(bytes_, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(answers(again), answers(bytes_))
    assert [s.transform.name for s in sc.lineage(again)][:6] == [s.name for s in chain]


@pytest.mark.slow
def test_check14_all_of_pruning_then_export() -> None:
    chain = sc.Pipeline([without_data(name) for name in ("blocks", *SLICES)])
    small = prune(chain)
    exported = prune(sc.compile.Export(), small)
    assert off(answers(exported), answers(small)) < 1e-3


@pytest.mark.parametrize("name", ["mlp", "heads", "head_dims", "channels", "blocks"])
def test_check14_encoders_without_vit_blocks_are_refused(name: str) -> None:
    pytest.importorskip("timm")
    sam = prune(sc.substitute.TinyViT(), toy())
    with pytest.raises(errors.ModelError) as caught:
        prune(without_data(name), sam)
    text = str(caught.value)
    if name in ("channels", "blocks"):
        assert f"prune.{name} finds no ViT blocks of segment_anything." in text
    else:
        assert f"prune.{name} finds no ViT of segment_anything in the image encoder." in text


@pytest.mark.parametrize("name", ["mlp", "decoder"])
def test_what_attention_leaves_alone_can_be_pruned_after_it(name: str) -> None:
    fused = prune(sc.attention.Fused(), toy())
    with pytest.raises(errors.OrderError):
        prune(without_data(name), fused)
    late = prune(sc.Pipeline([without_data(name)], any_order=True), fused)
    assert off(answers(late), answers(prune(without_data(name)))) < 1e-4


@pytest.mark.parametrize("name", ["mlp", "heads", "head_dims", "decoder"])
def test_sam_hq(name: str) -> None:
    from samcompress.substitute.hq import HQ

    sam = prune(HQ(), toy())
    small = prune(replace(TECHNIQUES[name], images=1), sam)
    assert small.mask_decoder.features == 32
    assert answers(small).shape == answers(sam).shape


def test_pruning_then_distillation() -> None:
    chain = sc.prune.Heads(ratio=0.5, criterion="random") | sc.prune.Channels(
        ratio=0.5, criterion="random", round_to=8
    )
    small = prune(chain | sc.distill.Encoder(steps=2, batch_size=2))
    assert len(sc.lineage(small)) == 3
    assert encode(small).shape == encode(toy()).shape
