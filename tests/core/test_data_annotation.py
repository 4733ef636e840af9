"""Polygons and run lengths, sound and damaged."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from samcompress.core.data._annotation import decoder, instances_of, unpack
from samcompress.core.errors import DataError

SOUND = {
    "id": 1,
    "area": 6.5,
    "bbox": [2, 1, 3, 2.5],
    "category_id": 4,
    "iscrowd": 1,
    "segmentation": [[2, 1, 5, 1, 5, 3, 2, 3]],
}


def reference(mask: np.ndarray) -> str:
    """The COCO string pycocotools writes."""
    pycocotools = pytest.importorskip("pycocotools.mask")
    return pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_run_lengths_by_hand() -> None:
    by_hand = np.array([[0, 1, 1], [0, 0, 1]], bool)  # columns: 00 10 11
    mask = decoder({"size": [2, 3], "counts": [2, 1, 1, 2]}, (2, 3))()
    np.testing.assert_array_equal(mask, by_hand)
    assert mask.flags.c_contiguous
    assert unpack("2112").tolist() == [2, 1, 1, 3]  # the fourth is written as a difference


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_strings_agree_with_pycocotools(density: float) -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (64, 48), (300, 500)):
        mask = rng.random(size) < density
        segmentation = {"size": list(size), "counts": reference(mask)}
        np.testing.assert_array_equal(decoder(segmentation, size)(), mask)
        runs = unpack(segmentation["counts"]).tolist()
        np.testing.assert_array_equal(decoder({"size": list(size), "counts": runs}, size)(), mask)


def test_polygons_agree_with_pycocotools() -> None:
    pycocotools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygons = rng.uniform(-3, 45, (2, 10)).tolist()
        merged = pycocotools.merge(pycocotools.frPyObjects(polygons, 40, 30))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pycocotools 2.0.11 under numpy 2
            expected = pycocotools.decode(merged).astype(bool)
        np.testing.assert_array_equal(decoder(polygons, (40, 30))(), expected)


def test_a_polygon_of_two_points_is_passed_over() -> None:
    square = [2, 1, 5, 1, 5, 3, 2, 3]
    alone = decoder([square], (8, 8))()
    np.testing.assert_array_equal(decoder([[1, 1, 7, 7], square], (8, 8))(), alone)
    assert alone.sum() == 6


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "segmentation is empty."),
        (None, "segmentation is empty."),
        ("abc", "segmentation is neither polygons nor run lengths."),
        ([1, 2, 3, 4, 5, 6], "segmentation is neither polygons nor run lengths."),
        ([[1, 1, 2, 2]], "no polygon has three points."),
        ({"size": [4, 4]}, "segmentation has no counts."),
        ({"counts": [16]}, "mask has another size than its image."),
        ({"size": [4, 5], "counts": [20]}, "mask has another size than its image."),
    ],
)
def test_damage_told_at_opening(segmentation: Any, message: str) -> None:
    with pytest.raises(DataError) as err:
        decoder(segmentation, (4, 4))
    assert err.value.what == message


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [4, 4], "counts": [5, 5]}, "run lengths do not fill the mask."),
        ({"size": [4, 4], "counts": [5, 10**30]}, "segmentation holds a number out of range."),
        ({"size": [4, 4], "counts": [5, 500]}, "run lengths do not fill the mask."),
        ({"size": [4, 4], "counts": [-4, 20]}, "run lengths do not fill the mask."),
        ({"size": [4, 4], "counts": [4, "a"]}, "segmentation holds something other than numbers."),
        ({"size": [4, 4], "counts": "05"}, "run lengths do not fill the mask."),
        ({"size": [4, 4], "counts": "zz"}, "counts are no COCO string."),
        ({"size": [4, 4], "counts": "P"}, "counts are no COCO string."),
        ({"size": [4, 4], "counts": "P" * 50 + "0"}, "counts are no COCO string."),
        ({"size": [4, 4], "counts": "ß"}, "counts are no COCO string."),
        ([[1, 1, 2, "a", 3, 3]], "segmentation holds something other than numbers."),
        ([[1, 1, float("nan"), 2, 3, 3]], "polygon leaves the image by far."),
        ([[1, 1, 1e9, 2, 3, 3]], "polygon leaves the image by far."),
    ],
)
def test_damage_told_at_decoding(segmentation: Any, message: str) -> None:
    with pytest.raises(DataError) as err:
        decoder(segmentation, (4, 4))()
    assert err.value.what == message


def test_fields_of_an_instance() -> None:
    records = [{**SOUND, "id": 7, "point_coords": [[3.5, 2.0]], "iscrowd": 0}, SOUND]
    (first, second), problems = instances_of(records, (8, 8))
    assert problems == []
    assert (first.id, first.category, first.area, first.crowd) == (1, 4, 6.5, True)
    assert first.box == (2.0, 1.0, 5.0, 3.5), "unrounded"
    assert (second.id, second.crowd, second.point) == (7, False, (3.5, 2.0))


@pytest.mark.parametrize(
    ("change", "what", "reason"),
    [
        ({"bbox": [1, 2, 3]}, "annotation 1", "annotation is malformed: not enough values"),
        ({"bbox": [1, 2, -3, 4]}, "annotation 1", "bbox or area is not usable: [1, 2, -3, 4], 6.5"),
        ({"area": float("nan")}, "annotation 1", "bbox or area is not usable"),
        ({"area": None}, "annotation 1", "annotation is malformed: float()"),
        ({"id": None}, "annotation number 1", "annotation has no usable id: None"),
        ({"id": [1]}, "annotation [1]", "annotation has no usable id: [1]"),
        ({"segmentation": []}, "annotation 1", "segmentation is empty"),
        ({"id": 0}, "annotation 0", "id is used twice in this image"),
    ],
)
def test_an_annotation_that_cannot_be_used(change: Any, what: str, reason: str) -> None:
    kept, problems = instances_of([{**SOUND, "id": 0}, {**SOUND, **change}], (8, 8))
    assert [i.id for i in kept] == [0]
    assert [p[0] for p in problems] == [what]
    assert problems[0][1].startswith(reason)


def test_records_that_are_none() -> None:
    kept, problems = instances_of([None, {"id": 3}], (8, 8))
    assert kept == ()
    assert problems[0][0] == "annotation number 0"
    assert problems[1] == ("annotation 3", "annotation has no 'area'")
