"""EfficientFormerV2's trunk against timm's, whose tensor names it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from norms import alive
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from samcompress.substitute._efficientformer import CONFIGS, Attention, build

timm = pytest.importorskip("timm")

# Millions of parameters and GMAC at 224 pixels with the classifiers: arXiv 2212.08059, table 1.
PUBLISHED = {"s0": (3.5, 0.40), "s1": (6.1, 0.65), "s2": (12.6, 1.25), "l": (26.1, 2.56)}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def reference(variant: str, size: int = 64) -> Any:
    """timm's network none of whose parts does nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(f"efficientformerv2_{variant}", num_classes=0, img_size=size)
        for name, parameter in network.named_parameters():
            if name.endswith(("attention_biases", "gamma")):
                parameter.data.normal_()
    return alive(network)


@pytest.mark.parametrize("variant", CONFIGS)
def test_tensors_are_those_of_timm(variant: str) -> None:
    with torch.device("meta"):
        ours = build(CONFIGS[variant], 224).state_dict()
    theirs = timm.create_model(f"efficientformerv2_{variant}", num_classes=0).state_dict()
    assert {n: t.shape for n, t in ours.items() if not n.startswith("neck.")} == {
        n: t.shape for n, t in theirs.items() if not n.startswith("norm.")
    }


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 160])
def test_features_are_those_of_timm(size: int) -> None:
    theirs = reference("s0", size)
    ours = build(CONFIGS["s0"], size).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = numbers(2, 3, size, size)
    expected = theirs.forward_intermediates(x, intermediates_only=True)
    for found, level in zip(ours.levels(x), expected, strict=True):
        assert (found - level).abs().max() <= 1e-5 * level.abs().max()


@pytest.mark.parametrize("variant", CONFIGS)
def test_published_sizes(variant: str) -> None:
    with torch.device("meta"):
        encoder = build(CONFIGS[variant], 224)
        trunk = nn.Sequential(encoder.stem, encoder.stages).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trunk(torch.empty(1, 3, 224, 224))
    millions, gmac = PUBLISHED[variant]
    width = CONFIGS[variant].channels[3]
    classifier = 2 * (width + 1) * 1000 + 2 * width
    found = sum(p.numel() for p in trunk.parameters()) + classifier
    assert found / 1e6 == pytest.approx(millions, rel=0.03)
    assert (counter.get_total_flops() / 2 + classifier) / 1e9 == pytest.approx(gmac, rel=0.04)


def test_bias_of_each_distance_by_hand() -> None:
    encoder = build(CONFIGS["s0"], 64)
    mixers = [m for m in encoder.modules() if isinstance(m, Attention)]
    assert [m.cells for m in mixers] == [2, 2, 4, 2, 2]
    whole, halving = mixers[0], mixers[2]
    whole.attention_biases.data[0] = torch.tensor([0.0, 1.0, 10.0, 11.0])  # 10 dy + dx
    assert whole.bias()[0, 0].tolist() == [
        [0.0, 1.0, 10.0, 11.0],
        [1.0, 0.0, 11.0, 10.0],
        [10.0, 11.0, 0.0, 1.0],
        [11.0, 10.0, 1.0, 0.0],
    ]
    rows = torch.arange(4.0)
    halving.attention_biases.data[0] = (10 * rows[:, None] + rows).flatten()
    found = halving.bias()
    assert found.shape == (1, 8, 4, 16)
    # Queries are at (0, 0), (0, 2), (2, 0), (2, 2).
    assert found[0, 0, 1].tolist() == [10.0 * y + abs(x - 2.0) for y in range(4) for x in range(4)]


def test_resized_bias_keeps_near_and_far() -> None:
    mixer = build(CONFIGS["s0"], 96).stages[3].downsample.attn
    table = numbers(8, 36)
    mixer.attention_biases.data = table
    mixer.attention_biases.requires_grad_(False)
    mixer.resize(12)
    assert not mixer.attention_biases.requires_grad
    assert mixer.attention_biases.shape == (8, 144)
    for old, new in ((0, 0), (5, 11), (30, 132), (35, 143)):  # corners of both tables
        torch.testing.assert_close(mixer.attention_biases[:, new], table[:, old])
    assert mixer.bias().shape == (1, 8, 36, 144)


@torch.no_grad()
def test_weights_loaded_after_a_call_count() -> None:
    encoder = build(CONFIGS["s0"], 64).eval()
    x = numbers(1, 3, 64, 64)
    encoder(x)
    state = copy.deepcopy(encoder.state_dict())
    for name, tensor in state.items():
        if name.endswith(("attention_biases", "gamma")):
            tensor.normal_(generator=torch.Generator().manual_seed(2))
    encoder.load_state_dict(state)
    fresh = build(CONFIGS["s0"], 64).eval()
    fresh.load_state_dict(state)
    assert torch.equal(encoder(x), fresh(x))
