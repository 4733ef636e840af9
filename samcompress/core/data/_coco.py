"""COCO and LVIS instances."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ._annotation import instances_of, reason_of
from ._dataset import Dataset, OnError, Skips
from ._files import Blob, header_size, read_image
from ._sample import Image, Instance, Sample, sha256


def coco(images: str | Path, annotations: str | Path, *, on_error: OnError = "skip") -> Dataset:
    """COCO instances, or anything written in COCO's form.

    Images without an object are kept; crowds are kept and say so.

    Args:
        images: folder of the images (such as ``coco/val2017``).
        annotations: the JSON file (such as ``coco/annotations/instances_val2017.json``).
        on_error: ``"skip"`` leaves damaged images and annotations out and names them in
            ``.skipped``; ``"raise"`` stops at the first.

    Raises:
        DataError: if the file is not COCO's, no image is usable, or on the first damage under
            ``on_error="raise"``.
        ConfigError: if on_error is neither.
    """
    folder, file = Path(images), Path(annotations)
    split = file.stem.removeprefix("instances_")

    def find(record: dict[str, Any]) -> Path:
        return folder / str(record["file_name"])

    return _open(file, find, f"coco@{split}", on_error)


def lvis(images: str | Path, annotations: str | Path, *, on_error: OnError = "skip") -> Dataset:
    """LVIS instances; a validation image may lie in COCO's train2017, as its ``coco_url`` tells.

    Args:
        images: folder that holds ``train2017`` and ``val2017``, or the images themselves.
        annotations: the JSON file (such as ``lvis_v1_val.json``).
        on_error: as in ``coco``.

    Raises:
        DataError: as in ``coco``.
        ConfigError: as in ``coco``.
    """
    folder, file = Path(images), Path(annotations)
    split = file.stem.removeprefix("lvis_v1_").removeprefix("lvis_")

    def find(record: dict[str, Any]) -> Path:
        address = PurePosixPath(record.get("coco_url") or record["file_name"])
        inside = folder / address.parent.name / address.name
        return inside if inside.exists() else folder / address.name

    return _open(file, find, f"lvis@{split}", on_error)


class CocoSample(Sample):
    """One image of a COCO or LVIS file."""

    def __init__(
        self,
        key: int | str,
        size: tuple[int, int],
        path: Path,
        records: list[dict[str, Any]],
        **fields: Any,
    ) -> None:
        super().__init__(key, path.name, size, **fields)
        self._path = path
        self._records = records

    @property
    def image(self) -> Image:
        return read_image(Blob(self._path), self.size)

    @property
    def instances(self) -> tuple[Instance, ...]:
        return instances_of(self._records, self.size)[0]

    def digest(self) -> str:
        records = sorted(json.dumps(record, sort_keys=True) for record in self._records)
        return sha256(repr((self.id, self.size)).encode(), *(r.encode() for r in records))


def _open(
    file: Path, find: Callable[[dict[str, Any]], Path], name: str, on_error: OnError
) -> Dataset:
    skips = Skips(on_error)
    content = Blob(file).json()
    try:
        images, records = list(content["images"]), list(content["annotations"])
    except (KeyError, TypeError) as err:
        raise DataError(
            "this is no COCO annotation file.",
            where=str(file),
            got=f"no {err}" if isinstance(err, KeyError) else type(content).__name__,
            expected="an object with images and annotations",
        ) from err
    by_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for number, record in enumerate(records):
        owner = record.get("image_id") if isinstance(record, dict) else None
        if isinstance(owner, (int, str)):
            by_image[owner].append(record)
        else:
            skips.add(name, f"annotation number {number}", "it names no image", str(file))
    samples: dict[Any, Sample] = {}
    for number, image in enumerate(images):
        try:
            key = image["id"]
            mine = by_image.pop(key, [])
            sample = _sample(image, find(image), mine)
            if key in samples:
                skips.add(key, "image", "id is used twice", str(file))
        except DataError as err:
            skips.add(key, "image", reason_of(err), err.where)
            continue
        except (KeyError, TypeError, ValueError) as err:
            skips.add(name, f"image number {number}", f"malformed entry: {err!r}", str(file))
            continue
        samples.setdefault(key, sample)
        for what, reason in instances_of(mine, sample.size)[1]:
            skips.add(key, what, reason, str(file))
    for key, lost in by_image.items():
        for record in lost:
            skips.add(key, f"annotation {record.get('id')}", "no image has this id", str(file))
    licence, groups = _licence(content, images), _groups(content)
    return Dataset(list(samples.values()), name, licence=licence, groups=groups, skips=skips)


def _sample(image: dict[str, Any], path: Path, records: list[dict[str, Any]]) -> CocoSample:
    size = header_size(Blob(path), (int(image["height"]), int(image["width"])))
    return CocoSample(
        image["id"],
        size,
        path,
        records,
        negative=tuple(image.get("neg_category_ids") or ()),
        not_exhaustive=tuple(image.get("not_exhaustive_category_ids") or ()),
    )


def _groups(content: dict[str, Any]) -> dict[int, str]:
    """How frequent LVIS says that a category is; COCO does not."""
    words = {"r": "rare", "c": "common", "f": "frequent"}
    listed = [c for c in content.get("categories") or () if isinstance(c, dict)]
    known = [c for c in listed if "id" in c and c.get("frequency") in words]
    return {c["id"]: words[c["frequency"]] for c in known}


def _licence(content: dict[str, Any], images: list[Any]) -> str | None:
    """The names of the licences that the images name."""
    used = {image.get("license") for image in images if isinstance(image, dict)}
    listed = content.get("licenses") or []
    return "; ".join(sorted({str(e.get("name")) for e in listed if e.get("id") in used})) or None
