"""Sample and Dataset: arrays of one's own, subsets, fingerprints, readable()."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from samcompress.core import data
from samcompress.core.data._dataset import Skips
from samcompress.core.data._sample import Held
from samcompress.core.errors import ConfigError, DataError, ShapeError

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
MASK = np.zeros((4, 6), bool)
MASK[1:3, 2:5] = True


def broken() -> np.ndarray:
    raise DataError("run lengths do not fill the mask.", expected=24)


def spoilt(on_error: str) -> data.Dataset:
    """A data set with one sound, one empty, one ill-sized and one broken mask, and a bad image."""

    class Gone(data.Sample):
        @property
        def image(self) -> np.ndarray:
            raise DataError("image cannot be decoded.", got="truncated", where="gone.jpg")

        @property
        def instances(self) -> tuple[data.Instance, ...]:
            return ()

    box = (0.0, 0.0, 1.0, 1.0)
    sources = [lambda: MASK, lambda: MASK & False, lambda: MASK[:2], broken]
    instances = tuple(
        data.Instance(number, None, 1.0, box, source=source)
        for number, source in enumerate(sources)
    )
    samples = [Gone("b", "gone.jpg", (4, 6)), Held("a", "a.jpg", IMAGE, instances)]
    return data.Dataset(samples, "spoilt", skips=Skips(on_error))


def test_arrays_of_ones_own() -> None:
    sample = data.Sample.from_arrays("mine", IMAGE, [MASK, ~MASK])
    assert sample.id == sample.name == "mine"
    assert sample.size == (4, 6)
    np.testing.assert_array_equal(sample.masks(), [MASK, ~MASK])
    first = sample.instances[0]
    assert (first.area, first.box, first.crowd) == (6.0, (2.0, 1.0, 5.0, 3.0), False)
    assert repr(sample) == "<Sample 'mine' 'mine' 6x4>"
    assert data.Sample.from_arrays("bare", IMAGE, []).masks().shape == (0, 4, 6)
    assert data.Sample.from_arrays("e", IMAGE, [MASK & False]).instances[0].box == (0, 0, 0, 0)


def test_one_pixel() -> None:
    sample = data.Sample.from_arrays(1, np.zeros((1, 1, 3), np.uint8), np.ones((1, 1, 1), bool))
    assert sample.masks().tolist() == [[[True]]]
    assert sample.instances[0].box == (0, 0, 1, 1)


def test_arrays_that_do_not_fit() -> None:
    with pytest.raises(ShapeError) as err:
        data.Sample.from_arrays("a", IMAGE[..., 0], [])
    assert str(err.value) == (
        "image is not RGB.\n  where     a\n  got       (4, 6) uint8\n  expected  (H, W, 3) uint8"
    )
    with pytest.raises(ShapeError) as err:
        data.Sample.from_arrays("a", IMAGE, [MASK, MASK[:2]])
    assert str(err.value) == (
        "mask 1 does not fit its image.\n  where     a\n  got       (2, 6) bool\n"
        "  expected  (4, 6) bool"
    )


def test_slices_and_subsets() -> None:
    scenes = data.shapes(10, size=16)
    assert isinstance(scenes[2:5], data.Dataset)
    assert [s.id for s in scenes[2:5]] == [2, 3, 4]
    assert [s.id for s in scenes[::-4]] == [9, 5, 1]
    assert scenes[-1].id == 9
    assert [s.id for s in scenes.subset(3)] == [0, 1, 2]
    assert [s.id for s in scenes.subset(ids=[7, 1])] == [1, 7]
    drawn = [s.id for s in scenes.subset(4, seed=1)]
    assert drawn == sorted(drawn)
    assert drawn != [0, 1, 2, 3]
    assert [s.id for s in scenes[::-1].subset(4, seed=1)] == drawn[::-1]
    assert set(drawn) < {s.id for s in scenes.subset(6, seed=1)}
    assert scenes[2:5].name == scenes.name
    assert scenes[2:5].licence == scenes.licence


def test_a_subset_that_is_not_there() -> None:
    scenes = data.shapes(3, size=16)
    with pytest.raises(DataError, match=r"cannot take 4 images of shapes@0-16x16\.") as err:
        scenes.subset(4)
    assert "expected  1 <= n <= 3" in str(err.value)
    with pytest.raises(DataError, match=r"shapes@0-16x16 has no such image id\.") as err:
        scenes.subset(ids=[1, 8])
    assert "got       [8]" in str(err.value)


def test_fingerprint() -> None:
    scenes = data.shapes(4, size=16)
    assert len(scenes.fingerprint) == 64
    assert scenes.fingerprint == data.shapes(4, size=16).fingerprint
    assert scenes[::-1].fingerprint == scenes.fingerprint
    others = [data.shapes(4, seed=1, size=16), data.shapes(5, size=16), data.shapes(4, size=24)]
    assert len({scenes.fingerprint, *(o.fingerprint for o in others)}) == 4
    mine = [data.Sample.from_arrays(1, IMAGE, [m]) for m in (MASK, ~MASK)]
    assert mine[0].digest() != mine[1].digest()


def test_readable_leaves_damage_out_and_names_it() -> None:
    spoiled = spoilt("skip")
    assert spoiled.skipped == ()
    for _ in range(2):  # the second time nothing is named twice
        (sample,) = spoiled.readable()
        assert sample.id == "a"
        assert [i.id for i in sample.instances] == [0]
        np.testing.assert_array_equal(sample.masks(), [MASK])
        np.testing.assert_array_equal(sample.image, IMAGE)
        assert [str(s) for s in spoiled.skipped] == [
            "image of b: image cannot be decoded: truncated",
            "annotation 1 of a: mask is empty",
            "annotation 2 of a: mask is (2, 6), image (4, 6)",
            "annotation 3 of a: run lengths do not fill the mask: expected 24",
        ]
    assert repr(spoiled) == "<Dataset spoilt 2 images, 4 skipped>"
    assert spoiled[1:].skipped == spoiled.skipped


def test_readable_stops_at_damage_when_told_to() -> None:
    with pytest.raises(DataError) as err:
        list(spoilt("raise").readable())
    assert str(err.value) == (
        "image of 'b' cannot be used.\n  where     gone.jpg\n"
        "  got       image cannot be decoded: truncated\n"
        '  try       mend it, or leave it out with on_error="skip"'
    )
    with pytest.raises(DataError, match="annotation 1 of 'a' cannot be used"):
        list(spoilt("raise")[1:].readable())


def test_a_broken_mask_says_whose_it_is() -> None:
    with pytest.raises(DataError, match=r"where     annotation 3"):
        _ = spoilt("skip")[1].instances[3].mask


def test_readable_reads_each_sample_once() -> None:
    reads = []

    class Counted(Held):
        @property
        def image(self) -> np.ndarray:
            reads.append(self.id)
            return super().image

    counted = data.Dataset([Counted(1, "a", IMAGE, ())], "counted")
    (sample,) = counted.readable()
    _ = sample.image, sample.image
    assert reads == [1]


def test_as_dataset() -> None:
    scenes = data.shapes(2, size=16)
    assert data.as_dataset(scenes) is scenes
    assert [s.id for s in data.as_dataset([scenes[1], scenes[0]])] == [1, 0]
    with pytest.raises(DataError) as err:
        data.as_dataset("coco")
    assert str(err.value) == (
        "these are no data.\n  got       str\n  expected  a Dataset or a sequence of Sample\n"
        "  try       samcompress.data.open(PATH), or samcompress.data.shapes(32)"
    )
    with pytest.raises(DataError, match=r"custom holds no usable image\.\n  got       no image"):
        data.as_dataset([])
    with pytest.raises(DataError, match=r"two images of custom have the same id\."):
        data.as_dataset([scenes[0], scenes[0]])


def test_on_error_has_two_values() -> None:
    with pytest.raises(ConfigError) as err:
        Skips("ignore")
    assert str(err.value) == (
        "on_error has no such value.\n  got       'ignore'\n  expected  'skip' or 'raise'"
    )


def test_data_travel_to_other_processes() -> None:
    scenes = data.shapes(2, size=16)
    again = pickle.loads(pickle.dumps(scenes))
    assert again.fingerprint == scenes.fingerprint
    sample = pickle.loads(pickle.dumps(next(scenes.readable())))
    np.testing.assert_array_equal(sample.masks(), scenes[0].masks())
