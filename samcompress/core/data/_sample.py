"""One image with its masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, ShapeError

Id = int | str
Mask = NDArray[np.bool_]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Instance:
    """One annotated object; its mask is decoded each time it is asked for.

    Args:
        id: the annotation's id, unique within its image.
        category: the annotation's category, None where the data have none.
        area: the annotation's own area in pixels (COCO: of the polygon, so not a whole number).
        box: (x0, y0, x1, y1) in pixels, as annotated, unrounded.
        crowd: True for a region of many objects (COCO's ``iscrowd``).
        point: the point (x, y) the annotation was made from, None where the data have none.
        source: what decodes the mask; called without arguments, returns (H, W) bool.
    """

    id: Id
    category: int | None
    area: float
    box: tuple[float, float, float, float]
    crowd: bool = False
    point: tuple[float, float] | None = None
    source: Callable[[], Mask] = field(repr=False, compare=False, kw_only=True)

    @property
    def mask(self) -> Mask:
        """The mask, (H, W) bool at the image's own size, decoded now.

        Raises:
            DataError: if what the annotation holds is not a mask.
        """
        try:
            return self.source()
        except DataError as err:
            err.where = err.where or f"annotation {self.id}"
            raise


class Sample:
    """One image with its annotated objects, read from its file when asked for.

    Nothing is kept: ask once and hold on to it, or iterate over ``Dataset.readable()``, which
    reads everything of a sample once. Each layout has its own subclass; for arrays of your own
    use ``Sample.from_arrays``.

    Args:
        key: the image's id, unique within its data set; becomes ``id``.
        name: the image's file name, for people.
        size: (H, W).
        negative: categories known to be absent (LVIS' ``neg_category_ids``).
        not_exhaustive: categories not annotated to the last object (LVIS).
    """

    def __init__(
        self,
        key: Id,
        name: str,
        size: tuple[int, int],
        *,
        negative: tuple[int, ...] = (),
        not_exhaustive: tuple[int, ...] = (),
    ) -> None:
        self.id = key
        self.name = name
        self.size = size
        self.negative = negative
        self.not_exhaustive = not_exhaustive

    @property
    def image(self) -> Image:
        """The picture, (H, W, 3) uint8 RGB, decoded now.

        Raises:
            DataError: if the file is gone or damaged.
        """
        raise NotImplementedError

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The annotated objects, crowds included, in ascending id.

        Raises:
            DataError: if the annotation cannot be read any more.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """A hash of id, size and annotation; the same wherever the files lie."""
        raise NotImplementedError

    def masks(self) -> Mask:
        """All masks of the image, (A, H, W) bool, in the order of ``instances``."""
        masks = [instance.mask for instance in self.instances]
        return np.stack(masks) if masks else np.zeros((0, *self.size), bool)

    @staticmethod
    def from_arrays(key: Id, image: Image, masks: Sequence[Mask] | Mask) -> Sample:
        """A sample held in memory; boxes and areas are those of the masks.

        Args:
            key: id and name of the sample, unique within the data set.
            image: (H, W, 3) uint8 RGB.
            masks: (A, H, W) bool, or a list of (H, W) bool; may be empty.

        Raises:
            ShapeError: if image and masks do not fit together.

        Example:
            >>> image, mask = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), bool)
            >>> mask[1:3, 2:5] = True
            >>> Sample.from_arrays("a", image, [mask]).instances[0].box
            (2.0, 1.0, 5.0, 3.0)
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            got = f"{image.shape} {image.dtype}"
            raise ShapeError("image is not RGB.", where=key, got=got, expected="(H, W, 3) uint8")
        objects = []
        for number, mask in enumerate(masks):
            mask = np.asarray(mask)
            if mask.shape != image.shape[:2] or mask.dtype != bool:
                raise ShapeError(
                    f"mask {number} does not fit its image.",
                    where=key,
                    got=f"{mask.shape} {mask.dtype}",
                    expected=f"{image.shape[:2]} bool",
                )
            objects.append(from_mask(number, mask))
        return Held(key, str(key), image, tuple(objects))

    def __repr__(self) -> str:
        height, width = self.size
        return f"<Sample {self.id!r} {self.name!r} {width}x{height}>"


@dataclass(frozen=True)
class Packed:
    """A mask in memory at one bit a pixel, so that a whole image's masks can be kept."""

    bits: NDArray[np.uint8]
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: Mask) -> Packed:
        return cls(np.packbits(mask), (mask.shape[0], mask.shape[1]))

    def __call__(self) -> Mask:
        height, width = self.size
        return np.unpackbits(self.bits, count=height * width).reshape(self.size).view(bool)


def tight_box(mask: Mask) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around a mask's pixels, x1 and y1 one past the last; zeros if empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def from_mask(key: Id, mask: Mask, category: int | None = None) -> Instance:
    """An instance of which nothing but the mask is known."""
    area = float(np.count_nonzero(mask))
    return Instance(key, category, area, tight_box(mask), source=Packed.of(mask))


class Held(Sample):
    """A sample whose picture and masks are in memory."""

    def __init__(
        self, key: Id, name: str, image: Image, instances: tuple[Instance, ...], **fields: Any
    ) -> None:
        super().__init__(key, name, (image.shape[0], image.shape[1]), **fields)
        self._image = image
        self._instances = instances

    @property
    def image(self) -> Image:
        return self._image

    @property
    def instances(self) -> tuple[Instance, ...]:
        return self._instances

    def digest(self) -> str:
        parts = [repr((self.id, self.size)).encode(), self._image.tobytes()]
        parts += [np.packbits(instance.mask).tobytes() for instance in self._instances]
        return sha256(*parts)


class Renamed(Sample):
    """A sample under another id."""

    def __init__(self, sample: Sample, key: Id) -> None:
        super().__init__(
            key,
            sample.name,
            sample.size,
            negative=sample.negative,
            not_exhaustive=sample.not_exhaustive,
        )
        self._sample = sample

    @property
    def image(self) -> Image:
        return self._sample.image

    @property
    def instances(self) -> tuple[Instance, ...]:
        return self._sample.instances

    def digest(self) -> str:
        return self._sample.digest()


def sha256(*parts: bytes) -> str:
    """SHA-256 over parts; each part's length goes in, so that moving a border changes it."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()
