from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import random_sam

import samcompress as sc


def test_numbers_are_attributes() -> None:
    sam = random_sam()
    found = sc.summary(sam)
    assert found.parameters == sum(p.numel() for p in sam.parameters())
    assert [part.name for part in found.parts] == [
        "image_encoder",
        "prompt_encoder",
        "mask_decoder",
        "total",
    ]
    assert sum(part.parameters for part in found.parts[:3]) == found.parameters
    assert found["image_encoder"].macs == sc.evaluate.macs(sam).encoder
    assert found["total"].dtypes == ("float32",)
    assert found.image_size == 64


def test_after_steps() -> None:
    small = sc.quantize.Int8Weights(min_size=0)(random_sam())
    found = sc.summary(small)
    assert found.steps == ("quantize.int8_weights",)
    assert set(found["image_encoder"].dtypes) == {"int8", "float32"}
    assert found["total"].bytes < sc.summary(random_sam())["total"].bytes


def test_table(golden: Callable[[str, str], None], capfd: pytest.CaptureFixture[str]) -> None:
    shown = sc.summary(random_sam())
    golden("summary.txt", repr(shown) + "\n")
    golden("summary.html", shown._repr_html_() + "\n")
    assert capfd.readouterr() == ("", "")


def test_not_a_sam() -> None:
    with pytest.raises(sc.errors.ModelError, match="not a SAM"):
        sc.summary(torch.nn.Linear(1, 1))
