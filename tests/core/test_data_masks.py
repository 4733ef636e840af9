"""Images with mask PNGs, and open() for everything."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samcompress.core import data
from samcompress.core.errors import ConfigError, DataError

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
LABELS = np.zeros((6, 8), np.uint8)
LABELS[1:3, 2:5] = 1
LABELS[4:, 6:] = 7


def save(path: Path, values: np.ndarray = IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_label_maps_and_binary_masks(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "a_0.png", LABELS)
    save(tmp_path / "a_cat.png", (LABELS == 1).astype(np.uint8) * 255)
    save(tmp_path / "a.png", LABELS // 7)
    (tmp_path / "readme.txt").write_text("passed over")
    found = data.masks(tmp_path)
    assert found.name == f"masks@{tmp_path.name}"
    assert found.skipped == ()
    assert found.note is None
    (sample,) = found.readable()
    assert [i.id for i in sample.instances] == ["a:1", "a_0:1", "a_0:7", "a_cat:255"]
    np.testing.assert_array_equal(sample.masks()[1], LABELS == 1)
    assert sample.instances[1].box == (2, 1, 5, 3)
    assert [i.area for i in sample.instances] == [4, 6, 4, 6]


def test_pngs_beside_png_images_by_the_longest_name(tmp_path: Path) -> None:
    for name in ("a.png", "a_b.png"):
        save(tmp_path / name)
        save(tmp_path / name.replace(".png", ".jpg")) if name == "a_b.png" else None
    save(tmp_path / "a_b_0.png", LABELS)
    save(tmp_path / "a_0.png", LABELS)
    found = data.masks(tmp_path)
    owners = {s.name: {str(i.id).split(":")[0] for i in s.instances} for s in found}
    assert owners == {"a_b.jpg": {"a_b", "a_b_0"}, "a.png": {"a_0"}}


def test_images_and_masks_apart(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "images" / name)
        save(tmp_path / "masks" / name, LABELS)
    save(tmp_path / "masks" / "c_1.png", LABELS)
    found = data.open(tmp_path)
    assert [s.id for s in found] == ["a", "b"]
    assert [i.id for i in found[0].instances] == ["a:1", "a:7"]
    assert [str(s) for s in found.skipped] == ["mask of c_1: no image has its name"]


def test_images_alone_serve_for_calibration(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.jpg")
    found = data.open(tmp_path)
    assert len(found) == 2
    assert found[0].instances == ()
    assert found.note == "images without masks: for calibration, not for accuracy"


def test_damage_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    for name in "abcdef":
        save(tmp_path / f"{name}.jpg")
        save(tmp_path / f"{name}_0.png", LABELS)
    (tmp_path / "b_0.png").unlink()
    (tmp_path / "c.jpg").write_bytes(b"no image")
    save(tmp_path / "d_0.png", LABELS[:, :-1])
    save(tmp_path / "d_1.png", LABELS)
    noise = np.random.default_rng(0).integers(1, 256, (6, 8), dtype=np.uint8)
    save(tmp_path / "e_0.png", noise)
    content = (tmp_path / "e_0.png").read_bytes()
    (tmp_path / "e_0.png").write_bytes(content[:60])
    save(tmp_path / "e_1.png", LABELS)
    (tmp_path / "f_0.png").write_bytes(b"no image")
    found = data.masks(tmp_path)
    assert [s.id for s in found] == ["a", "d", "e", "f"]
    assert [str(s) for s in found.skipped] == [
        "image of b: it has no mask",
        "image of c: image cannot be decoded: cannot identify image file",
        "mask d_0.png of d: it is 7 x 6, its image 8 x 6",
        "mask f_0.png of f: image cannot be decoded: cannot identify image file",
    ]
    assert [[i.id for i in s.instances] for s in found.readable()] == [
        ["a_0:1", "a_0:7"],
        ["d_1:1", "d_1:7"],
        ["e_1:1", "e_1:7"],
        [],
    ]
    assert str(found.skipped[-1]).startswith("annotation e_0 of e: image cannot be decoded: ")
    with pytest.raises(DataError, match="image of 'b' cannot be used"):
        data.masks(tmp_path, on_error="raise")


@pytest.mark.parametrize(("shape", "size"), [((8, 6), (8, 6)), ((6, 8), (6, 8))])
def test_orientation_follows_the_mask(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE).save(tmp_path / "a.jpg", exif=exif)
    save(tmp_path / "a_0.png", np.ones(shape, np.uint8))
    (sample,) = data.masks(tmp_path).readable()
    assert sample.size == size
    assert sample.image.shape[:2] == size


def test_the_fingerprint_is_of_the_masks(tmp_path: Path) -> None:
    for folder in "ab":
        save(tmp_path / folder / "x.jpg")
        save(tmp_path / folder / "x_0.png", LABELS)
    one, other = data.masks(tmp_path / "a"), data.masks(tmp_path / "b")
    assert one.fingerprint == other.fingerprint
    save(tmp_path / "b" / "x_0.png", LABELS + 1)
    assert data.masks(tmp_path / "b").fingerprint != one.fingerprint


def test_the_shared_segmentations(shared: Path) -> None:
    found = data.open(shared / "data" / "bsds500" / "val")
    assert len(found) == 100
    assert found.skipped == ()
    sample = found.subset(ids=["101085"])[0]
    stems = [str(i.id).split(":")[0] for i in sample.instances]
    assert set(stems) == {"101085_0", "101085_1", "101085_2"}
    first = sample.masks()[[stem == "101085_0" for stem in stems]]
    assert (first.sum(0) == 1).all(), "one person's regions cover the image once"


def test_open_drawn_scenes() -> None:
    assert data.open("shapes:3").name == "shapes@0-128x128"
    scenes = data.open("shapes:3@seed=2,size=16x24")
    assert (len(scenes), scenes[0].size) == (3, (16, 24))
    assert scenes.fingerprint == data.shapes(3, seed=2, size=(16, 24)).fingerprint
    for wrong in ("shapes:", "shapes:x", "shapes:3@speed=1", "shapes:3@1", "shapes:3@size=a"):
        with pytest.raises(DataError) as err:
            data.open(wrong)
        assert str(err.value) == (
            f"these drawn scenes are not understood.\n  got       {wrong}\n"
            "  expected  shapes:N, shapes:N@seed=1,size=256 or size=HxW"
        )
    with pytest.raises(ConfigError, match="n is out of range"):
        data.open("shapes:0")


def test_open_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for spec, got in (
        (tmp_path, "a folder with .txt in it"),
        (tmp_path / "notes.txt", "a .txt file"),
        (tmp_path / "none", f"no file or folder {tmp_path / 'none'}"),
    ):
        with pytest.raises(DataError) as err:
            data.open(spec)
        text = str(err.value)
        assert text.startswith(
            f"no data of a known layout.\n  where     {spec}\n  got       {got}\n"
        )
        for form in ("shapes:N", "PATH@val2017", "SA-1B folder", "shards (*.tar)", "mask PNGs"):
            assert form in text


def test_open_needs_a_split_where_there_are_several(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        save(tmp_path / split / "1.png")
        image = '{"id": 1, "file_name": "1.png", "width": 8, "height": 6}'
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(
            f'{{"images": [{image}], "annotations": []}}'
        )
    with pytest.raises(DataError) as err:
        data.open(tmp_path)
    assert str(err.value) == (
        f"the split is not given.\n  where     {tmp_path}\n  expected  train, val\n"
        f"  try       {tmp_path}@train"
    )
    with pytest.raises(DataError, match=re.escape("there is no such split.")):
        data.open(f"{tmp_path}@test")
    assert data.open(f"{tmp_path}@val").name == "coco@val"
    (tmp_path / "annotations" / "instances_train.json").unlink()
    assert data.open(tmp_path).name == "coco@val"
    with pytest.raises(DataError, match=r"no split: there is no annotations/\*\.json"):
        data.open(f"{tmp_path / 'val'}@val")
