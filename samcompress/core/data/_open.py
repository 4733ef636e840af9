"""One word for any data: what the command line's ``--data`` takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import DataError
from ._coco import coco, lvis
from ._dataset import Dataset, OnError
from ._files import IMAGE_SUFFIXES
from ._masks import masks
from ._sa1b import sa1b
from ._shapes import shapes

_FORMS = (
    "shapes:N, shapes:N@seed=1,size=256 or size=HxW",
    "COCO root, PATH@val2017 (annotations/instances_val2017.json); LVIS, PATH@lvis_v1_val",
    "SA-1B folder (*.jpg with *.json), folder of shards (*.tar), or one shard",
    "folder of images with mask PNGs (NAME.jpg with NAME_anything.png, or images/ and masks/)",
)


def open_data(spec: str | Path, *, on_error: OnError = "skip") -> Dataset:
    """Open data of any known layout.

    Args:
        spec: a path, ``PATH@SPLIT`` for COCO and LVIS, or ``shapes:N`` for drawn scenes with
            ``@seed=…``, ``@size=…`` or ``@seed=…,size=…`` behind.
        on_error: ``"skip"`` leaves damage out and names it in ``.skipped``; ``"raise"`` stops.

    Raises:
        DataError: if nothing known is there, the split is not, or the data cannot be used.
        ConfigError: if a number of ``shapes`` is out of range.

    Example:
        >>> open_data("shapes:4@seed=1")
        <Dataset shapes@1-128x128 4 images>
    """
    text = str(spec)
    if text.startswith("shapes:"):
        return _shapes(text)
    path, split = Path(text), None
    if not path.exists() and "@" in text:
        head, split = text.rsplit("@", 1)
        path = Path(head)
    if not path.exists():
        raise _unknown(text, f"no file or folder {path}")
    choices = _splits(path)
    if split is not None or choices:
        return _split(path, split, choices)(on_error=on_error)
    if path.is_file():
        if path.suffix == ".tar":
            return sa1b(path, on_error=on_error)
        raise _unknown(text, f"a {path.suffix or 'nameless'} file")
    suffixes = {entry.suffix.lower() for entry in path.iterdir()}
    if suffixes & {".tar"} or (".json" in suffixes and suffixes & {".jpg", ".jpeg"}):
        return sa1b(path, on_error=on_error)
    if suffixes & set(IMAGE_SUFFIXES) or (path / "images").is_dir():
        return masks(path, on_error=on_error)
    raise _unknown(text, f"a folder with {', '.join(sorted(suffixes)) or 'nothing'} in it")


def _unknown(text: str, got: str) -> DataError:
    looked = ("\n" + " " * 12).join(_FORMS)
    return DataError("no data of a known layout.", where=text, got=got, expected=looked)


def _shapes(text: str) -> Dataset:
    found = re.fullmatch(r"shapes:(\d+)(?:@(.+))?", text)
    words = found[2].split(",") if found and found[2] else []
    values: dict[str, str] = dict(word.split("=", 1) for word in words if "=" in word)
    size = re.fullmatch(r"(\d+)(?:x(\d+))?", values.get("size", "128"))
    seed = values.get("seed", "0")
    known = len(values) == len(words) and set(values) <= {"seed", "size"}
    if not (found and size and seed.isdigit() and known):
        raise DataError("these drawn scenes are not understood.", got=text, expected=_FORMS[0])
    height = int(size[1])
    width = int(size[2] or size[1])
    return shapes(int(found[1]), int(seed), (height, width))


def _splits(path: Path) -> dict[str, Callable[..., Dataset]]:
    """What can be opened below a COCO or LVIS root, by the name of its split."""
    choices: dict[str, Callable[..., Dataset]] = {}
    if not path.is_dir():
        return choices
    for file in sorted((path / "annotations").glob("instances_*.json")):
        split = file.stem.removeprefix("instances_")
        folder = path / split
        choices[split] = partial(coco, folder if folder.is_dir() else path, file)
    for file in sorted((path / "annotations").glob("lvis_v1_*.json")):
        choices[file.stem] = partial(lvis, path, file)
    return choices


def _split(
    path: Path, split: str | None, choices: dict[str, Callable[..., Dataset]]
) -> Callable[..., Dataset]:
    if split is None and len(choices) == 1:
        return next(iter(choices.values()))
    if split in choices:
        return choices[split]
    raise DataError(
        "the split is not given." if split is None else "there is no such split.",
        where=str(path),
        got=split,
        expected=", ".join(choices) or "no split: there is no annotations/*.json",
        fix=f"{path}@{next(iter(choices))}" if choices else str(path),
    )
