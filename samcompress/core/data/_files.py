"""Bytes on disk, alone in a file or inside a tar, and pictures made of them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..errors import DataError
from ._sample import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_EXIF_FORMATS = ("JPEG", "MPO", "TIFF", "WEBP")  # a PNG would have to be decoded to ask
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Blob:
    """A file, or ``length`` bytes of one from ``offset`` on."""

    path: Path
    offset: int = 0
    length: int | None = None

    def open(self) -> BinaryIO:
        """Open for reading; nothing is read yet.

        Raises:
            DataError: if the file is not there or may not be read.
        """
        try:
            file = self.path.open("rb")
        except OSError as err:
            raise DataError(
                "file cannot be opened.", where=str(self.path), got=err.strerror or str(err)
            ) from err
        if self.length is None:
            return file
        return io.BufferedReader(_Window(file, self.offset, self.length))

    def read(self) -> bytes:
        """All its bytes.

        Raises:
            DataError: if they cannot be read.
        """
        try:
            with self.open() as file:
                return file.read()
        except OSError as err:
            raise DataError(
                "file cannot be read.", where=str(self.path), got=err.strerror or str(err)
            ) from err

    def json(self) -> Any:
        """Its content as JSON.

        Raises:
            DataError: if it is none.
        """
        content = self.read()
        try:
            return json.loads(content)
        except ValueError as err:  # of JSON, and of its encoding
            raise DataError("file is not JSON.", where=str(self.path), got=str(err)) from err


class _Window(io.RawIOBase):
    """The bytes [offset, offset + length) of a file as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        want = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        data = self._file.read(want)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def header_size(blob: Blob, expected: tuple[int, int] | None = None) -> tuple[int, int]:
    """(H, W) of an image as it will be decoded, from its header alone.

    Raises:
        DataError: if this is no image, or none of the expected size.
    """
    return _decode(blob, expected, whole=False)[0]


def read_image(blob: Blob, expected: tuple[int, int] | None = None) -> Image:
    """Decode an image to (H, W, 3) uint8 RGB.

    A 16-bit channel is divided by 257, floats are taken as 0..1, transparency is dropped (the
    colours stay as stored), and of several frames the first is taken. The camera's orientation
    (EXIF) is honoured where the turned picture has the expected size, or none is expected.

    Args:
        blob: where it lies.
        expected: (H, W) according to the annotation.

    Raises:
        DataError: if it cannot be decoded, or has another size.
    """
    image = _decode(blob, expected, whole=True)[1]
    assert image is not None
    return image


def read_labels(blob: Blob) -> np.ndarray[Any, Any]:
    """Decode a label map to (H, W) integers: grey or palette values as stored, colours packed.

    Raises:
        DataError: if it cannot be decoded, or holds floats.
    """
    from PIL import Image as pil

    try:
        with blob.open() as file, pil.open(file) as picture:
            if picture.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
                return np.array(picture).astype(np.int64)
            if picture.mode in ("LA", "RGB", "RGBA"):
                rgb = np.array(picture.convert("RGB")).astype(np.int64)
                grey = (rgb == rgb[..., :1]).all()
                return rgb[..., 0] if grey else rgb @ np.array([65536, 256, 1])
            mode = picture.mode
    except DataError:
        raise
    except Exception as err:
        raise _damaged(blob, err) from err
    raise DataError(
        "mask is not a label map.", where=str(blob.path), got=f"mode {mode}", expected="integers"
    )


def _decode(
    blob: Blob, expected: tuple[int, int] | None, *, whole: bool
) -> tuple[tuple[int, int], Image | None]:
    from PIL import Image as pil

    try:
        with blob.open() as file, pil.open(file) as picture:
            turn = _turn(picture)
            stored = (picture.height, picture.width)
            turned = stored[::-1] if turn >= 5 else stored
            if expected is not None and turned != expected and stored == expected:
                turn, turned = 1, stored
            if expected is None or turned == expected:
                return turned, _rgb(picture, turn) if whole else None
    except DataError:
        raise
    except Exception as err:  # arbitrary bytes make a decoder raise nearly anything
        raise _damaged(blob, err) from err
    raise DataError(
        "image has another size than its annotation.",
        where=str(blob.path),
        got=f"{turned[1]} x {turned[0]}",
        expected=f"{expected[1]} x {expected[0]} (width x height)",
    )


def _damaged(blob: Blob, err: Exception) -> DataError:
    # Pillow quotes the file object, whose address differs from run to run.
    reason = str(err).split(" <")[0] or type(err).__name__
    return DataError("image cannot be decoded.", where=str(blob.path), got=reason)


def _turn(picture: Picture) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it is nonsense."""
    if picture.format not in _EXIF_FORMATS:
        return 1
    try:
        turn = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF beside a sound picture
        return 1
    return turn if turn in range(1, 9) else 1


def _rgb(picture: Picture, turn: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.clip(np.array(picture).astype(np.int64), 0, 65535)
        picture = _from_grey((grey + 128) // 257)
    elif picture.mode == "F":
        grey = np.nan_to_num(np.clip(np.array(picture), 0, 1))
        picture = _from_grey(grey * 255 + 0.5)
    elif picture.mode == "P":
        picture = picture.convert("RGBA")  # straight to RGB warns of transparency given as bytes
    picture = picture.convert("RGB")
    if turn in turns:
        picture = picture.transpose(turns[turn])
    return np.array(picture)


def _from_grey(values: np.ndarray[Any, Any]) -> Picture:
    from PIL import Image as pil

    return pil.fromarray(values.astype(np.uint8))
