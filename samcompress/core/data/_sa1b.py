"""SA-1B's layout: an image and a JSON of the same stem, loose in a folder or in tar shards."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ._annotation import instances_of, reason_of
from ._dataset import Dataset, OnError, Skips
from ._files import Blob, header_size, read_image
from ._sample import Id, Image, Instance, Sample, sha256

_IMAGES = (".jpg", ".jpeg")


def sa1b(
    paths: str | Path | Sequence[str | Path],
    *,
    ids: Sequence[Id] | None = None,
    on_error: OnError = "skip",
) -> Dataset:
    """SA-1B, or data written in its layout (``sa_1.jpg`` and ``sa_1.json``).

    A shard is indexed once and then read at any place, so samples can be taken in any order. Loose
    files and shards of the same data give the same samples, in ascending id.

    Args:
        paths: a folder of pairs, a folder of shards, a shard, or a list of these. In a folder
            that holds both, the pairs are taken.
        ids: only these images (the number after ``sa_``); the others are not even looked at.
        on_error: as in ``coco``.

    Raises:
        DataError: if a path is not there, no image is usable, or on the first damage under
            ``on_error="raise"``.
        ConfigError: if on_error is neither.
    """
    places = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    skips = Skips(on_error)
    pairs: dict[Id, dict[str, Blob]] = {}
    for place in places:
        for name, blob in _files(place, skips):
            stem, suffix = name.stem, name.suffix.lower()
            kind = "image" if suffix in _IMAGES else "json" if suffix == ".json" else None
            if kind and kind in pairs.setdefault(_key(stem), {}):
                skips.add(_key(stem), kind, "found twice; the first is taken", str(blob.path))
            elif kind:
                pairs[_key(stem)][kind] = blob
    if ids is not None:
        for key in ids:
            if key not in pairs:
                skips.add(key, "image", "not found", ", ".join(map(str, places)))
        pairs = {key: pairs[key] for key in ids if key in pairs}
    ordered = sorted(pairs, key=lambda key: (isinstance(key, str), key))
    samples = [_sample(key, pairs[key], skips) for key in ordered]
    return Dataset(
        [sample for sample in samples if sample],
        f"sa1b-layout@{'+'.join(place.stem for place in places)}",
        note="in SA-1B itself the masks are SAM's own output: a score there is agreement with SAM",
        skips=skips,
    )


class Sa1bSample(Sample):
    """One pair of image and JSON."""

    def __init__(self, key: Id, name: str, size: tuple[int, int], image: Blob, json: Blob) -> None:
        super().__init__(key, name, size)
        self._image = image
        self._json = json

    @property
    def image(self) -> Image:
        return read_image(self._image, self.size)

    @property
    def instances(self) -> tuple[Instance, ...]:
        return instances_of(_parse(self._json)[1], self.size)[0]

    def digest(self) -> str:
        return sha256(repr((self.id, self.size)).encode(), self._json.read())


def _key(stem: str) -> Id:
    number = stem.removeprefix("sa_")
    return int(number) if number.isascii() and number.isdigit() else stem


def _parse(blob: Blob) -> tuple[dict[str, Any], list[Any]]:
    content = blob.json()
    try:
        image, records = content["image"], content["annotations"]
        image = {name: image[name] for name in ("width", "height", "file_name")}
    except (KeyError, TypeError) as err:
        raise DataError(
            "this is no annotation in SA-1B's form.", where=str(blob.path), got=repr(err)
        ) from err
    if not isinstance(records, list):
        raise DataError("annotations are no list.", where=str(blob.path))
    return image, records


def _sample(key: Id, pair: dict[str, Blob], skips: Skips) -> Sa1bSample | None:
    if len(pair) < 2:
        (kind, blob), *_ = pair.items()
        other = "annotation (json)" if kind == "image" else "picture (jpg)"
        skips.add(key, "image", f"its {other} is missing", str(blob.path))
        return None
    try:
        image, records = _parse(pair["json"])
        size = (image["height"], image["width"])
        header_size(pair["image"], size)
    except DataError as err:
        skips.add(key, "image", reason_of(err), err.where)
        return None
    for what, reason in instances_of(records, size)[1]:
        skips.add(key, what, reason, str(pair["json"].path))
    return Sa1bSample(key, str(image["file_name"]), size, pair["image"], pair["json"])


def _files(place: Path, skips: Skips) -> Iterator[tuple[PurePosixPath, Blob]]:
    """Every file below a place, with its name: in a folder, a folder of shards, or a shard."""
    if place.is_dir():
        inside = sorted(place.iterdir())
        if any(path.suffix == ".json" for path in inside):
            yield from ((PurePosixPath(path.name), Blob(path)) for path in inside)
        for path in inside:
            if path.suffix == ".tar" and not any(p.suffix == ".json" for p in inside):
                yield from _shard(path, skips)
    elif place.is_file():
        yield from _shard(place, skips)
    else:
        raise DataError(
            "there is no such folder or shard.", where=str(place), fix="check the path of the data"
        )


def _shard(path: Path, skips: Skips) -> Iterator[tuple[PurePosixPath, Blob]]:
    size = path.stat().st_size
    end, last = 0, "nothing"
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                end, last = member.offset_data + member.size, member.name
                if end <= size and member.isfile():
                    yield (
                        PurePosixPath(member.name),
                        Blob(path, member.offset_data, member.size),
                    )
    except (tarfile.TarError, OSError) as err:
        if end <= size:
            skips.add(path.name, "shard", f"cannot be read after {last}: {err}", str(path))
            return
    if end > size:
        skips.add(path.name, "shard", f"cut off inside {last}", str(path))
    elif any(Blob(path, -(-end // 512) * 512, 512).read() or b"cut"):
        # tarfile takes a damaged or missing header for the end, which is a block of zeros
        skips.add(path.name, "shard", f"cut off or damaged after {last}", str(path))
