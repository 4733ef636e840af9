from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from torch import Tensor, nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.distill import Supervised
from samcompress.distill._clicks import Clicks
from samcompress.distill._decode import decode
from samcompress.distill._samples import Batch, Frame, Samples
from samcompress.distill.supervised import Rounds

FAST = {"steps": 4, "batch_size": 2, "prompts": 2, "rounds": 2, "augment": None}


def objective(sam: nn.Module, data: Any, **fields: Any) -> Rounds:
    settings = Supervised(**{**FAST, **fields})
    source = Samples(
        data,
        [Frame.of(sam)],
        batch_size=settings.batch_size,
        prompts=settings.prompts,
        augment=settings.augment,
        seed=settings.seed,
    )
    return Rounds(sam, source, settings, 10)


def weights(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith(part)}


def changed(before: nn.Module, after: nn.Module, part: str) -> bool:
    old, new = weights(before, part), weights(after, part)
    return any(not torch.equal(old[k], new[k]) for k in old)


# ----------------------------------------------------------------------------------------- decoder


def test_decoding_is_that_of_segment_anything() -> None:
    """Boxes, points and mask prompts of several images at once, each as SAM does it alone."""
    sam = random_sam()
    batch = objective(sam, sc.shapes(3), batch_size=3, prompts=3).source.draw(0, Share())
    with torch.no_grad():
        features = sam.image_encoder(batch.images)
        clicks = Clicks.of(batch, 64, seed=0, step=0)
        asked = clicks.begin(batch.boxes, batch.target)
        boxed = asked.labels[:, 0] == 2
        assert boxed.any()
        assert not boxed.all()
        masks = torch.randn(len(boxed), 1, 32, 32)
        for fed in (None, masks):
            asked = type(asked)(asked.points, asked.labels, fed)
            found = decode(sam, features, batch.owner, asked)
            assert found.tokens.shape == (len(boxed), 5, 32)
            for i, owner in enumerate(batch.owner.tolist()):
                point = asked.points[i : i + 1, :1], torch.ones(1, 1)
                sparse, dense = sam.prompt_encoder(
                    points=None if boxed[i] else point,
                    boxes=asked.points[i].reshape(1, 4) if boxed[i] else None,
                    masks=None if fed is None else fed[i : i + 1],
                )
                logits, scores = sam.mask_decoder.predict_masks(
                    image_embeddings=features[owner : owner + 1],
                    image_pe=sam.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                )
                assert torch.allclose(found.logits[i], logits[0], atol=1e-5)
                assert torch.allclose(found.scores[i], scores[0], atol=1e-5)


def test_trained_model_gives_the_predictor_the_logits_of_training() -> None:
    scenes = sc.shapes(2)
    small = Supervised(**FAST)(random_sam(), data=scenes, progress=False)
    batch = objective(small, scenes, prompts=1, box_share=1).source.draw(0, Share())
    asked = Clicks.of(batch, 64, seed=0, step=0).begin(batch.boxes, batch.target, box_share=1)
    with torch.no_grad():
        found = decode(small, small.image_encoder(batch.images), batch.owner, asked)
    for i, index in enumerate(batch.indices):
        image = scenes[index].image
        scale = max(image.shape[:2]) / 64
        box = asked.points[i].flatten().numpy() * scale
        told = sc.predict(small, [image], [[sc.Prompt(box=box)]])[0]
        assert torch.allclose(told.logits[0, 0], found.logits[i, 0], atol=1e-4)


# ---------------------------------------------------------------------------------------- training


def test_learns_eight_shapes_by_heart() -> None:
    """From random weights, and in less than 300 steps."""
    scenes = []
    for sample in sc.shapes(8, seed=3, size=64):
        largest = max((i.mask for i in sample.instances), key=np.sum)
        scenes.append(sc.data.Sample.from_arrays(sample.id, sample.image, largest[None]))
    sam = random_sam()
    assert sc.evaluate.accuracy(sam, scenes, "box").miou < 0.5
    step = Supervised(
        steps=250,
        batch_size=8,
        prompts=1,
        rounds=1,
        box_share=1,
        augment=None,
        lr=3e-3,
        turn=(0.5, 0.9),
    )
    done = step(sam, data=scenes, progress=False)
    assert sc.evaluate.accuracy(done, scenes, "box").miou > 0.95


@pytest.mark.parametrize("train_encoder", [True, False])
def test_only_the_declared_parts_change(train_encoder: bool) -> None:
    sam = random_sam()
    original = copy.deepcopy(sam)
    step = Supervised(**FAST, train_encoder=train_encoder)
    small = step(sam, data=sc.shapes(4), progress=False)
    assert changed(original, small, "image_encoder") is train_encoder
    assert changed(original, small, "mask_decoder")
    assert changed(original, small, "prompt_encoder")
    assert not changed(original, sam, "")
    assert all(p.grad is None for p in small.parameters())
    assert not small.training


def test_gradients_reach_encoder_and_score_head() -> None:
    sam = random_sam().train()
    model = objective(sam, sc.shapes(4))
    terms = model(model.source.draw(0, Share()), 0)
    assert set(terms) == {"single", "best of three", "score"}
    sum(terms.values()).backward()
    for part in ("image_encoder.patch_embed", "mask_decoder.iou_prediction_head", "prompt_encoder"):
        grads = [p.grad for p in sam.get_submodule(part).parameters() if p.grad is not None]
        assert sum(g.norm() for g in grads) > 0


