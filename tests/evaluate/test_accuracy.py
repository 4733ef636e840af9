"""Accuracy from images to intervals: with a real small SAM, and with stubs of known figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

from samcompress.core import data
from samcompress.core.data import Dataset, Sample
from samcompress.core.data._dataset import Skips
from samcompress.core.data._sample import Held
from samcompress.core.errors import ConfigError, DataError, ModelError
from samcompress.core.history import Step, history, remember
from samcompress.core.predict import Embedding, Prediction, decode, encode
from samcompress.core.prompt import Prompt
from samcompress.core.registry import get
from samcompress.evaluate.accuracy import Accuracy, accuracies, accuracy, agreement
from samcompress.evaluate.masks import decode as decode_runs
from samcompress.evaluate.masks import iou
from samcompress.evaluate.protocol import NonFiniteError, Protocol, Target, rounds
from samcompress.evaluate.records import Paired

Answerer = Callable[[Prompt, tuple[int, int]], tuple[list[np.ndarray], list[float]]]


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return random_sam()


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return data.shapes(5, seed=2, size=(48, 64))


@pytest.fixture(scope="module")
def coco(shared: Path) -> Dataset:
    folder = shared / "data/coco"
    return data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answerer], list[int]]:
    """Put a predictor in place of encoder and decoder; gives the list of encoded batch sizes."""

    def install(answer: Answerer) -> list[int]:
        batches: list[int] = []

        def encode(model: Any, images: Sequence[np.ndarray], *, batch_size: int) -> list[Embedding]:
            batches.append(len(images))
            none = torch.zeros(1)
            return [Embedding(none, i.shape[:2], i.shape[:2]) for i in images]  # type: ignore[arg-type]

        def decode(
            model: Any, embedding: Embedding, prompts: list[Prompt], **_: object
        ) -> Prediction:
            found = [answer(prompt, embedding.size) for prompt in prompts]
            masks = torch.from_numpy(np.stack([np.stack(m) for m, _ in found]))
            scores = torch.tensor([s for _, s in found])
            return Prediction(masks, scores, torch.zeros(*scores.shape, 4, 4))

        # By name: the package's attribute `accuracy` is the function, not the module.
        module = sys.modules["samcompress.evaluate.accuracy"]
        monkeypatch.setattr("samcompress.evaluate._reading.encode", encode)
        monkeypatch.setattr(module, "decode", decode)
        return batches

    return install


def filled(prompt: Prompt, size: tuple[int, int]) -> tuple[list[np.ndarray], list[float]]:
    """Every pixel whose centre lies in the box."""
    x0, y0, x1, y1 = prompt.box.astype(float)
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    return [((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))], [0.5]


def test_filled_boxes_of_coco(
    sam: torch.nn.Module, coco: Dataset, stub: Callable[[Answerer], list[int]]
) -> None:
    batches = stub(filled)
    found = accuracy(sam, coco, "box", keep_masks=True)
    assert (found.n_images, found.n_instances) == (106, 1036)
    assert batches == [1] * 106  # images without a scored object are not encoded
    assert found.miou == pytest.approx(0.589311, abs=5e-7)
    assert found.mean("category") == pytest.approx(0.579221, abs=5e-7)
    assert found.mean("image") == pytest.approx(0.582542, abs=5e-7)
    sizes = {k: (round(v["miou"], 6), v["n_instances"]) for k, v in found.by_size().items()}
    assert sizes == {"S": (0.588461, 463), "M": (0.571899, 373), "L": (0.623752, 200)}
    low, high = found.ci()
    assert (high - low) / (2 * 1.96) == pytest.approx(0.0087, abs=0.0002)
    assert low < found.miou < high
    with_crowd = accuracy(sam, coco, "box", include_crowd=True)
    assert with_crowd.n_instances == 1050
    assert with_crowd.miou == pytest.approx(0.583774, abs=5e-7)
    assert (
        found.protocol == "coco@val2017#108/box/single/feedback=none/crowd=no,min_area=0/instance"
    )
    assert "/crowd=yes," in with_crowd.protocol
    assert agreement(found, found) == 1


def test_invariance(sam: torch.nn.Module, scenes: Dataset) -> None:
    first = accuracy(sam, scenes, "clicks-3", choice="predicted")
    order = [scenes[i] for i in (3, 0, 4, 1, 2)]
    shuffled = accuracy(sam, order, "clicks-3", choice="predicted")
    assert shuffled.records == first.records
    assert shuffled.ci() == first.ci()
    for batch_size in (3, 16):
        other = accuracy(sam, scenes, "clicks-3", choice="predicted", batch_size=batch_size)
        assert [r.key for r in other.records] == [r.key for r in first.records]
        assert [r.iou for r in other.records] == pytest.approx([r.iou for r in first.records])
        assert other.miou == pytest.approx(first.miou, abs=1e-9)
    one_by_one = accuracy(sam, scenes, "clicks-3", choice="predicted", prompt_batch=1)
    assert one_by_one.miou == pytest.approx(first.miou, abs=1e-6)


def test_an_unrelated_image_and_a_second_copy_change_nothing(
    sam: torch.nn.Module, scenes: Dataset
) -> None:
    base = accuracy(sam, scenes, "point")
    blank = Sample.from_arrays("blank", np.zeros((30, 40, 3), np.uint8), [])
    assert accuracy(sam, [*scenes, blank], "point").miou == base.miou
    copies = [Sample.from_arrays(f"copy {s.id}", s.image, s.masks()) for s in scenes]
    doubled = accuracy(sam, [*scenes, *copies], "point")
    assert doubled.n_instances == 2 * base.n_instances
    for average in ("instance", "image"):
        assert doubled.mean(average) == pytest.approx(base.mean(average), abs=1e-12)  # type: ignore[arg-type]


def test_several_prompts_share_one_encoding(
    sam: torch.nn.Module, scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = sam.image_encoder.forward
    monkeypatch.setattr(
        sam.image_encoder, "forward", lambda x: calls.append(len(x)) or forward(x), raising=True
    )
    prompts = ("box", "point", "random-3", "box+1", "clicks-2-xor")
    found = accuracies(sam, scenes, prompts, batch_size=2, seed=4)
    assert calls == [2, 2, 1]
    assert [a.settings.prompt for a in found] == ["box", "center", *prompts[2:]]
    for name, one in zip(prompts, found, strict=True):
        alone = accuracy(sam, scenes, name, batch_size=2, seed=4)
        assert alone.records == one.records
        assert alone.protocol == one.protocol
    clicks = [{r.clicks for r in a.records} for a in found]
    assert clicks == [{0}, {1}, {3}, {1}, {2}]


def test_oracle_is_the_upper_bound(sam: torch.nn.Module, scenes: Dataset) -> None:
    chosen, best = (
        accuracy(sam, scenes, "point", choice=choice)  # type: ignore[arg-type]
        for choice in ("predicted", "oracle")
    )
    worst: list[float] = []
    for sample in scenes:
        pairs = [(i, i.mask) for i in sample.instances]
        rule = chosen.settings.rule
        asked = [rule.start(i, mask, image_id=sample.id, seed=0) for i, mask in pairs]
        (embedding,) = encode(sam, [sample.image])
        masks = decode(sam, embedding, asked, multimask=True).masks
        worst += [iou(m.numpy(), true).min() for m, (_, true) in zip(masks, pairs, strict=True)]
    for high, middle, low in zip(best.records, chosen.records, worst, strict=True):
        assert high.iou >= middle.iou >= low
    assert best.miou > chosen.miou > np.mean(worst)


def three(truth: np.ndarray, scores: list[float]) -> Callable[[list[Prompt], bool], Prediction]:
    """Three shrunken answers to every prompt, with these scores."""
    masks = np.stack([truth & (np.arange(truth.shape[1]) < end) for end in (4, 12, 8)])

    def decode(prompts: list[Prompt], multimask: bool) -> Prediction:
        count = 3 if multimask else 1
        return Prediction(
            torch.from_numpy(np.stack([masks[:count]] * len(prompts))),
            torch.tensor([scores[:count]] * len(prompts)),
            torch.arange(count).float().reshape(1, -1, 1, 1).expand(len(prompts), -1, 4, 4),
        )

    return decode


@pytest.mark.parametrize(
    ("choice", "scores", "row"),
    [
        ("single", [0.1, 0.2, 0.3], 0),
        ("predicted", [0.1, 0.2, 0.3], 2),
        ("predicted", [0.3, 0.3, 0.3], 0),
        ("oracle", [0.9, 0.1, 0.3], 1),
    ],
)
def test_choice(choice: Any, scores: list[float], row: int) -> None:
    truth = np.ones((4, 16), bool)
    target = Target("", truth, Prompt(points=[[1, 1]]))
    protocol = Protocol(data="x", choice=choice)
    ((answer,),) = rounds(protocol, [target], three(truth, scores))
    assert answer.iou == (4 / 16, 12 / 16, 8 / 16)[row]
    assert answer.score == pytest.approx(scores[row])
    assert (answer.logits == row).all()


def test_true_scores_make_predicted_the_oracle() -> None:
    truth = np.ones((4, 16), bool)
    decoder = three(truth, [4 / 16, 12 / 16, 8 / 16])
    target = Target("", truth, Prompt(points=[[1, 1]]))
    for choice in ("predicted", "oracle"):
        protocol = Protocol(data="x", prompt="clicks-3", choice=choice)  # type: ignore[arg-type]
        assert [a.iou for (a,) in rounds(protocol, [target], decoder)] == [0.75] * 3


def test_feedback_sends_the_chosen_logits() -> None:
    truth = np.ones((4, 16), bool)
    asked: list[Prompt] = []

    def spy(prompts: list[Prompt], multimask: bool) -> Prediction:
        asked.extend(prompts)
        return three(truth, [0.1, 0.2, 0.3])(prompts, multimask)

    target = Target("", truth, Prompt(points=[[1, 1]]))
    for feedback in ("none", "logits"):
        protocol = Protocol(data="x", prompt="clicks-2", choice="oracle", feedback=feedback)  # type: ignore[arg-type]
        list(rounds(protocol, [target], spy))
    once, again, fed = (1, False, False), (2, False, False), (2, False, True)
    assert [p.kind for p in asked] == [once, again, once, fed]
    assert (asked[3].mask == 1).all()  # mask 1 of 0, 1, 2 is the oracle's


def test_feedback_with_a_real_model(sam: torch.nn.Module, scenes: Dataset) -> None:
    none, logits = (
        accuracy(sam, scenes, "clicks-3", feedback=feedback)  # type: ignore[arg-type]
        for feedback in ("none", "logits")
    )
    assert none.protocol != logits.protocol
    assert [r.iou for r in none.records] != [r.iou for r in logits.records]


def test_a_perfect_answer_is_not_clicked_again() -> None:
    truth = np.zeros((8, 8), bool)
    truth[2:6, 2:6] = True
    calls = []

    def perfect(prompts: list[Prompt], multimask: bool) -> Prediction:
        calls.append(len(prompts))
        return Prediction(
            torch.from_numpy(truth)[None, None], torch.ones(1, 1), torch.ones(1, 1, 4, 4)
        )

    for name in ("clicks-5", "clicks-5-xor"):
        protocol = Protocol(data="x", prompt=name)
        target = Target("", truth, Prompt(points=[[3, 3]]))
        assert [a.iou for (a,) in rounds(protocol, [target], perfect)] == [1] * 5
    assert calls == [1, 1]


def test_not_finite_names_image_and_prompt(scenes: Dataset) -> None:
    broken = random_sam()
    for layer in broken.mask_decoder.iou_prediction_head.layers:
        layer.bias.data.fill_(float("nan"))
    first = scenes[0]
    with pytest.raises(NonFiniteError) as err:
        accuracy(broken, scenes, "clicks-2")
    lines = str(err.value).splitlines()
    assert lines[:3] == [
        "the model's answer is not finite.",
        f"  where     image {first.id}, annotation {first.instances[0].id}, prompt clicks-2",
        "  got       scores [nan], 0 bad logits",
    ]
    assert isinstance(err.value, ArithmeticError)
    hyper = broken.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    hyper.bias.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"bad logits"):
        accuracy(broken, scenes)


def test_filters(sam: torch.nn.Module, scenes: Dataset) -> None:
    every = accuracy(sam, scenes)
    bound = float(np.median([r.area for r in every.records]))
    large = accuracy(sam, scenes, min_area=bound)
    assert [r.key for r in every.records if r.area >= bound] == [r.key for r in large.records]
    assert large.n_instances < every.n_instances
    assert f"min_area={bound:g}/" in large.protocol
    with pytest.raises(DataError) as err:
        accuracy(sam, scenes, min_area=1e9)
    assert str(err.value).splitlines()[0] == "there is no object to score."
    assert "no annotation that passes the filters" in str(err.value)


def test_size_groups_share_their_bounds() -> None:
    areas = [1023.9, 1024.0, 1025.0, 9216.0, 9217.0]
    found = Accuracy.from_dict(
        {
            "protocol": str(Protocol(data="x#1")),
            "samples": [
                {**dict(image_id=1, annotation_id=i, category=None), "area": area}
                | {"iou": 0.1 * i, "score": 0.0, "clicks": 0}
                for i, area in enumerate(areas)
            ],
            "skipped": [],
        }
    )
    assert {k: v["n_instances"] for k, v in found.by_size().items()} == {"S": 2, "M": 3, "L": 2}
    assert found.by_size()["M"]["miou"] == pytest.approx(0.2)


class Late(Sample):
    """A sample whose picture turns out to be damaged."""

    @property
    def image(self) -> Any:
        raise DataError("file is truncated.", got="12 bytes")

    @property
    def instances(self) -> Any:
        return ()

    def digest(self) -> str:
        return "late"


def test_damage_found_late_is_skipped(sam: torch.nn.Module, scenes: Dataset) -> None:
    base = accuracy(sam, scenes)
    samples = [Late("bad", "bad.jpg", (48, 64)), *scenes]
    found = accuracy(sam, Dataset(samples, "mixed", skips=Skips("skip")))
    assert found.records == base.records
    (item,) = found.skipped
    assert (item.id, item.what) == ("bad", "image")
    assert "truncated" in item.reason


def test_what_a_model_cannot_take_is_skipped(sam: torch.nn.Module, scenes: Dataset) -> None:
    line = Sample.from_arrays("line", np.zeros((1, 400, 3), np.uint8), np.ones((1, 1, 400), bool))
    found = accuracy(sam, [line, *scenes], batch_size=16)
    assert [(s.id, s.what) for s in found.skipped] == [("line", "image")]
    assert "too narrow" in found.skipped[0].reason
    with pytest.raises(DataError, match=r"got       image of line: an image is too narrow"):
        accuracy(sam, [line])


def test_an_annotation_without_a_point_is_skipped(sam: torch.nn.Module, scenes: Dataset) -> None:
    with pytest.raises(DataError, match="an annotation has no point"):
        accuracy(sam, scenes, "annotated")


def test_prompts_from_the_annotation_alone(sam: torch.nn.Module) -> None:
    scene = data.shapes(1, seed=1, size=(48, 64))[0]
    first, *others = scene.instances
    bad = replace(first, box=(500.0, 500.0, 600.0, 600.0), point=None)
    good = [replace(i, point=(i.box[0], i.box[1])) for i in others]
    sample = Held(scene.id, scene.name, scene.image, (bad, *good))
    box, annotated = accuracies(sam, [sample], ("box", "annotated"))
    for found, reason in ((box, "does not lie in its image"), (annotated, "has no point")):
        assert [r.annotation_id for r in found.records] == [i.id for i in others]
        assert [(s.id, s.what) for s in found.skipped] == [(scene.id, f"annotation {first.id}")]
        assert reason in found.skipped[0].reason


def test_refusals(sam: torch.nn.Module, scenes: Dataset) -> None:
    with pytest.raises(ModelError, match="this is not a SAM"):
        accuracy(torch.nn.Linear(2, 2), scenes)
    with pytest.raises(DataError):
        accuracy(sam, [])
    with pytest.raises(ConfigError, match=r"unknown choice\.\n  got       best"):
        accuracy(sam, scenes, choice="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"batch_size is below 1\.\n  got       0"):
        accuracy(sam, scenes, batch_size=0)
    with pytest.raises(ConfigError, match="there is no prompt to ask with"):
        accuracies(sam, scenes, ())
    with pytest.raises(ConfigError, match="min_area is below 0"):
        accuracy(sam, scenes, min_area=float("nan"))


def test_the_model_is_left_as_it_was(sam: torch.nn.Module, scenes: Dataset) -> None:
    sam.train()
    try:
        accuracy(sam, scenes)
        assert all(module.training for module in sam.modules())
    finally:
        sam.eval()


def test_progress_counts_images(sam: torch.nn.Module, scenes: Dataset) -> None:
    events = []
    accuracy(sam, scenes, batch_size=2, progress=events.append)
    assert [(e.step, e.label, e.done, e.total) for e in events] == [
        ("accuracy", "images", i, 5) for i in range(1, 6)
    ]


def test_against_itself(sam: torch.nn.Module, scenes: Dataset) -> None:
    found = accuracy(sam, scenes, keep_masks=True)
    paired = found.against(found)
    assert (paired.delta, paired.ci, paired.worse_share) == (0, (0, 0), 0)
    assert (paired.wilcoxon_p, paired.agreement) == (1, 1)
    assert paired.verdict() == "not worse"


def test_against_a_base(scenes: Dataset) -> None:
    base, other = (accuracy(random_sam(seed=seed), scenes, keep_masks=True) for seed in (0, 1))
    paired = other.against(base)
    deltas = [a.iou - b.iou for a, b in zip(other.records, base.records, strict=True)]
    assert paired.delta == pytest.approx(other.miou - base.miou)
    assert paired.worse_share == np.mean(np.array(deltas) < -0.05)
    assert len(paired.worst) == 1
    assert paired.worst[0].delta == min(deltas)
    assert paired.ci[0] < paired.delta < paired.ci[1]
    expected = np.mean(
        [
            iou(decode_runs(a.mask), decode_runs(b.mask))
            for a, b in zip(other.records, base.records, strict=True)
        ]
    )
    assert paired.agreement == pytest.approx(expected)
    assert agreement(other, base) == paired.agreement
    without = accuracy(random_sam(seed=1), scenes)
    assert without.against(base).agreement is None
    with pytest.raises(DataError, match="masks of these accuracies were not kept"):
        agreement(without, base)


def test_verdict_needs_the_whole_interval() -> None:
    def verdict(low: float, high: float) -> str:
        return Paired((low + high) / 2, (low, high), 0, 1, (), None, 9, 99).verdict(margin=0.01)

    assert verdict(-0.009, 0.001) == "not worse"
    assert verdict(-0.03, -0.011) == "worse"
    assert verdict(-0.02, 0.02) == "not resolved"


def test_protocols_do_not_mix(sam: torch.nn.Module, scenes: Dataset) -> None:
    box, point = accuracies(sam, scenes)
    with pytest.raises(ConfigError, match="rows of different protocol id do not belong"):
        box.against(point)
    elsewhere = accuracy(sam, [Sample.from_arrays("a", s.image, s.masks()) for s in scenes[:1]])
    twin = Accuracy(box.settings, elsewhere.records)
    with pytest.raises(DataError, match="these accuracies have no object in common"):
        box.against(twin)


def test_json_round_trip(scenes: Dataset) -> None:
    base, other = (accuracy(random_sam(seed=s), scenes, "random-2", seed=5) for s in (0, 1))
    entry = json.loads(json.dumps(other.to_dict(base)))
    again = Accuracy.from_dict(entry)
    assert again == other
    assert again.to_dict(base) == other.to_dict(base)
    assert entry["protocol"].split("/")[1] == "random-2:seed=5"
    assert set(entry["samples"][0]) == {
        *("image_id", "annotation_id", "category", "area", "iou", "score", "clicks")
    }
    assert entry["delta"] == other.against(base).delta
    assert other.to_dict()["delta"] is None
    assert base.to_dict(base)["delta"] == 0
    with pytest.raises(DataError, match="no accuracy entry of a result file"):
        Accuracy.from_dict({"protocol": entry["protocol"]})


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(data="a/b@c#9", prompt="point"),
        Protocol(data="x#1", prompt="random-9", seed=3, choice="oracle", average="image"),
        Protocol(
            data="x#1", prompt="box+2-xor", feedback="logits", include_crowd=True, min_area=576
        ),
    ],
)
def test_protocol_ids_are_read_back(protocol: Protocol) -> None:
    assert Protocol.parse(str(protocol)) == protocol


def test_what_has_no_influence_is_not_in_the_id() -> None:
    assert Protocol(data="x", prompt="box", feedback="logits", seed=4) == Protocol(data="x")
    with pytest.raises(ConfigError) as err:
        Protocol.parse("box")
    assert str(err.value) == (
        "this is no protocol id.\n  got       box\n"
        "  expected  coco@val2017#108/box/single/feedback=none/crowd=no,min_area=0/instance"
    )


@pytest.mark.parametrize(
    ("taught", "choice", "warns"),
    [
        ([], "predicted", False),
        ([None, False], "predicted", True),
        ([False, None], "predicted", True),
        ([False, True], "predicted", False),
        ([True, False], "predicted", True),
        ([False], "oracle", False),
        ([False], "single", False),
    ],
)
def test_predicted_iou_that_was_not_taught(
    taught: list[bool | None],
    choice: str,
    warns: bool,
    scenes: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the last step that trained says of itself counts; others say nothing."""
    model = random_sam()
    states = [{} if value is None else {"iou_trained": value} for value in taught]
    steps = tuple(Step(get("prune.mlp"), state) for state in states)
    remember(model, replace(history(model), steps=steps))
    accuracy(model, scenes[:1], "point", choice=choice)  # type: ignore[arg-type]
    expected = "the model was last trained without a loss on predicted IoU, which decides"
    assert caplog.messages == ([expected] if warns else [])
