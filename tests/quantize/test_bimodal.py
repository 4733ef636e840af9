"""Keys with two peaks, folded into one; with it PTQ4SAM, which contains the fold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.errors import ConfigError, ModelError
from samcompress.quantize._bimodal import channel_signs, peaks, turn
from samcompress.quantize._fake import Rounded
from samcompress.quantize._uniform import Grid
from samcompress.quantize.bimodal import Bimodal
from samcompress.quantize.fake_quant import FakeQuant
from samcompress.quantize.ptq4_sam import PTQ4SAM

PLACES = (
    "mask_decoder.transformer.layers.0.cross_attn_token_to_image",
    "mask_decoder.transformer.layers.1.cross_attn_token_to_image",
    "mask_decoder.transformer.final_attn_token_to_image",
)


def scenes(count: int = 1) -> Any:
    return sc.shapes(count, size=(48, 64))


def planted(sam: nn.Module) -> nn.Module:
    """Keys around 8 and -8 where tokens look at the image, each channel on one side."""
    sam = copy.deepcopy(sam)
    for name in PLACES:
        keys: Any = sam.get_submodule(f"{name}.k_proj")
        signs = torch.where(torch.arange(len(keys.bias)) % 2 == 0, 8.0, -8.0)
        keys.bias.data = signs
    return sam


def answers(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    sample = scenes()[0]
    prompts = [sc.Prompt(box=o.box) for o in sample.instances]
    found = sc.predict(model, [sample.image], [prompts], multimask=True)[0]
    return found.logits, found.scores


def keys_of(model: nn.Module, name: str) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(f"{name}.k_proj").register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    answers(model)
    handle.remove()
    return seen[0]


def test_planted_peaks_are_found_and_folded_exactly(tiny_sam: nn.Module) -> None:
    sam = planted(tiny_sam)
    folded = Bimodal()(sam, data=scenes())
    turned = sc.lineage(folded)[-1].state["turned"]
    assert sorted(turned) == sorted(PLACES)
    for channels in turned.values():
        assert channels == [c for c in range(len(channels) * 2) if c % 2]
    assert all(map(torch.equal, answers(folded), answers(sam)))
    changed = {
        name.rpartition(".")[0]
        for name, value in folded.state_dict().items()
        if not torch.equal(value, sam.state_dict()[name])
    }
    assert changed == {f"{name}.{part}" for name in PLACES for part in ("q_proj", "k_proj")}


def test_four_bits_serve_folded_keys_better(tiny_sam: nn.Module) -> None:
    sam = planted(tiny_sam)
    folded = Bimodal()(sam, data=scenes())
    grid = Grid(4)
    for name in PLACES:
        errors = []
        for model in (sam, folded):
            keys = keys_of(model, name)
            rounded = grid.fake(keys, *grid.steps(keys.min(), keys.max()))
            errors.append(float((rounded - keys).square().mean()))
        assert errors[0] >= 3 * errors[1]


def test_a_second_fold_changes_nothing(tiny_sam: nn.Module) -> None:
    once = Bimodal()(planted(tiny_sam), data=scenes())
    again = Bimodal()(once, data=scenes())
    assert sc.lineage(again)[-1].state["turned"] == {}
    state = once.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_one_peak_is_left_alone(tiny_sam: nn.Module) -> None:
    same = Bimodal()(tiny_sam, data=scenes())
    assert sc.lineage(same)[-1].state["turned"] == {}
    state = tiny_sam.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in same.state_dict().items())


def test_peaks_by_construction() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=draw)
    sides = torch.where(torch.arange(20_000) % 2 == 0, 8.0, -8.0)
    assert peaks(x, 128, 0.01, 32) == 1
    assert peaks(x + sides, 128, 0.01, 32) == 2
    assert peaks(torch.cat([x - 20, x, x + 20]), 128, 0.01, 32) == 3
    assert peaks(torch.zeros(10), 128, 0.01, 32) == 1


def test_a_channel_of_mean_zero_keeps_its_sign() -> None:
    keys = torch.tensor([[[1.0, -2.0, 3.0], [-1.0, -2.0, 4.0]]])
    assert channel_signs(keys).tolist() == [1, -1, 1]


def test_signs_in_the_encoder_need_the_tables_of_positions(tiny_sam: nn.Module) -> None:
    """Why the encoder is left alone: relative positions meet the queries too."""
    attn = tiny_sam.image_encoder.blocks[0].attn
    width = attn.qkv.in_features
    one_head = torch.where(torch.arange(width // attn.num_heads) % 2 == 0, 1.0, -1.0)
    signs = torch.cat([one_head.repeat(2 * attn.num_heads), torch.ones(width)])
    x = torch.randn(1, 3, 3, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        true = attn(x)
        turn(attn.qkv, signs)
        naive = attn(x)
        attn.rel_pos_h.mul_(one_head)
        attn.rel_pos_w.mul_(one_head)
        aware = attn(x)
    assert (naive - true).norm() / true.norm() > 1e-3
    assert torch.equal(aware, true)


def test_ptq4sam_folds_then_rounds(tiny_sam: nn.Module) -> None:
    sam = planted(tiny_sam)
    step = PTQ4SAM(weight_bits=4, activation_bits=4, images=1)
    rounded = step(sam, data=scenes())
    state = sc.lineage(rounded)[-1].state
    assert sorted(state["turned"]) == sorted(PLACES)
    assert any(isinstance(m, Rounded) for m in rounded.modules())
    without = FakeQuant(weight_bits=4, activation_bits=4, images=1)(sam, data=scenes())
    for name in PLACES:
        # Peaks at -8 and 8 become one, so half the steps do.
        steps = [float(m.get_submodule(f"{name}.dot.right").scale) for m in (rounded, without)]
        assert steps[0] < 0.6 * steps[1]


def test_errors(tiny_sam: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"peak_height is out of range"):
        Bimodal(peak_height=1.0)
    with pytest.raises(ConfigError, match=r"peak_distance is out of range(.|\n)*>= 1"):
        Bimodal(peak_distance=0)
    packed = sc.quantize.Int8Weights(min_size=0)(tiny_sam)
    with pytest.raises(ModelError, match="quantized already"):
        Bimodal()(packed, data=scenes())
    tiny_sam.mask_decoder.transformer = nn.Identity()
    with pytest.raises(ModelError, match="no attention of tokens to the image"):
        Bimodal().check(tiny_sam)
