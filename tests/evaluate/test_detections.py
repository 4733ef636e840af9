"""Masks for the boxes of a detector: what is asked, what is kept, what the id says."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

from samcompress.core import data
from samcompress.core.data import Dataset
from samcompress.core.errors import ConfigError, DataError, ModelError
from samcompress.core.predict import Prediction, decode, encode, predict
from samcompress.core.prompt import Prompt
from samcompress.evaluate.ap import average_precision
from samcompress.evaluate.detections import Boxes, detections
from samcompress.evaluate.masks import box_iou
from samcompress.evaluate.masks import decode as decode_runs
from samcompress.evaluate.protocol import NonFiniteError

Item = dict[str, Any]


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return random_sam()


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return data.shapes(3, seed=2, size=(48, 64))


@pytest.fixture(scope="module")
def items(scenes: Dataset) -> list[Item]:
    """The true boxes, scored at random; in the file's order."""
    rng = np.random.default_rng(0)
    return [
        {
            "image_id": s.id,
            "category_id": i.category,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(rng.random()),
        }
        for s in scenes
        for i in s.instances
        for x0, y0, x1, y1 in [i.box]
    ]


def test_one_mask_a_box(sam: torch.nn.Module, scenes: Dataset, items: list[Item]) -> None:
    found = detections(sam, scenes, items)
    assert len(found.results) == len(items)
    for result, item in zip(found.results, items, strict=True):
        assert set(result) == {"image_id", "category_id", "score", "segmentation"}
        assert {k: result[k] for k in ("image_id", "score")} == {
            k: item[k] for k in ("image_id", "score")
        }
    first = scenes[0]
    asked = [Prompt(box=i.box) for i in first.instances]
    (expected,) = predict(sam, [first.image], [asked])
    assert expected.masks is not None
    for result, mask in zip(found.results, expected.masks[:, 0].numpy(), strict=False):
        assert np.array_equal(decode_runs(result["segmentation"]), mask)


@pytest.mark.parametrize("choice", ["predicted", "box-iou"])
def test_choice_of_three(
    sam: torch.nn.Module, scenes: Dataset, items: list[Item], choice: Any
) -> None:
    found = detections(sam, scenes[:1], items, choice=choice)
    (embedding,) = encode(sam, [scenes[0].image])
    boxes = [i.box for i in scenes[0].instances]
    three = decode(sam, embedding, [Prompt(box=b) for b in boxes], multimask=True)
    assert three.masks is not None
    for row, (result, box) in enumerate(zip(found.results, boxes, strict=True)):
        masks = three.masks[row].numpy()
        rated = three.scores[row].numpy() if choice == "predicted" else None
        by_box = [box_iou(mask, box) for mask in masks]
        best = int(np.argmax(by_box if rated is None else rated))
        assert np.array_equal(decode_runs(result["segmentation"]), masks[best])


