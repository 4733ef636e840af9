"""Letterbox, choice of boxes, assembly of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from samcompress.core.errors import DataError, ShapeError
from samcompress.core.everything.choose import whole_frame
from samcompress.substitute._proposals import (
    GREY,
    Detections,
    Letterbox,
    Proposals,
    checked,
    resized,
    select,
)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [((30, 40), (48, 64)), ((48, 64), (30, 41)), ((1, 5), (10, 50)), ((64, 48), (32, 24)),
     ((37, 53), (64, 44)), ((7, 9), (7, 9)), ((9, 1), (3, 1)), ((100, 33), (13, 77))],
)  # fmt: skip
def test_resizes_as_opencv(old: tuple[int, int], new: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = image(*old)
    expected = cv2.resize(picture, new[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(resized(picture, new), expected)


@pytest.mark.parametrize("new", [(48, 64), (20, 90), (11, 13)])
def test_resizes_bilinearly(new: tuple[int, int]) -> None:
    picture = image(30, 40)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    exact = F.interpolate(pixels, new, mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(resized(picture, new) - exact).max() < 1.1


# --- letterbox ------------------------------------------------------------------------------------


def test_letterbox_sizes() -> None:
    made = {size: Letterbox.of(size, 1024, 32) for size in ((480, 640), (640, 480), (427, 640))}
    assert made[480, 640].padded == made[480, 640].inside == (768, 1024)
    assert made[640, 480].padded == (1024, 768)
    assert (made[427, 640].inside, made[427, 640].padded) == ((683, 1024), (704, 1024))
    assert made[427, 640].corner == (10, 0)  # 21 rows of grey: 10 above, 11 below
    assert Letterbox.of((1, 5000), 1024, 32).inside == (1, 1024)
    assert Letterbox.of((1, 1), 64, 32) == Letterbox((1, 1), (64, 64), (64, 64))
    assert Letterbox.of((3000, 2000), 1000, 32).padded == (1024, 672)


def test_letterbox_pixels() -> None:
    place = Letterbox.of((20, 50), 100, 32)
    assert (place.inside, place.padded, place.corner) == ((40, 100), (64, 128), (12, 14))
    picture = image(20, 50)
    pixels = place.pixels(picture)
    assert pixels.shape == (3, 64, 128)
    assert pixels.dtype == torch.float32
    whole = (pixels * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(whole[12:52, 14:114], resized(picture, (40, 100)))
    whole[12:52, 14:114] = GREY
    assert np.unique(whole).tolist() == [114]


def test_boxes_to_the_image() -> None:
    place = Letterbox.of((20, 50), 100, 32)
    found = place.boxes(torch.tensor([[14.0, 12, 114, 52], [24, 20, 34, 30], [0, 0, 128, 64]]))
    assert found.tolist() == [[0, 0, 50, 20], [5, 4, 10, 9], [0, 0, 50, 20]]


def test_maps_without_padding_are_interpolated() -> None:
    place = Letterbox.of((24, 48), 64, 32)
    assert place.padded == place.inside
    maps = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps[None], (24, 48), mode="bilinear")[0]
    assert torch.allclose(place.maps(maps), expected, atol=1e-6)


def test_maps_are_where_the_image_is() -> None:
    # A ramp over the input must be the same ramp over the image, whatever the padding.
    place = Letterbox.of((20, 50), 100, 32)
    x = (torch.arange(32) + 0.5) * 4  # centres of the cells, in pixels of the input
    y = (torch.arange(16) + 0.5) * 4
    maps = torch.stack([x.expand(16, -1), y[:, None].expand(-1, 32)])
    found = place.maps(maps)
    assert torch.allclose(found[0, 0], 14 + (torch.arange(50) + 0.5) * 2, atol=1e-4)
    assert torch.allclose(found[1, :, 0], 12 + (torch.arange(20) + 0.5) * 2, atol=1e-4)


# --- choosing -------------------------------------------------------------------------------------

SIZE = (64, 96)
PLACE = Letterbox.of(SIZE, 96, 32)


def detections(boxes: list[list[float]], scores: list[float], plain: float = 8.0) -> Detections:
    """Boxes x0, y0, x1, y1, each with a prototype of its own that is the same everywhere."""
    corners = torch.tensor(boxes).reshape(-1, 4).float()
    ways = torch.stack([*((corners[:, :2] + corners[:, 2:]) / 2).T,
                        *(corners[:, 2:] - corners[:, :2]).T])  # fmt: skip
    n = len(corners)
    prototypes = torch.full((n, SIZE[0] // 4, SIZE[1] // 4), plain)
    return Detections(ways[None], torch.tensor(scores)[None, None], torch.eye(n)[None],
                      prototypes[None])  # fmt: skip


def chosen(found: Detections, **rules: float) -> Proposals:
    return select(found, PLACE, **{"conf": 0.4, "iou": 0.9, "max_det": 300, **rules})


def test_masks_fill_their_boxes() -> None:
    found = chosen(detections([[8, 4, 20, 30], [30.4, 40.6, 90.5, 60.4]], [0.5, 0.9]))
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])
    assert found.boxes[1].tolist() == [8, 4, 20, 30]
    expected = np.zeros((2, *SIZE), bool)
    expected[0, 41:60, 30:90] = True  # pixels whose centres are inside
    expected[1, 4:30, 8:20] = True
    assert np.array_equal(found.masks, expected)
    assert (found.masks.dtype, found.boxes.dtype, found.scores.dtype) == (bool, "f4", "f4")


def test_confidence_overlap_and_number() -> None:
    boxes = [[0, 0, 40, 40], [0, 0, 40, 38], [50, 0, 60, 10], [50, 20, 60, 40]]
    found = detections(boxes, [0.6, 0.7, 0.4, 0.41])  # the first two have an IoU of 0.95
    assert chosen(found).scores.tolist() == pytest.approx([0.7, 0.41])
    assert chosen(found, iou=0.96).scores.tolist() == pytest.approx([0.7, 0.6, 0.41])
    assert chosen(found, conf=0.39).scores.tolist() == pytest.approx([0.7, 0.41, 0.4])
    assert chosen(found, max_det=1).boxes.tolist() == [[0, 0, 40, 38]]


def test_mixture_by_hand() -> None:
    # Two prototypes, one positive in the left half and one in the upper: their difference.
    left, upper = torch.full((16, 24), -3.0), torch.full((16, 24), -3.0)
    left[:, :12], upper[:8] = 3, 3
    raw = detections([[0, 0, 96, 64]], [0.9])
    raw = raw._replace(coefficients=torch.tensor([[[1.0], [-1.0]]]),
                       prototypes=torch.stack([left, upper])[None])  # fmt: skip
    mask = chosen(raw).masks[0]
    assert mask[34:, :46].all()  # left and not upper: 6
    assert not mask[:30, 50:].any()  # upper and not left: -6
    assert not mask[:30, :46].any()  # both: 0, which is not above one half
    assert not mask[34:, 50:].any()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = (torch.rand(40, 4, generator=generator) * 30).tolist()
    boxes = [[x, y, x + w + 2, y + h + 2] for x, y, w, h in boxes]
    raw = detections(boxes, torch.rand(40, generator=generator).tolist())
    raw = raw._replace(prototypes=torch.randn(1, 40, 16, 24, generator=generator))
    whole = chosen(raw, conf=0)
    monkeypatch.setattr("samcompress.substitute._proposals.CHUNK", 3)
    parts = chosen(raw, conf=0)
    assert len(whole) > 32
    assert np.array_equal(whole.masks, parts.masks)


def test_nothing_to_find() -> None:
    for found in (
        chosen(detections([[0, 0, 40, 40]], [0.3])),
        chosen(detections([[0, 0, 40, 40]], [0.9], plain=-8.0)),  # no pixel above one half
        chosen(detections([[5, 5, 5.5, 30]], [0.9])),  # thinner than a pixel
        chosen(detections([[-30, 0, -5, 30]], [0.9])),  # beside the image
    ):
        assert len(found) == 0
        assert (found.masks.shape, found.boxes.shape) == ((0, *SIZE), (0, 4))


def test_padding_shows_in_no_mask() -> None:
    place = Letterbox.of((20, 50), 100, 32)
    raw = detections([[20, 0, 60, 64]], [0.9])
    raw = raw._replace(prototypes=torch.full((1, 1, 16, 32), 5.0))
    found = select(raw, place, conf=0.4, iou=0.9, max_det=5)
    assert found.masks.shape == (1, 20, 50)
    assert found.boxes.tolist() == [[3, 0, 23, 20]]
    assert found.masks[0, :, 3:23].all()
    assert found.masks.sum() == 20 * 20


# --- the whole frame ------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "whole"), [(19, True), (20, False), (21, False)])
def test_sides_near_the_border(gap: int, whole: bool) -> None:
    box = torch.tensor([[gap, 0.0, 200, 200], [10, 10, 185, 199]])
    found = whole_frame(box, (200, 200))
    # Without snapping the first would overlap by 0.905, 0.9 or 0.895.
    assert (found[0].tolist() == [0, 0, 200, 200]) == whole
    assert found[1].tolist() == [0, 0, 200, 200]
    assert whole_frame(box, (200, 200), margin=0).tolist() == (
        [[0, 0, 200, 200], box[1].tolist()] if gap == 19 else box.tolist()
    )


def test_small_boxes_and_overlap_stay() -> None:
    place = Letterbox((200, 200), (100, 200), (128, 224))  # 14 above, 12 to the left
    near: Tensor = torch.tensor([[13.0, 15, 190, 113], [13.0, 15, 193, 113], [0, 0, 224, 128]])
    found = whole_frame(near, place.inside, place.corner)
    frame = [12, 14, 212, 114]
    assert found.tolist() == [near[0].tolist(), frame, frame]
    assert whole_frame(near, place.inside, place.corner, iou=0.99)[1].tolist() == frame
    assert whole_frame(near[:0], place.inside, place.corner).shape == (0, 4)


# --- images ---------------------------------------------------------------------------------------


def test_what_is_no_image() -> None:
    with pytest.raises(ShapeError, match="an image has the wrong shape"):
        checked(np.zeros((4, 4), np.uint8))
    with pytest.raises(ShapeError, match="an image has the wrong shape"):
        checked(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(DataError, match="an image has the wrong type"):
        checked(np.zeros((4, 4, 3), np.float32))
