"""What every technique of pruning says to a model that was quantised or exported before."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import random_sam
from pruning import SCENES, SLICES, TECHNIQUES, prune, toy

import samcompress as sc
from samcompress.core import errors
from samcompress.core.history import History, Step, history, remember
from samcompress.prune.budget import Budget

BUDGET = Budget(budget="macs<=80%", criterion="magnitude", ratios="equal")
ALL: dict[str, Any] = {**TECHNIQUES, "budget": BUDGET}
every = pytest.mark.parametrize("name", list(ALL))


def after(step: Any) -> Any:
    """A SAM that says it went through a step; modules are as they were."""
    sam = toy()
    remember(sam, History(history(sam).base, (Step(step, {}),)))
    return sam


@every
def test_exported_already(name: str) -> None:
    with pytest.raises(errors.OrderError) as caught:
        prune(ALL[name], after(sc.compile.Export()))
    assert str(caught.value).splitlines() == [
        f"prune.{name} cannot follow compile.export.",
        "  where     step 1 and step 2, counting the steps the model already went through",
        "  expected  compile.export last: it leaves no weights to change",
        f"  try       run prune.{name} on the model from before compile.export",
    ]


@every
def test_quantised_already(name: str) -> None:
    with pytest.raises(errors.OrderError) as caught:
        prune(ALL[name], after(sc.quantize.Int8Weights(min_size=0)))
    assert f"prune.{name} comes after quantize.int8_weights." in str(caught.value)


@pytest.mark.parametrize("name", [*SLICES, "budget"])
def test_quantised_already_whatever_the_order(name: str) -> None:
    small = prune(sc.quantize.Int8Weights(min_size=0), toy())
    with pytest.raises(errors.ModelError) as caught:
        prune(sc.Pipeline([ALL[name]], any_order=True), small)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"prune.{name} cannot cut a layer that was replaced."
    assert lines[2].startswith("  got       Int8")
    assert lines[3:] == [
        "  expected  torch.nn.Linear or torch.nn.Conv2d",
        "  try       prune first, then quantize",
    ]


@pytest.mark.parametrize("name", [*SLICES, "budget"])
def test_taylor_without_labels(name: str) -> None:
    images = [sc.Sample.from_arrays("plain", SCENES[0].image, [])]
    params = {**ALL[name].params(), "criterion": "taylor"}
    with pytest.raises(errors.DataError, match='criterion="taylor" needs annotated objects'):
        prune(sc.get(f"prune.{name}", **params), toy(), images)


@pytest.mark.parametrize("name", ["heads", "head_dims", "budget"])
def test_heads_that_do_not_divide(name: str) -> None:
    sam: Any = random_sam()
    sam.image_encoder.blocks[1].attn.num_heads = 5
    with pytest.raises(errors.ModelError) as caught:
        prune(ALL[name], sam)
    assert str(caught.value).splitlines() == [
        "the heads of an attention do not divide its width.",
        "  where     image_encoder.blocks.1.attn",
        "  got       32 dimensions, 5 heads",
        "  expected  as many dimensions for each head",
        "  try       num_heads must be what the layers were made for",
    ]
