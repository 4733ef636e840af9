"""Budgets: what can be written, what it means, and what a model costs."""

from __future__ import annotations

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import budget, errors
from samcompress.core.budget import Limit
from samcompress.core.timing import Rounds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parameters<=30M", Limit("parameters", 30e6)),
        ("parameters<=30e6", Limit("parameters", 30e6)),
        ("macs <= 1.5G", Limit("macs", 1.5e9)),
        ("macs<=50%", Limit("macs", 0.5, relative=True)),
        ("latency_ms<=50 on cpu", Limit("latency_ms", 50.0, device="cpu")),
        ("latency_ms<=0.5 on cuda:1", Limit("latency_ms", 0.5, device="cuda:1")),
        ("latency_ms<=12.5%", Limit("latency_ms", 0.125, relative=True)),
    ],
)
def test_parse(text: str, expected: Limit) -> None:
    found = Limit.parse(text)
    assert found == expected
    assert Limit.parse(str(found)) == found


def test_bound() -> None:
    assert Limit.parse("latency_ms<=50%").bound(80.0) == 40.0
    assert Limit.parse("latency_ms<=50").bound(80.0) == 50.0


@pytest.mark.parametrize("text", ["", "macs", "macs<50%", "macs<=", "macs<=-1", "macs<=50 %%"])
def test_no_budget(text: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Limit.parse(text)
    assert str(caught.value).splitlines() == [
        "this is not a budget.",
        f"  got       {text!r}",
        '  expected  "parameters<=30M", "macs<=50%" or "latency_ms<=50 on cpu"',
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "params<=30M",
            [
                "a budget cannot be of 'params'.",
                "  got       'params<=30M'",
                "  expected  parameters, macs, latency_ms",
                "  try       parameters, macs",
            ],
        ),
        (
            "macs<=50% on cpu",
            [
                "macs are the same on every device.",
                "  got       'macs<=50% on cpu'",
                "  try       macs<=50%",
            ],
        ),
        (
            "macs<=150%",
            [
                "a budget is a part of what the base costs.",
                "  got       'macs<=150%'",
                "  expected  more than 0% and less than 100%",
            ],
        ),
        (
            "macs<=0.5",
            [
                "a budget leaves nothing.",
                "  got       'macs<=0.5'",
                '  expected  "parameters<=30M", "macs<=50%" or "latency_ms<=50 on cpu"',
                "  try       macs<=50% for a share of the base",
            ],
        ),
        (
            "latency_ms<=0",
            [
                "a budget leaves nothing.",
                "  got       'latency_ms<=0'",
                '  expected  "parameters<=30M", "macs<=50%" or "latency_ms<=50 on cpu"',
            ],
        ),
    ],
)
def test_budget_that_makes_no_sense(text: str, lines: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Limit.parse(text)
    assert str(caught.value).splitlines() == lines


def test_costs() -> None:
    sam = random_sam()
    work = sc.evaluate.macs(sam)
    assert Limit.parse("parameters<=50%").cost(sam) == sum(p.numel() for p in sam.parameters())
    assert Limit.parse("macs<=50%").cost(sam) == work.encoder + work.decoder_per_prompt


def test_time_is_that_of_an_image_and_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "ROUNDS", Rounds.quick())
    sam = random_sam().train()
    seen: list[tuple[str, bool]] = []

    def note(module: torch.nn.Module, args: object) -> None:
        seen.append((type(module).__name__, module.training))

    handles = [
        part.register_forward_pre_hook(note)
        for part in (sam.image_encoder, sam.mask_decoder.transformer)
    ]
    assert Limit.parse("latency_ms<=50 on cpu").cost(sam) > 0
    for handle in handles:
        handle.remove()
    assert set(seen) == {("ImageEncoderViT", False), ("TwoWayTransformer", False)}
    assert sam.image_encoder.training


def test_device_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.ConfigError, match="the device 'cuda' is not there"):
        Limit.parse("latency_ms<=50 on cuda").timed({"sam": random_sam()})
    with pytest.raises(errors.ConfigError, match="'tpu' is not a device we measure on"):
        Limit.parse("latency_ms<=50 on tpu").timed({"sam": random_sam()})


def test_costs_are_shown_with_their_unit() -> None:
    shown = [
        Limit("macs", 1.0).shown(486e9),
        Limit("parameters", 1.0).shown(93735472),
        Limit("parameters", 1.0).shown(12.0),
        Limit("latency_ms", 1.0).shown(21900.0),
    ]
    assert shown == ["486 G macs", "93.7 M parameters", "12.0 parameters", "21900 ms"]
