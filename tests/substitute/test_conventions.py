"""Conventions of published models: what each changes, when it is refused, and that it is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything.modeling import MaskDecoder, PromptEncoder
from zoo_goldens import eps_of

import samcompress as sc
from samcompress.core import errors
from samcompress.core.framing import Framing, Stretched, Truncated, framing_of
from samcompress.substitute import _efficientsam
from samcompress.substitute.conventions import Conventions

ALL = [
    Conventions(of="tiny_sam"),
    Conventions(of="edge_sam", stability=True),
    Conventions(of="nano_sam"),
    Conventions(of="efficient_vit_sam"),
    Conventions(of="efficient_sam"),
]
each = pytest.mark.parametrize("step", ALL, ids=lambda step: step.of)
PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]


def image() -> np.ndarray:
    return sc.shapes(1, seed=9, size=(60, 80))[0].image


def ask(model: Any, *, multimask: bool = True) -> Any:
    return sc.predict(model, [image()], [PROMPTS], multimask=multimask)[0]


def encoder_of_kind(step: Conventions) -> Any:
    return sc.substitute.ResNet() if step.of == "nano_sam" else sc.substitute.ViT()


@each
def test_kept_by_save_and_load(step: Conventions, tmp_path: Path) -> None:
    sam = step(random_sam(), progress=False)
    sc.save(sam, tmp_path / "model")
    again = sc.load(tmp_path / "model")
    for multimask in (False, True):
        expected, found = (ask(m, multimask=multimask) for m in (sam, again))
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.masks, expected.masks)
    assert framing_of(again) == framing_of(sam)
    assert type(framing_of(again)) is type(framing_of(sam))
    assert sc.lineage(again)[0].transform == step


@each
def test_input_untouched_and_parts_where_they_were(step: Conventions) -> None:
    sam = random_sam().double()
    before = copy.deepcopy(sam.state_dict())
    made = step(sam, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in sam.state_dict().items())
    assert type(sam.prompt_encoder) is PromptEncoder
    assert type(sam.mask_decoder) is MaskDecoder
    assert {t.dtype for t in made.state_dict().values()} == {torch.float64}
    if step.of != "efficient_sam":
        assert list(made.state_dict()) == list(before)


@each
def test_after_an_encoder_and_before_another_size(step: Conventions) -> None:
    chain = encoder_of_kind(step) | step | sc.substitute.ImageSize(size=64)
    small = chain(random_sam(image_size=128, patch_size=16), progress=False)
    framing = framing_of(small)
    kinds = {"nano_sam": Truncated, "efficient_sam": Stretched}
    assert type(framing) is kinds.get(step.of, Framing)
    assert (framing.size, framing.frame) == (64, 64)
    found = ask(small)
    assert found.masks.shape == (2, 3, 60, 80)
    assert found.logits.shape == (2, 3, 16, 16)


@each
def test_twice(step: Conventions) -> None:
    with pytest.raises(errors.NoEffectError, match="follows these conventions already"):
        step(step(random_sam(), progress=False), progress=False)


def test_tiny_sam_gives_the_best_of_three() -> None:
    sam = random_sam()
    single = ask(Conventions(of="tiny_sam")(sam, progress=False), multimask=False)
    three = ask(sam)
    best = three.scores.argmax(1)
    assert torch.equal(single.scores[:, 0], three.scores.amax(1))
    assert torch.equal(single.logits[:, 0], three.logits[torch.arange(2), best])


def test_edge_sam_scores_by_stability() -> None:
    sam = random_sam()
    plain, stable = ask(sam), ask(Conventions(of="edge_sam", stability=True)(sam, progress=False))
    assert torch.equal(stable.logits, plain.logits)
    high = (plain.logits > 1).sum((-2, -1)).float()
    low = (plain.logits > -1).sum((-2, -1)).clamp(min=1).float()
    assert torch.equal(stable.scores, high / low)


def test_nano_sam_adds_no_padding_point() -> None:
    sam: Any = random_sam()
    nano: Any = Conventions(of="nano_sam")(sam, progress=False)
    points = (torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1))
    assert sam.prompt_encoder(points=points, boxes=None, masks=None)[0].shape == (1, 2, 32)
    assert nano.prompt_encoder(points=points, boxes=None, masks=None)[0].shape == (1, 1, 32)


def test_efficient_vit_sam_changes_eps_alone() -> None:
    sam: Any = random_sam()
    made: Any = Conventions(of="efficient_vit_sam")(sam, progress=False)
    assert eps_of(sam.mask_decoder, "LayerNorm") == {1e-5}
    assert eps_of(made.mask_decoder, "LayerNorm") == {1e-6}
    assert eps_of(made.image_encoder, "LayerNorm") == {1e-6}
    assert type(made.mask_decoder) is MaskDecoder


def test_efficient_sam_takes_its_sizes_from_the_decoder() -> None:
    sizes = {"decoder_depth": 3, "decoder_mlp_dim": 48, "decoder_num_heads": 2}
    sam: Any = random_sam(iou_head_hidden_dim=40, **sizes)
    made: Any = Conventions(of="efficient_sam")(sam, progress=False)
    decoder = made.mask_decoder
    assert type(made.prompt_encoder) is _efficientsam.PromptEncoder
    assert len(decoder.transformer.layers) == 3
    assert decoder.transformer.layers[2].mlp.lin1.out_features == 48
    assert decoder.transformer.layers[0].self_attn.num_heads == 2
    assert decoder.iou_prediction_head.layers[0].out_features == 40
    assert made.prompt_encoder.mask_input_size == (32, 32)
    same, other = (Conventions(of="efficient_sam", seed=s)(sam, progress=False) for s in (0, 1))
    weights = [m.mask_decoder.iou_token.weight for m in (made, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- refused --------------------------------------------------------------------------------------


def test_edge_sam_without_the_score_has_no_effect() -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        Conventions(of="edge_sam")(random_sam())
    assert str(caught.value) == (
        "substitute.conventions: without the score, EdgeSAM's conventions are SAM's.\n"
        "  got       stability=False\n"
        "  try       stability=True, or leave this step out"
    )


def test_only_edge_sam_has_the_option() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Conventions(of="tiny_sam", stability=True)
    assert str(caught.value) == (
        "substitute.conventions: only EdgeSAM scores masks by their stability.\n"
        "  got       of='tiny_sam'\n"
        "  expected  of='edge_sam'"
    )
    with pytest.raises(errors.ConfigError, match="of has a value it cannot take"):
        Conventions(of="mobile_sam")


def test_parts_of_another_kind() -> None:
    sam = Conventions(of="efficient_sam")(random_sam(), progress=False)
    with pytest.raises(errors.ModelError) as caught:
        Conventions(of="tiny_sam")(sam)
    assert str(caught.value) == (
        "substitute.conventions does not know this model's parts.\n"
        "  where     mask_decoder\n"
        "  got       samcompress.substitute._efficientsam.MaskDecoder\n"
        "  expected  segment_anything's own\n"
        "  try       put this step right after the one that made the image encoder"
    )


def test_two_projects_conventions_that_do_not_meet() -> None:
    both = Conventions(of="tiny_sam") | Conventions(of="nano_sam")
    made = both(random_sam(), progress=False)
    assert type(framing_of(made)) is Truncated
    assert ask(made, multimask=False).logits.shape == (2, 1, 32, 32)
