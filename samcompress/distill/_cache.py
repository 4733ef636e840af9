"""What training reads again and again: the teacher's embeddings, and the images made ready."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core._progress import Progress
from ..core.checkpoint import fingerprint
from ..core.errors import CheckpointError, DataError
from ..core.files import whole
from ..core.predict import preprocess

if TYPE_CHECKING:
    from ..core.data import Dataset

log = logging.getLogger("samcompress.distill")
SHARD = 64  # images a file: what a killed run loses at most
LARGEST = 6e4  # float16 ends at 65504
READY_BYTES = 1 << 30


class Teacher:
    """The teacher's embeddings of a data set, each computed once and kept as float16.

    Args:
        model: the teacher; left as it is.
        data: the images.
        folder: where to keep the embeddings, `SHARD` images a safetensors file; None for memory.

    Raises:
        CheckpointError: if the folder holds those of another teacher, preprocessing or data set.
    """

    def __init__(self, model: Any, data: Dataset, folder: Path | None) -> None:
        self.model, self.data, self.folder = model, data, folder
        self.identity: dict[str, Any] = {
            "teacher": fingerprint(model.image_encoder),
            "image_size": model.image_encoder.img_size,
            "pixel_mean": model.pixel_mean.flatten().tolist(),
            "pixel_std": model.pixel_std.flatten().tolist(),
            "data": data.fingerprint,
            "dtype": "float16",
        }
        self._memory: dict[int, Tensor] = {}

    def fill(self, progress: Progress) -> None:
        """Compute what is missing."""
        starts = range(0, len(self.data), SHARD)
        todo = [s for s in starts if not self._there(s)]
        images = [i for s in todo for i in range(s, min(s + SHARD, len(self.data)))]
        cells = self.model.prompt_encoder.get_dense_pe()[0].numel()
        log.info("teacher: %d images to encode, %.3g MB", len(images), len(images) * cells * 2e-6)
        found: list[Tensor] = []
        with evaluating(self.model):
            for index in progress.track(images, label="teacher", total=len(images)):
                found.append(self._embed(index))
                if len(found) == SHARD or index == len(self.data) - 1:
                    self._keep(index + 1 - len(found), torch.stack(found))
                    found.clear()

    def read(self, indices: Sequence[int]) -> Tensor:
        """(B, C, h, w) float32 embeddings on the CPU."""
        if self.folder is None:
            return torch.stack([self._memory[i] for i in indices]).float()
        rows: dict[int, Tensor] = {}
        for start in {i - i % SHARD for i in indices}:
            with safe_open(self._path(start), framework="pt") as file:
                shard = file.get_slice("embedding")
                rows |= {i: shard[i - start] for i in indices if i - i % SHARD == start}
        return torch.stack([rows[i] for i in indices]).float()

    def _embed(self, index: int) -> Tensor:
        sample = self.data[index]
        ready, _ = preprocess(self.model, sample.image)
        embedding: Tensor
        with torch.no_grad():
            embedding = self.model.image_encoder(ready[None])[0].float()
        largest = float(embedding.abs().max())
        if not largest <= LARGEST:  # also true of NaN
            raise DataError(
                "the teacher's embedding of an image cannot be used.",
                where=f"image {sample.id}",
                got=f"a largest value of {largest:g}",
                expected=f"finite values up to {LARGEST:g}",
                fix="look for NaN in the teacher's weights, or leave the image out",
            )
        return embedding.half().cpu()

    def _path(self, start: int) -> Path:
        assert self.folder is not None
        return self.folder / f"teacher-{start:07d}.safetensors"

    def _keep(self, start: int, embeddings: Tensor) -> None:
        if self.folder is None:
            self._memory |= dict(enumerate(embeddings, start))
            return
        with whole(self._path(start)) as temporary:
            try:
                save_file(
                    {"embedding": embeddings},
                    temporary,
                    metadata={"samcompress": json.dumps(self.identity)},
                )
            except SafetensorError as err:
                raise OSError(str(err)) from err

    def _there(self, start: int) -> bool:
        if self.folder is None or not self._path(start).exists():
            return False
        path = self._path(start)
        try:
            with safe_open(path, framework="pt") as file:
                other = json.loads((file.metadata() or {})["samcompress"])
                file.get_slice("embedding")
        except (OSError, SafetensorError, KeyError, ValueError) as err:
            raise CheckpointError(
                "cached teacher embeddings cannot be read.",
                where=str(path),
                got=f"{type(err).__name__}: {err}",
                fix="delete the file; its images will be encoded again",
            ) from err
        for field, mine in self.identity.items():
            if other.get(field) != mine:
                raise CheckpointError(
                    f"the cached teacher embeddings do not belong to this run: {field} differs.",
                    where=str(path.parent),
                    got=other.get(field),
                    expected=mine,
                    fix="another workdir=, or delete the folder to encode the images again",
                )
        return True


class Ready:
    """Preprocessed images for the student, kept in memory as far as they fit `READY_BYTES`."""

    def __init__(self, model: nn.Module, data: Dataset) -> None:
        self.model, self.data = model, data
        self._kept: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        self._room = READY_BYTES

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """(B, 3, S, S) images on the model's device, and their sizes inside the padding."""
        found = [self._get(i) for i in indices]
        return torch.stack([image for image, _ in found]), [size for _, size in found]

    def _get(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        if index in self._kept:
            return self._kept[index]
        image, size = preprocess(self.model, self.data[index].image)
        self._room -= image.numel() * image.element_size()
        if self._room > 0:
            self._kept[index] = image, size
        return image, size


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
