from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything import SamPredictor

import samcompress as sc
from samcompress.core.framing import Framing, Stretched, Truncated, framing_of
from samcompress.core.predict import preprocess

SIZES = [(48, 64), (64, 43), (33, 100), (64, 64), (10, 8)]


def picture(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_sams_rule_is_that_of_its_predictor(size: tuple[int, int]) -> None:
    sam = random_sam()
    framing = framing_of(sam)
    predictor = SamPredictor(sam)
    predictor.set_image(picture(size))
    assert framing.inside(size) == predictor.input_size
    ready, inside = preprocess(sam, picture(size))
    assert inside == predictor.input_size
    resized = torch.as_tensor(predictor.transform.apply_image(picture(size))).permute(2, 0, 1)
    assert torch.equal(framing.resized(picture(size)), resized.float())
    assert torch.equal(ready, sam.preprocess(resized))
    low = torch.randn(2, 3, 32, 32)
    full = sam.postprocess_masks(low, predictor.input_size, size)
    assert torch.equal(framing.full_size(low, size), full)


def test_an_encoder_smaller_than_its_frame() -> None:
    framing = Framing(32, 64)
    assert framing.resized(picture((48, 64))).shape == (3, 24, 32)
    assert framing.inside((48, 64)) == (48, 64)
    assert framing.scale((24, 32)) == (2, 2)
    assert framing.at(64) == Framing(64, 128)


def test_stretched() -> None:
    framing = Stretched(32, 32)
    assert framing.inside((48, 64)) == (32, 32)
    assert framing.scale((48, 64)) == (0.5, 32 / 48)
    assert framing.resized(picture((48, 64))).shape == (3, 32, 32)
    assert framing.full_size(torch.zeros(1, 1, 8, 8), (48, 64)).shape == (1, 1, 48, 64)
    assert type(framing.at(64)) is Stretched


def test_truncated() -> None:
    framing = Truncated(512, 512)
    assert framing.resized(picture((480, 640))).shape == (3, 384, 512)
    assert framing.inside((640, 427)) == (512, 341)
    assert framing.scale((320, 640)) == (0.8, 0.8)
    # int(1024 / (w / h)) is not always int(1024 * h / w).
    assert Truncated(1024, 1024).inside((93, 512)) == (185, 1024)
    low = torch.arange(64.0).view(1, 1, 8, 8)
    # Only the upper half shows an image of 1 : 2.
    assert float(framing.full_size(low, (320, 640)).max()) == 31


def test_a_rule_of_its_own_is_followed_and_copied() -> None:
    import copy

    sam = random_sam()
    sam.framing = Stretched(64, 64)
    again = copy.deepcopy(sam)
    image = picture((40, 64))
    ready, inside = preprocess(again, image)
    assert ready.shape == (3, 64, 64)
    assert inside == (64, 64)
    (found,) = sc.predict(again, [image], [[sc.Prompt(points=[[60, 30]])]])
    assert found.masks.shape == (1, 1, 40, 64)
