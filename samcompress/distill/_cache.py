"""What training reads again and again: the teacher's embeddings, and the images made ready."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from ..core._objective import Share
from ..core._progress import Progress
from ..core.checkpoint import identity as model_identity
from ..core.contract import embedding_shape
from ..core.errors import CheckpointError, DataError
from ..core.files import whole, write_whole
from ..core.framing import Framing, framing_of
from ..core.predict import preprocess
from ._embeddings import HEADER, VARIANTS, Embeddings, Variant, checksum
from ._losses import valid_cells

if TYPE_CHECKING:
    from ..core.data import Dataset

log = logging.getLogger("samcompress.distill")
SHARD = 64  # images a file, more in large sets: what a killed run loses at most
FILES = 256  # from so many files on, they grow instead of becoming more
SHARD_BYTES = 1 << 30
ABANDONED = 3600.0  # seconds after which a half-written file has lost its writer
LARGEST = 6e4  # float16 ends at 65504
READY_BYTES = 1 << 30
INDEX = "index.json"
Dtype = Literal["float16", "float32"]
Piece = tuple[Variant, int]


class Teacher:
    """The teacher's image embeddings of a data set, each computed once.

    In a folder they are kept as safetensors files, written whole and never again: a run that was
    killed goes on with the files that are missing, and several processes can fill and read the
    folder at the same time. Every file says which teacher, preprocessing and images it is of.
    ``index.json`` lists the files once all are there.

    Args:
        model: the teacher; left as it is, used on the device it is on.
        data: the images.
        folder: where to keep the embeddings; None for memory.
        dtype: of the embeddings kept. float16 loses less than a student ever learns.
        flip: also keep those of the mirrored images, for training that mirrors at random.
        crop: keep only the cells that show the image, a third less for photos of 3 : 2. The rest
            reads as 0, which is no embedding: a decoder sees the padding too, and so does a student
            on another grid at the image's border. Only for losses cell by cell on one grid.
        batch_size: images in one call of the teacher's encoder.
        rule: how images are fitted into the teacher's square, the student's rule; None for its own.
    """

    def __init__(
        self,
        model: Any,
        data: Dataset,
        folder: Path | None,
        *,
        dtype: Dtype = "float16",
        flip: bool = False,
        crop: bool = False,
        batch_size: int = 1,
        rule: type[Framing] | None = None,
    ) -> None:
        self.model, self.data, self.folder = model, data, folder
        self.crop, self.batch_size = crop, batch_size
        self.framing = square(model, rule)
        self.variants = VARIANTS if flip else VARIANTS[:1]
        self.dtype: torch.dtype = getattr(torch, dtype)
        shape = list(embedding_shape(model))
        self._image_bytes = math.prod(shape) * self.dtype.itemsize
        keys = json.dumps([sample.id for sample in data])
        self.identity: dict[str, Any] = {
            "teacher": model_identity(model),
            "tap": "image_encoder",
            "image_size": model.image_encoder.img_size,
            "pixel_mean": model.pixel_mean.flatten().tolist(),
            "pixel_std": model.pixel_std.flatten().tolist(),
            "resize": type(self.framing).__name__.lower(),
            "padding": "0 after normalising, below and right",
            "data": data.fingerprint,
            # The data set's fingerprint does not depend on the order.
            "order": hashlib.sha256(keys.encode()).hexdigest(),
            "dtype": dtype,
            "crop": crop,
            "shape": shape,
            "shard": self._images_a_file(),
        }
        self._embeddings = Embeddings(self.identity, folder)

    def fill(self, progress: Progress, *, share: Share | None = None) -> None:
        """Compute what is missing.

        Args:
            progress: counts the images.
            share: the part of the files that this process sees to. By default all; under
                `torch.distributed` one part for each process, and all wait for one another.

        Raises:
            CheckpointError: if the folder holds embeddings of another teacher, preprocessing or
                data set, a file of it is damaged, or the disk has not enough room.
            DataError: if an image is damaged, or its embedding not finite.
        """
        together = share is None and self.folder is not None and _several()
        pieces, missing = self._pieces(), self._missing()
        self._announce(missing)
        if together:
            # All divide the same list, whoever looked first.
            agreed = [missing]
            distributed.broadcast_object_list(agreed)
            pieces = agreed[0]
            share = Share(distributed.get_rank(), distributed.get_world_size())
        needed = set(missing)
        mine = [piece for _, piece in (share or Share()).of(pieces) if piece in needed]
        kept: list[tuple[Tensor, tuple[int, int]]] = []
        count = sum(len(self._images(start)) for _, start in mine)
        with evaluating(self.model):
            records = progress.track(self._encode(mine), label="teacher", total=count)
            for (variant, start), record in records:
                kept.append(record)
                if len(kept) == len(self._images(start)):
                    self._keep(variant, start, kept)
                    kept = []
        if together:
            distributed.barrier()
        if self.folder is not None:
            self._finish(together=together)

    def read(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> Tensor:
        """(B, C, h, w) float32 embeddings on the CPU, see `Embeddings.read`."""
        return self._embeddings.read(indices, flipped)

    def reader(self) -> Embeddings:
        """Reads the same without the model, in other processes too; take it after `fill`."""
        return self._embeddings

    def _images_a_file(self) -> int:
        room: int = max(1, SHARD_BYTES // self._image_bytes)
        return min(max(SHARD, -(-len(self.data) // FILES)), room)

    def _images(self, start: int) -> range:
        return range(start, min(start + self.identity["shard"], len(self.data)))

    def _pieces(self) -> list[Piece]:
        starts = range(0, len(self.data), self.identity["shard"])
        return [(variant, start) for start in starts for variant in self.variants]

    def _missing(self) -> list[Piece]:
        return [piece for piece in self._pieces() if not self._embeddings.has(*piece)]

    def _announce(self, missing: Sequence[Piece]) -> None:
        """Say what it costs, and refuse what does not fit."""
        images = [i for _, start in missing for i in self._images(start)]
        size = len(images) * self._image_bytes
        if self.crop:
            size = sum(self._cropped_bytes(i) for i in images)
        if self.folder is None:
            log.info("teacher: %d images to encode, %s of memory", len(images), _text(size))
            return
        # The folder may not be there yet.
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        log.info(
            "teacher: %d images to encode, %s in %s, where %s are free",
            len(images),
            _text(size),
            self.folder,
            _text(free),
        )
        if size > free:
            raise CheckpointError(
                "there is no room for the teacher's embeddings.",
                where=str(self.folder),
                got=f"{_text(free)} free",
                expected=f"{_text(size)} for {len(images)} images",
                fix="workdir= on another disk, or fewer images",
            )

    def _cropped_bytes(self, index: int) -> int:
        rows, columns = self._cells(self.framing.inside(self.data[index].size))
        channels: int = self.identity["shape"][0]
        return channels * rows * columns * self.dtype.itemsize

    def _cells(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns to keep."""
        _, height, width = self.identity["shape"]
        if not self.crop:
            return height, width
        valid = valid_cells(input_size, self.identity["image_size"], (height, width))[0]
        return int(valid[:, 0].sum()), int(valid[0].sum())

    def _encode(
        self, pieces: Sequence[Piece]
    ) -> Iterator[tuple[Piece, tuple[Tensor, tuple[int, int]]]]:
        """Each image's embedding, as it is kept, and its size inside the padding."""
        for variant, start in pieces:
            # Another process may have been here in the meantime.
            if self._embeddings.has(variant, start):
                continue
            images = self._images(start)
            for first in range(start, images.stop, self.batch_size):
                batch = range(first, min(first + self.batch_size, images.stop))
                for record in self._embed(batch, mirrored=variant == "flip"):
                    yield (variant, start), record

    @torch.no_grad()
    def _embed(
        self, batch: Sequence[int], *, mirrored: bool
    ) -> list[tuple[Tensor, tuple[int, int]]]:
        images = [self.data[i].image for i in batch]
        if mirrored:
            images = [np.ascontiguousarray(image[:, ::-1]) for image in images]
        ready = [preprocess(self.model, image, self.framing) for image in images]
        embeddings = self.model.image_encoder(torch.stack([image for image, _ in ready])).float()
        records = []
        for index, embedding, (_, size) in zip(batch, embeddings, ready, strict=True):
            largest = float(embedding.abs().max())
            if not largest <= LARGEST:  # also true of NaN
                raise DataError(
                    "the teacher's embedding of an image cannot be used.",
                    where=f"image {self.data[index].id}",
                    got=f"a largest value of {largest:g}",
                    expected=f"finite values up to {LARGEST:g}",
                    fix="look for NaN in the teacher's weights, or leave the image out",
                )
            rows, columns = self._cells(size)
            kept = embedding[:, :rows, :columns].to("cpu", self.dtype)
            records.append((kept.contiguous(), size))
        return records

    def _keep(
        self, variant: Variant, start: int, records: Sequence[tuple[Tensor, tuple[int, int]]]
    ) -> None:
        if self.folder is None:
            for index, (record, _) in enumerate(records, start):
                self._embeddings.memory[variant, index] = record
            return
        if self._embeddings.has(variant, start):
            return
        header = {
            **self.identity,
            "variant": variant,
            "keys": [self.data[i].id for i in self._images(start)],
            "crc32": [checksum(record) for record, _ in records],
        }
        tensors = {
            "embedding": torch.cat([record.flatten() for record, _ in records]),
            "cells": torch.tensor([record.shape[1:] for record, _ in records], dtype=torch.int32),
            "hw": torch.tensor([size for _, size in records], dtype=torch.int32),
        }
        with whole(self._embeddings.path(variant, start)) as temporary:
            try:
                save_file(tensors, temporary, metadata={HEADER: json.dumps(header)})
            except SafetensorError as err:
                raise OSError(str(err)) from err
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())

    def _finish(self, *, together: bool) -> None:
        """List the files once all are there, and clear away what killed processes left."""
        assert self.folder is not None
        for part in self.folder.glob(".*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
        missing = self._missing()
        if missing and together:
            raise CheckpointError(
                "embeddings that other processes computed are not here.",
                where=str(self._embeddings.path(*missing[0])),
                expected="one folder that all processes and machines see",
                fix="workdir= on a shared disk",
            )
        if missing:
            return
        document = {"format": 1, "identity": self.identity, "files": self._files()}
        content = f"{json.dumps(document)}\n".encode()
        index = self.folder / INDEX
        if not index.exists() or index.read_bytes() != content:
            write_whole(index, content)

    def _files(self) -> list[dict[str, Any]]:
        found = []
        for variant in VARIANTS:
            for start in range(0, len(self.data), self.identity["shard"]):
                path = self._embeddings.path(variant, start)
                if path.exists():
                    keys = [self.data[i].id for i in self._images(start)]
                    facts = {"file": path.name, "bytes": path.stat().st_size, "keys": keys}
                    found.append(facts)
        return found


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _text(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


class Ready:
    """Preprocessed images for the student, kept in memory as far as they fit `READY_BYTES`."""

    def __init__(self, model: nn.Module, data: Dataset) -> None:
        self.model, self.data = model, data
        self.framing = square(model)
        self._kept: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        self._room = READY_BYTES

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """(B, 3, S, S) images on the model's device, and their sizes inside the padding."""
        found = [self._get(i) for i in indices]
        return torch.stack([image for image, _ in found]), [size for _, size in found]

    def _get(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        if index in self._kept:
            return self._kept[index]
        image, size = preprocess(self.model, self.data[index].image, self.framing)
        self._room -= image.numel() * image.element_size()
        if self._room > 0:
            self._kept[index] = image, size
        return image, size


def square(model: nn.Module, rule: type[Framing] | None = None) -> Framing:
    """A rule, by default the model's own, whose sizes are pixels of the model's square."""
    sam: Any = model
    side = sam.image_encoder.img_size
    return (rule or type(framing_of(model)))(side, side)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
