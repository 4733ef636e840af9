"""The shipped `tiny`: its prompts mean something. Measured figures are in its card."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import samcompress as sc
from samcompress.core.data import Dataset
from samcompress.core.predict import decode, encode
from samcompress.core.prompt import Prompt
from samcompress.evaluate.accuracy import accuracies

FOLDER = Path(sc.core.__file__).parent / "tiny"
LARGE = 400  # a fortieth of the image


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    """Scenes of a seed that training never saw."""
    return sc.shapes(24, seed=1_000_007)


def test_files() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 1_300_000
    card = (FOLDER / "card.md").read_text()
    for part in ("Apache-2.0", "examples/train_tiny.py", "shapes", "box", "point", "steps"):
        assert part in card


def test_it_loads_as_any_sam(trained: nn.Module) -> None:
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert not any(m.training for m in trained.modules())
    wanted = {k: v.shape for k, v in sc.build("tiny").state_dict().items()}
    assert {k: v.shape for k, v in trained.state_dict().items()} == wanted


def test_masks_mean_something(trained: nn.Module, scenes: Dataset) -> None:
    box, point, clicks = accuracies(
        trained, scenes, ("box", "point", "clicks-3"), min_area=LARGE, feedback="logits"
    )
    # An ellipse in the box has 0.6, a disc around the point 0.2.
    assert box.miou > 0.7
    assert point.miou > 0.65
    assert clicks.miou > point.miou + 0.01
    three, best = (
        accuracies(trained, scenes, ("point",), min_area=LARGE, choice=choice)[0]
        for choice in ("predicted", "oracle")
    )
    assert best.miou > three.miou + 0.01
    assert three.miou > 0.65


def test_scores_rank_masks(trained: nn.Module, scenes: Dataset) -> None:
    for choice in ("single", "predicted"):
        (found,) = accuracies(trained, scenes, ("point",), choice=choice)
        rank = spearmanr([r.score for r in found.records], [r.iou for r in found.records])
        assert rank.statistic > 0.5


def test_a_mask_is_heard(trained: nn.Module, scenes: Dataset) -> None:
    """The mask of an object, sent along with a point, makes the point's mask better."""
    gained = []
    for scene in scenes[:8]:
        (embedding,) = encode(trained, [scene.image])
        for thing in (i for i in scene.instances if i.area >= LARGE):
            y, x = (int(v[len(v) // 2]) for v in np.nonzero(thing.mask))
            box = decode(trained, embedding, [Prompt(box=thing.box)])
            plain, helped = (
                decode(trained, embedding, [Prompt(points=[[x, y]], mask=mask)])
                for mask in (None, box.logits[0])
            )
            gained.append(iou(helped, thing.mask) - iou(plain, thing.mask))
    assert len(gained) > 20
    assert np.mean(gained) > 0.05


def iou(found: sc.Prediction, truth: np.ndarray) -> float:
    mask = found.masks[0, 0].numpy()
    return (mask & truth).sum() / (mask | truth).sum()


def test_position_tables_are_used(trained: nn.Module, scenes: Dataset) -> None:
    """So that a technique that loses them is seen to."""
    image = [scenes[0].image]
    (whole,) = encode(trained, image)
    for part in ("rel_pos", "pos_embed"):
        without = copy.deepcopy(trained)
        with torch.no_grad():
            for name, p in without.image_encoder.named_parameters():
                if part in name:
                    p.zero_()
        (embedding,) = encode(without, image)
        change = (embedding.features - whole.features).norm() / whole.features.norm()
        assert change > 0.02
