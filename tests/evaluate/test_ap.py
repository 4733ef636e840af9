"""AP and AR against figures of pycocotools on real annotations, and what goes in and out."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

from samcompress.core import data
from samcompress.core.data import Dataset, Instance, Sample
from samcompress.core.data._dataset import Skips
from samcompress.core.data._sample import Held, Renamed
from samcompress.core.errors import ConfigError, DataError
from samcompress.evaluate import accuracy, average_precision, stats
from samcompress.evaluate.ap import AveragePrecision
from samcompress.evaluate.masks import decode, encode

ANNOTATIONS = "annotations/instances_val2017.json"
Result = dict[str, Any]


@pytest.fixture(scope="module")
def coco(shared: Path) -> Dataset:
    """All images decoded once, as the scorer asks for them in every test."""
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / ANNOTATIONS)
    return Dataset(list(found.readable()), found.name)


def objects(found: Dataset) -> Iterator[tuple[Sample, Instance]]:
    pairs = [(sample, instance) for sample in found for instance in sample.instances]
    return iter(sorted(pairs, key=lambda pair: pair[1].id))


def detection(sample: Sample, instance: Instance, mask: np.ndarray, score: float) -> Result:
    ids = {"image_id": sample.id, "category_id": instance.category}
    return {**ids, "score": score, "segmentation": encode(mask)}


@pytest.fixture(scope="module")
def shifted(coco: Dataset) -> list[Result]:
    """Four of five objects, moved by up to 6 pixels, a third of them twice."""
    results = []
    for j, (sample, instance) in enumerate(objects(coco)):
        if j % 5 == 0:
            continue
        right, down, mask = j % 7, j % 3, instance.mask
        moved = np.zeros_like(mask)
        moved[down:, right:] = mask[: mask.shape[0] - down, : mask.shape[1] - right]
        found = detection(sample, instance, moved, (7919 * j % 1000) / 1000)
        results += [found, {**found, "score": found["score"] / 2}][: 2 if j % 4 == 0 else 1]
    return results


def twelve(found: AveragePrecision) -> list[float]:
    """In the order pycocotools prints them."""
    sizes = [found.by_size[name] for name in "SML"]
    precisions = [found.ap, found.ap50, found.ap75, *(size["ap"] for size in sizes)]
    return [*precisions, *found.ar.values(), *(size["ar"][100] for size in sizes)]


FIGURES = [
    *(0.431221, 0.638267, 0.438416, 0.221112, 0.479177, 0.735485),
    *(0.381769, 0.491118, 0.495161, 0.269547, 0.518012, 0.746938),
]


def test_perfect_masks(coco: Dataset) -> None:
    perfect = [detection(s, i, i.mask, 1.0) for s, i in objects(coco)]
    found = average_precision(perfect, coco)
    assert (found.ap, found.ap50, found.ap75, found.ar[100]) == (1, 1, 1, 1)
    assert found.ar[1] == pytest.approx(0.682860, abs=5e-7)
    assert found.ar[10] == pytest.approx(0.989184, abs=5e-7)
    assert (found.n_images, found.n_instances, found.n_detections) == (108, 1036, 1050)
    assert [found.by_size[name]["n_instances"] for name in "SML"] == [463, 373, 200]


def test_filled_boxes(coco: Dataset) -> None:
    results = []
    for sample, instance in objects(coco):
        if instance.crowd:
            continue
        x0, y0, x1, y1 = instance.box
        x, y = np.arange(sample.size[1]) + 0.5, np.arange(sample.size[0]) + 0.5
        box = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
        results.append(detection(sample, instance, box, 1.0))
    found = average_precision(results, coco)
    figures = (found.ap, found.ap50, found.ap75)
    assert figures == pytest.approx((0.240897, 0.601963, 0.146613), abs=5e-7)


def test_twelve_figures(coco: Dataset, shifted: list[Result]) -> None:
    found = average_precision(shifted, coco)
    assert twelve(found) == pytest.approx(FIGURES, abs=1e-6)
    assert found.protocol == "coco@val2017#108/detections/AP:mask/categories=yes/max=1,10,100"


def test_a_box_that_comes_along_is_not_used(
    coco: Dataset, shifted: list[Result], shared: Path
) -> None:
    boxed = []
    for result in shifted:
        mask = data._annotation.decoder(result["segmentation"], _size(result))()
        x0, y0, x1, y1 = data._sample.tight_box(mask)
        boxed.append({**result, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    assert twelve(average_precision(boxed, coco)) == pytest.approx(FIGURES, abs=1e-6)
    # The scorer by itself is right without a box, and wrong with one.
    assert plain(shared, shifted) == pytest.approx(FIGURES, abs=1e-6)
    assert plain(shared, boxed)[3] == pytest.approx(0.232229, abs=1e-6)


def _size(result: Result) -> tuple[int, int]:
    height, width = result["segmentation"]["size"]
    return height, width


def plain(shared: Path, results: list[Result]) -> list[float]:
    """The twelve figures by pycocotools' own way in and out."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        truth = COCO(str(shared / "data/coco" / ANNOTATIONS))
        run = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return list(run.stats)


