"""AR, mask recall and best IoU of any masks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from samcompress.core import data
from samcompress.core.data import Dataset, Sample
from samcompress.core.data._sample import Renamed
from samcompress.core.errors import ConfigError, DataError, ShapeError
from samcompress.evaluate.ap import average_precision
from samcompress.evaluate.masks import encode, iou
from samcompress.evaluate.proposals import Recall, recall

Given = dict[Any, list[dict[str, Any]]]
LIMITS = (10, 100, 1000)


@pytest.fixture(scope="module")
def coco(shared: Path) -> Dataset:
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")
    return Dataset(list(found.readable()), found.name)


@pytest.fixture(scope="module")
def shifted(coco: Dataset) -> Given:
    """Four of five objects, moved by up to 6 pixels, a third of them twice."""
    found: Given = {sample.id: [] for sample in coco}
    pairs = [(sample, instance) for sample in coco for instance in sample.instances]
    for j, (sample, instance) in enumerate(sorted(pairs, key=lambda pair: pair[1].id)):
        if j % 5 == 0:
            continue
        right, down, mask = j % 7, j % 3, instance.mask
        moved = np.zeros_like(mask)
        moved[down:, right:] = mask[: mask.shape[0] - down, : mask.shape[1] - right]
        entry = {"segmentation": encode(moved), "score": (7919 * j % 1000) / 1000}
        twins = [entry, {**entry, "score": entry["score"] / 2}]
        found[sample.id] += twins[: 2 if j % 4 == 0 else 1]
    return found


@pytest.fixture(scope="module")
def of_coco(coco: Dataset, shifted: Given) -> Recall:
    return recall(shifted, coco)


def test_recall_of_coco(of_coco: Recall) -> None:
    sizes = of_coco.by_size()
    expected = {
        10: (0.312838, 0.134125, 0.368901, 0.622000),
        100: (0.427413, 0.222678, 0.515550, 0.737000),
        1000: (0.427413, 0.222678, 0.515550, 0.737000),
    }
    for most, figures in expected.items():
        parts = [sizes[name]["ar"][most] for name in "SML"]
        assert (of_coco.ar[most], *parts) == pytest.approx(figures, abs=1e-6)
    assert (len(of_coco.records), of_coco.n_images) == (1036, 108)
    assert [sizes[name]["n_instances"] for name in "SML"] == [463, 373, 200]
    assert of_coco.protocol == "coco@val2017#108/proposals/AR:mask/rank=score/max=10,100,1000"
    low, high = of_coco.ci()
    assert low < of_coco.ar[1000] < high


def test_shares_and_best_iou_by_definition(coco: Dataset, shifted: Given, of_coco: Recall) -> None:
    from samcompress.evaluate.masks import decode

    records = {(r.image_id, r.annotation_id): r.iou for r in of_coco.records}
    best = []
    for sample in coco[:12]:
        masks = np.stack([decode(entry["segmentation"]) for entry in shifted[sample.id]])
        for instance in (i for i in sample.instances if not i.crowd):
            value = iou(masks, instance.mask).max()
            assert records[sample.id, instance.id] == pytest.approx(value, abs=1e-12)
            best.append(value)
    assert len(best) > 50
    every = np.array([record.iou for record in of_coco.records])
    assert of_coco.miou == pytest.approx(every.mean())
    assert of_coco.shares == {t: pytest.approx((every >= t).mean()) for t in (0.5, 0.75, 0.9)}


def test_perfect_masks_find_all(coco: Dataset) -> None:
    perfect = {
        s.id: [{"segmentation": i.mask, "predicted_iou": 1.0} for i in s.instances] for s in coco
    }
    found = recall(perfect, coco[:40])
    assert (found.ar[1000], found.miou, set(found.shares.values())) == (1, 1, {1})


def blobs(seed: int, count: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Boxes that overlap in many ways, with scores."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 60, 90), bool)
    for mask in masks:
        y, x = rng.integers(0, 40), rng.integers(0, 60)
        mask[y : y + rng.integers(4, 40), x : x + rng.integers(4, 60)] = True
    scores = rng.integers(0, 5, count) / 5 if ties else rng.random(count)
    return masks, scores


@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_scorer_on_random_masks(ties: bool) -> None:
    samples, found, results = [], {}, []
    for seed in range(12):
        truths, _ = blobs(seed, 9, ties)
        samples.append(Sample.from_arrays(seed, np.zeros((60, 90, 3), np.uint8), truths))
        masks, scores = blobs(100 + seed, 40, ties)
        masks[:9] = np.roll(truths, seed % 5, axis=2)
        found[seed] = SimpleNamespace(masks=masks, scores=scores)
        results += [
            {"image_id": seed, "score": score, "segmentation": mask}
            for mask, score in zip(masks, scores, strict=True)
        ]
    own = recall(found, samples, max_masks=(3, 10, 30))
    scorer = average_precision(results, samples, class_agnostic=True, max_detections=(3, 10, 30))
    assert own.ar == {k: pytest.approx(v, abs=1e-9) for k, v in scorer.ar.items()}
    for name, part in own.by_size().items():
        expected = scorer.by_size[name]["ar"]
        assert part["ar"] == {
            k: None if v is None else pytest.approx(v, abs=1e-9) for k, v in expected.items()
        }


# --- forms ---


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return data.shapes(3, seed=2, size=(48, 64))


def test_every_form_gives_the_same(scenes: Dataset) -> None:
    masks = {s.id: s.masks() for s in scenes}
    scores = {s.id: np.linspace(1, 0.5, len(s.instances)) for s in scenes}
    by_image = {s.image.tobytes(): s.id for s in scenes}

    forms: list[Any] = [
        {k: SimpleNamespace(masks=masks[k], scores=scores[k]) for k in masks},
        {
            k: [
                {"segmentation": m, "predicted_iou": s}
                for m, s in zip(masks[k], scores[k], strict=True)
            ]
            for k in masks
        },
        {
            k: [
                {"segmentation": encode(m), "score": s, "predicted_iou": -s}
                for m, s in zip(masks[k], scores[k], strict=True)
            ]
            for k in masks
        },
        lambda image: SimpleNamespace(
            masks=masks[by_image[image.tobytes()]], scores=scores[by_image[image.tobytes()]]
        ),
    ]
    first, *others = [recall(form, scenes, max_masks=(2,)) for form in forms]
    assert all(other.records == first.records for other in others)
    assert 0 < first.ar[2] < 1
    assert first.n_prompts is None
    with pytest.raises(DataError, match=r"no masks of an image[\s\S]*an empty list"):
        recall({}, scenes)


class Generated:
    """Masks as `sc.Everything` gives them: no list, run lengths on demand, what it cost."""

    def __init__(self, masks: np.ndarray) -> None:
        self.found = masks
        self.scores = np.ones(len(masks))
        self.predicted_iou = np.linspace(0.9, 0.1, len(masks))
        self.stability = np.ones(len(masks))
        self.stats = SimpleNamespace(prompts=7)

    def __len__(self) -> int:
        return len(self.found)

    def rle(self, index: int, *, compressed: bool) -> dict[str, Any]:
        assert compressed
        return encode(self.found[index])


def test_a_generator_tells_its_prompts(scenes: Dataset) -> None:
    found = recall({s.id: Generated(s.masks()) for s in scenes}, scenes)
    assert (found.n_prompts, found.ar[1000]) == (21, 1)
    cells = found.cells()
    assert cells["prompts an image"] == 7
    assert cells["masks an image"] == sum(len(s.instances) for s in scenes) / 3
    assert json.loads(json.dumps(found.to_dict()))["n_prompts"] == 21
    assert repr(found).startswith("<Recall AR@1000 1.000 shapes@")


def test_rank_of_the_paper(scenes: Dataset) -> None:
    """The mean of predicted IoU and stability: here the second mask comes first."""
    (sample,) = scenes[:1]
    right = sample.instances[0].mask
    entries = [
        {"segmentation": ~right, "predicted_iou": 0.9, "stability_score": 0.1},
        {"segmentation": right, "predicted_iou": 0.6, "stability_score": 0.9},
    ]
    one = Sample.from_arrays(sample.id, sample.image, [right])
    by_score = recall({sample.id: entries}, [one], max_masks=(1, 2))
    by_sam = recall({sample.id: entries}, [one], max_masks=(1, 2), rank="sam")
    assert (by_score.ar, by_sam.ar) == ({1: 0, 2: 1}, {1: 1, 2: 1})
    assert "/rank=sam/" in by_sam.protocol
    other = recall({s.id: Generated(s.masks()) for s in scenes}, scenes, rank="sam")
    assert other.ar[1000] == 1


def test_agreement_of_two_generators(scenes: Dataset) -> None:
    teacher = {s.id: Generated(s.masks()) for s in scenes}
    student = {s.id: Generated(s.masks()[:-1]) for s in scenes}
    forward = recall(student, scenes, references=teacher)
    back = recall(teacher, scenes, references=student)
    count = sum(len(s.instances) for s in scenes)
    assert forward.shares[0.9] == pytest.approx((count - 3) / count)
    assert back.miou == 1
    assert len(back.records) == count - 3
    assert "/proposals,references=" in forward.protocol
    assert forward.protocol != back.protocol


def test_nothing_found(scenes: Dataset) -> None:
    found = recall({s.id: [] for s in scenes}, scenes)
    assert (found.ar, found.miou) == ({10: 0, 100: 0, 1000: 0}, 0)
    assert found.n_masks == 0
    blank = Sample.from_arrays("blank", np.zeros((8, 8, 3), np.uint8), [])
    with pytest.raises(DataError, match="there is no object to find"):
        recall({"blank": []}, [blank])


def test_crowds_are_not_to_be_found(shared: Path) -> None:
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")
    sample = next(s for s in found if any(i.crowd for i in s.instances))
    counted = recall(lambda image: [], [sample])
    assert len(counted.records) == sum(not i.crowd for i in sample.instances)


def test_invariance(coco: Dataset, shifted: Given) -> None:
    part = coco[:20]
    base = recall(shifted, part)
    assert recall(shifted, list(part)[::-1]).records == base.records
    assert recall(shifted, part, workers=3).records == base.records
    copies = Dataset([*part, *(Renamed(s, f"copy {s.id}") for s in part)], coco.name)
    both = shifted | {f"copy {s.id}": shifted[s.id] for s in part}
    assert recall(both, copies).ar == pytest.approx(base.ar)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([{"segmentation": np.ones((4, 4), bool), "score": 1}], ShapeError, "does not fit"),
        ([{"segmentation": np.ones((48, 64)), "score": 1}], ShapeError, "does not fit"),
        ([{"segmentation": np.ones((48, 64), bool)}], DataError, r"no masks[\s\S]*predicted_iou"),
        (
            [{"segmentation": np.ones((48, 64), bool), "score": float("nan")}],
            DataError,
            r"scores do not fit[\s\S]*1 not finite",
        ),
        (
            SimpleNamespace(masks=np.ones((2, 48, 64), bool), scores=[1.0]),
            DataError,
            r"scores do not fit[\s\S]*1 scores[\s\S]*2 finite",
        ),
        (3, DataError, r"these are no masks of an image[\s\S]*int"),
    ],
)
def test_damaged_masks(scenes: Dataset, entries: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        recall(lambda image: entries, scenes)


def test_wrong_arguments(scenes: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"unknown rank[\s\S]*score \| sam"):
        recall({}, scenes, rank="area")  # type: ignore[arg-type]
    for limits in ((), (0, 10)):
        with pytest.raises(ConfigError, match="max_masks is a list of counts"):
            recall({}, scenes, max_masks=limits)


def test_an_empty_mask_has_no_stability() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    scene = [Sample.from_arrays("a", np.zeros((8, 8, 3), np.uint8), [mask])]
    masks = [
        {"segmentation": np.zeros((8, 8), bool), "predicted_iou": 0.9, "stability_score": np.nan},
        {"segmentation": mask, "predicted_iou": 0.8, "stability_score": 0.9},
    ]
    found = recall({"a": masks}, scene, rank="sam", max_masks=(1,), source="a file")
    assert found.ar == {1: 1.0}
    assert "/a file/AR:mask/rank=sam/" in found.protocol
    masks[1]["stability_score"] = np.nan
    with pytest.raises(DataError, match="scores do not fit"):
        recall({"a": masks}, scene, rank="sam")
