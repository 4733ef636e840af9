"""Drawn scenes with exact masks: data for everybody, without a download."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import ConfigError
from ._dataset import Dataset
from ._sample import Image, Instance, Sample, from_mask, sha256
from ._shapes_draw import VERSION, draw


def shapes(n: int, seed: int = 0, size: int | tuple[int, int] = 128) -> Dataset:
    """Scenes of textured, shaded, overlapping things, drawn when asked for.

    A scene depends on (seed, index, size) alone, so ``shapes(8)`` are the first of ``shapes(32)``.
    The masks are the visible parts, exact to the pixel; only the picture is anti-aliased. A thing
    of which too little can be seen stays in the picture without an annotation. The category is
    the number of the outline in ``samcompress.core.data.KINDS``.

    Args:
        n: number of scenes.
        seed: another seed, other scenes.
        size: side in pixels, or (H, W); at least 8.

    Raises:
        ConfigError: if n, seed or size is out of range.

    Example:
        >>> scenes = shapes(4, seed=1, size=(48, 64))
        >>> scenes[2].image.shape, scenes[2].masks().shape[1:]
        ((48, 64, 3), (48, 64))
    """
    height, width = (size, size) if isinstance(size, int) else size
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("size", min(height, width), 8)):
        if value < least:
            raise ConfigError(f"{name} is out of range.", got=value, expected=f"{name} >= {least}")
    samples = [Scene(seed, index, (height, width)) for index in range(n)]
    return Dataset(
        samples,
        f"shapes@{seed}-{width}x{height}",
        licence="CC0 (drawn by samcompress)",
        note="drawn scenes, exact masks of the visible parts",
    )


class Scene(Sample):
    """One drawn scene."""

    def __init__(self, seed: int, index: int, size: tuple[int, int]) -> None:
        super().__init__(index, f"scene_{seed}_{index:05d}", size)
        self._key = (seed, index, size[0], size[1])

    @property
    def image(self) -> Image:
        image: Image = _scene(*self._key)[0].copy()
        return image

    @property
    def instances(self) -> tuple[Instance, ...]:
        return _scene(*self._key)[1]

    def digest(self) -> str:
        return sha256(repr((VERSION, self._key)).encode())


# A few scenes are kept because image and instances are asked for one after the other.
@lru_cache(maxsize=4)
def _scene(seed: int, index: int, height: int, width: int) -> tuple[Image, tuple[Instance, ...]]:
    image, labels, kinds = draw(np.random.default_rng([seed, index]), height, width)
    counts = np.bincount(labels.ravel(), minlength=len(kinds) + 1)
    least = max(9, height * width // 800)
    return image, tuple(
        from_mask(number, labels == number, kind)
        for number, kind in enumerate(kinds, 1)
        if counts[number] >= least
    )
