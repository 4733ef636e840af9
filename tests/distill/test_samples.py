from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import errors
from samcompress.core._draws import batch as draw
from samcompress.core._objective import Share
from samcompress.core.data import Dataset, Sample
from samcompress.core.framing import framing_of
from samcompress.core.predict import preprocess
from samcompress.distill._samples import Augment, Batch, Frame, Samples
from samcompress.distill._views import Views

FRAME = replace(Frame.of(random_sam()), grid=32)  # 64 pixels
STILL = Augment(scale=(1, 1), flip=0, colour=0, grey=0, paste=0)


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return sc.data.as_dataset([*sc.shapes(4, size=(48, 80)), *sc.shapes(8, size=(90, 64))[4:]])


def samples(data: Dataset, *frames: Frame, **fields: object) -> Samples:
    settings = {"batch_size": 4, "prompts": 3, "augment": None, "seed": 0, **fields}
    return Samples(data, frames or (FRAME,), **settings)


def rectangles(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> Dataset:
    """One grey image with rectangles x0, y0, x1, y1."""
    masks = np.zeros((len(boxes), *size), bool)
    image = np.full((*size, 3), 90, np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
        image[y0:y1, x0:x1] = 200
    return sc.data.as_dataset([Sample.from_arrays("a", image, masks)])


def equal(a: Batch, b: Batch) -> bool:
    names = ("images", "valid", "target", "boxes", "owner")
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)
    return same and (a.places, a.indices, a.sizes) == (b.places, b.indices, b.sizes)


def test_plain_images_are_those_of_the_predictor(scenes: Dataset) -> None:
    sam = random_sam()
    batch = samples(scenes).draw(0, Share())
    for image, index, size in zip(batch.images, batch.indices, batch.sizes, strict=True):
        ready, inside = preprocess(sam, scenes[index].image)
        assert torch.allclose(image, ready, atol=1e-6)
        assert size == inside


@pytest.mark.parametrize("of", ["efficient_sam", "nano_sam"])
def test_every_model_sees_images_by_the_students_rule(scenes: Dataset, of: Any) -> None:
    student = sc.substitute.Conventions(of=of)(random_sam(), progress=False)
    teacher = random_sam(seed=1, image_size=128)
    source = samples(scenes, Frame.of(student), Frame.of(teacher))
    batch = source.draw(0, Share())
    for number, index in enumerate(batch.indices):
        ready, inside = preprocess(student, scenes[index].image)
        rule = type(framing_of(student))(128, 128)
        larger, _ = preprocess(teacher, scenes[index].image, rule)
        assert batch.sizes[number] == pytest.approx(inside, abs=1)  # from the teacher's, rounded
        assert torch.allclose(batch.others[0][number], larger, atol=1e-6)
        if of == "efficient_sam":
            assert inside == (64, 64)
            assert batch.valid[number].all()
            assert float((batch.images[number] - ready).abs().mean()) < 0.1
    seen = Views(scenes, source.frames, batch_size=2, seed=0).draw(0, Share())
    drawn = draw(len(scenes), 2, seed=0, step=0)
    assert seen.sizes == tuple(framing_of(student).inside(scenes[i].size) for i in drawn)


def test_stretched_objects_keep_their_place() -> None:
    student = sc.substitute.Conventions(of="efficient_sam")(random_sam(), progress=False)
    frame = replace(Frame.of(student), grid=32)
    data = rectangles((8, 12, 40, 36), size=(48, 64))
    for augment in (None, STILL):
        batch = samples(data, frame, batch_size=1, augment=augment).draw(0, Share())
        assert batch.boxes.tolist() == [[8, 16, 40, 48]]
        expected = torch.zeros(32, 32)
        expected[8:24, 4:20] = 1
        assert float((batch.target[0] - expected).abs().mean()) < 0.02


def test_targets_boxes_and_valid_cells() -> None:
    batch = samples(rectangles((8, 16, 40, 32), size=(48, 64)), batch_size=1).draw(0, Share())
    assert batch.boxes.tolist() == [[8, 16, 40, 32]]
    assert batch.target.shape == (1, 32, 32)
    expected = torch.zeros(32, 32)
    expected[8:16, 4:20] = 1
    assert torch.equal(batch.target[0], expected)
    assert torch.equal(batch.valid[0, :, 0], torch.tensor([1.0] * 24 + [0.0] * 8))
    assert batch.weight == 1


def test_padding_is_zero_after_normalising(scenes: Dataset) -> None:
    batch = samples(scenes, augment=Augment(scale=(0.5, 0.7))).draw(0, Share())
    for image, (height, width), valid in zip(batch.images, batch.sizes, batch.valid, strict=True):
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
        assert valid.sum() * 4 == pytest.approx(height * width)


def test_draws_depend_on_seed_and_step_alone(scenes: Dataset) -> None:
    fields = {"augment": Augment()}
    first, again = samples(scenes, **fields), samples(scenes, **fields)
    again.draw(7, Share())
    assert equal(first.draw(3, Share()), again.draw(3, Share()))
    other = samples(scenes, **fields, seed=1)
    assert not equal(first.draw(3, Share()), other.draw(3, Share()))
    assert not equal(first.draw(3, Share()), first.draw(4, Share()))


@pytest.mark.parametrize("count", [2, 3])
def test_shares_make_up_the_batch(scenes: Dataset, count: int) -> None:
    source = samples(scenes, augment=Augment(), batch_size=5)
    whole = source.draw(2, Share())
    parts = [source.draw(2, Share(i, count)) for i in range(count)]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.target for p in parts]), whole.target)
    assert sum(p.weight for p in parts) == whole.weight
    assert tuple(i for p in parts for i in p.places) == whole.places == (0, 1, 2, 3, 4)


