"""From an image to the input of a proposal network, and from its output to masks.

For networks that give boxes with coefficients and, once for the image, prototype maps of which each
box's mask is a mixture. Any backbone will do.

Source: FastSAM's rules, X. Zhao et al., 2023, arXiv 2306.12156; own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from ..core.errors import DataError, ShapeError
from ..core.everything.choose import whole_frame

GREY = 114
# Masks are enlarged so many at a time: in float they are four times as large as in bool.
CHUNK = 32


class Detections(NamedTuple):
    """What a network says about each of A cells, before anything is chosen.

    Attributes:
        boxes: (B, 4, A) centre x, y, width, height in pixels of the input.
        scores: (B, 1, A) in 0...1.
        coefficients: (B, K, A).
        prototypes: (B, K, h, w) over the whole input.
    """

    boxes: Tensor
    scores: Tensor
    coefficients: Tensor
    prototypes: Tensor


@dataclass(frozen=True)
class Proposals:
    """Masks of one image, best first.

    Attributes:
        masks: (N, H, W) bool, none of them empty.
        boxes: (N, 4) float32 x0, y0, x1, y1 in the image's pixels; those of the detector, not the
            masks' own.
        scores: (N,) float32 in 0...1.
    """

    masks: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Letterbox:
    """An image in the middle of a network's input, grey around it.

    Attributes:
        size: H, W of the image.
        inside: its height and width in the input.
        padded: height and width of the input.
    """

    size: tuple[int, int]
    inside: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], longest: int, multiple: int) -> Letterbox:
        """The longest side is scaled to `longest`, then both are padded to a multiple."""
        scale = longest / max(size)
        inside = tuple(max(1, round(n * scale)) for n in size)
        padded = tuple(-(-n // multiple) * multiple for n in inside)
        return cls(size, (inside[0], inside[1]), (padded[0], padded[1]))

    @property
    def corner(self) -> tuple[int, int]:
        """Top and left of the image in the input."""
        return (self.padded[0] - self.inside[0]) // 2, (self.padded[1] - self.inside[1]) // 2

    def pixels(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 to (3, h, w) float32 in 0...1."""
        canvas = np.full((*self.padded, 3), GREY, np.uint8)
        (top, left), (height, width) = self.corner, self.inside
        canvas[top : top + height, left : left + width] = resized(image, self.inside)
        return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255

    def boxes(self, boxes: Tensor) -> Tensor:
        """(N, 4) corners in the input to corners in the image, cut at its border."""
        top, left = self.corner
        factors = [self.size[1] / self.inside[1], self.size[0] / self.inside[0]]
        moved = (boxes - boxes.new_tensor([left, top, left, top])) * boxes.new_tensor(factors * 2)
        cut: Tensor = clip_boxes_to_image(moved, self.size)
        return cut

    def maps(self, maps: Tensor) -> Tensor:
        """(N, h, w) over the input to (N, H, W) over the image, bilinear in one step."""
        axes = []
        for axis, cells in enumerate(maps.shape[-2:]):
            pixels = torch.arange(self.size[axis], dtype=torch.float64) + 0.5
            place = pixels * (self.inside[axis] / self.size[axis]) + self.corner[axis]
            # Beyond the outermost cells' centres there is nothing to interpolate between.
            half = 1 - 1 / cells
            axes.append((place * (2 / self.padded[axis]) - 1).clamp(-half, half))
        ys, xs = torch.meshgrid(*axes, indexing="ij")
        grid = torch.stack([xs, ys], -1)[None].to(maps)
        return F.grid_sample(maps[None], grid, mode="bilinear", align_corners=False)[0]


def checked(image: np.ndarray) -> np.ndarray:
    """The image, if it is one.

    Raises:
        ShapeError: if it is not (H, W, 3).
        DataError: if it is not uint8.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ShapeError(
            "an image has the wrong shape.",
            got=image.shape,
            expected="(H, W, 3)",
            fix='np.asarray(PIL.Image.open(path).convert("RGB"))',
        )
    if image.dtype != np.uint8:
        raise DataError(
            "an image has the wrong type.",
            got=image.dtype,
            expected="uint8, 0 to 255",
            fix="scale it to 0...255 and use .astype(np.uint8)",
        )
    return image


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between neighbours, without antialiasing, in OpenCV's whole numbers.

    The same bytes as its ``resize`` with ``INTER_LINEAR``: weights in steps of 1/2048, bits dropped
    between the two passes. Rounding once, at the end, would change every eighth value by one.

    Args:
        image: (H, W, 3) uint8.
        size: new height and width.
    """
    if image.shape[:2] == size:
        return image
    rows, columns = _taps(image.shape[0], size[0]), _taps(image.shape[1], size[1])
    wide = image.astype(np.int32)
    wide = sum(wide[:, index] * weight[:, None] for index, weight in columns) >> 4
    tall: np.ndarray = sum((wide[index] * weight[:, None, None]) >> 16 for index, weight in rows)
    return ((tall + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two neighbours of each new pixel: their indices, and their weights of 2048 in all."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(place)
    share = place - first
    index = first.astype(np.int64)
    return [
        (np.clip(index + i, 0, old - 1), np.rint(weight * 2048).astype(np.int32))
        for i, weight in enumerate((1 - share, share))
    ]


def select(
    found: Detections, place: Letterbox, *, conf: float, iou: float, max_det: int
) -> Proposals:
    """Choose boxes of one image and make their masks.

    Boxes below `conf` go, then all that overlap with a better one; `whole_frame` follows. A mask is
    the sigmoid of its mixture of prototypes, enlarged, above one half, and inside its box. Boxes
    thinner than a pixel and masks without any are left out.

    Args:
        found: of a batch of one.
        place: where the image is in the input.
        conf: least score.
        iou: largest overlap of two boxes.
        max_det: at most so many masks.
    """
    boxes, scores, coefficients, prototypes = (t[0].float() for t in found)
    likely = (scores[0] > conf).nonzero()[:, 0]
    corners = box_convert(boxes.T[likely], "cxcywh", "xyxy")
    kept = nms(corners, scores[0, likely], iou)[:max_det]
    best = likely[kept]
    placed = place.boxes(whole_frame(corners[kept], place.inside, place.corner))
    thick = ((placed[:, 2:] - placed[:, :2]) >= 1).all(1)
    best, placed = best[thick], placed[thick]
    masks = np.zeros((len(best), *place.size), bool)
    for i in range(0, len(best), CHUNK):
        mixed = torch.einsum("kn,khw->nhw", coefficients[:, best[i : i + CHUNK]], prototypes)
        large = place.maps(mixed.sigmoid()) > 0.5
        masks[i : i + CHUNK] = (large & _inside(placed[i : i + CHUNK], place.size)).cpu().numpy()
    some = masks.any((1, 2))
    return Proposals(masks[some], placed.cpu().numpy()[some], scores[0, best].cpu().numpy()[some])


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W): which pixels' centres are in which box."""
    ys = torch.arange(size[0], device=boxes.device) + 0.5
    xs = torch.arange(size[1], device=boxes.device) + 0.5
    x0, y0, x1, y1 = boxes[..., None].unbind(1)
    across, down = (xs >= x0) & (xs < x1), (ys >= y0) & (ys < y1)
    return down[:, :, None] & across[:, None, :]
