"""Cached teacher embeddings: how they lie in their files, and how they are read again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import CheckpointError

Variant = Literal["teacher", "flip"]
VARIANTS: tuple[Variant, ...] = ("teacher", "flip")
HEADER = "samcompress"


class Embeddings:
    """Reads the embeddings that a `Teacher` keeps; several processes can, at the same time.

    Holds no model and can be pickled, so the workers that draw batches may have a copy. Only the
    records asked for are read; each is compared with its checksum when first read.

    Args:
        identity: what every file must say of itself.
        folder: of the files; None for embeddings in memory.
    """

    def __init__(self, identity: Mapping[str, Any], folder: Path | None) -> None:
        self.identity, self.folder = identity, folder
        self.memory: dict[tuple[Variant, int], Tensor] = {}
        self._shards: dict[Path, _Shard] = {}
        self._checked: set[tuple[Variant, int]] = set()

    def read(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> Tensor:
        """Embeddings of images, on the CPU.

        Args:
            indices: B places in the data set.
            flipped: for each whether that of the mirrored image is wanted; None for none.

        Returns:
            (B, C, h, w) float32; 0 in cells that were not kept.

        Raises:
            CheckpointError: if a file is missing, damaged or of another teacher.
        """
        found = torch.zeros(len(indices), *self.identity["shape"])
        for place, index in enumerate(indices):
            record = self._record("flip" if flipped and flipped[place] else "teacher", index)
            found[place, :, : record.shape[1], : record.shape[2]] = record
        return found

    def path(self, variant: Variant, start: int) -> Path:
        """The file of the images from `start` on."""
        assert self.folder is not None
        return self.folder / f"{variant}-{start:07d}.safetensors"

    def has(self, variant: Variant, start: int) -> bool:
        """Whether the images from `start` on are kept already.

        Raises:
            CheckpointError: if their file is damaged or of another teacher.
        """
        if self.folder is None:
            return (variant, start) in self.memory
        if not self.path(variant, start).exists():
            return False
        self._shard(variant, start)
        return True

    def _record(self, variant: Variant, index: int) -> Tensor:
        start = index - index % self.identity["shard"]
        if not self.has(variant, start):
            raise CheckpointError(
                "a teacher's embedding is missing.",
                where=self.folder and str(self.path(variant, start)),
                got=f"no {variant} embedding of image number {index}",
                fix="run again what fills the cache; or wait for the process that does",
            )
        if self.folder is None:
            return self.memory[variant, index]
        path, shard, row = self.path(variant, start), self._shard(variant, start), index - start
        low, high = shard.offsets[row : row + 2]
        try:
            with safe_open(path, framework="pt") as file:
                flat: Tensor = file.get_slice("embedding")[low:high]
        except (OSError, SafetensorError) as err:
            raise _damaged(path, f"{type(err).__name__}: {err}") from err
        if (variant, index) not in self._checked:
            if checksum(flat) != shard.checksums[row]:
                raise _damaged(path, f"another checksum of image {shard.keys[row]}")
            self._checked.add((variant, index))
        return flat.view(-1, *shard.cells[row])

    def _shard(self, variant: Variant, start: int) -> _Shard:
        path = self.path(variant, start)
        if path not in self._shards:
            header, shard = _open(path)
            for field, mine in {**self.identity, "variant": variant}.items():
                if header.get(field) != mine:
                    raise CheckpointError(
                        f"the cached teacher embeddings do not belong to this run: {field} "
                        "differs.",
                        where=str(path.parent),
                        got=header.get(field),
                        expected=mine,
                        fix="another workdir=, or delete the folder to encode the images again",
                    )
            self._shards[path] = shard
        return self._shards[path]


@dataclass(frozen=True)
class _Shard:
    """What a file tells of its n records.

    Attributes:
        keys: ids of the images.
        checksums: CRC-32 of each.
        cells: rows and columns of each that were kept.
        offsets: n + 1 places in the flat tensor where each begins and the last ends.
    """

    keys: list[int | str]
    checksums: list[int]
    cells: list[tuple[int, int]]
    offsets: list[int]


def checksum(record: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(record.contiguous().numpy().data)


def _open(path: Path) -> tuple[dict[str, Any], _Shard]:
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[HEADER])
            cells = [(h, w) for h, w in file.get_tensor("cells").tolist()]
            (values,) = file.get_slice("embedding").get_shape()
        channels = header["shape"][0]
        offsets = [0, *accumulate(channels * h * w for h, w in cells)]
        shard = _Shard(header["keys"], header["crc32"], cells, offsets)
        whole = len(cells) == len(shard.keys) == len(shard.checksums) and offsets[-1] == values
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as err:
        raise _damaged(path, f"{type(err).__name__}: {err}") from err
    if not whole:
        raise _damaged(path, "a header and tensors that contradict one another")
    return header, shard


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "cached teacher embeddings cannot be read.",
        where=str(path),
        got=found,
        fix="delete the file; its images will be encoded again",
    )
