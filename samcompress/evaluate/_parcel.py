"""What travels to another machine: one file that arrives whole or is refused.

A header of fixed length with the length and hash of what follows, then a tar of plain files. Models
are folders of `sc.save`, pictures PNG, all else JSON: nothing in it is run when it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from ..core.data import Dataset, Instance, Sample, Skipped
from ..core.data._dataset import Skips
from ..core.data._sample import Held, Packed
from ..core.errors import CheckpointError, DataError
from .masks import decode, encode

MAGIC = b"samcompress"
HEADER = len(MAGIC) + 1 + 20 + 1 + 64 + 1
CHUNK = 1 << 20


def pack(path: Path, texts: Mapping[str, Any], folders: Mapping[str, Path]) -> None:
    """Write a parcel.

    Args:
        path: the file.
        texts: JSON values by name.
        folders: folders of plain files by name.
    """
    with path.open("wb+") as file:
        file.write(b" " * HEADER)
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, value in texts.items():
                content = json.dumps(value).encode()
                entry = tarfile.TarInfo(f"{name}.json")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            for name, folder in folders.items():
                for part in sorted(f for f in folder.rglob("*") if f.is_file()):
                    entry = tarfile.TarInfo(f"{name}/{part.relative_to(folder).as_posix()}")
                    entry.size = part.stat().st_size
                    with part.open("rb") as content_file:
                        tar.addfile(entry, content_file)
        size = file.tell() - HEADER
        file.seek(HEADER)
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        file.seek(0)
        file.write(header(size, digest.hexdigest()))


def header(size: int, digest: str) -> bytes:
    """Length and hash of what follows it."""
    return b"%s %020d %s\n" % (MAGIC, size, digest.encode())


def read_header(line: bytes) -> tuple[int, str]:
    """Length and hash.

    Raises:
        CheckpointError: if this is no header.
    """
    words = line.split()
    if len(line) != HEADER or len(words) != 3 or words[0] != MAGIC or not words[1].isdigit():
        raise CheckpointError(
            "this is no parcel of samcompress.",
            got=repr(line[:80]),
            expected="one sent by bench --on",
        )
    return int(words[1]), words[2].decode()


def unpack(source: BinaryIO, folder: Path) -> None:
    """Read a parcel into an empty folder.

    Raises:
        CheckpointError: if it was cut short or changed, or holds anything but plain files.
    """
    size, wanted = read_header(source.read(HEADER))
    file, digest, left = folder / "parcel.tar", hashlib.sha256(), size
    with file.open("wb") as out:
        while left and (chunk := source.read(min(CHUNK, left))):
            out.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    if left or digest.hexdigest() != wanted:
        raise CheckpointError(
            "the parcel did not arrive whole.",
            got=f"{size - left} of {size} bytes" if left else "other bytes than were sent",
            fix="run the same command again",
        )
    with tarfile.open(file) as tar:
        for entry in tar:
            place = PurePosixPath(entry.name)
            if not entry.isfile() or place.is_absolute() or ".." in place.parts:
                raise CheckpointError(
                    "the parcel holds more than plain files.", got=entry.name, expected="files"
                )
            target = folder.joinpath(*place.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(entry)
            assert content is not None  # it is a file
            with content, target.open("wb") as out:
                while chunk := content.read(CHUNK):
                    out.write(chunk)
    file.unlink()


def write_data(data: Dataset, folder: Path, *, first: bool = False) -> dict[str, Any]:
    """Write images without loss, and return what else another machine must know of the data.

    Args:
        data: as it is measured.
        folder: gets a PNG an image.
        first: only the first image, where nothing but times is measured.
    """
    from PIL import Image

    folder.mkdir(parents=True)
    records = []
    for number, sample in enumerate(data.readable()):
        Image.fromarray(sample.image).save(folder / f"{number}.png", compress_level=1)
        records.append(
            {
                "id": sample.id,
                "name": sample.name,
                "negative": sample.negative,
                "not_exhaustive": sample.not_exhaustive,
                "instances": [
                    {
                        "id": i.id,
                        "category": i.category,
                        "area": i.area,
                        "box": list(i.box),
                        "crowd": i.crowd,
                        "point": None if i.point is None else list(i.point),
                        "mask": encode(i.mask),
                    }
                    for i in sample.instances
                ],
            }
        )
        if first:
            break
    return {
        "name": data.name,
        "length": len(data),
        "groups": list(data.groups.items()),
        "skipped": [vars(item) for item in data.skipped],
        "samples": records,
    }


class Sent(Dataset):
    """Data that came in a parcel: counts as many images as were asked for where they came from."""

    def __init__(self, record: dict[str, Any], folder: Path) -> None:
        samples = [_sample(item, folder / f"{n}.png") for n, item in enumerate(record["samples"])]
        skips = Skips("skip", [Skipped(**item) for item in record["skipped"]])
        super().__init__(samples, record["name"], groups=dict(record["groups"]), skips=skips)
        self.length = record["length"]

    def __len__(self) -> int:
        return int(getattr(self, "length", len(self._samples)))


def _sample(record: dict[str, Any], file: Path) -> Sample:
    from PIL import Image

    with Image.open(file) as picture:
        image = np.asarray(picture.convert("RGB"))
    try:
        instances = tuple(
            Instance(
                item["id"],
                item["category"],
                item["area"],
                tuple(item["box"]),
                item["crowd"],
                None if item["point"] is None else tuple(item["point"]),
                source=Packed.of(decode(item["mask"])),
            )
            for item in record["instances"]
        )
        known = {name: tuple(record[name]) for name in ("negative", "not_exhaustive")}
    except (KeyError, TypeError) as err:
        raise DataError("this is no image of a parcel.", where=file.name, got=str(err)) from err
    return Held(record["id"], record["name"], image, instances, **known)
