"""A SAM that knows the masks of its image: every sampler runs end to end without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samcompress.core.everything.samplers import Accepted, Sampler, Scene
from samcompress.core.framing import Framing
from samcompress.core.predict import Embedding

SURE = 10.0


class Same(Framing):
    """Frame and image are the same, whatever its size."""

    def inside(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def scale(self, size: tuple[int, int]) -> tuple[float, float]:
        return 1.0, 1.0

    def resized(self, image: np.ndarray) -> Tensor:
        return torch.zeros(3, self.size, self.size)

    def full_size(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        return low


class Prompted(nn.Module):
    """Hands prompts on: (P, 1 or 2, 2) places of a point or of a box's corners."""

    def __init__(self) -> None:
        super().__init__()
        self.input_image_size, self.mask_input_size = (8, 8), (8, 8)
        self.weight = nn.Parameter(torch.zeros(1))

    def get_dense_pe(self) -> Tensor:
        return torch.zeros(1, 1, 1, 1)

    def forward(self, points: Any, boxes: Any, masks: Any) -> tuple[Tensor, Tensor]:
        places = points[0] if points is not None else boxes.reshape(-1, 2, 2)
        return places.double(), torch.zeros(len(places), 0)


class Oracle(nn.Module):
    """Answers from true masks.

    A point gets the masks under it, the smallest first, up to three; what is left, or a point on
    nothing, gets masks of nothing that the oracle expects nothing of. A box gets the mask whose box
    is most like it.
    """

    mask_threshold = 0.0

    def __init__(self, masks: np.ndarray) -> None:
        super().__init__()
        self.framing = Same(8, 8)
        self.image_encoder = nn.Conv2d(3, 1, 8)
        self.image_encoder.img_size = 8
        self.prompt_encoder = Prompted()
        self.pixel_mean, self.pixel_std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        self.preprocess = self.postprocess_masks = None
        self.mask_decoder = Answers(np.asarray(masks, bool))


class Answers(nn.Module):
    def __init__(self, masks: np.ndarray) -> None:
        super().__init__()
        self.masks = masks[np.argsort(masks.sum((1, 2)), kind="stable")]
        self.asked: list[int] = []

    def forward(self, sparse_prompt_embeddings: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        places = sparse_prompt_embeddings.numpy()
        self.asked.append(len(places))
        count = 3 if places.shape[1] == 1 else 1
        logits = torch.full((len(places), count, *self.masks.shape[1:]), -SURE)
        scores = torch.zeros(len(places), count)
        for row, place in enumerate(places):
            for column, index in enumerate(self._meant(place)[:count]):
                logits[row, column][torch.from_numpy(self.masks[index])] = SURE
                scores[row, column] = 1
        return logits, scores

    def _meant(self, place: np.ndarray) -> np.ndarray:
        if len(place) == 1:
            x, y = place[0].astype(int)
            return np.flatnonzero(self.masks[:, y, x])
        overlaps = [_iou(place.ravel(), _box(mask)) for mask in self.masks]
        return np.array([np.argmax(overlaps)])


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    inside = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(inside / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside))


@dataclass(frozen=True)
class Walk:
    """What a sampler asked of true masks, and which of them a point lay in."""

    prompts: int
    hit: int
    masks: int


def walk(sampler: Sampler, masks: np.ndarray) -> Walk:
    """Run a sampler against true masks without making any logits: much faster, same prompts."""
    areas = np.array([np.count_nonzero(mask) for mask in masks])
    order = np.argsort(areas, kind="stable")
    masks, size = np.asarray(masks, bool)[order], masks.shape[1:]
    share = (areas[order] / np.prod(size)).astype(np.float32)
    cover = np.full(size, np.inf, np.float32)
    scene = Scene(np.zeros((1, 1, 3), np.uint8), Embedding(torch.zeros(1), size, size), nn.Module())
    hit, prompts = np.zeros(len(masks), bool), 0
    rounds = sampler.rounds(scene)
    asked = next(rounds, None)
    while asked is not None:
        prompts += len(asked)
        x, y = asked.points.astype(int).T
        under = masks[:, y, x]
        hit |= under.any(1)
        if sampler.tau is not None and sampler.tau < SURE:
            # Up to three of each point, the smallest first.
            for index in np.flatnonzero((under & (under.cumsum(0) <= 3)).any(1)):
                np.minimum(cover, share[index], out=cover, where=masks[index])
        try:
            asked = rounds.send(Accepted(cover))
        except StopIteration:
            asked = None
    return Walk(prompts, int(hit.sum()), len(masks))
