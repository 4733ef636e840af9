"""What every registered technique must do, whatever it is."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, Case
from conftest import random_sam
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import samcompress as sc
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# A teacher of other weights: a student that equals its teacher has nothing to learn.
RUN = {
    "data": sc.shapes(4, seed=3, size=(60, 80)),
    "teacher": random_sam(seed=5),
    "progress": False,
}
PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """Input and output of each technique, made once."""
    pairs = {}
    for case in CASES:
        sam = start(case)
        pairs[case.name] = (sam, apply(case, sam))
    return pairs


def start(case: Case) -> torch.nn.Module:
    """What a technique is tried on."""
    sam = random_sam(depth=case.depth)
    first = next((row for row in CASES if row.name == case.after), None)
    return sam if first is None else apply(first, sam)


def apply(case: Case, sam: torch.nn.Module) -> torch.nn.Module:
    """What a technique makes of it; one that mends another's result learns from the whole SAM."""
    run = RUN if case.after is None else RUN | {"teacher": random_sam(depth=case.depth)}
    return sc.get(case.name, **case.params)(sam, **run)


def logits(model: torch.nn.Module) -> torch.Tensor:
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    return sc.predict(model, [image], [PROMPTS], multimask=True)[0].logits


def test_every_technique_has_one_row() -> None:
    assert sorted(case.name for case in CASES) == sorted(sc.list_transforms())


@each
def test_input_is_untouched(case: Case) -> None:
    sam = start(case)
    steps = sc.lineage(sam)
    sam.prompt_encoder.requires_grad_(False)
    sam.mask_decoder.train()
    hash_before = fingerprint(sam)
    flags = {n: m.training for n, m in sam.named_modules()}
    trainable = {n: p.requires_grad for n, p in sam.named_parameters()}
    random_state = torch.get_rng_state()
    small = apply(case, sam)
    assert fingerprint(sam) == hash_before
    assert {n: m.training for n, m in sam.named_modules()} == flags
    assert {n: p.requires_grad for n, p in sam.named_parameters()} == trainable
    assert all(p.grad is None for p in (*sam.parameters(), *small.parameters()))
    assert torch.equal(torch.get_rng_state(), random_state)
    for model in (sam, small):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
    kept = {n: p for n, p in small.named_parameters() if n in trainable}
    assert {n: p.requires_grad for n, p in kept.items()} == {n: trainable[n] for n in kept}
    assert small.mask_decoder.training or case.name.startswith("compile")
    assert type(small) is type(sam)
    assert sc.lineage(sam) == steps


@each
def test_it_changes_what_it_says(case: Case, made: dict) -> None:
    sam, small = made[case.name]
    facts = sc.lineage(small)[-1].facts
    for what in case.shrinks:
        assert facts["after"][what] < facts["before"][what]
    if case.exact is not None:
        torch.testing.assert_close(logits(small), logits(sam), rtol=0, atol=case.exact)


@each
def test_predictor_and_generator_work_unchanged(case: Case, made: dict) -> None:
    _, small = made[case.name]
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    predictor = SamPredictor(small)
    predictor.set_image(image)
    side = small.prompt_encoder.mask_input_size
    for asked in (
        {"point_coords": np.array([[20, 30], [5, 5]]), "point_labels": np.array([1, 0])},
        {"box": np.array([5, 8, 60, 50])},
        {"box": np.array([5, 8, 60, 50]), "mask_input": np.ones((1, *side), np.float32)},
    ):
        for multimask in (False, True):
            masks, scores, low = predictor.predict(**asked, multimask_output=multimask)
            assert masks.shape == (3 if multimask else 1, 60, 80)
            assert np.isfinite(scores).all()
            assert low.shape[1:] == side
    generator = SamAutomaticMaskGenerator(
        small, points_per_side=2, pred_iou_thresh=-9, stability_score_thresh=-1
    )
    assert len(generator.generate(image)) > 0


@each
def test_deterministic(case: Case, made: dict) -> None:
    sam, small = made[case.name]
    again = apply(case, sam)
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=case.tolerance)
    assert sc.lineage(again)[-1].transform == sc.lineage(small)[-1].transform


@each
def test_recipe_round_trip(case: Case) -> None:
    transform = sc.get(case.name, **case.params)
    pipe = sc.Pipeline([transform])
    again = sc.Pipeline.from_json(pipe.to_json())
    assert again == pipe
    assert hash(again) == hash(pipe)
    assert eval(repr(transform), {"sc": sc}) == transform  # the text form is the code that makes it
    assert eval(repr(pipe), {"sc": sc}) == pipe
    assert transform.name in transform._repr_html_()


@each
def test_deepcopy(case: Case, made: dict) -> None:
    _, small = made[case.name]
    twin = copy.deepcopy(small)
    assert torch.equal(logits(twin), logits(small))
    assert sc.lineage(twin) == sc.lineage(small)


@each
def test_state_is_plain_json(case: Case, made: dict) -> None:
    step = sc.lineage(made[case.name][1])[-1]
    assert json.loads(json.dumps(step.state)) == step.state


LOAD = """
import json, sys, torch, samcompress as sc
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = sc.load(folder)
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    prompts = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
    found = sc.predict(model, [image], [prompts], multimask=True)[0].logits
    torch.save(found, folder + "/../" + folder.split("/")[-1] + ".out")
    assert sc.lineage(model)[-1].transform.name == folder.split("/")[-1]
"""


def test_saved_and_loaded_in_a_new_process(made: dict, tmp_path: Path) -> None:
    folders = []
    for case in CASES:
        sc.save(made[case.name][1], tmp_path / case.name)
        folders.append(str(tmp_path / case.name))
    subprocess.run([sys.executable, "-c", LOAD, *folders], check=True)
    for case in CASES:
        found = torch.load(tmp_path / f"{case.name}.out", weights_only=True)
        expected = logits(made[case.name][1])
        torch.testing.assert_close(found, expected, rtol=0, atol=case.tolerance)


@each
def test_twice(case: Case, made: dict) -> None:
    _, small = made[case.name]
    if case.twice is None:
        assert len(sc.lineage(apply(case, small))) == len(sc.lineage(small)) + 1
    else:
        with pytest.raises(getattr(errors, case.twice), match=case.name.replace(".", r"\.")):
            apply(case, small)


@each
def test_not_a_sam(case: Case) -> None:
    with pytest.raises(errors.ModelError, match="not a SAM"):
        sc.get(case.name, **case.params)(torch.nn.Linear(2, 2), data=RUN["data"])


@each
def test_needs_data(case: Case) -> None:
    step = sc.get(case.name, **case.params)
    if step.needs_data:
        with pytest.raises(errors.DataError, match="needs images"):
            step(start(case))
        with pytest.raises(errors.DataError, match="no usable image"):
            step(start(case), data=sc.shapes(4)[:0])


@each
def test_unknown_field(case: Case) -> None:
    with pytest.raises(errors.ConfigError, match="no field 'rattio'"):
        sc.get(case.name, rattio=1)
