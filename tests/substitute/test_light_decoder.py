"""A lighter mask decoder: which weights stay, what narrow attention computes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from segment_anything.modeling.transformer import Attention
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.evaluate.macs import decoder_macs
from samcompress.substitute.conventions import Conventions
from samcompress.substitute.light_decoder import LightDecoder, narrow_attention, narrow_mlp

PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
STATE = {"layers": [2, 1], "mlp_dim": 24, "attention_dim": 8}


def ask(model: Any) -> Any:
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    return sc.predict(model, [image], [PROMPTS], multimask=True)[0]


def test_first_layer_stays_as_it_was() -> None:
    sam: Any = random_sam()
    light: Any = LightDecoder()(sam, progress=False)
    old, new = sam.mask_decoder.state_dict(), light.mask_decoder.state_dict()
    assert {n for n in old if n not in new} == {n for n in old if "transformer.layers.1." in n}
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert light.mask_decoder.transformer.depth == 1
    assert sc.lineage(light)[0].state == {"layers": [2, 1], "mlp_dim": None, "attention_dim": None}


def test_all_at_once_saved_and_loaded(tmp_path: Path) -> None:
    sam = random_sam()
    sam.mask_decoder.requires_grad_(False)
    light: Any = LightDecoder(mlp_dim=24, attention_dim=8)(sam, progress=False)
    assert sc.lineage(light)[0].state == STATE
    (layer,) = light.mask_decoder.transformer.layers
    assert layer.mlp.lin1.out_features == layer.mlp.lin2.in_features == 24
    assert layer.cross_attn_token_to_image.q_proj.weight.shape == (8, 32)
    assert layer.cross_attn_image_to_token.out_proj.weight.shape == (32, 8)
    assert layer.self_attn.q_proj.weight.shape == (32, 32)
    assert light.mask_decoder.transformer.final_attn_token_to_image.internal_dim == 8
    assert not any(p.requires_grad for p in light.mask_decoder.parameters())
    assert decoder_macs(light, 1) < decoder_macs(sam, 1)
    sc.save(light, tmp_path / "model")
    again = sc.load(tmp_path / "model")
    assert torch.equal(ask(again).logits, ask(light).logits)


def test_sizes_of_sam() -> None:
    """The numbers of the docstring."""
    least = {"depth": 1, "embed_dim": 12, "num_heads": 1, "global_attn_indexes": ()}
    sam = sc.build("vit_b", **least)
    expected = {
        (): (4.06, 1.81),
        (("depth", 1),): (2.48, 1.25),
        (("mlp_dim", 512),): (1.69, 1.25),
        (("mlp_dim", 512), ("attention_dim", 64)): (1.49, 0.83),
    }
    for fields, (parameters, macs) in expected.items():
        light = LightDecoder(**dict(fields))(sam, progress=False) if fields else sam
        count = sum(p.numel() for p in light.mask_decoder.parameters())
        assert (round(count / 1e6, 2), round(decoder_macs(light, 1) / 1e9, 2)) == (parameters, macs)


@torch.no_grad()
def test_narrow_mlp_is_the_mlp_without_its_least_units() -> None:
    sam: Any = random_sam()
    mlp = sam.mask_decoder.transformer.layers[0].mlp
    score = mlp.lin1.weight.norm(dim=1) * mlp.lin2.weight.norm(dim=0)
    dropped = score.argsort()[:100]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    muted = mlp.lin2.weight.clone()
    muted[:, dropped] = 0
    expected = torch.relu(x @ mlp.lin1.weight.T + mlp.lin1.bias) @ muted.T + mlp.lin2.bias
    narrow_mlp(mlp, len(score) - 100)
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_narrow_attention_is_attention_without_its_least_channels() -> None:
    """By hand: 2 heads of 4 channels, of which 2 each say nothing; then nothing is lost."""
    attention = Attention(16, 2, downsample_rate=2)
    g = torch.Generator().manual_seed(0)
    for p in attention.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
    silent, mute = [0, 2, 5, 6], [1, 2, 4, 7]
    for rows, linear in ((silent, attention.k_proj), (mute, attention.v_proj)):
        linear.weight[rows] = linear.bias[rows] = 0
    tokens, image = torch.randn(1, 3, 16, generator=g), torch.randn(1, 9, 16, generator=g)
    expected = attention(tokens, image, image)
    narrow_attention(attention, 4)
    assert attention.q_proj.out_features == attention.out_proj.in_features == 4
    torch.testing.assert_close(attention(tokens, image, image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "step",
    [
        Conventions(of="tiny_sam"),
        Conventions(of="efficient_sam"),
        sc.substitute.HQ(),
    ],
    ids=lambda step: step.name + getattr(step, "of", ""),
)
def test_on_other_decoders(step: Any, tmp_path: Path) -> None:
    light = (step | LightDecoder(mlp_dim=24, attention_dim=8))(random_sam(), progress=False)
    assert ask(light).masks.shape == (2, 3, 60, 80)
    sc.save(light, tmp_path / "model")
    assert torch.equal(ask(sc.load(tmp_path / "model")).logits, ask(light).logits)


def test_training_recovers_it(trained: nn.Module) -> None:
    chain = LightDecoder(mlp_dim=64) | sc.distill.PromptLoop(steps=6, lr=1e-3, batch_size=4)
    light = chain(trained, data=sc.shapes(8), progress=False)
    facts = sc.lineage(light)[-1].state
    assert facts["loss_after"] < facts["loss_before"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"depth": 3},
            "depth is more than the decoder has.\n"
            "  where     mask_decoder.transformer\n"
            "  got       3\n"
            "  expected  <= 2",
        ),
        (
            {"mlp_dim": 4096},
            "mlp_dim is more than the decoder has.\n"
            "  where     mask_decoder.transformer\n"
            "  got       4096\n"
            "  expected  <= 128",
        ),
        (
            {"attention_dim": 6},
            "attention_dim does not divide into the heads.\n"
            "  where     mask_decoder.transformer\n"
            "  got       6\n"
            "  expected  a multiple of 4",
        ),
    ],
)
def test_what_the_decoder_has_not(fields: dict[str, int], message: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        LightDecoder(**fields)(random_sam())
    assert str(caught.value) == f"substitute.light_decoder: {message}"


def test_nothing_to_do() -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        LightDecoder(depth=2)(random_sam())
    assert str(caught.value) == (
        "substitute.light_decoder: the decoder is as light as that already.\n"
        "  where     mask_decoder.transformer\n"
        "  got       depth 2, mlp_dim 128, attention_dim 16\n"
        "  try       less of one of these, or leave this step out"
    )


def test_fields_out_of_range() -> None:
    with pytest.raises(errors.ConfigError, match="depth is out of range") as caught:
        LightDecoder(depth=0)
    assert "expected  >= 1" in str(caught.value)


def test_replaced_layers() -> None:
    int8 = sc.quantize.Int8Weights(min_size=0)(random_sam(), progress=False)
    with pytest.raises(errors.ModelError) as caught:
        LightDecoder().check(int8)
    assert str(caught.value) == (
        "substitute.light_decoder does not know this mask decoder's transformer.\n"
        "  where     mask_decoder.transformer.layers.0.self_attn.q_proj\n"
        "  got       samcompress.quantize._layers.Int8Linear\n"
        "  expected  segment_anything's two-way transformer with plain linear layers\n"
        "  try       put this step before those that replace modules"
    )
