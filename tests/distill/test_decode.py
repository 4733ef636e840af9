"""Training decodes as the predictor does, whatever the model's prompt encoder and decoder are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import random_sam
from torch import nn
from zoo_models import MODELS

import samcompress as sc
from samcompress.core import errors
from samcompress.distill import _decode
from samcompress.distill._clicks import Asked
from samcompress.distill._decode import decode, plain

STEPS = {
    "tiny_sam": sc.substitute.Conventions(of="tiny_sam"),
    "edge_sam": sc.substitute.Conventions(of="edge_sam", stability=True),
    "nano_sam": sc.substitute.Conventions(of="nano_sam"),
    "efficient_sam": sc.substitute.Conventions(of="efficient_sam"),
    "hq": sc.substitute.HQ(),
    "hq alone": sc.substitute.HQ(hq_token_only=True),
}
PROMPTED = ("prompt_loop", "full_stage", "supervised")
SHORT = {"steps": 2, "batch_size": 2, "prompts": 2}


def model(kind: str, seed: int = 0) -> Any:
    if kind == "sam2":
        return MODELS["sam2"]()
    sam = random_sam(seed=seed)
    if kind == "sam":
        return sam
    return STEPS[kind](sam, progress=False) if seed == 0 else _seeded(kind)(sam, progress=False)


def _seeded(kind: str) -> Any:
    step = STEPS[kind]
    return dataclasses.replace(step, seed=1)


def prompts(side: int) -> tuple[torch.Tensor, Asked]:
    """Six prompts of two images, mixed: boxes and points, each with one click more."""
    g = torch.Generator().manual_seed(3)
    corners = side * torch.rand(6, 2, 2, generator=g).sort(1).values
    boxed = torch.tensor([True, False, False, True, True, False])
    labels = torch.ones(6, dtype=torch.int64)
    first = Asked.begin(corners.flatten(1), side * torch.rand(6, 2, generator=g), labels, boxed)
    clicked = first.grown(side * torch.rand(6, 2, generator=g), torch.tensor([0, 1, 1, 0, 1, 0]))
    return torch.tensor([1, 0, 1, 0, 1, 1]), clicked


def alone(sam: Any, embedding: torch.Tensor, asked: Asked, row: int) -> tuple[Any, Any]:
    """One prompt through the model's own modules, as a predictor calls them."""
    points, labels = asked.points[row : row + 1], asked.labels[row : row + 1]
    if labels[0, 0] == 2:
        boxes, points, labels = points[:, :2].flatten(1), points[:, 2:], labels[:, 2:]
    else:
        boxes, keep = None, [0, *range(2, labels.shape[1])]
        points, labels = points[:, keep], labels[:, keep]
    given = (points, labels) if labels.shape[1] else None
    sparse, dense = sam.prompt_encoder(points=given, boxes=boxes, masks=None)
    both = [
        sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        for multimask in (False, True)
    ]
    return torch.cat([m for m, _ in both], 1), torch.cat([s for _, s in both], 1)