def test_boundary(coco: Dataset, shifted: list[Result]) -> None:
    found = average_precision(shifted, coco, overlap="boundary")
    figures = [0.354742, 0.638267, 0.336200, 0.221112, 0.428010, 0.490382]
    assert twelve(found)[:6] == pytest.approx(figures, abs=1e-6)
    assert "/AP:boundary/" in found.protocol


def test_class_agnostic_recall(coco: Dataset, shifted: list[Result]) -> None:
    bare = [{k: v for k, v in result.items() if k != "category_id"} for result in shifted]
    limits = (10, 100, 1000)
    found = average_precision(bare, coco, class_agnostic=True, max_detections=limits)
    expected = {
        10: (0.312838, 0.134125, 0.368901, 0.622000),
        100: (0.427413, 0.222678, 0.515550, 0.737000),
        1000: (0.427413, 0.222678, 0.515550, 0.737000),
    }
    for most, figures in expected.items():
        sizes = [found.by_size[name]["ar"][most] for name in "SML"]
        assert (found.ar[most], *sizes) == pytest.approx(figures, abs=1e-6)
    assert found.protocol.endswith("/categories=no/max=10,100,1000")


def test_invariance(coco: Dataset, shifted: list[Result]) -> None:
    coco = coco[:40]
    seen = {sample.id for sample in coco}
    # Equal scores are ranked by place, so that only without them the order is free.
    results = [{**r, "score": (7919 * j % 1051) / 1051} for j, r in enumerate(shifted)]
    results = [result for result in results if result["image_id"] in seen]
    assert len({r["score"] for r in results}) == len(results)
    base = twelve(average_precision(results, coco))
    order = np.random.default_rng(0)
    mixed = [results[i] for i in order.permutation(len(results))]
    shuffled = Dataset([coco[int(i)] for i in order.permutation(len(coco))], coco.name)
    blank = Sample.from_arrays(10**9, np.zeros((30, 40, 3), np.uint8), [])
    assert twelve(average_precision(mixed, shuffled)) == base
    assert twelve(average_precision(results, Dataset([*coco, blank], coco.name))) == base
    copies = Dataset([*coco, *(Renamed(s, f"copy {s.id}") for s in coco)], coco.name)
    twice = results + [{**r, "image_id": f"copy {r['image_id']}"} for r in results]
    assert twelve(average_precision(twice, copies)) == pytest.approx(base, abs=1e-9)


@pytest.mark.parametrize("rules", ["coco", "lvis"])
def test_a_draw_is_the_score_of_its_images(
    coco: Dataset, shifted: list[Result], rules: Any
) -> None:
    coco = coco[:30]
    seen = {sample.id for sample in coco}
    # Else the copies of an image would stand together or apart as the names of copies are sorted.
    results = [{**r, "score": (7919 * j % 1051) / 1051} for j, r in enumerate(shifted)]
    results = [result for result in results if result["image_id"] in seen]
    found = average_precision(results, coco, rules=rules)
    assert len(found.draws) == 1000
    order = sorted(coco, key=lambda sample: sample.id)
    weights = next(stats.weights(len(coco), draws=1000))
    for draw in (0, 1, 999):
        copies, again = [], []
        for sample, count in zip(order, weights[draw].astype(int), strict=True):
            for k in range(count):
                name = f"{sample.id:012d}, {k}"
                copies.append(Renamed(sample, name))
                mine = (r for r in results if r["image_id"] == sample.id)
                again += [{**r, "image_id": name} for r in mine]
        expected = average_precision(again, Dataset(copies, "drawn"), rules=rules).ap
        assert found.draws[draw] == pytest.approx(expected, abs=1e-9)


def test_interval_and_difference(coco: Dataset, shifted: list[Result]) -> None:
    found = average_precision(shifted, coco)
    low, high = found.ci()
    assert low < found.ap < high
    assert 0.05 < high - low < 0.25
    assert found.against(found) == (0, (0, 0))
    # Two pixels more, for all: the loss is far surer than either number.
    worse = average_precision(
        [
            {**r, "segmentation": encode(np.roll(decode(r["segmentation"]), 2, axis=1))}
            for r in shifted
        ],
        coco,
    )
    lost, (least, most) = worse.against(found)
    assert lost == worse.ap - found.ap
    assert least < lost < most < 0
    assert most - least < (high - low) / 2
    entry = worse.to_dict(found.to_dict())
    assert (entry["delta"], entry["delta_ci"]) == (lost, pytest.approx([least, most], abs=2e-5))
    with pytest.raises(ConfigError, match="different protocol id"):
        worse.against(average_precision(shifted, coco, class_agnostic=True))


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return data.shapes(3, seed=2, size=(48, 64))


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return random_sam()


