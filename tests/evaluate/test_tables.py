"""Results side by side; what was measured by other rules does not fit."""

from __future__ import annotations

import pytest
from conftest import random_sam

from samcompress.core import data
from samcompress.core.data import Dataset
from samcompress.core.errors import ConfigError, DataError
from samcompress.evaluate.accuracy import accuracies
from samcompress.evaluate.ap import average_precision
from samcompress.evaluate.detections import detections
from samcompress.evaluate.proposals import recall
from samcompress.evaluate.tables import table


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return data.shapes(3, seed=2, size=(48, 64))


def test_accuracies_side_by_side(scenes: Dataset) -> None:
    base, small = (accuracies(random_sam(seed=seed), scenes) for seed in (0, 1))
    found = table({"base": base[0], "small": small[0]})
    assert [column.name for column in found.columns] == [
        *("name", "mIoU", "mIoU S", "mIoU M", "mIoU L", "objects")
    ]
    assert found.notes == (base[0].protocol,)
    assert "±" in found.text()
    with pytest.raises(ConfigError, match=r"different protocol id[\s\S]*'base' and 'small'"):
        table({"base": base[0], "small": small[1]})
    with pytest.raises(DataError, match="there are no rows to compare"):
        table({})


def test_boxes_of_another_detector_do_not_share_a_table(scenes: Dataset) -> None:
    items = [
        {"image_id": s.id, "category_id": i.category, "bbox": [4, 4, 20, 20], "score": 0.5}
        for s in scenes
        for i in s.instances
    ]
    other = [{**item, "score": 0.4} for item in items]
    one, two, moved = (
        average_precision(detections(random_sam(seed=seed), scenes, boxes), scenes)
        for seed, boxes in ((0, items), (1, items), (0, other))
    )
    assert "AP50" in table({"one": one, "two": two}).text()
    with pytest.raises(ConfigError, match=r"different protocol id[\s\S]*boxes="):
        table({"one": one, "moved": moved})
    refined = average_precision(detections(random_sam(), scenes, items, refine=True), scenes)
    with pytest.raises(ConfigError, match=r"single\+refined"):
        table({"one": one, "refined": refined})


def test_recalls_side_by_side(scenes: Dataset) -> None:
    masks = {s.id: [{"segmentation": m, "score": 1.0} for m in s.masks()] for s in scenes}
    every, none = recall(masks, scenes), recall({s.id: [] for s in scenes}, scenes)
    text = table({"every": every, "none": none}).text()
    assert "AR@1000" in text
    assert "best IoU" in text
    with pytest.raises(ConfigError, match="rank=sam"):
        table({"every": every, "none": recall({s.id: [] for s in scenes}, scenes, rank="sam")})
