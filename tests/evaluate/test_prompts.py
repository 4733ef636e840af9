"""Prompts by name, and the click simulator on COCO with a predictor of three lines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samcompress.core import data
from samcompress.core.errors import ConfigError, DataError
from samcompress.core.predict import Prediction
from samcompress.core.prompt import Prompt
from samcompress.evaluate.masks import farthest
from samcompress.evaluate.prompts import Rule, generator, next_click, random_points
from samcompress.evaluate.protocol import Decoder, Protocol, Target, rounds


def instance(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**{"id": 7, "box": (1.5, 2.0, 6.25, 5.0), "point": None, **fields})


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((9, 12), bool)
    mask[2:7, 3:8] = True
    mask[4, 8:12] = True
    return mask


@pytest.fixture(scope="module")
def truths(shared: Path) -> list[np.ndarray]:
    """The 1036 masks of COCO val2017's subset that are no crowd."""
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")
    return [i.mask for sample in found for i in sample.instances if not i.crowd]


def start(name: str, mask: np.ndarray, seed: int = 0, **fields: object) -> Prompt:
    return Rule.parse(name).start(instance(**fields), mask, image_id=3, seed=seed)


def test_first_prompts(mask: np.ndarray) -> None:
    assert start("box", mask).box.tolist() == [1.5, 2.0, 6.25, 5.0]
    assert start("box-tight", mask).box.tolist() == [3, 2, 12, 7]
    for name in ("center", "point", "clicks-3"):
        assert start(name, mask).points.tolist() == [[5, 4]]
        assert start(name, mask).labels.tolist() == [1]
    assert start("annotated", mask, point=(4.5, 3.25)).points.tolist() == [[4.5, 3.25]]
    assert start("box+2", mask).kind == (0, True, False)


@pytest.mark.parametrize(
    ("name", "clicks", "xor"),
    [("box", 0, False), ("clicks-1", 0, False), ("clicks-5-xor", 4, True), ("box+2", 2, False)],
)
def test_rules(name: str, clicks: int, xor: bool) -> None:
    rule = Rule.parse(name)
    assert (rule.name, rule.clicks, rule.kind == "xor") == (name, clicks, xor)


def test_random_points_depend_on_ids_and_seed_only(mask: np.ndarray) -> None:
    points = start("random-4", mask).points
    assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all()
    assert len(np.unique(points, axis=0)) == 4
    assert np.array_equal(points, start("random-4", mask).points)
    assert not np.array_equal(points, start("random-4", mask, seed=1).points)
    assert not np.array_equal(points, start("random-4", mask, id=8).points)


def test_random_points_of_a_small_mask_are_all_its_pixels() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1, 1:3] = True
    points = random_points(mask, 5, generator(0, 1, 2)).points
    assert sorted(points.tolist()) == [[1, 1], [2, 1]]


def test_random_points_are_uniform() -> None:
    mask = np.zeros((3, 5), bool)
    mask[1] = True
    counts = np.zeros(5)
    for number in range(3000):
        counts[int(random_points(mask, 1, generator(0, "a", number)).points[0, 0])] += 1
    assert abs(counts - 600).max() < 80


