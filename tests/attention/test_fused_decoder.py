"""The fused mask decoder against segment_anything's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam, randomise
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import MaskDecoder
from torch import nn

import samcompress as sc
from samcompress.attention import fused
from samcompress.attention.fused import FusedDecoder
from samcompress.core import _shared_decoder
from samcompress.core._shared_decoder import OneImage, sharable
from samcompress.core.everything._decode import Shared, decoder_for

Inputs = dict[str, Any]
KINDS = ("points", "boxes", "both", "masks")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of prompts that the fast path has decoded together."""
    calls: list[int] = []

    class Counted(OneImage):
        def transform(self, sparse: torch.Tensor) -> Any:
            calls.append(len(sparse))
            return super().transform(sparse)

    monkeypatch.setattr(fused, "OneImage", Counted)
    return calls


@torch.no_grad()
def asked(sam: Any, kind: str = "points", count: int = 2, *, multimask: bool = True) -> Inputs:
    drawn = torch.Generator().manual_seed(3)
    side = sam.image_encoder.img_size
    corners = side * torch.rand(count, 4, generator=drawn)
    points = (corners.view(count, 2, 2), torch.ones(count, 2))
    position = sam.prompt_encoder.get_dense_pe()
    masks = torch.randn(count, 1, *sam.prompt_encoder.mask_input_size, generator=drawn)
    sparse, dense = sam.prompt_encoder(
        points=points if kind != "boxes" else None,
        boxes=corners if kind in ("boxes", "both") else None,
        masks=masks if kind == "masks" else None,
    )
    return {
        "image_embeddings": torch.randn(position.shape, generator=drawn),
        "image_pe": position,
        "sparse_prompt_embeddings": sparse.detach(),
        "dense_prompt_embeddings": dense.detach(),
        "multimask_output": multimask,
    }


