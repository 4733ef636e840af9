"""substitute.image_size: the model that would be built at that size, tables resized as stated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import parameter_count
from samcompress.evaluate.macs import closed_form, macs
from samcompress.substitute.image_size import resize_positions, resize_relative


def run(size: int, sam: Any = None) -> Any:
    return sc.substitute.ImageSize(size=size)(sam or random_sam(), progress=False)


def encode(sam: Any, size: int) -> torch.Tensor:
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return sam.image_encoder(image.to(sam.image_encoder.pos_embed.dtype))


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(16, 8), (12, 5), (8, 16), (7, 7)])
def test_positions_are_resized_as_pillow_resizes_an_image(old: int, new: int) -> None:
    table = torch.randn(1, old, old, 3, generator=torch.Generator().manual_seed(0))
    found = resize_positions(table, new)
    assert found.shape == (1, new, new, 3)
    assert found.is_contiguous()
    for channel in range(3):
        image = Image.fromarray(table[0, :, :, channel].numpy())
        expected = np.asarray(image.resize((new, new), Image.Resampling.BICUBIC))
        if new <= old:  # enlarging, Pillow takes another cubic than torch
            np.testing.assert_allclose(found[0, :, :, channel], expected, atol=1e-5)
        else:
            assert np.corrcoef(found[0, :, :, channel].ravel(), expected.ravel())[0, 1] > 0.99


def test_relative_positions_by_hand() -> None:
    table = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])  # distances -2...2
    # Three rows at the centres of three equal parts of five.
    torch.testing.assert_close(resize_relative(table, 3), torch.tensor([[1 / 3], [2.0], [11 / 3]]))
    assert torch.equal(resize_relative(table, 5), table)
    assert resize_relative(table, 9)[4].item() == 2  # distance 0 stays in the middle


@pytest.mark.parametrize("size", [32, 40, 96])
def test_same_as_upstream_resizing_while_it_runs(size: int) -> None:
    sam = random_sam()
    small = run(size, sam)
    # segment_anything resizes relative tables itself, on every call, if they do not fit.
    upstream = copy.deepcopy(sam)
    upstream.image_encoder.pos_embed = small.image_encoder.pos_embed
    torch.testing.assert_close(encode(small, size), encode(upstream, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 96])
def test_same_as_a_model_built_at_that_size(size: int) -> None:
    small = run(size)
    native = random_sam(image_size=size)
    native.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(encode(small, size), encode(native, size))
    for name in ("input_image_size", "image_embedding_size", "mask_input_size"):
        assert getattr(small.prompt_encoder, name) == getattr(native.prompt_encoder, name)
    assert small.image_encoder.img_size == size
    assert macs(small) == macs(native)
    image = sc.shapes(1, size=(40, 64))[0].image
    prompts = [[sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 39])]]
    first, second = (sc.predict(m, [image], prompts)[0] for m in (small, native))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.masks, second.masks)


def test_window_tables_and_all_other_weights_stay() -> None:
    sam = random_sam()
    small = run(16, sam)  # a grid of 2, smaller than the window of 3
    before, after = sam.state_dict(), small.state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name].shape != after[name].shape]
    block = "image_encoder.blocks.1.attn.rel_pos_"
    assert changed == ["image_encoder.pos_embed", f"{block}h", f"{block}w"]
    assert all(torch.equal(before[n], after[n]) for n in before if n not in changed)


def test_there_and_back_is_near_where_tables_are_smooth() -> None:
    sam = random_sam()
    ramp = torch.linspace(-1, 1, 8)
    sam.image_encoder.pos_embed.data.copy_((ramp[:, None] + 2 * ramp)[None, :, :, None])
    back = run(64, run(128, sam))
    difference = (back.image_encoder.pos_embed - sam.image_encoder.pos_embed).abs()
    assert difference[:, 1:-1, 1:-1].max() < 0.05


def test_encoders_without_tables() -> None:
    sam = random_sam()
    sam.image_encoder.pos_embed = None
    for block in sam.image_encoder.blocks:
        block.attn.use_rel_pos = False
        del block.attn.rel_pos_h, block.attn.rel_pos_w
    small = copy.deepcopy(sam)
    sc.substitute.ImageSize(size=32).rebuild(small, {"size": 32})
    with torch.no_grad():
        assert small.image_encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 32, 4, 4)


def test_types_and_flags_are_kept() -> None:
    sam = random_sam().to(torch.bfloat16)
    sam.image_encoder.pos_embed.requires_grad_(False)
    small = run(32, sam)
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())
    assert not small.image_encoder.pos_embed.requires_grad
    assert small.image_encoder.blocks[1].attn.rel_pos_h.requires_grad
    assert torch.isfinite(encode(small, 32)).all()


def test_vit_b_at_512() -> None:
    sam = sc.SamConfig().build(empty=True)
    sc.substitute.ImageSize().rebuild(sam, {"size": 512})
    assert parameter_count(sam) == 91_343_408
    shapes = {b.attn.rel_pos_h.shape[0] for b in sam.image_encoder.blocks}
    assert shapes == {27, 63}
    assert macs(sam).encoder == closed_form(sc.SamConfig(image_size=512)) == 113_545_150_464


def test_saved_and_loaded(tmp_path: Path) -> None:
    small = run(32, run(96))
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(encode(again, 32), encode(small, 32))
    assert again.prompt_encoder.mask_input_size == (16, 16)
    assert [step.state for step in sc.lineage(again)] == [{"size": 96}, {"size": 32}]


# --- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96])
def test_predictor_and_generator_on_a_photo(shared: Path, size: int) -> None:
    path = sorted((shared / "data" / "bsds500" / "test").glob("*.jpg"))[0]
    photo = np.asarray(Image.open(path).convert("RGB"))
    height, width = photo.shape[:2]
    assert height != width
    small = run(size)
    predictor = SamPredictor(small)
    predictor.set_image(photo)
    side = small.prompt_encoder.mask_input_size
    for asked in (
        {"point_coords": np.array([[width / 2, height / 2]]), "point_labels": np.array([1])},
        {"box": np.array([10, 20, width - 10, height - 20])},
        {"box": np.array([10, 20, 90, 80]), "mask_input": np.ones((1, *side), np.float32)},
    ):
        masks, scores, low = predictor.predict(**asked)
        assert masks.shape == (3, height, width)
        assert low.shape == (3, *side) == (3, size // 2, size // 2)
        assert np.isfinite(scores).all()
    generator = SamAutomaticMaskGenerator(
        small, points_per_side=2, pred_iou_thresh=-9, stability_score_thresh=-1
    )
    found = generator.generate(photo)
    assert found
    assert all(mask["segmentation"].shape == (height, width) for mask in found)


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], size: int, sam: Any = None) -> str:
    with pytest.raises(error) as caught:
        run(size, sam)
    return str(caught.value)


def test_not_a_multiple_of_the_patch() -> None:
    assert message(errors.ConfigError, 100).splitlines() == [
        "substitute.image_size: size does not fit the image encoder.",
        "  got       100",
        "  expected  a multiple of 8",
        "  try       ImageSize(size=96) or ImageSize(size=104)",
    ]
    assert message(errors.ConfigError, 3).endswith("try       ImageSize(size=8)")


@pytest.mark.parametrize("size", [0, -64])
def test_no_size(size: int) -> None:
    text = message(errors.ConfigError, size)
    assert text.startswith("substitute.image_size: size is not a size.")
    assert "at least 1 pixel" in text


def test_same_size() -> None:
    assert message(errors.NoEffectError, 64).splitlines() == [
        "substitute.image_size: the model has this size already.",
        "  where     image_encoder.img_size",
        "  got       64",
        "  try       leave this step out, or choose another size",
    ]


def test_another_encoder() -> None:
    sam = random_sam()
    encoder = torch.nn.Conv2d(3, 32, 8, 8)
    encoder.img_size = 64
    sam.image_encoder = encoder
    text = message(errors.ModelError, 32, sam)
    assert text.startswith("substitute.image_size does not know how to resize this model.")
    assert "Conv2d: 'Conv2d' object has no attribute 'patch_embed'" in text
    assert "as in segment_anything" in text


def test_after_another_technique() -> None:
    small = sc.prune.Mlp(criterion="magnitude")(random_sam(), progress=False)
    text = message(errors.OrderError, 32, small)
    assert text.startswith("substitute.image_size comes after prune.mlp.")
