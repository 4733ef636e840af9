from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything import SamPredictor

import samcompress as sc
from samcompress.core import errors
from samcompress.core.predict import decode, encode

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 255, size, dtype=np.uint8) for size in ((60, 90, 3), (70, 33, 3))]
PROMPTS = [
    sc.Prompt(points=[[20, 30]]),
    sc.Prompt(box=[3, 4, 30, 50]),
    sc.Prompt(points=[[20, 30], [30, 50.5]], labels=[1, 0], box=[3.3, 4, 31, 50]),
    sc.Prompt(points=[[5, 6]], mask=RNG.normal(size=(1, 32, 32))),
    sc.Prompt(points=[[12, 1]]),
    sc.Prompt(mask=RNG.normal(size=(1, 32, 32))),
]


@pytest.mark.parametrize("image_size", [64, 48])
@pytest.mark.parametrize("multimask", [False, True])
def test_equals_one_at_a_time(image_size: int, multimask: bool) -> None:
    sam = random_sam(image_size=image_size)
    side = sam.prompt_encoder.mask_input_size[0]
    prompts = [p for p in PROMPTS if p.mask is None or side == 32]
    found = sc.predict(
        sam, IMAGES, [prompts, prompts[::-1]], multimask=multimask, batch_size=2, prompt_batch=2
    )
    predictor = SamPredictor(sam)
    for image, asked, prediction in zip(IMAGES, [prompts, prompts[::-1]], found, strict=True):
        predictor.set_image(image)
        for index, p in enumerate(asked):
            masks, scores, logits = predictor.predict(
                p.points, p.labels, p.box, p.mask, multimask_output=multimask
            )
            assert np.array_equal(prediction.masks[index].numpy(), masks)
            torch.testing.assert_close(prediction.scores[index], torch.from_numpy(scores))
            torch.testing.assert_close(
                prediction.logits[index], torch.from_numpy(logits), rtol=1e-5, atol=1e-5
            )


def test_no_prompts_is_a_normal_case() -> None:
    found = sc.predict(random_sam(), IMAGES[:1], [[]], multimask=True)[0]
    assert found.masks.shape == (0, 3, 60, 90)
    assert found.scores.shape == (0, 3)
    assert found.logits.shape == (0, 3, 32, 32)


def test_logits_go_back_in_as_a_prompt() -> None:
    sam = random_sam()
    embedding = encode(sam, IMAGES[:1])[0]
    first = decode(sam, embedding, PROMPTS[:1], full_size=False)
    assert first.masks is None
    again = decode(sam, embedding, [sc.Prompt(points=[[20, 30]], mask=first.logits[0])])
    assert not torch.equal(again.logits, first.logits)


def test_reduced_precision_gives_float_outputs() -> None:
    sam = random_sam()
    sam.image_encoder.bfloat16()
    sam.mask_decoder.bfloat16()
    found = sc.predict(sam, IMAGES[:1], [PROMPTS])[0]
    assert found.logits.dtype == found.scores.dtype == torch.float32
    full = sc.predict(random_sam(), IMAGES[:1], [PROMPTS])[0]
    error = (found.logits - full.logits).norm() / full.logits.norm()
    assert error < 0.1
    with pytest.raises(errors.ModelError, match="prompt encoder computes in float32 only"):
        sc.predict(sam.bfloat16(), IMAGES[:1], [PROMPTS])


def test_tall_grey_and_one_pixel_images() -> None:
    sam = random_sam()
    dot = np.zeros((1, 1, 3), np.uint8)
    assert sc.predict(sam, [dot], [[sc.Prompt(points=[[0, 0]])]])[0].masks.shape == (1, 1, 1, 1)
    with pytest.raises(errors.ShapeError, match="too narrow") as caught:
        sc.predict(sam, [np.zeros((1, 500, 3), np.uint8)], [[]])
    assert "at most 128 times as long as wide" in str(caught.value)
    with pytest.raises(errors.ShapeError) as caught:
        sc.predict(sam, [np.zeros((9, 9), np.uint8)], [[]])
    assert str(caught.value) == (
        "an image has the wrong shape.\n"
        "  got       (9, 9)\n"
        "  expected  (H, W, 3)\n"
        '  try       np.asarray(PIL.Image.open(path).convert("RGB"))'
    )
    with pytest.raises(errors.DataError, match="wrong type"):
        sc.predict(sam, [np.zeros((9, 9, 3), np.uint16)], [[]])


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({}, errors.ConfigError, "asks nothing"),
        ({"points": [[1, 2, 3]]}, errors.ShapeError, "points of a prompt has the wrong shape.\n  got       (1, 3)\n  expected  (N, 2)"),
        ({"points": [[np.nan, 2]]}, errors.ConfigError, "points of a prompt holds a number that is not finite"),
        ({"box": [1, 2, 3]}, errors.ShapeError, "expected  (4)"),
        ({"box": [1, 2, 3, np.inf]}, errors.ConfigError, "not finite"),
        ({"points": [[1, 2]], "labels": [1, 1]}, errors.ShapeError, "1 points, 2 labels"),
        ({"points": [[1, 2]], "labels": [2]}, errors.ConfigError, "neither 0 nor 1"),
        ({"points": []}, errors.ConfigError, "empty list of points"),
    ],
)  # fmt: skip
def test_bad_prompts(kwargs: dict, error: type, text: str) -> None:
    with pytest.raises(error) as caught:
        sc.Prompt(**kwargs)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [sc.Prompt(box=[200, 2, 300, 9]), sc.Prompt(box=[9, 9, 3, 3]), sc.Prompt(points=[[-1, 3]])],
)
def test_outside_the_image(prompt: sc.Prompt) -> None:
    with pytest.raises(errors.DataError, match=r"prompt 0(.|\n)*of the original image"):
        sc.predict(random_sam(), IMAGES[:1], [[prompt]])


def test_wrong_mask_size() -> None:
    with pytest.raises(errors.ShapeError, match="mask prompt") as caught:
        sc.predict(random_sam(), IMAGES[:1], [[sc.Prompt(mask=np.zeros((1, 8, 8)))]])
    assert "(1, 32, 32)" in str(caught.value)


def test_as_many_lists_as_images() -> None:
    with pytest.raises(errors.DataError, match="2 images, 1 lists"):
        sc.predict(random_sam(), IMAGES, [[]])