@pytest.mark.parametrize("kind", ["sam", "sam2", *STEPS])
def test_decoding_equals_the_predictor_prompt_by_prompt(kind: str) -> None:
    sam = model(kind)
    side = sam.image_encoder.img_size
    g = torch.Generator().manual_seed(1)
    owner, asked = prompts(side)
    begun = Asked(asked.points[:, :2], asked.labels[:, :2])
    with torch.no_grad():
        features = sam.image_encoder(torch.randn(2, 3, side, side, generator=g))
        for asks in (begun, asked):
            found = decode(sam, features, owner, asks)
            assert found.tokens.shape == (6, 5, 32)
            if kind != "edge_sam":  # which does not ask the head that predicts scores
                told = sam.mask_decoder.iou_prediction_head(found.tokens[:, 0])
                torch.testing.assert_close(told[:, 1:], found.scores[:, 1:])
            for row, image in enumerate(owner.tolist()):
                logits, scores = alone(sam, features[image : image + 1], asks, row)
                torch.testing.assert_close(found.logits[row], logits[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found.scores[row], scores[0], rtol=1e-4, atol=1e-4)
    assert plain(sam) == (kind == "sam")


def test_the_two_ways_agree_on_a_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = random_sam()
    owner, asked = prompts(64)
    features = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    asked = dataclasses.replace(asked, masks=masks)
    results = []
    for whole in (True, False):
        monkeypatch.setattr(_decode, "plain", lambda model, whole=whole: whole)
        sam.zero_grad()
        found = decode(sam, features, owner, asked)
        (found.logits.sum() + found.scores.sum() + found.tokens.sum()).backward()
        gradients = {n: p.grad.clone() for n, p in sam.named_parameters() if p.grad is not None}
        results.append((found, gradients))
    (one, mine), (other, theirs) = results
    for name in ("logits", "scores", "tokens"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", PROMPTED)
def test_every_kind_of_decoder_trains(name: str, kind: str) -> None:
    feed = {"feed": 0.0} if name == "supervised" and kind == "efficient_sam" else {}
    step = sc.get(f"distill.{name}", **SHORT, **feed)
    run = {"data": sc.shapes(2, seed=3, size=(60, 80)), "progress": False}
    trained = step(model(kind), teacher=model(kind, seed=5), **run)
    before, after = model(kind).state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[n], before[n]) for n in before if "image_encoder" in n)
    assert not any(m._forward_hooks for m in trained.modules())


@pytest.mark.parametrize("name", ["encoder", *PROMPTED])
def test_further_channels_have_no_counterpart_in_a_plain_teacher(name: str) -> None:
    fields = {k: v for k, v in SHORT.items() if k != "prompts" or name != "encoder"}
    run = {"data": sc.shapes(2, seed=3, size=(60, 80)), "progress": False}
    student, teacher = sc.substitute.HQ()(random_sam(), progress=False), random_sam(seed=5)
    trained = sc.get(f"distill.{name}", **fields)(student, teacher=teacher, **run)
    state = sc.lineage(trained)[-1].state
    if name == "encoder":
        assert state["adapters"] == ["further channels left out: 64 and 32 in all"]
    assert state["loss_before"] > 0


def test_masks_that_are_no_prompt() -> None:
    with pytest.raises(errors.ModelError) as caught:
        sc.distill.Supervised(steps=1)(model("efficient_sam"), data=sc.shapes(2))
    assert str(caught.value) == (
        "distill.supervised feeds masks back, which this prompt encoder does not take.\n"
        "  where     prompt_encoder.mask_downscaling\n"
        "  got       samcompress.substitute._efficientsam.PromptEncoder\n"
        "  expected  a prompt encoder that takes masks, as SAM's\n"
        "  try       feed=0 and at most 10 rounds, or sc.distill.PromptLoop(), which feeds none"
    )
    with pytest.raises(errors.ModelError, match="feeds masks back"):
        sc.distill.Supervised(steps=1, feed=0, rounds=11)(model("efficient_sam"), data=sc.shapes(2))


class Unknown(nn.Module):
    """Decodes, but not with parts of segment_anything."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, **given: Any) -> Any:
        return self.decoder(**given)


@pytest.mark.parametrize("name", PROMPTED)
def test_a_decoder_of_other_parts_is_refused_before_any_work(name: str) -> None:
    sam = random_sam()
    sam.mask_decoder = Unknown(sam.mask_decoder)
    step = sc.get(f"distill.{name}", **SHORT)
    with pytest.raises(errors.ModelError) as caught:
        (sc.prune.Mlp() | step)(sam, data=sc.shapes(2))
    assert str(caught.value) == (
        f"distill.{name} cannot decode prompts with this mask decoder.\n"
        "  where     mask_decoder.predict_masks, mask_decoder.transformer, "
        "mask_decoder.num_mask_tokens\n"
        f"  got       {__name__}.Unknown\n"
        "  expected  a decoder with the parts of segment_anything's\n"
        "  try       sc.distill.Encoder(), which compares embeddings only"
    )
    if name != "supervised":
        with pytest.raises(errors.ModelError, match="teacher cannot decode prompts"):
            step(random_sam(), teacher=sam, data=sc.shapes(2), progress=False)
