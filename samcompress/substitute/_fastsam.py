"""FastSAM's network: all masks of an image in one run, without prompts.

No SAM: a convolutional detector of one class gives boxes, each with coefficients that mix 32
prototype maps into its mask. Prompts choose among those masks afterwards; none can make a mask that
was not proposed. What follows the network is in `_proposals`.

Source: X. Zhao et al., "Fast Segment Anything", 2023, arXiv 2306.12156; the network is the
segmentation variant of YOLOv8, the masks are after D. Bolya et al., "YOLACT", 2019, arXiv
1904.02689, the distances after X. Li et al., "Generalized Focal Loss", 2020, arXiv 2006.04388. The
official code and weights are AGPL-3.0: this is own code from names and shapes of the tensors, and
weights come under the upstream terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core._infer import fill
from ._fold import batch_norm_pairs, fold_batch_norms
from ._proposals import Detections, Letterbox, Proposals, checked, select

STRIDES = (8, 16, 32)
STEM = "model.0.conv.weight"


@dataclass(frozen=True)
class FastSamConfig:
    """Sizes of a FastSAM.

    Attributes:
        channels: widths at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's side.
        blocks: residual pairs of convolutions in each of the last four.
        neck: pairs, there without residual, wherever scales are joined.
        prototypes: maps that masks are mixed from.
        bins: a distance from a cell to a side of its box is the mean of a distribution over so many
            whole numbers of cells.
    """

    channels: tuple[int, int, int, int, int]
    blocks: tuple[int, int, int, int]
    neck: int
    prototypes: int = 32
    bins: int = 16


CONFIGS: dict[str, FastSamConfig] = {
    "s": FastSamConfig(channels=(32, 64, 128, 256, 512), blocks=(1, 2, 2, 1), neck=1),
    "x": FastSamConfig(channels=(80, 160, 320, 640, 640), blocks=(3, 6, 6, 3), neck=3),
}


def build(config: FastSamConfig, image_size: int = 1024) -> FastSam:
    """The network with random weights.

    Args:
        config: one of `CONFIGS`, or other sizes.
        image_size: longest side of the input in pixels.
    """
    return FastSam(config, image_size)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours, which are the same.

    Args:
        state: tensors of ``FastSAM-s.pt`` or ``FastSAM-x.pt``. Readers take the ``model.`` that all
            their names have for a wrapper's, so it may be gone.
    """
    return {f"model.{n}" if n[:1].isdigit() else n: tensor for n, tensor in state.items()}


def make(config: FastSamConfig, state: Mapping[str, Tensor] | None) -> FastSam:
    """The network with given weights, or with random ones, in eval mode and float32.

    Args:
        config: one of `CONFIGS`, or other sizes.
        state: tensors by our names, of any floating type; copied.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape.
    """
    if state is None:
        return build(config).eval()
    with torch.device("meta"):
        model = build(config)
    model = model.to_empty(device="cpu")
    fill(model, dict(state), where="state dict", expected=f"a FastSAM of widths {config.channels}")
    return model.eval()


