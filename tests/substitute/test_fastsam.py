"""FastSAM's network: reference outputs, sizes, folding, official files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norms import alive
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo_goldens import Reference, eps_of, error, parameters

import samcompress as sc
from samcompress.core import zoo
from samcompress.core._weights import read_state
from samcompress.core.errors import CheckpointError
from samcompress.substitute import _official_fastsam
from samcompress.substitute._fastsam import CONFIGS, FastSamConfig, build, convert, make
from samcompress.substitute._proposals import Letterbox

SMALL = FastSamConfig(channels=(4, 8, 8, 16, 16), blocks=(1, 2, 1, 1), neck=1, prototypes=4, bins=5)
KEYS = ("boxes", "score", "coef", "proto")
SLOW = pytest.mark.slow


def random(seed: int = 0, **sizes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return alive(build(replace(SMALL, **sizes), 64), seed)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- reference outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fused"),
    [("s", False), pytest.param("s", True, marks=SLOW), pytest.param("x", False, marks=SLOW)],
)
def test_reference(size: str, fused: bool, shared: Path) -> None:
    reference = Reference.of(f"fastsam_{size}", shared)
    stripped = {name.removeprefix("model."): t for name, t in reference.state().items()}
    model = make(CONFIGS[size], convert(stripped))
    if fused:
        model.fuse()
    image = reference.image()
    pixels = Letterbox.of(image.shape[:2], 1024, model.multiple).pixels(image)
    assert tuple(pixels[None].shape) == tuple(reference.arrays["input_shape"])
    assert reference.compare("input", "input", pixels.numpy()) == 0
    with torch.no_grad():
        found = model(pixels[None])
    for key, part in zip(KEYS, found, strict=True):
        assert tuple(part[0].shape) == tuple(reference.arrays[f"{key}_shape"])
        assert reference.compare("flat", key, part[0].numpy()) < 2e-6, key


@pytest.mark.parametrize("size", CONFIGS)
def test_sizes(size: str, shared: Path) -> None:
    manifest = Reference.of(f"fastsam_{size}", shared).manifest
    with torch.device("meta"):
        model = build(CONFIGS[size]).eval()
    assert parameters(model) == manifest["parameters"]["total"]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(manifest["macs"]["input_shape"], device="meta"))
    macs = counter.get_total_flops() / 2e9
    assert macs == pytest.approx(manifest["macs"]["encoder_gmacs"], rel=1e-3)
    assert eps_of(model, "BatchNorm2d") == {manifest["config"]["bn_eps"]} == {1e-3}
    rows = {name: tuple(shape) for name, shape, *_ in manifest["tensors"]}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == rows
    entry = zoo.find(f"fast_sam_{size}")
    assert entry.parameters == parameters(model)
    assert entry.macs == pytest.approx(macs * 1024 / 768, rel=1e-3)
    stripped = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    assert zoo.recognise(stripped) is entry


# --- the network ----------------------------------------------------------------------------------


def test_a_box_by_hand() -> None:
    model = random(bins=16)
    head = model.model["22"]
    for towers in (head.cv2, head.cv3, head.cv4):
        for tower in towers:
            torch.nn.init.zeros_(tower[2].weight)
            torch.nn.init.zeros_(tower[2].bias)
    logits = torch.full((4, 16), -50.0)
    for side, distance in enumerate((3, 1, 4, 2)):  # left, top, right, bottom, in cells
        logits[side, distance] = 50
    head.cv2[1][2].bias.data = logits.flatten()
    with torch.no_grad():
        boxes, scores, coefficients, prototypes = model(numbers(2, 3, 64, 96))
    assert boxes.shape == (2, 4, 96 + 24 + 6)
    assert prototypes.shape == (2, 4, 16, 24)
    assert scores.unique().tolist() == [0.5]
    assert coefficients.abs().max() == 0
    # Cell (1, 2) of the second map, of stride 16: its centre is at x = 40, y = 24.
    cell = boxes[0, :, 96 + 1 * 6 + 2]
    x0, x1, y0, y1 = 40 - 3 * 16, 40 + 4 * 16, 24 - 1 * 16, 24 + 2 * 16
    assert torch.allclose(cell, torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]))
    # All bins alike: the mean distance of 0...15 to each side.
    assert torch.allclose(boxes[0, :, 0], torch.tensor([4.0, 4.0, 120.0, 120.0]))


def test_other_sizes_batches_and_types() -> None:
    model = random()
    x = numbers(2, 3, 32, 96)
    with torch.no_grad():
        found = model(x)
        assert [tuple(part.shape) for part in found] == [
            (2, 4, 63), (2, 1, 63), (2, 4, 63), (2, 4, 8, 24)
        ]  # fmt: skip
        close([torch.cat(parts) for parts in zip(model(x[:1]), model(x[1:]), strict=True)], found)
        assert all(map(torch.equal, copy.deepcopy(model)(x), found))
        wide = copy.deepcopy(model).double()(x.double())
        assert {part.dtype for part in wide} == {torch.float64}
        close(found, wide)


def test_every_parameter_learns_and_the_graph_is_traceable() -> None:
    model = random()
    x = numbers(1, 3, 64, 64)
    graph = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        close(graph(x), model(x))
    sum(part.square().sum() for part in model.train()(numbers(2, 3, 64, 64))).backward()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.22.dfl.conv.weight"]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_fused_is_the_same_function() -> None:
    model = random()
    fused = copy.deepcopy(model)
    fused.fuse()
    with torch.no_grad():
        x = numbers(2, 3, 64, 64)
        close(fused(x), model(x))
    assert not eps_of(fused, "BatchNorm2d")
    again = random(seed=3)
    again.fuse()
    again.load_state_dict(fused.state_dict(), strict=True)
    again.fuse()  # nothing left to do
    with torch.no_grad():
        assert all(map(torch.equal, again(x), fused(x)))


# --- weights --------------------------------------------------------------------------------------


def pickled(state: dict[str, Tensor]) -> torch.nn.Module:
    """Modules with these tensors, as a file of ``torch.save(module)`` holds them."""
    whole = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        part = whole
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, torch.nn.Module())
            part = getattr(part, step)
        part.register_buffer(last, tensor)
    return whole


def test_an_official_file(tmp_path: Path) -> None:
    entry = zoo.find("fast_sam_s")
    state = entry.build(seed=1).half().state_dict()
    torch.save({"epoch": -1, "model": pickled(state), "ema": None}, tmp_path / "FastSAM-s.pt")
    read = read_state(tmp_path / "FastSAM-s.pt")
    assert zoo.recognise(read, "FastSAM-s.pt") is entry
    found = zoo.assemble(entry, read)
    assert not found.training
    assert {t.dtype for t in found.parameters()} == {torch.float32}
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(t, state[name].to(t.dtype)) for name, t in found.state_dict().items())


def test_tensors_that_do_not_fit() -> None:
    state = random().state_dict()
    del state["model.9.cv1.conv.weight"]
    state["model.0.conv.weight"] = torch.zeros(4, 3, 1, 1)
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        make(SMALL, convert(state))
    assert str(caught.value).startswith("the tensors do not fit.")
    for part in ("missing model.9.cv1.conv.weight", "unknown extra", "wrong model.0.conv.weight",
                 "a FastSAM of widths (4, 8, 8, 16, 16)"):  # fmt: skip
        assert part in str(caught.value)


def test_random_weights_by_name() -> None:
    entry = zoo.find("fast_sam_s")
    assert entry.licence == "AGPL-3.0"
    assert _official_fastsam.UPSTREAM in entry.files[0].page
    state = torch.get_rng_state()
    one, two = (entry.build(seed=seed).get_parameter("model.0.conv.weight") for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, two)


def test_proposes_on_a_picture() -> None:
    model = random()
    for tower in model.model["22"].cv4:
        tower[2].requires_grad_(False)
        tower[2].weight.neg_()  # these masks would all be empty
        tower[2].bias.neg_()
    scene = sc.shapes(1, size=(40, 72))[0]
    found = model.propose(scene.image, conf=0, iou=0.7, max_det=20)
    assert 0 < len(found) <= 20
    assert found.masks.shape == (len(found), 40, 72)
    assert (np.diff(found.scores) <= 0).all()
    assert error(found.scores, model.propose(scene.image, conf=0, iou=0.7, max_det=20).scores) == 0
    assert len(model.propose(scene.image, conf=1)) == 0