def perfect(scenes: Dataset) -> list[Result]:
    return [
        {"image_id": s.id, "score": 0.5, "segmentation": i.mask}
        for s in scenes
        for i in s.instances
    ]


def test_masks_of_an_accuracy(sam: torch.nn.Module, scenes: Dataset) -> None:
    boxes = accuracy(sam, scenes, "box", keep_masks=True)
    assert "/categories=yes/" in average_precision(boxes, scenes).protocol
    found = average_precision(boxes, scenes, class_agnostic=True)
    assert found.n_detections == found.n_instances == boxes.n_instances
    assert found.protocol == (
        f"{scenes.name}#3/box/single/feedback=none/crowd=no,min_area=0"
        "/AP:mask/categories=no/max=1,10,100"
    )
    by_hand = [
        {"image_id": r.image_id, "score": r.score, "segmentation": r.mask} for r in boxes.records
    ]
    assert twelve(average_precision(by_hand, scenes, class_agnostic=True)) == twelve(found)
    assert repr(found).startswith(f"<AveragePrecision {found.ap:.3f} (50: ")
    with pytest.raises(ConfigError, match=r"masks are of other data[\s\S]*#3[\s\S]*#2"):
        average_precision(boxes, scenes[:2], class_agnostic=True)
    with pytest.raises(DataError, match=r"masks of this accuracy were not kept[\s\S]*keep_masks"):
        average_precision(accuracy(sam, scenes), scenes, class_agnostic=True)


def test_nothing_found_and_nothing_to_find(scenes: Dataset) -> None:
    found = average_precision([], scenes, class_agnostic=True)
    assert (found.ap, found.ar[100], found.n_detections) == (0, 0, 0)
    assert found.by_size["L"] == {"ap": None, "ar": dict.fromkeys((1, 10, 100)), "n_instances": 0}
    blank = Sample.from_arrays("blank", np.zeros((30, 40, 3), np.uint8), [])
    with pytest.raises(DataError, match="there is no object to find"):
        average_precision([], [blank], class_agnostic=True)


def test_objects_without_category_need_class_agnostic(scenes: Dataset) -> None:
    bare = [Sample.from_arrays(s.id, s.image, s.masks()) for s in scenes]
    with pytest.raises(DataError, match=r"an object has no category[\s\S]*class_agnostic=True"):
        average_precision([], bare)
    assert average_precision(perfect(scenes), bare, class_agnostic=True).ap == 1


class Late(Held):
    """A sample whose picture turns out to be damaged."""

    @property
    def image(self) -> Any:
        raise DataError("file is truncated.")


def test_an_image_that_cannot_be_read_is_left_out(scenes: Dataset) -> None:
    first = scenes[0]
    late = Late("late", "late.jpg", first.image, first.instances)
    mixed = Dataset([late, *scenes], "mixed", skips=Skips("skip"))
    results = [{**r, "image_id": "late"} for r in perfect(scenes)[:1]] + perfect(scenes)
    found = average_precision(results, mixed, class_agnostic=True)
    assert (found.ap, found.n_images, found.n_detections) == (1, 3, len(results) - 1)
    assert [item.id for item in mixed.skipped] == ["late"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, r"score is not finite[\s\S]*detection 1"),
        ({"image_id": "?"}, r"no such image in the data[\s\S]*detection 1[\s\S]*'\?'"),
        ({"segmentation": np.ones((4, 4), bool)}, r"mask does not fit its image[\s\S]*\(48, 64\)"),
        ({"segmentation": {"size": [48, 64], "counts": "11"}}, r"do not fill[\s\S]*detection 1"),
        ({"segmentation": []}, r"segmentation is empty[\s\S]*detection 1"),
        ({"score": None}, r"this is no detection[\s\S]*detection 1[\s\S]*TypeError"),
    ],
)
def test_damaged_detections_are_named(scenes: Dataset, change: Result, message: str) -> None:
    results = perfect(scenes)
    results[1] = {**results[1], **change}
    with pytest.raises(DataError, match=message):
        average_precision(results, scenes, class_agnostic=True)


def test_wrong_arguments(scenes: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"unknown overlap[\s\S]*mask \| boundary"):
        average_precision([], scenes, overlap="rim")  # type: ignore[arg-type]
    for limits in ((), (0, 10)):
        with pytest.raises(ConfigError, match="max_detections is a list of counts"):
            average_precision([], scenes, max_detections=limits)
    with pytest.raises(DataError, match=r"this is no detection[\s\S]*KeyError: 'category_id'"):
        average_precision(perfect(scenes), scenes)