class FastSam(nn.Module):
    """Images to boxes, scores, coefficients and prototypes.

    Attributes:
        img_size: longest side of the input that `propose` makes.
        multiple: both sides of an input must be multiples of this.
    """

    multiple = 32

    def __init__(self, config: FastSamConfig, image_size: int = 1024) -> None:
        super().__init__()
        self.img_size = image_size
        half, quarter, fine, middle, coarse = config.channels
        n1, n2, n3, n4 = config.blocks
        neck = config.neck
        # The numbers are the official files' names; those left out have no tensors.
        self.model = nn.ModuleDict(
            {
                "0": _Conv(3, half, 3, 2),
                "1": _Conv(half, quarter, 3, 2),
                "2": _Branches(quarter, quarter, n1, residual=True),
                "3": _Conv(quarter, fine, 3, 2),
                "4": _Branches(fine, fine, n2, residual=True),
                "5": _Conv(fine, middle, 3, 2),
                "6": _Branches(middle, middle, n3, residual=True),
                "7": _Conv(middle, coarse, 3, 2),
                "8": _Branches(coarse, coarse, n4, residual=True),
                "9": _Pools(coarse),
                "12": _Branches(coarse + middle, middle, neck),
                "15": _Branches(middle + fine, fine, neck),
                "16": _Conv(fine, fine, 3, 2),
                "18": _Branches(fine + middle, middle, neck),
                "19": _Conv(middle, middle, 3, 2),
                "21": _Branches(middle + coarse, coarse, neck),
                "22": _Head((fine, middle, coarse), config.prototypes, config.bins),
            }
        )

    def forward(self, images: Tensor) -> Detections:
        """Detect everything.

        Args:
            images: (B, 3, H, W) RGB in 0...1; H and W multiples of `multiple`.
        """
        part = self.model
        fine = part["4"](part["3"](part["2"](part["1"](part["0"](images)))))
        middle = part["6"](part["5"](fine))
        coarse = part["9"](part["8"](part["7"](middle)))
        # Down to the finest scale and up again, each step with what was there before.
        middle = part["12"](torch.cat([_enlarged(coarse), middle], 1))
        fine = part["15"](torch.cat([_enlarged(middle), fine], 1))
        middle = part["18"](torch.cat([part["16"](fine), middle], 1))
        coarse = part["21"](torch.cat([part["19"](middle), coarse], 1))
        found: Detections = part["22"]((fine, middle, coarse))
        return found

    @torch.no_grad()
    def propose(
        self, image: np.ndarray, *, conf: float = 0.4, iou: float = 0.9, max_det: int = 300
    ) -> Proposals:
        """The masks of an image, best first; the rules are those of `select`.

        Args:
            image: (H, W, 3) uint8 RGB of any size.
            conf: least score.
            iou: of two boxes that overlap by more than this, the one with the lower score goes.
            max_det: at most so many masks.

        Raises:
            ShapeError: if the image is not (H, W, 3).
            DataError: if it is not uint8.
        """
        image = checked(image)
        weight = self.get_parameter(STEM)
        place = Letterbox.of((image.shape[0], image.shape[1]), self.img_size, self.multiple)
        found = self(place.pixels(image).to(weight)[None])
        return select(found, place, conf=conf, iou=iou, max_det=max_det)

    def resize(self, size: int) -> None:
        """Take another image size; nothing depends on it.

        Args:
            size: new longest side in pixels.
        """
        self.img_size = size

    def fuse(self) -> None:
        """Fold all batch norms into the convolutions before them, in place.

        The result computes what the network computes in eval mode, to rounding. Nothing happens
        where there is nothing to fold.
        """
        side, kind = self.multiple, self.get_parameter(STEM).dtype
        example = torch.empty(1, 3, side, side, dtype=kind, device="meta")
        fold_batch_norms(self, batch_norm_pairs(self, example))


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class _Pair(nn.Module):
    """Two 3x3 convolutions, with or without a residual."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.cv1 = _Conv(width, width, 3)
        self.cv2 = _Conv(width, width, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.residual else y


class _Branches(nn.Module):
    """Pairs in a row, each on half the channels; what every one of them gave is joined."""

    def __init__(self, inputs: int, outputs: int, pairs: int, residual: bool = False) -> None:
        super().__init__()
        width = outputs // 2
        self.cv1 = _Conv(inputs, 2 * width)
        self.cv2 = _Conv((2 + pairs) * width, outputs)
        self.m = nn.ModuleList(_Pair(width, residual) for _ in range(pairs))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for pair in self.m:
            parts.append(pair(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, 1))
        return y


class _Pools(nn.Module):
    """The map and its maxima over 5, 9 and 13 cells, joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1 = _Conv(width, width // 2)
        self.cv2 = _Conv(4 * (width // 2), width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        y: Tensor = self.cv2(torch.cat(parts, 1))
        return y


class _Prototypes(nn.Module):
    """Maps of twice the resolution."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.cv1 = _Conv(width, width, 3)
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2)
        self.cv2 = _Conv(width, width, 3)
        self.cv3 = _Conv(width, count)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv3(self.cv2(self.upsample(self.cv1(x))))
        return y


class _Head(nn.Module):
    """At every cell of three maps: a box, a score, and coefficients."""

    def __init__(self, inputs: tuple[int, int, int], prototypes: int, bins: int) -> None:
        super().__init__()
        finest = inputs[0]
        box = max(finest // 4, 4 * bins)
        self.bins = bins
        self.cv2 = _towers(inputs, box, 4 * bins)
        self.cv3 = _towers(inputs, finest, 1)
        self.cv4 = _towers(inputs, max(finest // 4, prototypes), prototypes)
        # The mean of a distribution over 0, 1, 2, ...: no weights to learn.
        mean = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        mean.weight.copy_(torch.arange(bins).reshape(1, -1, 1, 1))
        self.dfl = nn.ModuleDict({"conv": mean})
        self.proto = _Prototypes(finest, prototypes)

    def forward(self, maps: Sequence[Tensor]) -> Detections:
        sides, scores, coefficients = (
            torch.cat([t(x).flatten(2) for t, x in zip(towers, maps, strict=True)], 2)
            for towers in (self.cv2, self.cv3, self.cv4)
        )
        # (B, 4 bins, A) to the mean distances (B, 4, A) to left, top, right and bottom.
        batch, _, count = sides.shape
        shares = sides.reshape(batch, 4, self.bins, count).transpose(1, 2).softmax(1)
        before, after = self.dfl["conv"](shares)[:, 0].chunk(2, 1)
        centres, strides = _cells(maps)
        boxes = torch.cat([centres + (after - before) / 2, before + after], 1) * strides
        return Detections(boxes, scores.sigmoid(), coefficients, self.proto(maps[0]))


def _towers(inputs: Sequence[int], width: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(_Conv(n, width, 3), _Conv(width, width, 3), nn.Conv2d(width, outputs, 1))
        for n in inputs
    )


def _cells(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Centres (2, A) in cells of their own map, and the strides (1, A) that make them pixels."""
    centres, strides = [], []
    for x, stride in zip(maps, STRIDES, strict=True):
        height, width = x.shape[-2:]
        ys = torch.arange(height, dtype=x.dtype, device=x.device) + 0.5
        xs = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5
        grid = torch.stack([xs.expand(height, -1), ys[:, None].expand(-1, width)])
        centres.append(grid.flatten(1))
        strides.append(torch.full_like(centres[-1][:1], stride))
    return torch.cat(centres, 1), torch.cat(strides, 1)