def fuse(sam: nn.Module) -> Any:
    return sc.attention.Fused()(sam, progress=False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def agree(small: Any, sam: Any, inputs: Inputs, error: float = 1e-5) -> None:
    before = {name: copy.deepcopy(value) for name, value in inputs.items()}
    found, expected = small.mask_decoder(**inputs), sam.mask_decoder(**inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert relative(mine, theirs) < error
    for name, value in before.items():
        assert np.array_equal(inputs[name], value), name


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_segment_anything(
    kind: str, multimask: bool, count: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = random_sam()
    small = fuse(sam)
    assert type(small.mask_decoder) is FusedDecoder
    inputs = asked(sam, kind, count, multimask=multimask)
    agree(small, sam, inputs)
    assert seen == [count]
    # Groups of prompts that a cache would hold, the last one smaller.
    monkeypatch.setattr(fused, "prompts_at_once", lambda features: 3)
    agree(small, sam, inputs)
    assert seen[1:] == {1: [1], 2: [2], 16: [3] * 5 + [1]}[count]


def test_equals_on_shipped_weights(seen: list[int]) -> None:
    for name in ("tiny", "mini"):
        sam = sc.load(name)
        agree(fuse(sam), sam, asked(sam, "boxes", 5))
    assert sum(seen) == 10


def test_one_dense_prompt_for_all(seen: list[int]) -> None:
    sam = random_sam()
    inputs = asked(sam, count=4)
    inputs["dense_prompt_embeddings"] = inputs["dense_prompt_embeddings"][:1]
    agree(fuse(sam), sam, inputs)
    # As others' casts leave it.
    inputs["dense_prompt_embeddings"] = inputs["dense_prompt_embeddings"].repeat(4, 1, 1, 1)
    agree(fuse(sam), sam, inputs)
    assert seen == [4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_errs_no_more_than_eager(kind: str, seen: list[int]) -> None:
    sam = random_sam()
    half = sc.quantize.BFloat16()
    eager, small = half(sam, progress=False), half(fuse(sam), progress=False)
    inputs = asked(sam, kind, 16)
    with torch.no_grad():
        expected, _ = sam.mask_decoder(**inputs)
        theirs, _ = eager.mask_decoder(**inputs)
        mine, _ = small.mask_decoder(**inputs)
    assert seen == [16]
    assert mine.dtype == torch.float32
    assert relative(mine, expected) < min(3e-2, 1.5 * relative(theirs, expected))


def test_bfloat16_shares_what_was_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = sc.quantize.BFloat16()(fuse(random_sam()), progress=False)
    dense: list[int] = []

    class Counted(OneImage):
        def __init__(self, *args: Any) -> None:
            dense.append(len(args[-1]))
            super().__init__(*args)

    monkeypatch.setattr(fused, "OneImage", Counted)
    image = sc.shapes(1, size=64)[0].image
    prompts = [sc.Prompt(points=[[x, 30]]) for x in (10, 20, 30)]
    sc.predict(sam, [image], [prompts])
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    predictor.predict_torch(torch.full((3, 1, 2), 9.0), torch.ones(3, 1), multimask_output=True)
    sc.Everything(sampler=sc.samplers.Grid(side=2))(sam, image)
    assert dense == [1, 1, 1]


def watched(sam: Any) -> None:
    sam.mask_decoder.output_upscaling[2].register_forward_hook(lambda *_: None)


def patched(sam: Any) -> None:
    layer = sam.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def parametrised(sam: Any) -> None:
    attention = sam.mask_decoder.transformer.final_attn_token_to_image
    nn.utils.parametrizations.weight_norm(attention.v_proj)


def by_channel(sam: Any) -> None:
    sam.mask_decoder.output_upscaling[2] = nn.PReLU(8)


@pytest.mark.parametrize("change", [watched, patched, parametrised, by_channel])
def test_what_cannot_be_read_is_called(change: Callable[[Any], None], seen: list[int]) -> None:
    sam = random_sam()
    small = fuse(sam)
    for model in (sam, small):
        change(model)
    agree(small, sam, asked(sam))
    assert not seen
    assert not sharable(small.mask_decoder)


def test_autocast_and_other_types_are_segment_anythings(seen: list[int]) -> None:
    sam = random_sam()
    small, inputs = fuse(sam), asked(sam)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(small, sam, inputs, error=1e-12)
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        small.mask_decoder(**inputs | {"image_embeddings": inputs["image_embeddings"].double()})
    assert not seen


def test_several_images_are_segment_anythings(seen: list[int]) -> None:
    sam = random_sam()
    inputs = asked(sam, count=1)
    inputs["image_embeddings"] = inputs["image_embeddings"].repeat(2, 1, 1, 1)
    inputs["sparse_prompt_embeddings"] = inputs["sparse_prompt_embeddings"][:1]
    with torch.no_grad():
        for model in (sam, fuse(sam)):
            # It repeats images, and so pairs two images with one prompt.
            masks, _ = model.mask_decoder(**inputs)
            assert masks.shape[0] == 2
    assert not seen


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, seen: list[int]) -> None:
    sam = random_sam()
    small = fuse(sam)
    inputs = asked(sam, kind, 3)
    for model in (sam, small):
        masks, scores = model.mask_decoder(**inputs)
        (masks.square().mean() + scores.sum()).backward()
    pairs = zip(sam.mask_decoder.named_parameters(), small.mask_decoder.parameters(), strict=True)
    for (name, theirs), mine in pairs:
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
    frozen = small.mask_decoder.requires_grad_(False)
    embedding = inputs["image_embeddings"].requires_grad_()
    frozen(**inputs)[0].sum().backward()
    assert embedding.grad is not None
    assert not seen
    inputs["image_embeddings"] = embedding.detach()
    frozen(**inputs)
    assert seen == [3]


def test_traced_and_exported_as_segment_anything(seen: list[int]) -> None:
    sam = random_sam()
    small = fuse(sam).eval()
    inputs = asked(sam, "boxes")
    with torch.no_grad():
        graphs = [
            torch.export.export(model.mask_decoder, (), inputs, strict=False).graph
            for model in (sam.eval(), small)
        ]
    kinds = [[str(node.target) for node in graph.nodes if node.op != "output"] for graph in graphs]
    assert kinds[0] == kinds[1]
    assert not seen


LATER = [
    (sc.prune.Decoder(ratio=0.5), True),
    (sc.quantize.Int8Weights(min_size=0), False),
    (sc.quantize.Int8Dynamic(where="mask_decoder.**", force=True), False),
    (sc.substitute.LightDecoder(attention_dim=8), True),
    (sc.attention.PooledKV(where="mask_decoder.**"), False),
]


@pytest.mark.parametrize(("step", "shares"), LATER, ids=lambda x: getattr(x, "label", x))
def test_later_steps(step: Any, shares: bool, seen: list[int], tmp_path: Path) -> None:
    sam = random_sam()
    run = {"progress": False, "data": sc.shapes(2, size=64)}
    small = sc.Pipeline([sc.attention.Fused(), step], any_order=True)(sam, **run)
    plain = step(sam, **run)
    seen.clear()
    agree(small, plain, asked(sam, "both", 4))
    assert bool(seen) == shares == sharable(plain.mask_decoder)
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert type(again.mask_decoder) is type(small.mask_decoder)
    inputs = asked(sam)
    with torch.no_grad():
        assert torch.equal(again.mask_decoder(**inputs)[0], small.mask_decoder(**inputs)[0])


def test_trained_later(seen: list[int]) -> None:
    step = sc.distill.PromptLoop(steps=2, decoder="lora")
    small = (sc.attention.Fused() | step)(
        random_sam(), data=sc.shapes(2, size=64), teacher=random_sam(seed=3), progress=False
    )
    assert type(small.mask_decoder) is FusedDecoder
    seen.clear()
    plain = copy.deepcopy(small)
    plain.mask_decoder.__class__ = MaskDecoder
    agree(small, plain, asked(small))
    assert seen


def test_keeps_names_modes_and_the_input() -> None:
    sam = random_sam()
    sam.mask_decoder.train()
    sam.mask_decoder.iou_token.requires_grad_(False)
    small = fuse(sam)
    assert type(sam.mask_decoder) is MaskDecoder
    assert small.mask_decoder.training
    names = [name for name, _ in sam.mask_decoder.named_modules()]
    assert [name for name, _ in small.mask_decoder.named_modules()] == names
    assert small.state_dict().keys() == sam.state_dict().keys()
    assert not small.mask_decoder.iou_token.weight.requires_grad
    assert sc.evaluate.macs(small).decoder_per_prompt == sc.evaluate.macs(sam).decoder_per_prompt


def test_saved_by_an_earlier_version(tmp_path: Path) -> None:
    sam = random_sam()
    step = sc.attention.Fused()
    step.rebuild(sam, {"blocks": ["image_encoder.blocks.0"]})
    assert type(sam.mask_decoder) is MaskDecoder
    sc.save(fuse(random_sam()), tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert type(again.mask_decoder) is FusedDecoder
    agree(again, random_sam(), asked(again))


def test_other_decoders_are_left_alone() -> None:
    for options in ({"of": "tiny_sam"}, {"of": "edge_sam", "stability": True}):
        sam = sc.substitute.Conventions(**options)(random_sam(), progress=False)
        small = fuse(sam)
        assert type(small.mask_decoder) is type(sam.mask_decoder)
        assert sc.lineage(small)[-1].state["decoder"] is False


def test_automatic_masks(trained: nn.Module, seen: list[int]) -> None:
    small = fuse(trained)
    image = sc.shapes(1, seed=3, size=(96, 131))[0].image
    options = {"points_per_side": 6, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}
    found, wanted = (
        SamAutomaticMaskGenerator(m, **options).generate(image) for m in (small, trained)
    )
    assert seen
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine["segmentation"] != theirs["segmentation"]).sum() <= 3
        assert mine["point_coords"] == theirs["point_coords"]


def test_everything_shares_across_calls(trained: nn.Module, seen: list[int]) -> None:
    small = fuse(trained)
    features = asked(small)["image_embeddings"]
    assert isinstance(decoder_for(small, features), Shared)
    image = sc.shapes(1, seed=3, size=(96, 131))[0].image
    settings = sc.Everything(sampler=sc.samplers.Grid(side=6), min_iou=0.5, min_stability=0.6)
    found, wanted = settings(small, image), settings(trained, image)
    assert len(found) == len(wanted) > 0
    assert all(np.array_equal(a, b) for a, b in zip(found.counts, wanted.counts, strict=True))
    assert not seen


def test_prompts_at_once() -> None:
    assert _shared_decoder.prompts_at_once(torch.empty(1, 256, 64, 64)) == 4
    assert _shared_decoder.prompts_at_once(torch.empty(1, 64, 16, 16)) == 64
    assert _shared_decoder.prompts_at_once(torch.empty(1, 256, 64, 64, device="meta")) == 64


@pytest.mark.slow
def test_vit_b(seen: list[int]) -> None:
    sam = randomise(sc.build("vit_b", depth=1, global_attn_indexes=(0,)))
    for kind in KINDS:
        agree(fuse(sam), sam, asked(sam, kind, 5))
    assert seen == [4, 1] * 4