def test_padding_does_not_count() -> None:
    """Objects and masks drawn outside of the image change neither losses nor gradients."""
    sam = random_sam()
    model = objective(sam, sc.shapes(2, size=(32, 64)), rounds=1, box_share=1)
    batch = model.source.draw(0, Share())
    outside = batch.valid[batch.owner] == 0
    assert outside.any()
    odd = batch.target.masked_fill(outside, 1.0)
    found = []
    for target in (batch.target, odd):
        sam.zero_grad()
        terms = model(Batch(**{**vars(batch), "target": target}), 0)
        sum(terms.values()).backward()
        found.append((terms, sam.image_encoder.neck[0].weight.grad.clone()))
    assert all(torch.equal(found[0][0][k], found[1][0][k]) for k in found[0][0])
    assert torch.equal(found[0][1], found[1][1])


def weighted(model: Rounds, count: int) -> Mapping[str, float]:
    parts = [model.source.draw(0, Share(i, count)) for i in range(count)]
    total: dict[str, float] = {}
    for part in parts:
        for name, value in model(part, 0).items():
            total[name] = total.get(name, 0.0) + float(value) * part.weight
    return {k: v / sum(p.weight for p in parts) for k, v in total.items()}


def test_loss_does_not_depend_on_how_the_batch_is_divided() -> None:
    model = objective(
        random_sam(), sc.shapes(7), batch_size=5, rounds=3, augment=sc.distill.Augment()
    )
    with torch.no_grad():
        whole = weighted(model, 1)
        for count in (2, 5):
            assert weighted(model, count) == pytest.approx(whole, abs=1e-5)


def test_rounds_of_sam() -> None:
    model = objective(random_sam(), sc.shapes(2), rounds=11)
    idle = {model._idle(step) for step in range(60)}
    assert {last for _, last in idle} == {10}
    assert {i for i, _ in idle} == set(range(1, 10))
    assert objective(random_sam(), sc.shapes(2), rounds=3)._idle(0) == ()
    with torch.no_grad():
        terms = model(model.source.draw(0, Share()), 0)
    assert all(torch.isfinite(v) for v in terms.values())


def test_turn_of_the_loss() -> None:
    """At the beginning it is cross-entropy that counts, at the end SAM's own loss."""
    data, sam = sc.shapes(2), random_sam()
    turning, always = objective(sam, data, turn=(0.2, 0.8)), objective(sam, data)
    batch = always.source.draw(0, Share())
    with torch.no_grad():
        values = [float(turning(batch, step)["single"]) for step in (0, 1, 2, 5, 8, 9)]
        sams = float(always(batch, 9)["single"])
    # Prompts differ from step to step, but little beside the change of the loss.
    assert values[:3] == pytest.approx([values[0]] * 3, rel=0.01)
    assert abs(values[0] - sams) > 0.1 * sams
    assert values[-1] == sams


@pytest.mark.parametrize("fields", [{}, {"accumulate": 2, "ema": 0.9}, {"precision": "bf16"}])
def test_killed_and_resumed_is_bit_for_bit(
    fields: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sc.shapes(5)
    step = Supervised(**{**FAST, "augment": sc.distill.Augment(), **fields})
    whole = step(random_sam(), data=data, progress=False)
    draw = Samples.draw

    def killed(self: Samples, number: int, share: Share) -> Batch:
        if number == 2:
            raise KeyboardInterrupt
        return draw(self, number, share)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "draw", killed)
        with pytest.raises(KeyboardInterrupt):
            step(random_sam(), data=data, progress=False, workdir=tmp_path)
    resumed = step(random_sam(), data=data, progress=False, workdir=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert sc.lineage(resumed)[-1].state["curve"] == sc.lineage(whole)[-1].state["curve"]


def test_on_pruned_and_resized_models(tmp_path: Any) -> None:
    recipe = (
        sc.substitute.ImageSize(size=96)
        | sc.prune.Mlp(ratio=0.5, criterion="magnitude")
        | sc.attention.Fused()
        | Supervised(**FAST)
    )
    small = recipe(random_sam(), data=sc.shapes(4), progress=False)
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rounds": 0}, "rounds is out of range"),
        ({"prompts": 0}, "prompts is out of range"),
        ({"box_share": 1.5}, "box_share is out of range"),
        ({"turn": (0.8, 0.2)}, "turn is out of range"),
        ({"batch_size": 2, "accumulate": 3}, "accumulate divides a batch into more parts"),
        ({"lr": 0}, "lr is out of range"),
        ({"workers": -1}, "workers is out of range"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.ConfigError, match=text):
        Supervised(**fields)


def test_images_without_masks_are_refused() -> None:
    empty = sc.data.Sample.from_arrays("e", sc.shapes(1)[0].image, [])
    with pytest.raises(errors.DataError, match="images without a usable mask"):
        Supervised(**FAST)(random_sam(), data=[empty], progress=False)


def test_loss_that_is_not_a_number_stops_the_run() -> None:
    sam = random_sam()
    with torch.no_grad():
        sam.image_encoder.neck[0].weight[0] = float("nan")
    with pytest.raises(errors.ConfigError, match="training diverged"):
        Supervised(**{**FAST, "steps": 9})(sam, data=sc.shapes(2), progress=False)
