"""Simulated quantization by plain statistics, and what all simulations have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import samcompress as sc
from samcompress.core.errors import ConfigError, DataError, ModelError, NoEffectError
from samcompress.quantize._fake import (
    FakeConv2d,
    FakeDecoderAttention,
    FakeEncoderAttention,
    FakeLinear,
    Rounded,
    Site,
    after_gelu,
    attentions,
    replace,
)
from samcompress.quantize._quantizers import Affine, Hybrid, Log, Quantizer
from samcompress.quantize.fake_quant import FakeQuant

SMALL: dict[str, Any] = {"images": 2}


def scenes(count: int = 2) -> Any:
    return sc.shapes(count, size=(48, 64))


def prediction(model: nn.Module) -> Any:
    sample = scenes(1)[0]
    prompts = [sc.Prompt(box=o.box) for o in sample.instances]
    return sc.predict(model, [sample.image], [prompts])[0]


def features(model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model.image_encoder(torch.randn(1, 3, 64, 64, generator=draw))


def test_attention_is_the_same_until_something_is_rounded(tiny_sam: nn.Module) -> None:
    true = prediction(tiny_sam)
    twin = copy.deepcopy(tiny_sam)
    every = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear)]
    names = attentions(twin, every)
    assert len(names) == 2 + 7  # blocks of the encoder, attentions of the decoder
    replace(twin, {}, names)
    kinds = [type(twin.get_submodule(name)) for name in names]
    assert kinds == [FakeEncoderAttention] * 2 + [FakeDecoderAttention] * 7
    assert torch.allclose(prediction(twin).logits, true.logits, atol=1e-5)
    assert torch.equal(features(twin), features(tiny_sam))
    assert twin.state_dict().keys() == tiny_sam.state_dict().keys()


def test_more_bits_come_nearer(tiny_sam: nn.Module) -> None:
    true = features(tiny_sam)

    def error(bits: int) -> float:
        step = FakeQuant(weight_bits=bits, activation_bits=bits, **SMALL)
        return float((features(step(tiny_sam, data=scenes())) - true).norm() / true.norm())

    errors = {bits: error(bits) for bits in (8, 6, 4)}
    assert 0 < errors[8] < 0.05
    assert errors[8] < errors[6] < errors[4]


def test_every_weight_is_on_its_grid_and_the_rest_is_untouched(tiny_sam: nn.Module) -> None:
    before = copy.deepcopy(tiny_sam.state_dict())
    rounded = FakeQuant(weight_bits=4, activation_bits=4, **SMALL)(tiny_sam, data=scenes())
    assert all(torch.equal(v, before[k]) for k, v in tiny_sam.state_dict().items())
    layers = {n: m for n, m in rounded.named_modules() if isinstance(m, Rounded)}
    assert {type(m) for m in layers.values()} == {FakeLinear, FakeConv2d}
    for name, layer in layers.items():
        codes = layer.weight / layer.along(layer.weight_scale) + layer.along(layer.weight_zero)
        assert (codes - codes.round()).abs().max() < 1e-4, name
        assert torch.equal(layer.rounded_weight(), layer.weight), name
        assert isinstance(layer.input, Affine), name
    changed = {k for k, v in rounded.state_dict().items() if k in before and v.ne(before[k]).any()}
    assert changed == {f"{name}.weight" for name in layers}
    for part in ("patch_embed", "pos_embed", "rel_pos", "norm", "prompt_encoder", "hypernetworks"):
        assert any(part in name for name in before)
        assert not any(part in name for name in changed)
    assert {n.split(".")[0] for n in layers} == {"image_encoder", "mask_decoder"}


def test_saved_rebuilt_and_copied_bit_for_bit(tiny_sam: nn.Module, tmp_path: Any) -> None:
    step = FakeQuant(weight_bits=5, softmax="auto", gelu="hybrid", **SMALL)
    rounded = step(tiny_sam, data=scenes())
    kinds = {type(m) for m in rounded.modules() if isinstance(m, Quantizer)}
    assert {Affine, Hybrid} <= kinds
    true = prediction(rounded)
    sc.save(rounded, tmp_path / "model")
    for other in (sc.load(tmp_path / "model"), copy.deepcopy(rounded), rounded):
        assert torch.equal(prediction(other).logits, true.logits)
    files = {p.suffix for p in (tmp_path / "model").iterdir()}
    assert files <= {".safetensors", ".json", ".md"}


def test_the_same_twice_and_from_the_work_folder(tiny_sam: nn.Module, tmp_path: Any) -> None:
    step = FakeQuant(observer="percentile", **SMALL)
    models = [step(tiny_sam, data=scenes(), workdir=w) for w in (None, tmp_path, tmp_path)]
    assert len(list(tmp_path.iterdir())) == 1
    first = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


def test_the_work_folder_knows_models_of_equal_weights_apart(
    tiny_sam: nn.Module, tmp_path: Any
) -> None:
    step = FakeQuant(**SMALL, products=False)
    for size in (3, 5):
        near = sc.attention.Neighborhood(size=size)(tiny_sam)
        step(near, data=scenes(), workdir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_images_that_cannot_be_read(tiny_sam: nn.Module, tmp_path: Any) -> None:
    Image.fromarray(scenes()[0].image).save(tmp_path / "a.png")
    photos = sc.data.open(tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    for step in (FakeQuant(), sc.quantize.Int4Weights(method="gptq", group_size=16)):
        with pytest.raises(DataError, match=r"none could be read(.|\n)*1 samples"):
            step(tiny_sam, data=photos)


def test_what_the_gelu_of_an_mlp_gives() -> None:
    class Mlp(nn.Module):
        def __init__(self, act: nn.Module, last: str) -> None:
            super().__init__()
            self.act = act
            self.add_module(last, nn.Linear(2, 2))

    def found(act: nn.Module, last: str, role: Any = "input") -> bool:
        return after_gelu(nn.Sequential(Mlp(act, last)), Site("", role, f"0.{last}"))

    assert found(nn.GELU(), "lin2")
    assert found(nn.GELU(), "fc2")
    assert not found(nn.ReLU(), "lin2")
    assert not found(nn.GELU(), "lin1")


def test_bfloat16_keeps_codes_and_steps(tiny_sam: nn.Module) -> None:
    rounded = FakeQuant(**SMALL)(tiny_sam, data=scenes())
    half = copy.deepcopy(rounded).bfloat16()
    for name, layer in rounded.named_modules():
        if not isinstance(layer, Rounded):
            continue
        other: Any = half.get_submodule(name)
        assert other.weight_scale.dtype == torch.float32
        assert torch.equal(other.weight_scale, layer.weight_scale)
        codes = [(w.weight.float() / w.along(w.weight_scale)).round() for w in (layer, other)]
        assert (codes[0] - codes[1]).abs().max() <= 1  # 8 bits just fit into bfloat16's 8


def test_weights_alone_need_no_data(tiny_sam: nn.Module) -> None:
    rounded = FakeQuant(weight_bits=3, activation_bits=None, weight_search=True)(tiny_sam)
    assert not any(isinstance(m, Quantizer) for m in rounded.modules())
    state = sc.lineage(rounded)[-1].state
    assert state["quantizers"] == {} and state["attentions"] == [] and "worst" not in state  # noqa: PT018


def test_softmax_may_get_log_levels(tiny_sam: nn.Module) -> None:
    rounded = FakeQuant(softmax="log", activation_bits=4, **SMALL)(tiny_sam, data=scenes())
    kinds = {type(m.mix.left) for m in rounded.modules() if hasattr(m, "mix")}
    assert kinds == {Log}


def test_facts(tiny_sam: nn.Module) -> None:
    rounded = FakeQuant(weight_bits=4, activation_bits=4, **SMALL)(tiny_sam, data=scenes())
    step = sc.lineage(rounded)[-1]
    assert step.simulated
    worst = step.state["worst"]
    assert len(worst) == 5
    assert list(worst.values()) == sorted(worst.values(), reverse=True)
    assert set(worst) <= set(step.state["layers"])
    assert set(step.state["layers"].values()) == {4}


def test_after_fused_attention_only_layers(tiny_sam: nn.Module) -> None:
    fused = sc.attention.Fused()(tiny_sam)
    with pytest.raises(
        ModelError, match=r"cannot round inside(.|\n)*attention\.fused(.|\n)*products=False"
    ):
        FakeQuant(**SMALL)(fused, data=scenes())
    rounded = FakeQuant(products=False, **SMALL)(fused, data=scenes())
    plain = FakeQuant(products=False, **SMALL)(tiny_sam, data=scenes())
    assert torch.allclose(features(rounded), features(plain), atol=1e-2)
    assert any(isinstance(m, FakeLinear) for m in rounded.image_encoder.modules())


def test_after_pruning_and_another_encoder(tiny_sam: nn.Module) -> None:
    pruned = sc.prune.Mlp(ratio=0.5, criterion="magnitude")(tiny_sam)
    assert sc.lineage(FakeQuant(**SMALL)(pruned, data=scenes()))[-1].simulated
    other = sc.substitute.TinyViT()(tiny_sam)
    rounded = FakeQuant(**SMALL)(other, data=scenes())
    assert any(isinstance(m, FakeConv2d) for m in rounded.image_encoder.modules())
    reads = [m for m in rounded.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    assert reads
    assert not any(isinstance(m, FakeConv2d) for m in reads)


def test_errors(tiny_sam: nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"weight_bits is out of range(.|\n)*2 <= weight_bits <= 8"
    ):
        FakeQuant(weight_bits=1)
    with pytest.raises(ConfigError, match="images is out of range"):
        FakeQuant(images=0)
    with pytest.raises(DataError, match="needs images"):
        FakeQuant()(tiny_sam)
    with pytest.raises(NoEffectError, match="matched no module"):
        FakeQuant(where="image_encoder.layers.**")(tiny_sam, data=scenes())
    with pytest.raises(NoEffectError, match="found no layer to round"):
        FakeQuant(where="image_encoder.patch_embed.proj")(tiny_sam, data=scenes())
    rounded = FakeQuant(activation_bits=None)(tiny_sam)
    with pytest.raises(ModelError, match=r"quantized already(.|\n)*once"):
        FakeQuant(activation_bits=None)(rounded)
    with pytest.raises(ModelError, match="quantized already"):
        FakeQuant(activation_bits=None)(sc.quantize.Int8Weights(min_size=0)(tiny_sam))
    broken = copy.deepcopy(tiny_sam)
    broken.image_encoder.blocks[0].mlp.lin1.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"not finite(.|\n)*blocks\.0\.mlp\.lin1"):
        FakeQuant(**SMALL)(broken, data=scenes())
    broken = copy.deepcopy(tiny_sam)
    broken.image_encoder.blocks[0].norm1.weight.data.fill_(torch.inf)
    with pytest.raises(DataError, match=r"not finite while calibrating(.|\n)*blocks\.0\.attn"):
        FakeQuant(**SMALL)(broken, data=scenes())
