"""Images with masks as training wants them: augmented, in the padded frame, targets at low size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core._draws import batch, generator
from ..core._objective import Share
from ..core.errors import ConfigError, DataError
from ..core.framing import Framing, Stretched, framing_of

if TYPE_CHECKING:
    from ..core.data import Dataset, Instance, Sample

KEPT_BYTES = 3 << 30
TRIES = 20  # other images in place of one without a usable mask
SMALLEST = 10 / 256**2  # of the frame that an object must cover; at SAM's size that is 10 cells
FEWEST = 2.0  # cells that it must cover on a coarser grid
FINE = 256  # cells a side of the low-resolution masks of SAM itself
LARGEST = 0.9  # of the image; SAM leaves larger masks out
PASTED_REST = 0.3  # of an object must stay visible under pasted ones


@dataclass(frozen=True)
class Frame:
    """The padded square that a model sees.

    Attributes:
        size: its side S in pixels.
        grid: cells a side of the grid that masks are compared on.
        mean: of the pixels, three channels.
        std: of the pixels, three channels.
        rule: how images are fitted into it.
    """

    size: int
    grid: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rule: type[Framing] = Framing

    @classmethod
    def of(cls, model: nn.Module) -> Frame:
        """That of a SAM.

        The grid is that of its low-resolution masks, but finer than theirs where they are coarser
        than SAM's own, down to a cell a pixel: means over coarse cells hide small objects, while
        logits made larger can draw them.
        """
        sam: Any = model
        mean, std = (tuple(t.flatten().tolist()) for t in (sam.pixel_mean, sam.pixel_std))
        size, grid = sam.image_encoder.img_size, sam.prompt_encoder.mask_input_size[0]
        while grid < FINE and 2 * grid <= size:
            grid *= 2
        return cls(size, grid, mean, std, type(framing_of(model)))

    def ready(self, image: Tensor) -> Tensor:
        """(3, h, w) in 0...255 to (3, S, S): normalised first, then padded with 0."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        height, width = image.shape[-2:]
        return F.pad((image - mean) / std, (0, self.size - width, 0, self.size - height))


