"""The three parts of a SAM over exported files: predictors and generators see no difference."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core._shapes import expect
from ..core.errors import BackendError
from ..core.files import sha256
from ._graphs import BOTTOM_RIGHT, DECODER, ENCODER, NO_POINT, PLAIN, TOP_LEFT, Buckets
from .backends import BACKENDS, Opened
from .edge_tpu import edge_tpu_check

# Padding points that segment_anything adds to nothing, points, a box, and both.
PADDING = (0, 1, 0, 0)


class Folder:
    """A temporary folder that goes when the last module that uses it goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Folder:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process must not remove the folder of this one.
        return type(None), ()


class Exported(nn.Module):
    """Runs exported graphs; each is opened at its first call.

    Args:
        backend: name of the runtime.
        files: names of the graphs' files, of each graph the main one first.
        hashes: SHA-256 of files, by name; a file of another one is not run.

    Attributes:
        artifacts: file name to where the file is.
    """

    def __init__(
        self, backend: str, files: Sequence[str], hashes: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.backend = backend
        self.files = tuple(files)
        self.hashes = dict(hashes or {})
        self.bind(Path())

    @property
    def devices(self) -> tuple[str, ...]:
        """Kinds of device it computes on."""
        return BACKENDS[self.backend].devices

    @property
    def artifacts(self) -> dict[str, Path]:
        """File name to where the file is."""
        return {name: self.folder / name for name in self.files}

    def bind(self, folder: Path, keep: Folder | None = None) -> None:
        """Say where the files are.

        Args:
            folder: holds them.
            keep: the temporary folder that must live as long as this module does.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.opened: dict[tuple[str, int], Opened] = {}

    def graph(self, stem: str) -> Opened:
        """A graph by its file's name without suffix, with as many threads as torch uses.

        Raises:
            BackendError: if its files are gone, were changed, or cannot be read.
        """
        key = stem, torch.get_num_threads()
        if key not in self.opened:
            # One number of threads at a time: an open graph holds all its weights.
            self.opened = {k: v for k, v in self.opened.items() if k[1] == key[1]}
            names = [name for name in self.files if name.partition(".")[0] == stem]
            for name in names:
                self._check(name)
            runtime = BACKENDS[self.backend]
            self.opened[key] = runtime.open(
                self.folder / names[0], device=runtime.devices[0], threads=key[1]
            )
        return self.opened[key]

    def _check(self, name: str) -> None:
        path = self.folder / name
        if not path.exists():
            raise BackendError(
                "a file of an exported model is gone.",
                where=str(path.absolute()),
                fix="sc.save(model, folder) keeps a model, sc.load(folder) opens it",
            )
        if name in self.hashes and sha256(path) != self.hashes[name]:
            raise BackendError(
                "a file of an exported model was changed.",
                where=str(path.absolute()),
                got="another SHA-256",
                expected=self.hashes[name],
                fix="export the model again",
            )

    def checks(self) -> list[dict[str, Any]]:
        """What an Edge TPU would run of the .tflite files: a table each, as plain JSON values.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        files = {n: path for n, path in self.artifacts.items() if path.suffix == ".tflite"}
        tables = {name: edge_tpu_check(path).table() for name, path in files.items()}
        return [
            {"file": name, "title": t.title, "rows": t.records(), "notes": list(t.notes)}
            for name, t in tables.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.backend}, {', '.join(self.files)}"


class ExportedEncoder(Exported):
    """The image encoder over an exported graph for one image."""

    def __init__(
        self,
        backend: str,
        files: Sequence[str],
        img_size: int,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(backend, files, hashes)
        self.img_size = img_size

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, S, S) images, one after the other, to (B, C, h, w) float32.

        Raises:
            ShapeError: if S is not the size that was exported.
        """
        expect(x, "B 3 S S", name="image", S=self.img_size)
        graph = self.graph(ENCODER)
        return torch.cat([graph(image[None].float())[0] for image in x]).to(x.device)


class PackedPrompts(nn.Module):
    """Prompt encoder of an exported model: packs prompts, which `ExportedDecoder` then embeds.

    Args:
        pe_layer: segment_anything's position encoding, which predictors ask for.
        embed_dim: channels C.
        image_embedding_size: the grid h, w.
        input_image_size: the padded frame S, S.
        padding: padding points of a prompt of nothing, of points, of a box, and of both.
    """

    def __init__(
        self,
        pe_layer: nn.Module,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        padding: Sequence[int] = PADDING,
    ) -> None:
        super().__init__()
        self.padding = tuple(padding)
        self.pe_layer = pe_layer
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        h, w = image_embedding_size
        self.mask_input_size = (4 * h, 4 * w)

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the grid, (1, C, h, w)."""
        position: Tensor = self.pe_layer(self.image_embedding_size)
        return position[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pack P prompts.

        Args:
            points: (P, N, 2) coordinates and (P, N) labels.
            boxes: (P, 4) corners.
            masks: (P, 1, 4h, 4w) logits.

        Returns:
            (P, N', 3) x, y, label of points, padding point and box corners; (P, 1, 4h, 4w) masks,
            or no channel at all, (P, 0, 4h, 4w), where there is no mask.
        """
        given = [t for t in (points and points[0], boxes, masks) if t is not None]
        count = given[0].shape[0] if given else 1
        device = next(self.pe_layer.buffers()).device
        packed = [torch.zeros(count, 0, 3, device=device)]
        if points is not None:
            coords, labels = points[0].float(), points[1].float()
            # Labels above 1 mean a box only where there is one; here they mean nothing.
            labels = torch.where(labels.abs() <= 1, labels, PLAIN)
            packed.append(torch.cat([coords, labels[..., None]], -1))
        added = self.padding[(points is not None) + 2 * (boxes is not None)]
        packed.append(torch.tensor([0, 0, NO_POINT], device=device).expand(count, added, 3))
        if boxes is not None:
            corners = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=device)
            corners = corners.view(1, 2, 1).expand(count, 2, 1)
            packed.append(torch.cat([boxes.float().reshape(-1, 2, 2), corners], -1))
        if masks is None:
            masks = torch.zeros(count, 0, *self.mask_input_size, device=device)
        return torch.cat(packed, 1), masks


class ExportedDecoder(Exported):
    """Prompt encoder and mask decoder over exported graphs.

    Attributes:
        features: channels of the embedding beyond those of the prompts.
        sizes: prompts and points of the graphs; None if one graph takes any number.
    """

    def __init__(
        self,
        backend: str,
        files: Sequence[str],
        features: int = 0,
        sizes: Buckets | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(backend, files, hashes)
        self.features = features
        self.sizes = sizes

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode P packed prompts on one image.

        Args:
            image_embeddings: (1, C, h, w).
            image_pe: not used; the graph holds its own.
            sparse_prompt_embeddings: (P, N, 3) from `PackedPrompts`.
            dense_prompt_embeddings: (P, 1 or 0, 4h, 4w) from `PackedPrompts`.
            multimask_output: return the masks of an ambiguous prompt, not the single one.

        Returns:
            (P, M, 4h, 4w) logits and (P, M) scores, float32.

        Raises:
            ShapeError: if there is not exactly one image, prompts come from another encoder, or
                have more points than the graphs take.
        """
        expect(image_embeddings, "1 C h w", name="image_embeddings")
        points = sparse_prompt_embeddings.float()
        count = expect(points, "P N 3", name="sparse_prompt_embeddings")["P"]
        masks = dense_prompt_embeddings.float()
        has_mask = masks.shape[1] > 0
        masks = masks if has_mask else masks.new_zeros(count, 1, *masks.shape[2:])
        masks = masks.expand(count, -1, -1, -1)
        image, switch = image_embeddings.float(), torch.tensor([float(has_mask)])
        most = max(count, 1) if self.sizes is None else self.sizes.prompts[-1]
        pieces = [
            self._decode(image, *prompts, switch)
            for prompts in zip(torch.split(points, most), torch.split(masks, most), strict=True)
        ]
        logits, scores = (torch.cat(both) for both in zip(*pieces, strict=True))
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        device = image_embeddings.device
        return logits[:, chosen].to(device), scores[:, chosen].to(device)

    def _decode(self, image: Tensor, points: Tensor, masks: Tensor, switch: Tensor) -> Any:
        count, stem = len(points), DECODER
        if self.sizes is not None:
            prompts, n = self.sizes.fit(count, points.shape[1])
            stem = self.sizes.stem(prompts, n)
            blank = points.new_tensor([0, 0, NO_POINT])
            blank = blank.expand(count, n - points.shape[1], 3)
            points = _filled(torch.cat([points, blank], 1), prompts)
            masks = _filled(masks, prompts)
        found = self.graph(stem)(image, points[..., :2], points[..., 2], masks, switch)
        return [t[:count] for t in found]


def _filled(x: Tensor, count: int) -> Tensor:
    """(n, ...) to (count, ...) with zeros; prompts do not see one another."""
    return torch.cat([x, x.new_zeros(count - len(x), *x.shape[1:])])