def test_every_image_is_seen_in_an_epoch(scenes: Dataset) -> None:
    source = samples(scenes)
    seen = [i for step in range(2) for i in source.draw(step, Share()).indices]
    assert sorted(seen) == list(range(len(scenes)))


def test_augmented_masks_stay_on_their_objects() -> None:
    """Bright rectangles on grey: the image says where the masks must be."""
    data = rectangles((6, 6, 30, 26), (36, 34, 60, 60))
    augment = Augment(scale=(0.5, 2), flip=0.5, colour=0, grey=0, paste=0)
    source = samples(data, augment=augment, batch_size=1, prompts=2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (FRAME.mean, FRAME.std))
    for step in range(20):
        batch = source.draw(step, Share())
        bright = ((batch.images[0] * std + mean)[0] > 145) & (batch.images[0, 0] != 0)
        cells = torch.nn.functional.avg_pool2d(bright[None].float(), 2)[0]
        for mask, box in zip(batch.target, batch.boxes, strict=True):
            both = torch.minimum(mask, cells).sum()
            assert both / mask.sum() > 0.85
            x0, y0, x1, y1 = box.int().tolist()
            assert mask.sum() * 4 == pytest.approx((x1 - x0) * (y1 - y0), rel=0.15)


def test_pasted_objects_hide_what_lies_under_them() -> None:
    data = sc.data.join(*(sc.shapes(6, seed=s, size=96) for s in (1, 2)))
    plain = samples(data, augment=STILL, batch_size=6, prompts=9)
    pasted = samples(data, augment=Augment(**{**vars(STILL), "paste": 1}), batch_size=6, prompts=9)
    before, after = plain.draw(0, Share()), pasted.draw(0, Share())
    changed = 0
    for place in range(6):
        masks = after.target[after.owner == place]
        changed += int(not torch.equal(before.images[place], after.images[place]))
        # The pasted come first and no mask is covered by one of another image twice.
        assert len(masks) <= 9
        assert (masks.sum((1, 2)) >= 2).all()
    assert changed >= 5


@pytest.mark.parametrize(
    ("size", "patch", "low", "grid"),
    [
        (1024, 16, 256, 256),
        (512, 16, 128, 256),
        (384, 16, 96, 384),
        (256, 8, 128, 256),
        (64, 8, 32, 64),
    ],
)
def test_masks_are_compared_on_a_grid_as_fine_as_sams(
    size: int, patch: int, low: int, grid: int
) -> None:
    model = random_sam(image_size=size, patch_size=patch)
    assert model.prompt_encoder.mask_input_size == (low, low)
    assert Frame.of(model).grid == grid