def alike(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """The frames, all by the first one's rule: who is compared sees everything in one place."""
    return tuple(replace(frame, rule=frames[0].rule) for frame in frames)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How a training image may differ from its file.

    Args:
        scale: lowest and highest size, 1 being the whole image in the frame: large-scale jitter.
            Above 1 a random part is seen, below 1 the rest of the frame is padding; a model whose
            images always fill its frame sees the whole image then.
        flip: how often left and right change sides, 0 to 1.
        colour: largest relative change of brightness, contrast and saturation.
        grey: how often colours are taken away.
        paste: how often one to three objects of another image are pasted in (arXiv 2012.07177).
    """

    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    colour: float = 0.3
    grey: float = 0.1
    paste: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))
        low, high = self.scale
        if not 0 < low <= high:
            raise ConfigError(
                "Augment: scale is out of range.", got=self.scale, expected="0 < low <= high"
            )
        for name in ("flip", "colour", "grey", "paste"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"Augment: {name} is out of range.",
                    got=getattr(self, name),
                    expected=f"0 <= {name} <= 1",
                )


@dataclass(frozen=True)
class Batch:
    """Part of a batch of B images with P prompts in all, on the CPU.

    Attributes:
        images: (B, 3, S, S), normalised and padded, for the student.
        others: the same images for models with other frames.
        sizes: height and width of each image inside the student's frame.
        valid: (B, n, n), share of each cell of the frame's grid that shows the image.
        target: (P, n, n), share of each cell that the object covers.
        boxes: (P, 4), x0, y0, x1, y1 of the objects in the student's frame.
        owner: (P,) int64, which of the B images.
        places: of the B images in the whole batch.
        indices: of the B images in the data set.
    """

    images: Tensor
    others: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    valid: Tensor
    target: Tensor
    boxes: Tensor
    owner: Tensor
    places: tuple[int, ...]
    indices: tuple[int, ...]

    @property
    def weight(self) -> float:
        """The number of prompts."""
        return float(len(self.owner))

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        names = ("images", "valid", "target", "boxes", "owner")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, others=tuple(o.to(device) for o in self.others))


@dataclass(frozen=True)
class _View:
    """An image as drawn, before it is normalised: (3, h, w), and (K, h, w) shares in [0, 1]."""

    image: Tensor
    masks: Tensor


class Samples:
    """Draws batches of images, each with some of its objects.

    An image whose picture cannot be read, or that shows no object large enough, is replaced by
    another one, drawn from the same seed.

    Args:
        data: images with masks.
        frames: the student's first, then those of other models that see the same images, by the
            student's rule.
        batch_size: images in the whole batch.
        prompts: most objects of an image, drawn without replacement.
        augment: how images are changed; None for none, which gives the predictor's own pixels.
        seed: of everything drawn.
    """

    def __init__(
        self,
        data: Dataset,
        frames: Sequence[Frame],
        *,
        batch_size: int,
        prompts: int,
        augment: Augment | None,
        seed: int,
    ) -> None:
        self.data, self.frames, self.batch_size = data, alike(frames), batch_size
        self.prompts, self.augment, self.seed = prompts, augment, seed
        self.largest = max(frame.size for frame in frames)
        self._kept: dict[int, Sample | None] = {}
        self._room = KEPT_BYTES

    def draw(self, step: int, share: Share) -> Batch:
        """A part of the batch of a step."""
        chosen = batch(len(self.data), self.batch_size, seed=self.seed, step=step)
        found = [self._usable(index, step, place) for place, index in share.of(chosen)]
        frame, ratio = self.frames[0], self.frames[0].size // self.frames[0].grid
        images, others, sizes, valid, targets, boxes, owner = [], [], [], [], [], [], []
        for number, (_, _, view) in enumerate(found):
            fitted = self._fit(view, frame)
            height, width = fitted.image.shape[-2:]
            pad = (0, frame.size - width, 0, frame.size - height)
            images.append(frame.ready(fitted.image))
            others.append([f.ready(self._fit(view, f).image) for f in self.frames[1:]])
            sizes.append((height, width))
            shown = F.pad(torch.ones(1, height, width), pad)
            valid.append(F.avg_pool2d(shown, ratio)[0])
            targets.append(F.avg_pool2d(F.pad(fitted.masks, pad), ratio))
            boxes.append(_boxes(fitted.masks))
            owner += [number] * len(fitted.masks)
        return Batch(
            images=torch.stack(images),
            others=tuple(torch.stack(column) for column in zip(*others, strict=True)),
            sizes=tuple(sizes),
            valid=torch.stack(valid),
            target=torch.cat(targets),
            boxes=torch.cat(boxes),
            owner=torch.tensor(owner),
            places=tuple(place for place, _, _ in found),
            indices=tuple(index for _, index, _ in found),
        )

    def _usable(self, index: int, step: int, place: int) -> tuple[int, int, _View]:
        for attempt in range(TRIES):
            g = generator(self.seed, "image", step, place, attempt)
            if attempt:
                index = int(torch.randint(len(self.data), (), generator=g))
            view = self._view(index, g)
            if view is not None:
                return place, index, view
        raise DataError(
            "images without a usable mask, one after the other.",
            where=f"{self.data.name}, {TRIES} images tried",
            got="; ".join(map(str, self.data.skipped[:2])) or "no object large enough",
            expected=f"objects of at least {self.fewest:g} cells, {self.frames[0].grid} a side",
            fix="data with masks, a larger image size, or less large-scale jitter",
        )

    def _view(self, index: int, g: torch.Generator) -> _View | None:
        sample = self._held(index)
        if sample is None or not sample.instances:
            return None
        if self.augment is None:
            return self._plain(sample, g)
        view = self._seen(sample, self.prompts, g)
        if view is None:
            return None
        if float(torch.rand((), generator=g)) < self.augment.paste:
            view = self._pasted(view, g)
        return _View(self._coloured(view.image, g), view.masks) if len(view.masks) else None

    def _held(self, index: int) -> Sample | None:
        if index in self._kept:
            return self._kept[index]
        sample = self.data.hold(self.data[index])
        self._room -= 2 * math.prod((*sample.size, 3)) if sample else 0
        if self._room > 0:
            self._kept[index] = sample
        return sample

    def _plain(self, sample: Sample, g: torch.Generator) -> _View | None:
        """The whole image, resized by the same routine as in the predictor."""
        image = self.frames[0].rule(self.largest, self.largest).resized(sample.image)
        objects = _shuffled(sample.instances, g)
        masks = _resized(_stacked(objects), tuple(image.shape[1:]))
        masks = self._large(masks)[: self.prompts]
        return _View(image, masks) if len(masks) else None

    def _seen(self, sample: Sample, most: int, g: torch.Generator) -> _View | None:
        """A random part of an image at a random size, perhaps mirrored, with some objects."""
        assert self.augment is not None
        low, high = self.augment.scale
        u = torch.rand(4, generator=g, dtype=torch.float64).tolist()
        height, width = sample.size
        scale = low * (high / low) ** u[0] * self.largest / max(height, width)
        rows, columns = (min(n, math.ceil(self.largest / scale)) for n in (height, width))
        top, left = int(u[1] * (height - rows + 1)), int(u[2] * (width - columns + 1))
        size = tuple(min(self.largest, max(1, round(n * scale))) for n in (rows, columns))
        if issubclass(self.frames[0].rule, Stretched):
            size = self.largest, self.largest
        part = np.s_[top : top + rows, left : left + columns]
        window = (left, top, left + columns, top + rows)
        objects = [i for i in _shuffled(sample.instances, g) if _shows(i, window)][: 2 * most]
        masks = self._large(_resized(_stacked(objects)[:, part[0], part[1]], size))[:most]
        if not len(masks):
            return None
        pixels = torch.from_numpy(np.ascontiguousarray(sample.image[part])).permute(2, 0, 1)
        image = _resized(pixels.float(), size)
        if u[3] < self.augment.flip:
            image, masks = image.flip(-1), masks.flip(-1)
        return _View(image, masks)

    def _pasted(self, view: _View, g: torch.Generator) -> _View:
        """Objects of another image put on top; those they hide too much of are left out."""
        index = int(torch.randint(len(self.data), (), generator=g))
        count = int(torch.randint(1, 4, (), generator=g))
        sample = self._held(index)
        other = self._seen(sample, count, g) if sample and sample.instances else None
        if other is None:
            return view
        height, width = view.image.shape[-2:]
        bottom, right = (
            max(0, a - b) for a, b in zip((height, width), other.image.shape[-2:], strict=True)
        )
        pad = (0, right, 0, bottom)
        new = F.pad(other.masks, pad)[:, :height, :width]
        cover = new.amax(0)
        pixels = F.pad(other.image, pad)[:, :height, :width]
        image = view.image * (1 - cover) + pixels * cover
        rest = view.masks * (1 - cover)
        seen = rest.sum((1, 2)) >= PASTED_REST * view.masks.sum((1, 2))
        masks = self._large(torch.cat([new, rest[seen]]))[: self.prompts]
        return _View(image, masks)

    def _coloured(self, image: Tensor, g: torch.Generator) -> Tensor:
        assert self.augment is not None
        brightness, contrast, saturation = (
            1 + self.augment.colour * (2 * torch.rand(3, generator=g) - 1)
        ).tolist()
        image = image * brightness
        image = (image - image.mean()) * contrast + image.mean()
        grey = image.mean(0, keepdim=True)
        if float(torch.rand((), generator=g)) < self.augment.grey:
            saturation = 0.0
        mixed: Tensor = (image - grey) * saturation + grey
        return mixed.clamp(0, 255)

    def _large(self, masks: Tensor) -> Tensor:
        """Masks that can be learnt: not tiny in the student's grid, not nearly the whole image."""
        area = masks.sum((1, 2))
        cell = (self.largest / self.frames[0].grid) ** 2
        return masks[(area >= self.fewest * cell) & (area <= LARGEST * masks[0:1].numel())]

    @property
    def fewest(self) -> float:
        """Cells of the student's grid that an object must cover."""
        return max(FEWEST, SMALLEST * self.frames[0].grid ** 2)

    def _fit(self, view: _View, frame: Frame) -> _View:
        """The view, which was made for the largest frame, for another."""
        if frame.size == self.largest:
            return view
        height, width = (
            max(1, round(n * frame.size / self.largest)) for n in view.image.shape[-2:]
        )
        size = (height, width)
        return _View(_resized(view.image, size), _resized(view.masks, size))


def _shuffled(objects: Sequence[Instance], g: torch.Generator) -> list[Instance]:
    usable = [o for o in objects if not o.crowd]
    return [usable[i] for i in torch.randperm(len(usable), generator=g).tolist()]


def _stacked(objects: Sequence[Instance]) -> Tensor:
    if not objects:
        return torch.zeros(0, 1, 1)
    return torch.from_numpy(np.stack([o.mask for o in objects]))


def _shows(instance: Instance, window: tuple[int, int, int, int]) -> bool:
    """Whether a part of the object's box that is worth a look lies in the window."""
    x0, y0, x1, y1 = instance.box
    left, top, right, bottom = window
    inside = max(0.0, min(x1, right) - max(x0, left)) * max(0.0, min(y1, bottom) - max(y0, top))
    return inside > 0.05 * (x1 - x0) * (y1 - y0)


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """(K, H, W) to (K, h, w), antialiased bilinear, float32."""
    image = image.float()
    if tuple(image.shape[-2:]) == size or not len(image):
        return image.reshape(len(image), *size)
    resized: Tensor = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return resized


def _boxes(masks: Tensor) -> Tensor:
    """(K, 4) boxes around what is covered by more than half; x1 and y1 one past the last pixel."""
    found = []
    for mask in masks >= 0.5:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
        found.append([float(v) for v in ends])
    return torch.tensor(found)
