from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything import SamPredictor
from zoo_goldens import Reference, check

import samcompress as sc
from samcompress.core import errors
from samcompress.core.framing import Framing, framing_of
from samcompress.core.predict import decode, encode

SWAPS = [
    sc.substitute.TinyViT(),
    sc.substitute.RepViT(variant="m1"),
    sc.substitute.EfficientViT(variant="l0"),
    sc.substitute.ViT(variant="tiny"),
    sc.substitute.ResNet(),
]
each = pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.name)


@each
def test_grid_of_another_size_is_resized(swap: Any) -> None:
    sam = random_sam()  # cells of 8 pixels, where all of these have 16 of the frame
    small = swap(sam, progress=False)
    (step,) = sc.lineage(small)
    assert step.state["adapter"] == "bilinear, 4x4 -> 8x8"
    assert step.state["channels"] == 32
    side = small.image_encoder.img_size
    with torch.no_grad():
        assert small.image_encoder(torch.zeros(2, 3, side, side)).shape == (2, 32, 8, 8)


@each
def test_grid_of_the_same_size_is_left_alone(swap: Any) -> None:
    small = swap(sc.build("tiny", image_size=128, patch_size=16), progress=False)
    assert sc.lineage(small)[0].state["adapter"] is None
    assert type(small.image_encoder).__name__ != "OnGrid"


@each
def test_another_image_size(swap: Any) -> None:
    small = swap(random_sam(), progress=False)
    size = 2 * small.image_encoder.img_size
    large = sc.substitute.ImageSize(size=size)
    large = sc.Pipeline([large], any_order=True)(small, progress=False)
    assert large.image_encoder.img_size == size
    assert framing_of(large) == Framing(size, 128)
    image = sc.shapes(1)[0].image
    (found,) = sc.predict(large, [image], [[sc.Prompt(points=[[20, 30]])]])
    assert found.logits.shape == (1, 1, 64, 64)
    with pytest.raises(errors.ConfigError, match="size does not fit the image encoder"):
        sc.Pipeline([sc.substitute.ImageSize(size=size + 4)], any_order=True)(small, progress=False)


@each
def test_weights_depend_on_the_seed_alone(swap: Any) -> None:
    import dataclasses

    torch.manual_seed(5)
    first = swap(random_sam(), progress=False)
    second = swap(random_sam(), progress=False)
    other = dataclasses.replace(swap, seed=1)(random_sam(), progress=False)
    names = list(first.image_encoder.state_dict())
    states = [m.image_encoder.state_dict() for m in (first, second, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in names)
    assert not all(torch.equal(states[0][n], states[2][n]) for n in names)


def test_predictor_of_segment_anything_where_the_image_is_smaller_than_the_frame() -> None:
    """It knows of one square only; its prompts land within a quarter of a pixel of ours."""
    sam = random_sam(image_size=256, patch_size=16)
    small = sc.substitute.EfficientViT()(sam, progress=False)
    image = sc.shapes(1, size=(96, 128))[0].image
    (found,) = sc.predict(small, [image], [[sc.Prompt(points=[[70, 50]])]])
    predictor = SamPredictor(small)
    predictor.set_image(image)
    _, scores, logits = predictor.predict(
        point_coords=np.array([[70, 50]]), point_labels=np.array([1]), multimask_output=False
    )
    apart = np.abs(logits - found.logits[0].numpy()).max() / np.abs(logits).max()
    assert apart < 0.05
    assert abs(float(scores[0]) - float(found.scores[0, 0])) < 0.05


def test_image_side_that_does_not_fit() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        sc.substitute.RepViT()(random_sam(image_size=48))
    assert str(caught.value) == (
        "substitute.rep_vit: the image side does not fit this encoder.\n"
        "  where     image_encoder.img_size\n"
        "  got       48\n"
        "  expected  a multiple of 32\n"
        "  try       sc.substitute.ImageSize(size=...) before it"
    )


@pytest.mark.parametrize(
    ("name", "swap"),
    [
        ("mobilesam", sc.substitute.TinyViT()),
        ("edgesam", sc.substitute.RepViT()),
        ("efficientvit_sam_l0", sc.substitute.EfficientViT()),
    ],
)
def test_whole_chain_equals_the_reference(name: str, swap: Any, shared: Path) -> None:
    """Published weights' names and maths, through the transform, on SAM's own decoder."""
    from samcompress.substitute import _efficientvit, _repvit, _tiny_vit

    reference = Reference.of(name, shared)
    least = {"depth": 1, "embed_dim": 12, "num_heads": 1, "global_attn_indexes": ()}
    sam = swap(sc.build("vit_b", **least), progress=False)
    convert = {"mobilesam": _tiny_vit, "edgesam": _repvit, "efficientvit_sam_l0": _efficientvit}
    sam.load_state_dict(convert[name].convert(reference.state()), strict=True)
    if name.startswith("efficientvit"):
        _efficientvit.set_norm_eps(sam.mask_decoder)
    (embedding,) = encode(sam, [reference.image()])
    for key in ("point", "box"):
        prompt = reference.prompts()[key]
        found = [
            decode(sam, embedding, [prompt], multimask=many, full_size=False)
            for many in (False, True)
        ]
        low = torch.cat([f.logits[0] for f in found])
        scores = torch.cat([f.scores[0] for f in found]).numpy()
        full = framing_of(sam).full_size(low[None], embedding.size)[0]
        errors_ = check(reference, key, low.numpy(), scores, full.numpy())
        assert max(errors_.values()) < 1e-5, errors_
