"""Scores of weights: each criterion against a slow version written from its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import random_sam
from pruning import ATTENTION, SCENES, encode, kept_of, off, prune, toy
from segment_anything.modeling.image_encoder import window_unpartition
from torch import Tensor
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core.framing import Framing, Stretched
from samcompress.core.predict import preprocess
from samcompress.prune import _importance
from samcompress.prune._cut import keep_hidden
from samcompress.prune._groups import KINDS
from samcompress.prune._importance import element_scores

LIN1 = "image_encoder.blocks.0.mlp.lin1.weight"
LIN2 = "image_encoder.blocks.0.mlp.lin2.weight"
TOKEN = "mask_decoder.transformer.layers.0.mlp.lin1.weight"
SQUARE = sc.shapes(2, seed=7, size=64)  # as large as the toy's input: nothing is resized or padded


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All normal noise that is drawn, in order."""
    drawn: list[Tensor] = []
    randn = torch.randn

    def spy(*size: Any, **options: Any) -> Tensor:
        drawn.append(randn(*size, **options))
        return drawn[-1]

    monkeypatch.setattr(_importance.torch, "randn", spy)
    return drawn


def units(sam: Any, kind: str, name: str, scores: dict[str, Tensor]) -> Tensor:
    return KINDS[kind].groups(sam, name)[0].reduce(scores)


def of_group(sam: Any, kind: str, name: str, criterion: Any, **options: Any) -> Tensor:
    names = [m.weight for m in KINDS[kind].groups(sam, name)[0].members]
    return units(sam, kind, name, element_scores(sam, names, criterion, SCENES, **options))


# --- disturbed Taylor -----------------------------------------------------------------------------


def two_passes(sam: Any, scene: Any, noise: Tensor) -> None:
    """Gradients of half the squared distance to the model's own output plus noise."""
    image = preprocess(sam, scene.image)[0][None]
    with torch.no_grad():
        target = sam.image_encoder(image) + noise
    sam.zero_grad()
    ((target - sam.image_encoder(image)).square().sum() / 2).backward()


def test_check7_undisturbed_gradients_are_zero_and_disturbed_are_not() -> None:
    sam = toy()
    two_passes(sam, SCENES[0], torch.tensor(0.0))
    assert all(not p.grad.any() for p in sam.image_encoder.parameters())
    names = [f"image_encoder.{name}" for name, _ in sam.image_encoder.named_parameters()]
    scores = element_scores(sam, names, "disturbed_taylor", SCENES[:1])
    for name, values in scores.items():
        if name.endswith("qkv.bias"):
            queries, keys, rest = values.split(32)
            # A bias of the keys shifts all logits of a query alike.
            assert float(keys.max()) < 1e-3 * float(rest.max())
            values = torch.cat([queries, rest])
        assert values.any(), name


def test_check7_one_pass_is_two_passes(noises: list[Tensor]) -> None:
    """Every weight by itself, from the distance to a disturbed target."""
    sam, names = random_sam(), [LIN1, LIN2]
    noises.clear()  # building drew some
    scores = element_scores(sam, names, "disturbed_taylor", SCENES, seed=4)
    assert [tuple(noise.shape) for noise in noises] == 2 * [(1, 32, 8, 8)]
    squares = {name: 0.0 for name in names}
    for scene, noise in zip(SCENES, noises, strict=True):
        two_passes(sam, scene, noise)
        for name in names:
            squares[name] = squares[name] + sam.get_parameter(name).grad.double() ** 2
    for name in names:
        expected = sam.get_parameter(name).detach().double().abs() * squares[name] ** 0.5
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-4, atol=1e-9)
    found = units(sam, "mlp", "image_encoder.blocks.0.mlp", scores)
    for unit in range(96):  # a row of the first weight, a column of the second
        total = scores[LIN1][unit].sum() + scores[LIN2][:, unit].sum()
        assert float(found[unit]) == pytest.approx(float(total) / 2, rel=1e-5)


