"""Spaces: what can be written, what is refused, and what the default one holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import random_sam

import samcompress as sc
from samcompress.core import errors
from samcompress.evaluate.space import NONE, Choices, Option, Range, Slot, Space

SIZE = {"type": "substitute.image_size", "params": {"size": {"choices": [32, 48]}}}
MLP = {"type": "prune.mlp", "params": {"ratio": {"low": 0.25, "high": 0.75, "step": 0.25}}}
INT8 = {"type": "quantize.int8_weights"}
HALF = {"type": "quantize.b_float16"}


def slots(*options: Any, **more: Any) -> dict[str, Any]:
    named = [{"name": f"slot {i}", "options": o, **more} for i, o in enumerate(options)]
    return {"format": 1, "slots": named}


def test_grid_has_every_combination_once() -> None:
    space = Space.from_dict(slots([SIZE], [MLP], [INT8, HALF]))
    found = list(space.grid())
    assert len(found) == (1 + 2) * (1 + 3) * (1 + 2)
    assert len({json.dumps(d) for d in found}) == len(found)
    whole = [d for d in found if NONE not in d.values()]
    chain = space.build(whole[0])
    assert repr(chain) == (
        "sc.substitute.ImageSize(size=32) | sc.prune.Mlp() | sc.quantize.Int8Weights()"
    )
    assert all(space.build(d) for d in found if set(d.values()) != {NONE})


def test_json_and_back(tmp_path: Path) -> None:
    log = {"type": "prune.mlp", "params": {"ratio": {"low": 0.1, "high": 0.5, "log": True}}}
    space = Space.from_dict(slots([SIZE], [log, INT8][:1], [INT8, HALF], optional=False))
    space.save(tmp_path / "space.json")
    assert Space.load(tmp_path / "space.json") == space
    assert json.loads((tmp_path / "space.json").read_text()) == space.to_dict()
    assert space.slots[1].options[0].params["ratio"] == Range(0.1, 0.5, log=True)


def test_braces_in_a_chain_are_choices_in_the_order_written() -> None:
    space = Space.parse("prune.Mlp(ratio={0.5, 0.25}, criterion='magnitude') | attention.fused")
    assert space.slots[0].options[0].params == {
        "ratio": Choices((0.5, 0.25)),
        "criterion": "magnitude",
    }
    assert [space.build(d).steps[0].ratio for d in space.grid()] == [0.5, 0.25]
    twice = Space.parse("prune.mlp(ratio={0.1, 0.2}) | prune.mlp(ratio=0.3)")
    assert [slot.name for slot in twice.slots] == ["prune.mlp", "prune.mlp (2)"]


def test_singles_try_each_option_alone() -> None:
    space = Space.from_dict(slots([SIZE], [MLP], [INT8, HALF]))
    chains = [space.build(d) for d in space.singles()]
    assert [[step.label for step in chain] for chain in chains] == [
        ["substitute.image_size"],
        ["prune.mlp"],
        ["quantize.int8_weights"],
        ["quantize.b_float16"],
    ]
    assert chains[1].steps[0].ratio == 0.5


def test_few_fill_two_to_four_slots_and_are_drawn_alike() -> None:
    space = Space.from_dict(slots([SIZE], [MLP], [{"type": "attention.fused"}], [INT8, HALF]))
    draws = [[space.few(random.Random(7)) for _ in range(2)] for _ in range(2)]
    assert draws[0] == draws[1]
    many = random.Random(0)
    lengths = {len(space.build(space.few(many)).steps) for _ in range(40)}
    assert lengths == {2, 3, 4}


@pytest.mark.parametrize(
    ("space", "kind", "text"),
    [
        (slots([{"type": "prune.mpl"}]), errors.UnknownTransformError, "prune.mlp"),
        (
            slots([{"type": "prune.mlp", "params": {"ratoi": {"choices": [0.5]}}}]),
            errors.ConfigError,
            "has no field 'ratoi'",
        ),
        (
            slots([{"type": "prune.mlp", "params": {"ratio": {"low": 0.5, "high": 1.5}}}]),
            errors.ConfigError,
            "ratio is out of range(.|\n)*slot 0",
        ),
        (
            slots([{"type": "prune.mlp", "params": {"ratio": {"low": 0.5, "high": 0.1}}}]),
            errors.ConfigError,
            "this is no range.(.|\n)*slot 'slot 0', ratio",
        ),
        (
            slots([{"type": "prune.mlp", "params": {"ratio": {"low": 0.1, "heigh": 0.5}}}]),
            errors.ConfigError,
            "lacks 'high'",
        ),
        (slots([INT8], [MLP]), errors.OrderError, "prune.mlp comes after quantize.int8_weights"),
        ({"slots": []}, errors.ConfigError, "no list of something"),
        ({"slots": [{"name": "a"}]}, errors.ConfigError, "lacks 'options'"),
        ({"slots": [{"name": "a", "options": [INT8], "optoinal": 1}]}, errors.ConfigError,
         "a key 'optoinal'(.|\n)*try       optional"),
        ({**slots([INT8]), "format": 99}, errors.ConfigError, "newer samcompress"),
        ([], errors.ConfigError, "no object"),
    ],
)  # fmt: skip
def test_what_is_no_space(space: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        Space.from_dict(space)


def test_two_slots_of_one_name() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Space((Slot("a", (Option("attention.fused"),)), Slot("a", (Option("attention.fused"),))))
    assert str(caught.value).splitlines()[:2] == [
        "a space has slots of different names, each with a technique.",
        "  got       slots 'a', 'a'",
    ]


@pytest.mark.parametrize("text", ["prune.mlp({0.5})", "prune.mlp(ratio={0.5}", "{}"])
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(errors.ConfigError, match="this grid is not understood"):
        Space.parse(text)


def test_ranges_without_steps_have_no_grid(tmp_path: Path) -> None:
    space = Space.from_dict(
        slots([{"type": "prune.mlp", "params": {"ratio": {"low": 0.1, "high": 0.5}}}])
    )
    with pytest.raises(errors.ConfigError, match="a range without steps"):
        list(space.grid())
    with pytest.raises(errors.ConfigError, match="this is not a space"):
        Space.load(tmp_path / "absent.json")


def test_default_space_asks_the_techniques() -> None:
    sam = random_sam()
    space = Space.default(sam, calibration=True)
    inside = {option.type for slot in space.slots for option in slot.options}
    assert {"substitute.image_size", "prune.mlp", "attention.fused"} <= inside
    assert inside.isdisjoint(space.left_out)
    assert inside | space.left_out.keys() == set(sc.list_transforms())
    assert "train" in space.left_out["distill.encoder"]
    sizes = space.slots[0].options[0].params["size"]
    assert sizes.values == (32, 48)  # multiples of two patches below 64
    fused = Space.default(sc.attention.Fused()(sam), calibration=True)
    assert "attention.fused" in fused.left_out


def test_default_space_without_images_takes_what_needs_none() -> None:
    space = Space.default(random_sam())
    options = {option.type: option for slot in space.slots for option in slot.options}
    assert options["prune.mlp"].params["criterion"] == "magnitude"
    assert space.left_out["quantize.int8_static"] == "it needs images, and none were given for it"
    for decisions in space.singles():
        assert not any(step.needs_data for step in space.build(decisions))
