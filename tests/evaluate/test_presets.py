"""Rules of published tables by name, and what they add to protocols."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam

from samcompress.core import data
from samcompress.core.data import Dataset
from samcompress.core.errors import ConfigError, DataError
from samcompress.core.framing import Framing
from samcompress.core.predict import Prediction, decode, encode
from samcompress.core.prompt import Prompt
from samcompress.evaluate.accuracy import accuracies, accuracy, aim
from samcompress.evaluate.field import Field, resampled
from samcompress.evaluate.masks import boundary_iou, box_iou, iou
from samcompress.evaluate.presets import PRESETS, preset_protocol
from samcompress.evaluate.prompts import Rule, center_of_mass
from samcompress.evaluate.protocol import Protocol, Target, rounds

DATA = "coco@val2017#108"
IDS = {
    "sam-click": "center/predicted/feedback=none/crowd=no,min_area=0/instance",
    "sam-click-oracle": "center/oracle/feedback=none/crowd=no,min_area=0/instance",
    "sam-click-2": "clicks-2-xor/predicted/feedback=logits/crowd=no,min_area=0/instance",
    "sam-click-3": "clicks-3-xor/predicted/feedback=logits/crowd=no,min_area=0/instance",
    "sam-click-5": "clicks-5-xor/predicted/feedback=logits/crowd=no,min_area=0/instance",
    "sam-click-9": "clicks-9-xor/predicted/feedback=logits/crowd=no,min_area=0/instance",
    "efficientvit-box": "box/predicted/feedback=none/crowd=yes,min_area=0/instance",
    "efficientvit-click": "center/predicted/feedback=none/crowd=yes,min_area=0/instance",
    "efficientvit-click-3": "clicks-3/predicted/feedback=none/crowd=yes,min_area=0/instance",
    "efficientvit-click-5": "clicks-5/predicted/feedback=none/crowd=yes,min_area=0/instance",
    "edgesam-box": "box/single/feedback=none/crowd=no,min_area=0,truth=resampled/instance",
    "edgesam-box+1": "box+1-random:seed=0/single/feedback=none/crowd=no,min_area=0,"
    "truth=resampled/instance",
    "edgesam-box+2": "box+2-random:seed=0/single/feedback=none/crowd=no,min_area=0,"
    "truth=resampled/instance",
    "edgesam-center": "center/single/feedback=none/crowd=no,min_area=0,truth=resampled/instance",
    "edgesam-center+1": "center+1-random:seed=0/single/feedback=none/crowd=no,min_area=0,"
    "truth=resampled/instance",
    "edgesam-center+2": "center+2-random:seed=0/single/feedback=none/crowd=no,min_area=0,"
    "truth=resampled/instance",
    "efficientsam-box": "box-tight/predicted/feedback=none/crowd=no,min_area=0/instance",
    "efficientsam-point": "random-1:seed=0/predicted/feedback=none/crowd=no,min_area=0/instance",
    "efficientsam-point-3": "random-3:seed=0/predicted/feedback=none/crowd=no,min_area=0/instance",
    "nanosam": "box/predicted/feedback=none/crowd=yes,min_area=0/instance",
    "slimsam": "annotated/single/feedback=none/crowd=no,min_area=0/image",
    "samfast": "com/predicted/feedback=none/crowd=yes,min_area=0/instance",
    "hq": "box/single/feedback=none/crowd=no,min_area=0/instance",
    "hq-boundary": "box/single/feedback=none/crowd=no,min_area=0,overlap=boundary/instance",
}


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return random_sam()


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return data.shapes(3, seed=2, size=(48, 64))


def test_every_preset_has_its_id() -> None:
    found = {name: str(preset_protocol(name, DATA)) for name in PRESETS}
    assert found == {name: f"{DATA}/{rules}" for name, rules in IDS.items()}
    for text in found.values():
        assert str(Protocol.parse(text)) == text
    for name, preset in PRESETS.items():
        assert (preset.name, bool(preset.source)) == (name, True)
    seeded = preset_protocol("edgesam-box+1", DATA, seed=7)
    assert seeded.prompt == "box+1-random"
    assert ":seed=7/" in str(seeded)


def test_presets_are_on_their_page() -> None:
    page = (Path(__file__).parents[2] / "docs/howto/accuracy.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in page] == []


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset\.\n  got       'edgesam-centre'") as err:
        preset_protocol("edgesam-centre", DATA)
    assert "sam-click, sam-click-oracle" in str(err.value)
    assert "try       edgesam-center" in str(err.value)


def test_presets_beside_prompts(sam: torch.nn.Module, scenes: Dataset) -> None:
    presets = ("edgesam-box+1", "sam-click-2", "samfast", "hq-boundary")
    found = accuracies(sam, scenes, ("box",), presets=presets, seed=3)
    name = f"{scenes.name}#3"
    expected = [Protocol(data=name), *(preset_protocol(p, name, seed=3) for p in presets)]
    assert [a.settings for a in found] == expected
    for preset, one in zip(presets, found[1:], strict=True):
        alone = accuracy(sam, scenes, preset=preset, seed=3)
        assert (alone.records, alone.protocol) == (one.records, one.protocol)
    entry = found[1].to_dict()
    assert entry["prompt"] == "box+1-random, resampled truth"
    assert found[3].to_dict()["prompt"] == "com, with crowds"


def test_a_preset_brings_its_own_rules(sam: torch.nn.Module, scenes: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"own prompt[\s\S]*prompts='box', preset='hq'"):
        accuracy(sam, scenes, "box", preset="hq")
    with pytest.raises(ConfigError, match=r"own rules[\s\S]*choice='single'[\s\S]*the seed"):
        accuracy(sam, scenes, preset="hq", choice="single")


def _objects(sample: data.Sample) -> int:
    return len(sample.instances)


def test_crowds_are_kept_where_the_preset_keeps_them(shared: Path) -> None:
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")
    crowded = [min((s for s in found if any(i.crowd for i in s.instances)), key=_objects)]
    sam = random_sam()
    counts = {
        a.settings.include_crowd: a.n_instances
        for a in accuracies(sam, crowded, ("box",), presets=("efficientvit-box",))
    }
    crowds = sum(i.crowd for s in crowded for i in s.instances)
    assert crowds > 0
    assert counts[True] - counts[False] == crowds


# --- centre of mass ---


def clicked(mask: np.ndarray) -> list[float]:
    (point,) = center_of_mass(mask).points.tolist()
    return point


def test_centre_of_mass() -> None:
    mask = np.zeros((9, 12), bool)
    mask[2:7, 3:8] = True
    assert clicked(mask) == [5, 4]
    ring = mask.copy()
    ring[3:6, 4:7] = False  # 2 px to each side: right comes first
    assert clicked(ring) == [7, 4]
    ring[:, 7] = False
    assert clicked(ring)[0] != 7
    corner = np.zeros((9, 9), bool)
    corner[0, :] = corner[:, 0] = True
    x, y = clicked(corner)
    assert corner[int(y), int(x)]
    far = np.zeros((9, 9), bool)
    far[0:3, 0:3] = far[6:9, 6:9] = True  # neither row 4 nor column 4 meets it
    assert clicked(far) == [1, 1]
    with pytest.raises(DataError, match="an empty mask has no point"):
        center_of_mass(np.zeros((3, 3), bool))
    assert Rule.parse("com").start(None, mask, image_id=0).points.tolist() == [[5, 4]]


# --- rules ---


@pytest.mark.parametrize(
    ("name", "canonical", "clicks", "kind"),
    [
        ("point+2", "clicks-3", 2, "dual"),
        ("center+1-xor", "clicks-2-xor", 1, "xor"),
        ("point+1-random", "center+1-random", 1, "random"),
        ("random-1+4-xor", "random-1+4-xor", 4, "xor"),
        ("box-tight+1", "box-tight+1", 1, "dual"),
    ],
)
def test_any_first_prompt_takes_clicks(name: str, canonical: str, clicks: int, kind: str) -> None:
    rule = Rule.parse(name)
    assert (rule.name, rule.clicks, rule.kind) == (canonical, clicks, kind)
    assert rule.draws == ("random" in canonical)


@pytest.mark.parametrize("name", ["box-random", "random-3-random", "center-xor", "box+1-dual"])
def test_clicks_without_a_number(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown prompt"):
        Rule.parse(name)


# --- clicks drawn at low resolution ---


def field(mask: np.ndarray, frame: int = 64, low: int = 16, key: Any = (0, 1, 2)) -> Field:
    return Field.of(mask, Framing(frame, frame), (low, low), key)


def test_field_is_the_truth_in_the_frame() -> None:
    mask = np.zeros((96, 128), bool)
    mask[32:64, 64:96] = True
    found = field(mask)
    assert found.step == (8, 8)  # 128 px are 64 of the frame, 16 cells
    expected = np.zeros((16, 16), bool)
    expected[4:8, 8:12] = True
    assert np.array_equal(found.truth, expected)


def test_draws_are_uniform_in_the_error_and_nowhere_else() -> None:
    mask = np.zeros((96, 128), bool)
    mask[32:64, 64:96] = True
    answer = field(mask).truth.copy()
    answer[4:6, 8:12] = False  # 8 missed
    answer[0:2, 0:2] = True  # 4 extra
    answer[12:, :] = True  # padding: the image ends at cell 12
    counts: dict[tuple[float, float, int], int] = {}
    for number in range(1200):
        drawn = field(mask, key=(0, "a", number)).draw(answer, step=1)
        assert drawn is not None
        counts[drawn] = counts.get(drawn, 0) + 1
    missed = {(8 * x + 3.5, 8 * y + 3.5, 1) for x in range(8, 12) for y in (4, 5)}
    extra = {(8 * x + 3.5, 8 * y + 3.5, 0) for x in (0, 1) for y in (0, 1)}
    assert set(counts) == missed | extra
    assert all(60 < count < 145 for count in counts.values())


def test_draws_depend_on_ids_seed_and_step_only() -> None:
    mask = np.ones((64, 64), bool)
    nothing = np.zeros((16, 16), bool)
    first = field(mask).draw(nothing, step=1)
    assert first == field(mask).draw(nothing, step=1)
    others = [field(mask).draw(nothing, step=2), field(mask, key=(1, 1, 2)).draw(nothing, step=1)]
    assert first not in others


def test_few_wrong_pixels_are_not_clicked() -> None:
    mask = np.ones((64, 64), bool)
    answer = np.ones((16, 16), bool)
    answer[0, :9] = False
    assert field(mask).draw(answer, step=1) is None
    answer[0, 9] = False
    assert field(mask).draw(answer, step=1) is not None


def test_refinement_by_drawn_clicks(sam: torch.nn.Module, scenes: Dataset) -> None:
    once = accuracy(sam, scenes, preset="edgesam-center")
    twice = accuracy(sam, scenes, preset="edgesam-center+2")
    assert {r.clicks for r in once.records} == {1}
    assert {r.clicks for r in twice.records} <= {1, 2, 3}
    assert 3 in {r.clicks for r in twice.records}
    assert accuracy(sam, list(scenes)[::-1], preset="edgesam-center+2").records == twice.records
    other = accuracy(sam, scenes, preset="edgesam-center+2", seed=1)
    assert [r.iou for r in other.records] != [r.iou for r in twice.records]


def test_drawn_clicks_are_sent_without_the_mask(sam: torch.nn.Module, scenes: Dataset) -> None:
    protocol = preset_protocol("edgesam-box+1", "x")
    sample = scenes[0]
    instance = sample.instances[0]
    target = aim(sam, protocol, instance, instance.mask, image_id=sample.id)
    assert target.field is not None
    assert target.compared is not None
    (embedding,) = encode(sam, [sample.image])
    asked: list[Prompt] = []

    def spy(prompts: list[Prompt], multimask: bool) -> Prediction:
        asked.extend(prompts)
        assert not multimask
        return decode(sam, embedding, prompts)

    first, second = rounds(protocol, [target], spy)
    assert [prompt.kind for prompt in asked] == [(0, True, False), (1, True, False)]
    assert first[0].iou == iou(first[0].mask, target.compared)
    assert second[0].prompt.labels.tolist() in ([0], [1])


# --- truth and overlap ---


def test_resampled_truth_is_smooth_and_near() -> None:
    mask = np.zeros((427, 640), bool)
    mask[100:200, 100:300] = True
    assert np.array_equal(resampled(mask), mask)  # straight edges stay
    y, x = np.mgrid[:427, :640]
    disc = (y - 200) ** 2 + (x - 300) ** 2 < 80**2
    assert 0.99 < iou(resampled(disc), disc) <= 1
    noise = np.random.default_rng(0).random((427, 640)) < 0.5
    assert not np.array_equal(resampled(noise), noise)
    assert resampled(mask).shape == mask.shape


def test_boundary_of_an_accuracy(sam: torch.nn.Module, scenes: Dataset) -> None:
    plain = accuracy(sam, scenes, "box", keep_masks=True)
    rims = accuracy(sam, scenes, "box", overlap="boundary", keep_masks=True)
    assert [r.mask for r in plain.records] == [r.mask for r in rims.records]
    truths = {(s.id, i.id): i.mask for s in scenes for i in s.instances}
    from samcompress.evaluate.masks import decode as decode_runs

    for record in rims.records:
        assert record.iou == boundary_iou(decode_runs(record.mask or {}), truths[record.key])
    assert rims.protocol.endswith("/crowd=no,min_area=0,overlap=boundary/instance")
    with pytest.raises(ConfigError, match="rows of different protocol id"):
        rims.against(plain)


def test_oracle_is_decided_by_the_mask_even_for_boundaries(
    sam: torch.nn.Module, scenes: Dataset
) -> None:
    masks, rims = (
        accuracy(sam, scenes, "point", choice="oracle", overlap=overlap, keep_masks=True)  # type: ignore[arg-type]
        for overlap in ("mask", "boundary")
    )
    assert [r.mask for r in masks.records] == [r.mask for r in rims.records]


def test_choice_by_the_box() -> None:
    truth = np.zeros((20, 30), bool)
    truth[5:15, 5:25] = True
    masks = np.stack([truth & (np.arange(30) < end) for end in (10, 25, 15)])
    assert box_iou(masks[1], (5, 5, 25, 15)) == 1
    assert box_iou(masks[0], (5, 5, 25, 15)) == 50 / 200
    assert box_iou(masks[0], (5.4, 4.6, 25.2, 14.7)) == 50 / 200  # pixel centres decide
    assert box_iou(np.zeros((4, 4), bool), (1, 1, 1, 1)) == 1

    def decoder(prompts: list[Prompt], multimask: bool) -> Prediction:
        assert multimask
        return Prediction(
            torch.from_numpy(masks)[None], torch.tensor([[0.9, 0.1, 0.2]]), torch.zeros(1, 3, 4, 4)
        )

    target = Target("", truth, Prompt(box=(5, 5, 25, 15)))
    ((answer,),) = rounds(Protocol(data="x", choice="box-iou"), [target], decoder)
    assert (answer.iou, answer.score) == (1, pytest.approx(0.1))
    with pytest.raises(ConfigError, match=r"this prompt has none\.\n  got       center"):
        Protocol(data="x", prompt="point", choice="box-iou")


def test_label_names_what_is_not_as_usual() -> None:
    assert Protocol(data="x").label == "box"
    unusual = Protocol(
        data="x", prompt="clicks-2", feedback="logits", min_area=576, average="image"
    )
    assert unusual.label == "clicks-2, mask sent back, from 576 px, by image"


@pytest.mark.parametrize("bad", [{"truth": "smooth"}, {"overlap": "rim"}])
def test_unknown_values(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"unknown {next(iter(bad))}"):
        Protocol(data="x", **bad)


def test_a_damaged_id_is_refused() -> None:
    good = str(preset_protocol("edgesam-box", "x#1"))
    for bad in (good.replace("truth=", "trust="), good.replace("crowd=no,", "")):
        with pytest.raises(ConfigError, match="this is no protocol id"):
            Protocol.parse(bad)


def test_perfect_answers_of_coco(shared: Path) -> None:
    """Mean IoU and mean boundary IoU of the truth are 1."""
    folder = shared / "data/coco"
    found = data.coco(folder / "val2017", folder / "annotations/instances_val2017.json")[:25]
    for overlap in ("mask", "boundary"):
        protocol = Protocol(data="x", overlap=overlap)  # type: ignore[arg-type]
        values = []
        for sample in found:
            for instance in (i for i in sample.instances if not i.crowd):
                truth = instance.mask

                def perfect(
                    prompts: list[Prompt], multimask: bool, truth: np.ndarray = truth
                ) -> Prediction:
                    masks = torch.from_numpy(truth)[None, None]
                    return Prediction(masks, torch.ones(1, 1), torch.ones(1, 1, 4, 4))

                target = Target("", truth, protocol.rule.start(instance, truth, image_id=0))
                ((answer,),) = rounds(protocol, [target], perfect)
                values.append(answer.iou)
        assert len(values) > 100
        assert np.mean(values) == 1


def test_workers_change_no_number(sam: torch.nn.Module, scenes: Dataset) -> None:
    base = accuracy(sam, scenes, "point")
    for workers in (1, 4):
        assert accuracy(sam, scenes, "point", workers=workers).records == base.records
    with pytest.raises(ConfigError, match="workers is below 0"):
        accuracy(sam, scenes, workers=-1)


def test_workers_stop_at_damage(sam: torch.nn.Module) -> None:
    class Broken(data.Sample):
        @property
        def image(self) -> Any:
            raise DataError("file is truncated.")

        @property
        def instances(self) -> Any:
            return ()

    good = data.shapes(4, size=(48, 64))
    mixed = Dataset([*good, Broken("bad", "bad.jpg", (8, 8))], "mixed")
    with pytest.raises(DataError, match="truncated"):
        accuracy(sam, mixed, workers=2)


def test_plain_instances_need_no_model() -> None:
    """What `aim` leaves out where no rule asks for it."""
    mask = np.ones((8, 8), bool)
    instance = SimpleNamespace(id=1, box=(0.0, 0.0, 8.0, 8.0), point=None)
    target = aim(torch.nn.Identity(), Protocol(data="x"), instance, mask, image_id=2)  # type: ignore[arg-type]
    assert (target.field, target.compared) == (None, None)
    assert target.name == "image 2, annotation 1, prompt box"