@pytest.mark.parametrize("accumulate", ["rms", "sum"])
def test_check7_scores_follow_the_noise_level(
    accumulate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = random_sam()
    plain = element_scores(sam, [LIN1, TOKEN], "disturbed_taylor", SCENES, accumulate=accumulate)
    randn = torch.randn
    monkeypatch.setattr(_importance.torch, "randn", lambda *s, **o: 10 * randn(*s, **o))
    loud = element_scores(sam, [LIN1, TOKEN], "disturbed_taylor", SCENES, accumulate=accumulate)
    for name in plain:
        assert off(loud[name], 10 * plain[name]) < 1e-4


def test_check7_same_seed_same_units() -> None:
    first, same = (kept_of(prune(sc.prune.Heads(ratio=0.5, images=1, seed=1))) for _ in range(2))
    assert first == same
    sam = random_sam()
    scores = [
        element_scores(sam, [LIN1], "disturbed_taylor", SCENES, seed=s)[LIN1] for s in (1, 1, 2)
    ]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_order_of_images_does_not_matter() -> None:
    sam = random_sam()
    forth = element_scores(sam, [LIN1, TOKEN], "disturbed_taylor", list(SCENES))
    back = element_scores(sam, [LIN1, TOKEN], "disturbed_taylor", list(SCENES)[::-1])
    for name in forth:
        torch.testing.assert_close(forth[name], back[name], rtol=1e-4, atol=1e-8)


def test_signed_sums_are_slimsams() -> None:
    sam = random_sam()
    first, second = (
        element_scores(sam, [LIN1], "disturbed_taylor", [scene], accumulate="sum")[LIN1]
        for scene in SCENES
    )
    both = element_scores(sam, [LIN1], "disturbed_taylor", SCENES, accumulate="sum")[LIN1]
    rms = element_scores(sam, [LIN1], "disturbed_taylor", SCENES)[LIN1]
    assert (both <= first + second + 1e-6).all()
    assert not torch.allclose(both, first + second)  # gradients of different sign
    torch.testing.assert_close(rms, (first.square() + second.square()).sqrt(), rtol=1e-4, atol=1e-7)


def test_decoder_is_asked_for_all_masks_and_scores(noises: list[Tensor]) -> None:
    sam = random_sam()
    noises.clear()
    element_scores(sam, [TOKEN], "disturbed_taylor", SCENES[:1])
    assert [tuple(noise.shape) for noise in noises] == [(8, 4, 32, 32), (8, 4)]


def test_points_lie_inside_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = random_sam()
    seen: list[Tensor] = []
    prompts = type(sam.prompt_encoder).forward

    def spy(self: Any, points: Any, boxes: Any, masks: Any) -> Any:
        seen.append(points[0])
        return prompts(self, points=points, boxes=boxes, masks=masks)

    monkeypatch.setattr(type(sam.prompt_encoder), "forward", spy)
    wide = sc.shapes(4, seed=1, size=(30, 120))  # 16 x 64 in the model's square
    element_scores(sam, [TOKEN], "disturbed_taylor", wide)
    x, y = torch.cat(seen).unbind(-1)
    assert len(x) == 4 * 8
    assert 0 <= float(y.min()) < float(y.max()) <= 16 < 32 < float(x.max()) <= 64


# --- Taylor with labels ---------------------------------------------------------------------------


def test_taylor_is_the_loss_of_masks_and_scores() -> None:
    """On images as large as the input: boxes and masks are what the annotation says."""
    sam, names = random_sam(), [LIN1, TOKEN, "mask_decoder.iou_prediction_head.layers.0.weight"]
    found = element_scores(sam, names, "taylor", SQUARE)
    squares = {name: 0.0 for name in names}
    for scene in SQUARE:
        features = sam.image_encoder(preprocess(sam, scene.image)[0][None])
        losses, errors_of_scores = [], []
        for thing in scene.instances[:8]:
            sparse, dense = sam.prompt_encoder(
                points=None, boxes=torch.tensor([thing.box]), masks=None
            )
            target = torch.from_numpy(thing.mask).float().view(32, 2, 32, 2).mean((1, 3))
            for several in (False, True):
                logits, scores = sam.mask_decoder(
                    image_embeddings=features,
                    image_pe=sam.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=several,
                )
                for logit, score in zip(logits[0], scores[0], strict=True):
                    chance = logit.sigmoid()
                    losses.append(
                        -(target * chance.log() + (1 - target) * (1 - chance).log()).mean()
                    )
                    a, b = logit > 0, target > 0.5
                    iou = (a & b).sum() / max(int((a | b).sum()), 1)
                    errors_of_scores.append((score - iou) ** 2)
        sam.zero_grad()
        (torch.stack(losses).mean() + torch.stack(errors_of_scores).mean()).backward()
        for name in names:
            squares[name] = squares[name] + sam.get_parameter(name).grad ** 2
    for name in names:
        expected = sam.get_parameter(name).detach().abs() * squares[name].sqrt()
        assert off(found[name], expected) < 1e-3


@pytest.mark.parametrize("framing", [None, Stretched(64, 64), Framing(64, 128)], ids=repr)
def test_taylor_places_boxes_and_masks_by_the_models_rule(
    framing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = random_sam()
    if framing is not None:
        sam.framing = framing
        sam.prompt_encoder.input_image_size = (framing.frame, framing.frame)
    frame = 64 if framing is None else framing.frame
    boxes, targets = [], []
    prompts, loss = type(sam.prompt_encoder).forward, F.binary_cross_entropy_with_logits

    def spy(self: Any, points: Any, boxes: Any, masks: Any) -> Any:
        seen_boxes.append(boxes)
        return prompts(self, points=points, boxes=boxes, masks=masks)

    def watch(logits: Tensor, target: Tensor) -> Tensor:
        targets.append(target[:, 0])
        return loss(logits, target)

    seen_boxes = boxes
    monkeypatch.setattr(type(sam.prompt_encoder), "forward", spy)
    monkeypatch.setattr(_importance.F, "binary_cross_entropy_with_logits", watch)
    scene = sc.shapes(1, seed=3, size=(90, 200))[0]
    element_scores(sam, [LIN1], "taylor", [scene])
    cell = frame / 32
    for box, target in zip(boxes[0], targets[0], strict=True):
        y, x = torch.nonzero(target > 0.05, as_tuple=True)
        around = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]) * cell
        assert (around - box).abs().max() <= 1.5 * cell


