"""How an image and its prompts get into a model's square, and how masks get out of it again.

All SAMs see a square, but not all fill it alike. The rule belongs to the model: `framing_of` finds
it, and whoever predicts, measures or trains follows it; a teacher sees images by the student's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

ATTRIBUTE = "framing"


@dataclass(frozen=True)
class Framing:
    """SAM's rule: the longest side fills the square, the rest is padding at the right and below.

    Attributes:
        size: side S of the square that the image encoder takes.
        frame: side of the square in which prompts and masks are placed; the same for SAM, while
            some encoders take a smaller image than their prompts assume.
    """

    size: int
    frame: int

    def at(self, size: int) -> Framing:
        """The same rule for another S; the frame keeps its proportion."""
        return replace(self, size=size, frame=self.frame * size // self.size)

    def inside(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image of H, W in the frame; the rest is padding."""
        height, width = ResizeLongestSide.get_preprocess_shape(*size, self.frame)
        return int(height), int(width)

    def scale(self, size: tuple[int, int]) -> tuple[float, float]:
        """Factors of x and y from an image of H, W to the frame."""
        height, width = self.inside(size)
        return width / size[1], height / size[0]

    def resized(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 to (3, h, w) float32 in 0...255 that fits into S, not padded."""
        height, width = ResizeLongestSide.get_preprocess_shape(*image.shape[:2], self.size)
        return _tensor(_pillow(image, (height, width), Image.Resampling.BILINEAR))

    def full_size(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """(P, M, 4h, 4w) logits of the frame to (P, M, H, W) of the image."""
        height, width = self.inside(size)
        square = F.interpolate(low, (self.frame, self.frame), mode="bilinear")
        return F.interpolate(square[..., :height, :width], size, mode="bilinear")


class Stretched(Framing):
    """EfficientSAM's rule: both sides fill the square, nothing is padding."""

    def inside(self, size: tuple[int, int]) -> tuple[int, int]:
        """The whole frame."""
        return self.frame, self.frame

    def resized(self, image: np.ndarray) -> Tensor:
        """Bilinear between neighbours, without antialiasing."""
        square = (self.size, self.size)
        return F.interpolate(_tensor(image)[None], square, mode="bilinear")[0]

    def full_size(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Bicubic, in one step."""
        return F.interpolate(low, size, mode="bicubic")


class Truncated(Framing):
    """NanoSAM's rule: the shorter side is cut to whole pixels, resizing is bicubic."""

    def inside(self, size: tuple[int, int]) -> tuple[int, int]:
        """The longest side, and of the other the whole pixels of what its share leaves."""
        return _by_aspect(size, self.frame)

    def scale(self, size: tuple[int, int]) -> tuple[float, float]:
        """One factor for both."""
        factor = self.frame / max(size)
        return factor, factor

    def resized(self, image: np.ndarray) -> Tensor:
        """Pillow's bicubic filter."""
        size = _by_aspect((image.shape[0], image.shape[1]), self.size)
        return _tensor(_pillow(image, size, Image.Resampling.BICUBIC))

    def full_size(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """What shows the image, bilinear, in one step."""
        side, longest = low.shape[-1], max(size)
        height, width = (int(side * n / longest) for n in size)
        return F.interpolate(low[..., :height, :width], size, mode="bilinear")


def framing_of(model: nn.Module) -> Framing:
    """The model's rule: SAM's, unless the model brings its own."""
    found: Framing | None = getattr(model, ATTRIBUTE, None)
    if found is not None:
        return found
    sam: Any = model
    return Framing(sam.image_encoder.img_size, sam.image_encoder.img_size)


def _by_aspect(size: tuple[int, int], side: int) -> tuple[int, int]:
    # Two roundings, as upstream: a product with the inverse would now and then be a pixel more.
    aspect = size[1] / size[0]
    return (int(side / aspect), side) if aspect >= 1 else (side, int(side * aspect))


def _pillow(image: np.ndarray, size: tuple[int, int], kernel: Image.Resampling) -> np.ndarray:
    height, width = size
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), kernel))


def _tensor(image: np.ndarray) -> Tensor:
    return torch.tensor(image).permute(2, 0, 1).float()
