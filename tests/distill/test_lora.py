from __future__ import annotations

import torch
from conftest import random_sam
from learners import changed, copied
from torch import nn

import samcompress as sc
from samcompress.core._trainable import training
from samcompress.distill._lora import attach, merge

PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]


def logits(sam: nn.Module) -> torch.Tensor:
    image = sc.shapes(1, seed=9, size=(60, 64))[0].image
    return sc.predict(sam, [image], [PROMPTS], multimask=True)[0].logits


def moved(updates: nn.ModuleList) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for update in updates:
            update.b += 0.5 * torch.randn(update.b.shape, generator=g)


def test_nothing_changes_at_first(tiny_sam: nn.Module) -> None:
    expected = logits(tiny_sam)
    names = [n for n, _ in tiny_sam.named_parameters()]
    before = torch.get_rng_state()
    updates = attach(tiny_sam.mask_decoder, 4)
    assert torch.equal(torch.get_rng_state(), before)
    # Two layers of three attentions and a last one, each with a query and a value.
    assert len(updates) == 2 * (2 * 3 + 1)
    assert {tuple(u.a.shape) for u in updates} == {(4, 32)}
    assert {tuple(u.b.shape) for u in updates} == {(32, 4), (16, 4)}
    assert torch.equal(logits(tiny_sam), expected)
    # They are no part of the model.
    held = [n.replace("parametrizations.weight.original", "weight") for n in dict_of(tiny_sam)]
    assert sorted(held) == sorted(names)
    merge(tiny_sam.mask_decoder)
    assert torch.equal(logits(tiny_sam), expected)


def dict_of(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters()]


def test_merged_equals_unmerged(tiny_sam: nn.Module) -> None:
    first, before = logits(tiny_sam), copied(tiny_sam)
    kinds = [(n, type(m)) for n, m in tiny_sam.named_modules()]
    parameters = dict(tiny_sam.named_parameters())
    updates = attach(tiny_sam.mask_decoder, 4)
    moved(updates)
    unmerged = logits(tiny_sam)
    assert (unmerged - first).abs().max() > 1e-2
    merge(tiny_sam.mask_decoder)
    torch.testing.assert_close(logits(tiny_sam), unmerged, rtol=0, atol=1e-5)
    assert [(n, type(m)) for n, m in tiny_sam.named_modules()] == kinds
    assert {n: id(p) for n, p in tiny_sam.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    found = changed(before, tiny_sam)
    assert len(found) == len(updates)
    assert all(n.endswith(("q_proj.weight", "v_proj.weight")) for n in found)
    assert all(n.startswith("mask_decoder.transformer.") for n in found)


def test_rank_and_scale(tiny_sam: nn.Module) -> None:
    before = copied(tiny_sam)
    updates = attach(tiny_sam.mask_decoder, 3, scale=2.0)
    moved(updates)
    assert torch.equal(updates[0](), 2 * (updates[0].b @ updates[0].a))
    merge(tiny_sam.mask_decoder)
    name = "mask_decoder.transformer.layers.0.self_attn.q_proj.weight"
    difference = tiny_sam.state_dict()[name] - before[name]
    assert torch.linalg.matrix_rank(difference, atol=1e-5) == 3
    merge(tiny_sam.mask_decoder)  # nothing left to do


def test_they_alone_train() -> None:
    sam = random_sam()
    whole = nn.ModuleDict({"sam": sam, "updates": attach(sam.mask_decoder, 2)})
    with training(whole, ("updates",)) as chosen:
        assert len(chosen) == 2 * 14
        attention = sam.mask_decoder.transformer.final_attn_token_to_image
        x = torch.rand(1, 3, 32, generator=torch.Generator().manual_seed(0))
        attention(x, x, x).sum().backward()
        last = whole["updates"][-1]
        assert last.b.grad.abs().sum() > 0
        assert last.a.grad is not None
        assert all(p.grad is None for p in sam.parameters())


def test_seeds() -> None:
    first, again, other = (attach(random_sam().mask_decoder, 2, seed=s) for s in (0, 0, 1))
    assert torch.equal(first[0].a, again[0].a)
    assert not torch.equal(first[0].a, other[0].a)
    assert not torch.equal(first[0].a, first[1].a)