def test_taylor_without_labels() -> None:
    images = [sc.Sample.from_arrays("plain", SCENES[0].image, [])]
    with pytest.raises(errors.DataError) as caught:
        prune(sc.prune.Mlp(criterion="taylor"), data=images)
    assert str(caught.value).splitlines() == [
        'criterion="taylor" needs annotated objects.',
        "  got       images without any",
        "  expected  data with masks",
        '  try       criterion="disturbed_taylor" needs images only',
    ]


def test_taylor_passes_over_images_without_objects() -> None:
    sam = random_sam()
    empty = sc.Sample.from_arrays("plain", SCENES[0].image, [])
    both = element_scores(sam, [LIN1], "taylor", [empty, SCENES[1]])[LIN1]
    assert torch.equal(both, element_scores(sam, [LIN1], "taylor", SCENES[1:])[LIN1])


# --- the others -----------------------------------------------------------------------------------


def test_magnitude_is_squared() -> None:
    sam = random_sam()
    scores = element_scores(sam, [LIN1], "magnitude")
    assert torch.equal(scores[LIN1], sam.get_parameter(LIN1).detach() ** 2)


def test_random_is_uniform() -> None:
    sam = random_sam()
    first, same, other = (element_scores(sam, [LIN1, LIN2], "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(first[LIN2], same[LIN2])
    assert not torch.equal(first[LIN1], other[LIN1])
    assert 0 <= float(first[LIN1].min()) < 0.01 < 0.99 < float(first[LIN1].max()) <= 1


def test_activation_is_wanda() -> None:
    """The size of a weight times the norm of its input, over all tokens of all images."""
    sam = random_sam()
    inputs: dict[str, list[Tensor]] = {LIN1: [], LIN2: []}
    handles = [
        sam.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2))
        )
        for name in inputs
    ]
    with torch.no_grad():
        for scene in SCENES:
            sam.image_encoder(preprocess(sam, scene.image)[0][None])
    for handle in handles:
        handle.remove()
    found = element_scores(sam, [LIN1, LIN2], "activation", SCENES)
    for name, seen in inputs.items():
        norms = torch.cat(seen).norm(dim=0)
        torch.testing.assert_close(found[name], sam.get_parameter(name).detach().abs() * norms)


