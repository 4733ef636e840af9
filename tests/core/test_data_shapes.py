"""Drawn scenes: exact masks, the same everywhere, quick."""

from __future__ import annotations

import numpy as np
import pytest

from samcompress.core import data
from samcompress.core.data._shapes_draw import VERSION
from samcompress.core.errors import ConfigError

# kinds, areas and mean colour of the first two scenes
KNOWN = [
    ([2, 2, 2], [2989, 1402, 869], [102.8, 120.4, 158.1]),
    (
        [1, 1, 7, 5, 8, 8, 6, 1],
        [615, 359, 2143, 584, 41, 180, 171, 1784],
        [88.7, 74.9, 79.8],
    ),
]


def test_a_scene_depends_on_seed_index_and_size_alone() -> None:
    few, many = data.shapes(3, seed=5, size=64), data.shapes(9, seed=5, size=64)
    for one, other in zip(few, many, strict=False):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.masks(), other.masks())
        assert one.instances[0].id == other.instances[0].id
    assert (data.shapes(1, seed=6, size=64)[0].image != few[0].image).any()
    assert (few[0].image != few[1].image).any()


def test_the_same_scenes_as_ever() -> None:
    """Whoever changes a scene raises VERSION; sines may differ by a pixel between machines."""
    assert VERSION == 1
    for scene, (kinds, areas, colour) in zip(data.shapes(2), KNOWN, strict=True):
        assert [instance.category for instance in scene.instances] == kinds
        found = [instance.area for instance in scene.instances]
        np.testing.assert_allclose(found, areas, atol=2)
        np.testing.assert_allclose(scene.image.mean((0, 1)), colour, atol=0.2)


@pytest.mark.parametrize("size", [8, 33, 128, (40, 72)])
def test_masks_are_boolean_disjoint_and_of_the_image_size(size: int | tuple[int, int]) -> None:
    shape = (size, size) if isinstance(size, int) else size
    for scene in data.shapes(12, size=size):
        masks = scene.masks()
        assert scene.size == shape
        assert scene.image.shape == (*shape, 3)
        assert scene.image.dtype == np.uint8
        assert masks.dtype == bool
        assert masks.shape[1:] == shape
        assert masks.sum(0).max(initial=0) <= 1, "only visible parts"
        for instance, mask in zip(scene.instances, masks, strict=True):
            assert mask.sum() == instance.area >= 9
            assert instance.category in data.KINDS
            x0, y0, x1, y1 = (int(v) for v in instance.box)
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0].any()
            assert mask[y1 - 1].any()
            assert mask[:, x0].any()


def test_scenes_are_varied() -> None:
    scenes = data.shapes(100, size=128)
    objects = [instance for scene in scenes for instance in scene.instances]
    assert min(len(scene.instances) for scene in scenes) >= 1
    assert {instance.category for instance in objects} == set(data.KINDS)
    areas = np.array([instance.area for instance in objects])
    assert areas.min() >= 128 * 128 // 800
    assert np.percentile(areas, 95) > 20 * np.percentile(areas, 5)


def test_an_edge_in_the_mask_is_an_edge_in_the_picture() -> None:
    """Pixels across a mask's border differ more than pixels on either side of it."""
    across, along = [], []
    for scene in data.shapes(20, size=128):
        image = scene.image.astype(float).mean(-1)
        labels = sum((k * m for k, m in enumerate(scene.masks(), 1)), np.zeros(scene.size))
        step = np.abs(np.diff(image[:, ::2], axis=1))
        border = np.diff(labels[:, ::2], axis=1) != 0
        across.append(step[border].mean())
        along.append(step[~border].mean())
    assert np.mean(across) > 3 * np.mean(along)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is out of range.\n  got       0\n  expected  n >= 1"),
        ({"n": 1, "seed": -1}, "seed is out of range.\n  got       -1\n  expected  seed >= 0"),
        ({"n": 1, "size": (8, 7)}, "size is out of range.\n  got       7\n  expected  size >= 8"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as err:
        data.shapes(**arguments)
    assert str(err.value) == message
