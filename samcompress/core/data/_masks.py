"""A folder of images with mask PNGs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from ..errors import DataError
from ._annotation import reason_of
from ._dataset import Dataset, OnError, Skips
from ._files import IMAGE_SUFFIXES, Blob, header_size, read_image, read_labels
from ._sample import Image, Instance, Mask, Sample, from_mask, sha256


def masks(folder: str | Path, *, on_error: OnError = "skip") -> Dataset:
    """Images with mask PNGs beside them, or in subfolders ``images`` and ``masks``.

    The masks of ``NAME.jpg`` are ``NAME.png`` (beside a PNG image only in ``masks``) and every
    ``NAME_anything.png``; the longest NAME wins. In a mask 0 is background and every other value
    (or colour) is one object, so a binary mask is one object and a label map as many as it has
    values. An object's id is ``"STEM:VALUE"``. A folder without a single mask gives images only,
    enough for calibration.

    Args:
        folder: the folder.
        on_error: as in ``coco``; an image without a mask, among others with one, counts as damage.

    Raises:
        DataError: if no image is usable, or on the first damage under ``on_error="raise"``.
        ConfigError: if on_error is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("there is no such folder.", where=str(folder))
    skips = Skips(on_error)
    images, of_image = _pair(folder, skips)
    samples: list[Sample] = []
    for name, path in images.items():
        found = of_image.get(name, [])
        if of_image and not found:
            skips.add(name, "image", "it has no mask", str(path))
            continue
        if sample := _sample(name, path, found, skips):
            samples.append(sample)
    note = None if of_image else "images without masks: for calibration, not for accuracy"
    return Dataset(samples, f"masks@{folder.resolve().name}", note=note, skips=skips)


class FolderSample(Sample):
    """One image and its mask files."""

    def __init__(self, key: str, size: tuple[int, int], image: Path, masks: list[Path]) -> None:
        super().__init__(key, image.name, size)
        self._image = image
        self._masks = masks

    @property
    def image(self) -> Image:
        return read_image(Blob(self._image), self.size)

    @property
    def instances(self) -> tuple[Instance, ...]:
        found: list[Instance] = []
        for path in self._masks:
            try:
                labels = read_labels(Blob(path))
            except DataError as err:  # damages this file's objects only: told when asked for
                nowhere = (0.0, 0.0, 0.0, 0.0)
                found.append(Instance(path.stem, None, 0.0, nowhere, source=_Damaged(err)))
                continue
            values = np.unique(labels)
            found += [from_mask(f"{path.stem}:{v}", labels == v) for v in values if v != 0]
        return tuple(found)

    def digest(self) -> str:
        parts = [part for path in self._masks for part in (path.name.encode(), Blob(path).read())]
        return sha256(repr((self.id, self.size)).encode(), *parts)


class _Damaged:
    """Stands for a mask that cannot be decoded."""

    def __init__(self, err: DataError) -> None:
        self._err = err

    def __call__(self) -> Mask:
        raise self._err


def _pair(folder: Path, skips: Skips) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """Images by name, and the mask files of each."""
    apart = (folder / "images").is_dir() and (folder / "masks").is_dir()
    files = sorted((folder / "images" if apart else folder).iterdir())
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    pngs = [path for path in pictures if path.suffix.lower() == ".png"]
    others = [path for path in pictures if path.suffix.lower() != ".png"]
    images: dict[str, Path] = {}
    of_image: defaultdict[str, list[Path]] = defaultdict(list)
    if apart:
        candidates = sorted((folder / "masks").glob("*.png"))
        for path in others + pngs:
            _enter(images, path, skips)
    else:
        candidates = []
        for path in others:
            _enter(images, path, skips)
        names = {path.stem for path in pngs} | set(images)
        for path in pngs:
            if path.stem in images or _owner(path.stem, names):
                candidates.append(path)
            else:
                _enter(images, path, skips)
    for path in candidates:
        owner = path.stem if path.stem in images else _owner(path.stem, set(images))
        if owner is None:
            skips.add(path.stem, "mask", "no image has its name", str(path))
        else:
            of_image[owner].append(path)
    return images, of_image


def _enter(images: dict[str, Path], path: Path, skips: Skips) -> None:
    if path.stem in images:
        skips.add(path.stem, f"image {path.name}", "another image has its name", str(path))
    images.setdefault(path.stem, path)


def _owner(stem: str, names: set[str]) -> str | None:
    """The longest name of which this is ``NAME_anything``."""
    parts = stem.split("_")
    heads = ("_".join(parts[:k]) for k in range(len(parts) - 1, 0, -1))
    return next((head for head in heads if head in names), None)


def _sample(name: str, path: Path, found: list[Path], skips: Skips) -> FolderSample | None:
    sizes = {mask: own for mask in found if (own := _mask_size(name, mask, skips))}
    try:
        size = _size(path, set(sizes.values()))
    except DataError as err:
        skips.add(name, "image", reason_of(err), err.where)
        return None
    for mask, own in sizes.items():
        if own != size:
            reason = f"it is {own[1]} x {own[0]}, its image {size[1]} x {size[0]}"
            skips.add(name, f"mask {mask.name}", reason, str(mask))
    return FolderSample(name, size, path, [mask for mask, own in sizes.items() if own == size])


def _mask_size(name: str, mask: Path, skips: Skips) -> tuple[int, int] | None:
    try:
        return header_size(Blob(mask))
    except DataError as err:
        skips.add(name, f"mask {mask.name}", reason_of(err), err.where)
        return None


def _size(path: Path, of_masks: set[tuple[int, int]]) -> tuple[int, int]:
    """The image's size: turned by EXIF, unless only unturned it fits its masks."""
    turned = header_size(Blob(path))
    if turned in of_masks or turned[::-1] not in of_masks:
        return turned
    try:
        return header_size(Blob(path), turned[::-1])
    except DataError:
        return turned