@pytest.mark.parametrize("name", ["boxes", "clicks-0", "random-k", "clicks", "box+0", "", None, 3])
def test_unknown_prompt(name: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown prompt\.\n  got       ") as err:
        Rule.parse(name)  # type: ignore[arg-type]
    assert "box+k-random, point; k is a number from 1" in str(err.value)


def test_unknown_prompt_suggests() -> None:
    with pytest.raises(ConfigError, match="try       center"):
        Rule.parse("centre")


def test_annotations_that_cannot_be_asked_for(mask: np.ndarray) -> None:
    with pytest.raises(DataError) as err:
        start("annotated", mask)
    assert str(err.value) == (
        "an annotation has no point.\n"
        "  expected  point_coords, as SA-1B has\n"
        '  try       prompts="center"'
    )
    with pytest.raises(DataError, match="an annotation has no usable box"):
        start("box", mask, box=(5, 0, 4, 9))
    for name in ("center", "random-2"):
        with pytest.raises(DataError, match="an empty mask has no point"):
            start(name, np.zeros((3, 3), bool))


def test_next_click_by_hand(mask: np.ndarray) -> None:
    nothing, everything = np.zeros_like(mask), np.ones_like(mask)
    assert next_click(mask, nothing) == (5, 4, 1)
    # The extra area of a full answer is thickest in the corner at the lower right.
    x, y, label = next_click(mask, everything)  # type: ignore[misc]
    assert (x, y, label) == (*farthest(~mask)[:2], 0)  # type: ignore[index]
    assert next_click(mask, mask) is None
    assert next_click(mask, mask, xor=True) is None
    almost = mask.copy()
    almost[4, 5] = False
    assert next_click(mask, almost) == (5, 4, 1)
    assert next_click(mask, almost, [(5, 4)]) is None


def test_xor_takes_both_errors_together() -> None:
    truth, answer = np.zeros((7, 14), bool), np.zeros((7, 14), bool)
    truth[1:6, 1:6] = True  # missed: 5 wide
    answer[1:6, 6:11] = True  # extra: 5 wide, touching
    assert next_click(truth, answer) == (8, 3, 0)  # equal: an extra pixel wins
    assert next_click(truth, answer, xor=True) == (3, 3, 1)  # one region, first of equals


def test_correct_adds_to_all_earlier_points_and_keeps_the_box(mask: np.ndarray) -> None:
    rule = Rule.parse("box+2")
    first = rule.start(instance(), mask, image_id=1)
    second = rule.correct(first, mask, np.zeros_like(mask))
    assert second is not None
    assert (second.points.tolist(), second.labels.tolist()) == ([[5, 4]], [1])
    assert second.box.tolist() == first.box.tolist()
    assert rule.correct(second, mask, mask) is None


def test_center_of_coco(truths: list[np.ndarray]) -> None:
    found = [farthest(mask) for mask in truths]
    x, y, squared = np.array(found).T
    assert (len(found), x.sum(), y.sum()) == (1036, 308_293, 271_062)
    assert np.sqrt(squared).sum() == pytest.approx(23_705.5584, abs=1e-4)
    assert all(mask[b, a] for mask, a, b in zip(truths, x, y, strict=True))


def disc(shape: tuple[int, int], radius: int = 32) -> Decoder:
    """Within 32 px of a positive click and not of a negative one."""

    def near(points: np.ndarray) -> np.ndarray:
        found = np.zeros(shape, bool)
        for x, y in points.astype(int):
            top, left = max(0, y - radius), max(0, x - radius)
            part = found[top : y + radius + 1, left : x + radius + 1]
            rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
            part |= (rows + top - y) ** 2 + (columns + left - x) ** 2 <= radius**2
        return found

    def decode(prompts: list[Prompt], multimask: bool) -> Prediction:
        masks = [near(p.points[p.labels == 1]) & ~near(p.points[p.labels == 0]) for p in prompts]
        n = len(prompts)
        return Prediction(
            torch.from_numpy(np.stack(masks))[:, None], torch.ones(n, 1), torch.zeros(n, 1, 4, 4)
        )

    return decode


@pytest.mark.parametrize(
    ("name", "means", "total", "negative"),
    [
        ("clicks-5", [0.238432, 0.210711, 0.220913, 0.231775, 0.239609], 2_908_426, 1514),
        ("clicks-5-xor", [0.238432, 0.210928, 0.221391, 0.232289, 0.240535], 2_906_935, 1494),
    ],
)
def test_clicks_on_coco(
    truths: list[np.ndarray], name: str, means: list[float], total: int, negative: int
) -> None:
    protocol = Protocol(data="coco", prompt=name)
    ious, places, labels = [], 0.0, 0
    for truth in truths:
        target = Target("", truth, protocol.rule.start(instance(), truth, image_id=0))
        answers = [a for (a,) in rounds(protocol, [target], disc(truth.shape))]
        ious.append([a.iou for a in answers])
        places += answers[-1].prompt.points.sum()
        labels += int((answers[-1].prompt.labels == 0).sum())
    assert np.mean(ious, axis=0) == pytest.approx(means, abs=5e-7)
    assert (places, labels) == (total, negative)
