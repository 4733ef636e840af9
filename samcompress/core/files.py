"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CheckpointError

_MASK = os.umask(0)
os.umask(_MASK)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; move it there if all went well, else remove it.

    Works for a file and for a folder; a folder that exists is replaced.

    Raises:
        CheckpointError: if the place cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _open_to_others(temporary)
        if temporary.is_dir() and path.exists():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except OSError as err:
        raise CheckpointError(
            "could not write.",
            where=str(path),
            got=f"{type(err).__name__}: {err.strerror or err}",
            expected="a writable place with enough room",
            fix="choose another folder, or free some space; nothing was left behind",
        ) from err
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def _open_to_others(place: Path) -> None:
    """Give files the mode of any new file: safetensors writes them for their owner alone."""
    for file in [place, *place.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~_MASK)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with whole(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