def test_two_frames_show_the_same() -> None:
    small, large = FRAME, Frame(128, 64, FRAME.mean, FRAME.std)
    data = sc.shapes(4, size=(96, 128))
    for augment in (None, Augment(colour=0, grey=0)):
        batch = samples(data, small, large, augment=augment).draw(0, Share())
        (others,) = batch.others
        assert others.shape == (4, 3, 128, 128)
        shrunk = torch.nn.functional.interpolate(others, (64, 64), mode="area")
        inside = torch.nn.functional.interpolate(batch.valid[:, None], (64, 64)) == 1
        apart = ((shrunk - batch.images).abs() * inside).mean()
        assert apart < 0.1 * batch.images.std()


def test_what_cannot_be_learnt_is_left_out() -> None:
    # A speck, a mask of nearly everything, and one good object.
    data = rectangles((0, 0, 2, 2), (0, 0, 64, 62), (10, 10, 30, 30))
    batch = samples(data, batch_size=1, prompts=9).draw(0, Share())
    assert batch.boxes.tolist() == [[10, 10, 30, 30]]


def test_images_without_masks() -> None:
    with pytest.raises(errors.DataError) as found:
        samples(rectangles((0, 0, 2, 2)), batch_size=1).draw(0, Share())
    assert str(found.value) == (
        "images without a usable mask, one after the other.\n"
        "  where     custom, 20 images tried\n"
        "  got       no object large enough\n"
        "  expected  objects of at least 2 cells, 32 a side\n"
        "  try       data with masks, a larger image size, or less large-scale jitter"
    )


def test_another_image_in_place_of_a_useless_one() -> None:
    useless = Sample.from_arrays("b", np.zeros((64, 64, 3), np.uint8), [])
    data = sc.data.as_dataset([useless, rectangles((8, 8, 40, 40))[0]])
    batch = samples(data, batch_size=2).draw(0, Share())
    assert batch.indices == (1, 1)
    assert batch.places == (0, 1)


def test_mask_of_another_size_is_left_out() -> None:
    class Odd(Sample):
        image = np.zeros((64, 64, 3), np.uint8)

        @property
        def instances(self):  # type: ignore[no-untyped-def]
            good = rectangles((8, 8, 40, 40))[0].instances[0]
            large = rectangles((0, 0, 80, 80), size=(100, 100))[0].instances[0]
            return (good, large)

    data = Dataset([Odd("odd", "odd.jpg", (64, 64))], "odd", skips=_skipping())
    batch = samples(data, batch_size=1, prompts=5).draw(0, Share())
    assert len(batch.target) == 1
    assert [str(s) for s in data.skipped] == [
        "annotation 0 of odd: mask is (100, 100), image (64, 64)"
    ]
    strict = Dataset([Odd("odd", "odd.jpg", (64, 64))], "odd")
    with pytest.raises(errors.DataError, match=r"mask is \(100, 100\), image \(64, 64\)"):
        samples(strict, batch_size=1).draw(0, Share())


def _skipping() -> object:
    from samcompress.core.data._dataset import Skips

    return Skips("skip")


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"scale": (2, 1)}, "scale"), ({"flip": 1.5}, "flip"), ({"paste": -1}, "paste")],
)
def test_bad_augmentation(fields: dict[str, object], name: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"Augment: {name} is out of range"):
        Augment(**fields)


def test_real_images(shared: object) -> None:
    data = sc.data.join(
        sc.data.open(f"{shared}/data/coco@train2017")[:6],
        sc.data.open(f"{shared}/data/sa1b_train")[:6],
    )
    batch = samples(data, augment=Augment(), batch_size=6, prompts=6).draw(0, Share())
    assert batch.weight >= 6
    assert batch.images.isfinite().all()
    x0, y0, x1, y1 = batch.boxes.T
    assert ((x0 < x1) & (y0 < y1)).all()
    # Every target lies inside its box, a cell being two pixels wide.
    for target, box in zip(batch.target, batch.boxes, strict=True):
        rows, columns = (target >= 0.5).nonzero().T
        assert (2 * columns + 2 >= box[0]).all()
        assert (2 * columns <= box[2]).all()
        assert (2 * rows + 2 >= box[1]).all()
        assert (2 * rows <= box[3]).all()
