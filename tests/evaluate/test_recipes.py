"""Recipes in any form, the check before work, and the tables of what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

import samcompress as sc
from samcompress.core import zoo
from samcompress.core.errors import ConfigError, OrderError, UnknownTransformError
from samcompress.evaluate.catalog import catalog, describe, health
from samcompress.evaluate.environment import Check
from samcompress.evaluate.recipes import preflight, recipe

CHAIN = sc.prune.Mlp(ratio=0.5) | sc.quantize.Int8Weights(min_size=0)


@pytest.mark.parametrize(
    "text",
    [
        "prune.mlp(ratio=0.5) | quantize.int8_weights(min_size=0)",
        "sc.prune.Mlp(ratio=0.5)|sc.quantize.Int8Weights(min_size=0)",
        repr(CHAIN),
    ],
)
def test_chain_in_one_line(text: str) -> None:
    assert recipe(text) == CHAIN


def test_chain_of_three_keeps_its_order() -> None:
    found = recipe("substitute.image_size(size=64) | attention.fused | quantize.int8_weights")
    assert [s.label for s in found] == [
        "substitute.image_size",
        "attention.fused",
        "quantize.int8_weights",
    ]
    with pytest.raises(OrderError):
        recipe("quantize.int8_weights | prune.mlp")


def test_file_and_shipped_name(tmp_path: Path) -> None:
    CHAIN.save(tmp_path / "mine.json")
    assert recipe(tmp_path / "mine.json") == CHAIN
    assert recipe("small") == recipe("small.json") == sc.Pipeline.load("small")


def test_image_size_comes_first_once() -> None:
    assert recipe("prune.mlp", image_size=64).steps[0] == sc.substitute.ImageSize(size=64)
    mobile = recipe("mobile", image_size=64)
    assert len(mobile) == len(recipe("mobile"))
    assert mobile.steps[0] == sc.substitute.ImageSize(size=64)


def test_chain_is_read_not_run() -> None:
    with pytest.raises(ConfigError) as raised:
        recipe("prune.mlp(ratio=__import__('os').getpid())")
    assert str(raised.value).startswith("this chain is not understood.\n  got       ")
    assert "expected  'prune.mlp(ratio=0.5) | quantize.int8_weights'" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "error", "part"),
    [
        ("prune.mlp(0.5)", ConfigError, "values need names"),
        ("prune.mlp(", ConfigError, "this chain is not understood"),
        ("mlp()", ConfigError, "this chain is not understood"),
        ("prune.mpl()", UnknownTransformError, "try       prune.mlp"),
        ("prune.mlp(rate=0.5)", ConfigError, "prune.mlp has no field 'rate'"),
        ("nothing", ConfigError, "there is no such recipe"),
    ],
)
def test_what_is_no_recipe(text: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error) as raised:
        recipe(text)
    assert part in str(raised.value)


def test_preflight_as_golden_text(golden) -> None:
    table = preflight(recipe("mobile", image_size=128), sc.build("tiny"))
    golden("preflight.txt", table.text() + "\n")
    ready = [row["ready"] for row in table.records()]
    assert ready[:3] == ["no: the model has this size already.", "no: needs images.", "yes"]


def test_preflight_changes_nothing() -> None:
    sam = sc.build("tiny")
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    table = preflight(recipe("small"), sam, data=sc.shapes(1))
    assert [row["ready"] for row in table.records()] == ["yes", "yes"]
    assert all((before[name] == value).all() for name, value in sam.state_dict().items())
    assert sc.lineage(sam) == ()


def test_pattern_that_matches_nothing_is_shown() -> None:
    pipeline = sc.Pipeline([sc.prune.Mlp(where="image_encoder.layers.*")])
    (row,) = preflight(pipeline, sc.build("tiny"), data=sc.shapes(1)).records()
    assert row["modules matched"] == "none"
    assert row["ready"] == "no: matched no module."


def test_catalog_keeps_four_kinds_apart() -> None:
    techniques, architectures, recipes, models = catalog()
    assert [r["name"] for r in techniques.records()] == sc.list_transforms()
    assert [r["name"] for r in architectures.records()] == list(sc.ARCHITECTURES)
    assert [f"{r['name']}.json" for r in recipes.records()] == list(sc.list_recipes())
    assert [r["name"] for r in models.records()] == list(zoo.published())
    assert all(r["what it is"] for r in techniques.records())


def test_describe_a_checkpoint(tmp_path: Path) -> None:
    sc.save(sc.quantize.Int8Weights()(sc.build("tiny")), tmp_path / "out")
    text, (parts, history, files) = describe(tmp_path / "out")
    assert "base weights: " in text
    assert parts.records()[-1]["part"] == "total"
    (step,) = history.records()
    assert step["step"] == "quantize.int8_weights"
    assert step["size after"] < step["size before"]
    assert files.records()[0]["file"] == "model.safetensors"


def test_health_marks_what_is_broken() -> None:
    table = health([Check("a", "ready", "1.0"), Check("b", "broken", "too old", "pip install b")])
    assert [row[1].mark for row in table.cells()] == ["", "red"]
    assert table.records()[1]["detail"] == "too old; to mend it: pip install b"
