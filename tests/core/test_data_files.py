"""Pictures of every kind become RGB; damage becomes DataError."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samcompress.core.data._files import Blob, header_size, read_image, read_labels
from samcompress.core.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(picture: Image.Image, path: Path, **options: object) -> Blob:
    picture.save(path, **options)
    return Blob(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RGB).convert(mode)
    blob = save(picture, tmp_path / "a.png")
    image = read_image(blob)
    assert image.dtype == np.uint8
    assert image.shape == (5, 7, 3)
    assert image.flags.writeable
    np.testing.assert_array_equal(image, np.array(picture.convert("RGB")))
    assert header_size(blob) == (5, 7)


def test_transparency_is_dropped(tmp_path: Path) -> None:
    alpha = np.dstack([RGB, np.zeros((5, 7), np.uint8)])
    np.testing.assert_array_equal(read_image(save(Image.fromarray(alpha), tmp_path / "a.png")), RGB)
    palette = Image.fromarray(RGB).convert("P")
    blob = save(palette, tmp_path / "p.png", transparency=bytes(range(200)))
    np.testing.assert_array_equal(read_image(blob), np.array(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    image = read_image(save(Image.fromarray(deep), tmp_path / f"a.{suffix}"))
    assert image[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (image == image[..., :1]).all()


def test_floats_are_taken_as_zero_to_one(tmp_path: Path) -> None:
    values = np.array([[-1, 0, 0.5, 1, 7, np.nan]], np.float32)
    image = read_image(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert image[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def test_cmyk(tmp_path: Path) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = read_image(save(red, tmp_path / "a.jpg"))
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 3


def test_one_pixel(tmp_path: Path) -> None:
    blob = save(Image.new("L", (1, 1), 9), tmp_path / "a.png")
    assert read_image(blob, (1, 1)).tolist() == [[[9, 9, 9]]]


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_cameras_orientation(tmp_path: Path, turn: int) -> None:
    corners = np.zeros((16, 32, 3), np.uint8)
    corners[:8, :8] = 255  # the stored picture is white at the top left
    exif = Image.Exif()
    exif[0x0112] = turn
    blob = save(Image.fromarray(corners), tmp_path / "a.jpg", exif=exif, quality=95)
    lying = turn >= 5
    shown = (32, 16) if lying else (16, 32)
    assert header_size(blob) == shown
    image = read_image(blob, shown)
    assert image.shape[:2] == shown
    bottom, right = turn in (3, 4, 7, 8), turn in (2, 3, 6, 7)
    corner = image[-1 if bottom else 0, -1 if right else 0]
    assert corner.min() > 200, "where the camera says the top left is"
    assert sum(image[y, x].min() > 200 for y in (0, -1) for x in (0, -1)) == 1


def test_orientation_is_ignored_where_only_the_stored_size_fits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    blob = save(Image.fromarray(RGB), tmp_path / "a.jpg", exif=exif)
    assert read_image(blob, (5, 7)).shape == (5, 7, 3)
    assert read_image(blob, (7, 5)).shape == (7, 5, 3)
    with pytest.raises(DataError) as err:
        read_image(blob, (5, 8))
    assert str(err.value) == (
        f"image has another size than its annotation.\n  where     {tmp_path / 'a.jpg'}\n"
        "  got       5 x 7\n  expected  8 x 5 (width x height)"
    )


def test_damage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file cannot be opened\.\n.*missing\.jpg\n.*No such file"):
        read_image(Blob(tmp_path / "missing.jpg"))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"image cannot be decoded.\n.*\n.*cannot identify image"):
        header_size(Blob(tmp_path / "text.jpg"))
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        path = tmp_path / f"cut.{suffix}"
        save(Image.fromarray(big), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert header_size(Blob(path)) == (64, 64), "the header is sound"
        with pytest.raises(DataError, match=r"image cannot be decoded\."):
            read_image(Blob(path))
    with pytest.raises(DataError, match=r"image cannot be decoded\."):
        read_labels(Blob(tmp_path / "cut.png"))


def test_a_picture_inside_another_file(tmp_path: Path) -> None:
    inner = save(Image.fromarray(RGB), tmp_path / "a.png").read()
    outer = tmp_path / "outer"
    outer.write_bytes(b"before" + inner + b"after")
    blob = Blob(outer, 6, len(inner))
    assert blob.read() == inner
    np.testing.assert_array_equal(read_image(blob), RGB)
    with blob.open() as file:
        file.seek(-3, 2)
        assert file.read() == inner[-3:]
        assert file.read() == b""


def test_labels(tmp_path: Path) -> None:
    values = np.array([[0, 1, 200]], np.uint8)
    for mode in ("L", "P"):
        picture = Image.frombytes(mode, (3, 1), values.tobytes())
        if mode == "P":
            picture.putpalette(list(range(256)) * 3)
        assert read_labels(save(picture, tmp_path / "a.png")).tolist() == [[0, 1, 200]]
    deep = Image.fromarray(np.array([[0, 300, 65535]], np.uint16))
    assert read_labels(save(deep, tmp_path / "a.png")).tolist() == [[0, 300, 65535]]
    grey = Image.fromarray(np.dstack([values] * 3))
    assert read_labels(save(grey, tmp_path / "a.png")).tolist() == [[0, 1, 200]]
    colour = Image.fromarray(np.array([[[0, 0, 0], [1, 2, 3], [0, 0, 9]]], np.uint8))
    assert read_labels(save(colour, tmp_path / "a.png")).tolist() == [[0, 66051, 9]]
    with pytest.raises(DataError, match=r"mask is not a label map\."):
        read_labels(save(Image.new("F", (2, 2)), tmp_path / "a.tif"))


def test_not_json(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe\xfa"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=r"file is not JSON\."):
            Blob(tmp_path / "a.json").json()