def test_activation_does_not_see_what_pads_the_windows() -> None:
    sam = toy()  # windows of three on a grid of eight
    name = f"{ATTENTION[0]}.proj.weight"
    block = sam.image_encoder.blocks[0]
    seen: list[Tensor] = []
    handle = block.attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        sam.image_encoder(preprocess(sam, SCENES[0].image)[0][None])
    handle.remove()
    tokens = window_unpartition(seen[0], 3, (9, 9), (8, 8)).flatten(0, 2)
    assert len(tokens) == 64 < seen[0].flatten(0, 2).shape[0] == 81
    found = element_scores(sam, [name], "activation", SCENES[:1])[name]
    expected = block.attn.proj.weight.detach().abs() * tokens.norm(dim=0)
    torch.testing.assert_close(found, expected)
    padded = block.attn.proj.weight.detach().abs() * seen[0].flatten(0, 2).norm(dim=0)
    assert off(found, padded) > 1e-2


def test_activation_of_a_convolution() -> None:
    sam = toy()
    name = "image_encoder.neck.0.weight"
    found = element_scores(sam, [name, TOKEN], "activation", SCENES)
    assert found[name].shape == (32, 32, 1, 1)
    assert found[TOKEN].any()


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["disturbed_taylor", "taylor", "activation", "magnitude"])
def test_check8_scores_follow_their_units(criterion: Any) -> None:
    sam, name = toy(), "image_encoder.blocks.1.mlp"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    shuffled = copy.deepcopy(sam)
    keep_hidden(shuffled.get_submodule(name), order.tolist())
    assert off(encode(shuffled), encode(sam)) < 1e-5
    plain = of_group(sam, "mlp", name, criterion)
    moved = of_group(shuffled, "mlp", name, criterion)
    torch.testing.assert_close(moved, plain[order], rtol=1e-3, atol=float(plain.max()) * 1e-5)


def test_check8_a_prefix_of_the_sorted_model_is_pruning() -> None:
    sam, name = toy(), "image_encoder.blocks.1.mlp"
    scores = of_group(sam, "mlp", name, "magnitude")
    order = scores.argsort(descending=True, stable=True).tolist()
    ranked = copy.deepcopy(sam)
    keep_hidden(ranked.get_submodule(name), order)
    keep_hidden(ranked.get_submodule(name), range(48))
    pruned = copy.deepcopy(sam)
    keep_hidden(pruned.get_submodule(name), sorted(order[:48]))
    assert off(encode(ranked), encode(pruned)) < 1e-5
    assert (
        sorted(order[:48])
        == kept_of(prune(sc.prune.Mlp(ratio=0.5, criterion="magnitude", where=name), sam))[name]
    )


def test_check9_taylor_does_not_see_how_a_product_is_split() -> None:
    """Values times ten and what reads them by ten: the same function."""
    sam, name = toy(), ATTENTION[1]
    scaled = copy.deepcopy(sam)
    attn = scaled.get_submodule(name)
    attn.qkv.weight.data[64:] *= 10
    attn.qkv.bias.data[64:] *= 10
    attn.proj.weight.data /= 10
    assert off(encode(scaled), encode(sam)) < 1e-5
    for criterion in ("disturbed_taylor", "taylor"):
        for kind in ("heads", "head_dims"):
            plain, same = (of_group(m, kind, name, criterion) for m in (sam, scaled))
            assert off(same, plain) < 1e-3
    plain, other = (of_group(m, "heads", name, "magnitude") for m in (sam, scaled))
    assert off(other, plain) > 1


@pytest.mark.parametrize("criterion", ["disturbed_taylor", "taylor", "activation"])
def test_scores_of_a_small_type_are_those_of_its_float32_copy(criterion: Any) -> None:
    sam = toy()
    sam.image_encoder.to(torch.bfloat16)
    names = [LIN1, f"{ATTENTION[0]}.qkv.weight"]
    found = element_scores(sam, names, criterion, SCENES[:1])
    wide = copy.deepcopy(sam).float()
    expected = element_scores(wide, names, criterion, SCENES[:1])
    for name in names:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])


def test_nothing_of_the_model_changes() -> None:
    sam = toy().train()
    sam.image_encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    with torch.no_grad():
        for criterion in ("disturbed_taylor", "taylor", "activation"):
            scores = element_scores(sam, [LIN1, TOKEN], criterion, SCENES[:1])
            assert not any(values.requires_grad for values in scores.values())
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
    assert all(p.grad is None for p in sam.parameters())
    assert all(module.training for module in sam.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sam.modules())