def test_refined_asks_again_with_box_and_mask(
    sam: torch.nn.Module, scenes: Dataset, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[Any] = []

    def spy(model: Any, embedding: Any, prompts: list[Prompt], **options: Any) -> Prediction:
        kinds.append({prompt.kind for prompt in prompts})
        return decode(model, embedding, prompts, **options)

    monkeypatch.setattr(sys.modules[detections.__module__], "decode", spy)
    plain = detections(sam, scenes[:1], items)
    refined = detections(sam, scenes[:1], items, refine=True)
    assert kinds == [{(0, True, False)}, {(0, True, False)}, {(0, True, True)}]
    assert refined.results != plain.results
    assert refined.source == plain.source.replace("/single", "/single+refined")


def test_result_does_not_depend_on_groups(
    sam: torch.nn.Module, scenes: Dataset, items: list[Item]
) -> None:
    whole = detections(sam, scenes, items, choice="predicted")
    assert detections(sam, scenes, items, choice="predicted", workers=2).results == whole.results
    single = detections(sam, scenes, items, choice="predicted", prompt_batch=1)
    for a, b in zip(whole.results, single.results, strict=True):
        one, other = (decode_runs(r["segmentation"]) for r in (a, b))
        assert np.count_nonzero(one ^ other) <= 2


def test_hash_is_that_of_the_file(
    sam: torch.nn.Module, scenes: Dataset, items: list[Item], tmp_path: Path
) -> None:
    file = tmp_path / "vitdet.json"
    file.write_text(json.dumps(items))
    boxes = Boxes.load(file)
    assert boxes.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert boxes.items == Boxes.of(items).items
    assert boxes.facts() == {"sha256": boxes.sha256, "n_boxes": len(items)}
    found = average_precision(detections(sam, scenes, file), scenes)
    assert found.protocol == (
        f"{scenes.name}#3/boxes={boxes.sha256[:12]}/single/AP:mask/categories=yes/max=1,10,100"
    )
    assert found.detector == boxes.facts()
    entry = json.loads(json.dumps(found.to_dict()))
    assert entry["detector"]["sha256"] == boxes.sha256
    assert set(entry["ar"]) == {"1", "10", "100"}
    file.write_text(json.dumps(items[1:]))
    other = average_precision(detections(sam, scenes, str(file)), scenes)
    assert other.protocol != found.protocol
    # The same boxes from memory have one hash, whatever else stood beside them.
    more = [{**item, "area": 3.0} for item in items]
    assert Boxes.of(more).sha256 == Boxes.of(items).sha256


def test_boxes_of_other_images_and_unusable_ones(
    sam: torch.nn.Module, scenes: Dataset, items: list[Item]
) -> None:
    outside = {**items[0], "bbox": [500.0, 500.0, 10.0, 10.0]}
    found = detections(sam, scenes[:2], [outside, *items])
    seen = {sample.id for sample in scenes[:2]}
    assert [r["image_id"] for r in found.results] == [
        item["image_id"] for item in items if item["image_id"] in seen
    ]
    (skipped,) = found.skipped
    assert (skipped.id, skipped.what) == (items[0]["image_id"], "box [500.0, 500.0, 10.0, 10.0]")
    assert "does not lie in its image" in skipped.reason
    with pytest.raises(DataError, match=r"no box is of these images[\s\S]*1 boxes of others"):
        detections(sam, scenes, [{**items[0], "image_id": "elsewhere"}])
    with pytest.raises(ConfigError, match=r"masks are of other data[\s\S]*#2[\s\S]*#3"):
        average_precision(found, scenes)


def test_images_without_boxes_are_not_encoded(
    sam: torch.nn.Module, scenes: Dataset, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(model: Any, images: Any, **options: Any) -> Any:
        calls.append(len(images))
        return encode(model, images, **options)

    monkeypatch.setattr("samcompress.evaluate._reading.encode", count)
    mine = [item for item in items if item["image_id"] == scenes[1].id]
    assert len(detections(sam, scenes, mine).results) == len(mine)
    assert calls == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"box or score is not usable[\s\S]*detection 1[\s\S]*\[1.0, 2.0, 3"),
        ({"bbox": [1, 2, -3, 4]}, "box or score is not usable"),
        ({"score": float("inf")}, r"box or score is not usable[\s\S]*finite score"),
        ({"bbox": None}, r"this is no detection[\s\S]*detection 1[\s\S]*TypeError"),
    ],
)
def test_damaged_boxes_are_named(
    items: list[Item], tmp_path: Path, change: Item, message: str
) -> None:
    bad = [items[0], {**items[1], **change}]
    with pytest.raises(DataError, match=message):
        Boxes.of(bad)


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    file.write_text('{"annotations": []}')
    with pytest.raises(DataError, match=r"no list of detections[\s\S]*boxes.json[\s\S]*dict"):
        Boxes.load(file)
    with pytest.raises(DataError, match="file cannot be opened"):
        Boxes.load(tmp_path / "absent.json")


def test_refusals(sam: torch.nn.Module, scenes: Dataset, items: list[Item]) -> None:
    with pytest.raises(ConfigError, match=r"unknown choice\.\n  got       oracle"):
        detections(sam, scenes, items, choice="oracle")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="this is not a SAM"):
        detections(torch.nn.Linear(2, 2), scenes, items)
    broken = random_sam()
    for layer in broken.mask_decoder.iou_prediction_head.layers:
        layer.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"where     image [\s\S]*, box \["):
        detections(broken, scenes, items)


def test_perfect_boxes_score_1(scenes: Dataset, items: list[Item]) -> None:
    assert Boxes.of(items).ap(scenes) == 1
    with pytest.raises(DataError, match="there is no object to find"):
        blank = data.Sample.from_arrays("blank", np.zeros((8, 8, 3), np.uint8), [])
        Boxes.of(items).ap([blank])


def test_box_ap_equals_pycocotools(shared: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder = shared / "data/coco"
    file = folder / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    found = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [a["bbox"][0] + j % 4, a["bbox"][1], a["bbox"][2], a["bbox"][3] + j % 9],
            "score": (7919 * j % 1000) / 1000,
        }
        for j, a in enumerate(content["annotations"])
        if j % 5
    ]
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        run = COCOeval(truth, truth.loadRes([dict(item) for item in found]), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    own = Boxes.of(found).ap(data.coco(folder / "val2017", file))
    assert own == pytest.approx(run.stats[0], abs=1e-6)
