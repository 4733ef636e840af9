"""Simulated models: their accuracy is measured, their time is not."""

from __future__ import annotations

import pytest
from torch import nn

import samcompress as sc
from samcompress.core.errors import ModelError
from samcompress.evaluate.latency import Rounds, latency
from samcompress.quantize.fake_quant import FakeQuant


def test_time_is_refused(tiny_sam: nn.Module) -> None:
    rounded = FakeQuant(activation_bits=None)(tiny_sam)
    with pytest.raises(
        ModelError, match=r"simulated model is not timed(.|\n)*quantize\.fake_quant"
    ):
        latency(rounded, rounds=Rounds.quick())


@pytest.mark.parametrize("simulated_base", [False, True])
def test_a_row_has_accuracy_and_the_reason(tiny_sam: nn.Module, simulated_base: bool) -> None:
    rounded = FakeQuant(activation_bits=None)(tiny_sam)
    models = {"float": tiny_sam, "rounded": rounded}
    if simulated_base:
        models = dict(reversed(models.items()))
    report = sc.evaluate.benchmark(
        models,
        sc.shapes(1, size=64),
        prompts=("box",),
        rounds=Rounds.exactly(1),
        memory=False,
        progress=False,
    )
    rows = {row["name"]: row for row in report.rows}
    assert rows["rounded"]["status"] == "measured"
    assert rows["rounded"]["accuracy"][0]["miou"] >= 0
    assert rows["rounded"]["latency"] is None
    assert "simulated model is not timed" in rows["rounded"]["missing"]["latency"]
    assert rows["float"]["latency"]["encoder"]["n"] == 1
    assert report.text()


def test_the_summary_says_so(tiny_sam: nn.Module) -> None:
    rounded = FakeQuant(activation_bits=None)(tiny_sam)
    assert "quantize.fake_quant (simulated)" in repr(sc.summary(rounded))
    packed = sc.quantize.Int8Weights(min_size=0)(tiny_sam)
    assert "simulated" not in repr(sc.summary(packed))
