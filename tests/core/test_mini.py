"""The shipped `mini`: its prompts mean something on photographs. Figures are in its card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.evaluate.accuracy import accuracies

FOLDER = Path(sc.core.__file__).parent / "mini"


@pytest.fixture(scope="module")
def mini() -> nn.Module:
    return sc.load("mini")


@pytest.fixture(scope="module")
def photos(shared: Path) -> sc.Dataset:
    """Photographs that training never saw."""
    return sc.data.open(f"{shared}/data/coco@val2017")[:6]


def test_files() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 20_000_000
    card = (FOLDER / "card.md").read_text()
    for part in ("COCO", "BSDS500", "examples/train_mini.py", "ellipse", "box", "point", "steps"):
        assert part in card


def test_it_loads_as_any_sam(mini: nn.Module) -> None:
    assert {p.dtype for p in mini.parameters()} == {torch.float32}
    assert not any(m.training for m in mini.modules())
    wanted = {k: v.shape for k, v in sc.build("mini").state_dict().items()}
    assert {k: v.shape for k, v in mini.state_dict().items()} == wanted
    assert sc.lineage(mini) == ()


def test_masks_mean_something(mini: nn.Module, photos: sc.Dataset) -> None:
    box, point, clicks = accuracies(
        mini, photos, ("box", "point", "clicks-3"), min_area=32**2, feedback="logits"
    )
    assert box.miou > 0.6
    assert point.miou > 0.3
    assert clicks.miou > point.miou + 0.05
