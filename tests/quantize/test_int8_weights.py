"""quantize.int8_weights: bounds of the codes, equality with a float twin, storage that shrinks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from torch import nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import parameter_count, tensor_bytes
from samcompress.evaluate.macs import macs
from samcompress.quantize._layers import (
    Int8Conv2d,
    Int8Linear,
    dequantize,
    int8_twin,
    quantize_channels,
)

INT8 = (Int8Linear, Int8Conv2d)


def run(sam: Any = None, **fields: Any) -> Any:
    return sc.quantize.Int8Weights(**{"min_size": 0, **fields})(sam or random_sam(), progress=False)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def outputs(sam: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding, and logits of a box on it."""
    with torch.no_grad():
        features = sam.image_encoder(draw(2, 3, 64, 64))
        sparse, dense = sam.prompt_encoder(
            points=None, boxes=torch.tensor([[5.0, 8.0, 50.0, 40.0]]), masks=None
        )
        logits, _ = sam.mask_decoder(
            image_embeddings=features[:1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    return features, logits


def float_twin(sam: Any, small: Any) -> Any:
    """The float model whose weights are those that the int8 model computes with."""
    twin = copy.deepcopy(sam)
    for name, layer in small.named_modules():
        if isinstance(layer, INT8):
            weight = dequantize(layer.weight, layer.scale, torch.float32)
            twin.get_submodule(name).weight.data = weight
    return twin


# --- codes ----------------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    weight = torch.tensor([[127.0, -63.4, 0.6, 0.0], [0.5, 0.25, -0.125, -0.5]])
    codes, scale = quantize_channels(weight)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[127, -63, 1, 0], [127, 64, -32, -127]]
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.5 / 127]))


@pytest.mark.parametrize("shape", [(40, 30), (8, 3, 4, 4)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_error_is_at_most_half_a_step(shape: tuple[int, ...], size: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    codes, scale = quantize_channels(weight)
    largest = weight.flatten(1).abs().amax(1)
    error = (dequantize(codes, scale, torch.float32) - weight).flatten(1).abs().amax(1)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert (codes.flatten(1).abs().amax(1) == 127).all()  # the whole range is used


def test_channels_of_nothing_and_next_to_nothing() -> None:
    weight = torch.zeros(2, 4)
    weight[1, 2] = 1e-44  # a subnormal number
    codes, scale = quantize_channels(weight)
    assert codes[0].tolist() == [0, 0, 0, 0]
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(dequantize(codes, scale, torch.float32)[0], torch.zeros(4))


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_float_twin(bias: bool) -> None:
    layer = nn.Linear(6, 5, bias=bias)
    small = int8_twin(layer)
    assert isinstance(small, Int8Linear)
    small.fill(layer.weight)
    x = draw(2, 3, 6)
    weight = small.weight.float() * small.scale[:, None]
    assert torch.equal(small(x), F.linear(x, weight, layer.bias))
    assert (small.bias is not None) is bias
    assert repr(small) == f"Int8Linear(in_features=6, out_features=5, bias={bias})"


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
    ],
)
def test_convolution_equals_its_float_twin(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(4, 6, **options)
    small = int8_twin(layer)
    assert isinstance(small, Int8Conv2d)
    small.fill(layer.weight)
    twin = copy.deepcopy(layer)
    twin.weight.data = small.weight.float() * small.scale[:, None, None, None]
    x = draw(2, 4, 8, 8)
    assert torch.equal(small(x), twin(x))
    assert "4, 6, kernel_size=" in repr(small)


def test_layers_of_other_kinds_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    others = (Own(4, 4), nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 3, padding_mode="reflect"))
    assert [int8_twin(layer) for layer in others] == [None, None, None]


# --- models ---------------------------------------------------------------------------------------


def test_model_equals_its_float_twin_and_is_near_the_original() -> None:
    sam = random_sam()
    small = run(sam)
    for found, twin, original in zip(
        outputs(small), outputs(float_twin(sam, small)), outputs(sam), strict=True
    ):
        assert torch.equal(found, twin)
        assert 0 < (found - original).norm() / original.norm() < 0.03


def test_what_is_replaced_and_what_stays() -> None:
    sam = random_sam()
    small = run(sam)
    replaced = {n for n, m in small.named_modules() if isinstance(m, INT8)}
    assert sorted(replaced) == sorted(sc.lineage(small)[-1].state["layers"])
    assert replaced == {
        n
        for n, m in sam.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and not n.startswith("prompt_encoder")
    }
    before, after = sam.state_dict(), small.state_dict()
    for name, tensor in before.items():
        changed = name.removesuffix(".weight") in replaced and name.endswith(".weight")
        assert torch.equal(after[name], tensor) != changed
    assert set(after) - set(before) == {f"{name}.scale" for name in replaced}


def test_where_and_min_size_choose() -> None:
    encoder = run(where="image_encoder.**")
    assert not [n for n, m in encoder.mask_decoder.named_modules() if isinstance(m, INT8)]
    large = run(min_size=3000)
    for module in large.modules():
        if isinstance(module, INT8):
            assert module.weight.numel() >= 3000
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.numel() < 3000 or module in large.prompt_encoder.modules()


def test_the_rest_can_follow_later() -> None:
    whole = run()
    twice = run(run(where="image_encoder.**"))
    for a, b in zip(outputs(twice), outputs(whole), strict=True):
        assert torch.equal(a, b)


def test_counts_are_those_of_the_float_model() -> None:
    sam = random_sam()
    small = run(sam)
    assert macs(small) == macs(sam)
    assert parameter_count(small) == parameter_count(sam)


def test_vit_b_shrinks_to_what_the_card_says() -> None:
    sam = sc.SamConfig().build(empty=True)
    before = tensor_bytes(sam)
    step = sc.quantize.Int8Weights()
    step.rebuild(sam, {"layers": step._layers(sam)})
    assert 0.27 < tensor_bytes(sam) / before < 0.28
    assert parameter_count(sam) == 93_735_472


def test_file_is_as_small_as_the_tensors_and_loads_bit_equal(tmp_path: Path) -> None:
    sam = random_sam(embed_dim=128, depth=4)
    small = run(sam)
    for name, model in (("float", sam), ("int8", small)):
        sc.save(model, tmp_path / name)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("int8", "float")]
    assert sizes[0] / sizes[1] < 0.34
    again = sc.load(tmp_path / "int8")
    for a, b in zip(outputs(again), outputs(small), strict=True):
        assert torch.equal(a, b)


def test_types_survive_moves_and_copies() -> None:
    small = run()
    name = "image_encoder.blocks.0.mlp.lin1"
    layer: Any = small.get_submodule(name)
    for moved in (
        copy.deepcopy(small),
        copy.deepcopy(small).to("cpu"),
        copy.deepcopy(small).bfloat16(),
        copy.deepcopy(small).half().float(),
        copy.deepcopy(small).double(),
    ):
        other: Any = moved.get_submodule(name)
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.scale, layer.scale)
        assert (other.weight.dtype, other.scale.dtype) == (torch.int8, torch.float32)
        assert other.bias.dtype == moved.image_encoder.pos_embed.dtype
    assert copy.deepcopy(small).to("meta").get_submodule(name).scale.is_meta
    low: Any = copy.deepcopy(small).bfloat16()
    with torch.no_grad():
        found = low.image_encoder(draw(2, 3, 64, 64).bfloat16())
    assert found.dtype == torch.bfloat16
    expected = outputs(small)[0]
    assert (found.float() - expected).norm() / expected.norm() < 0.03


def test_a_float_checkpoint_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*lin1\.scale"):
        run().load_state_dict(random_sam().state_dict())


def test_follows_pruning_and_fused_attention() -> None:
    sam = random_sam()
    chain = (
        sc.prune.Mlp(ratio=0.5, criterion="magnitude")
        | sc.attention.Fused()
        | sc.quantize.Int8Weights(min_size=0)
    )
    small = chain(sam, progress=False)
    plain = run(sc.prune.Mlp(ratio=0.5, criterion="magnitude")(sam, progress=False))
    torch.testing.assert_close(outputs(small)[0], outputs(plain)[0], rtol=0, atol=1e-4)


def test_exports_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 5)).eval()
    for index in (0, 2):
        small = int8_twin(net[index])
        assert small is not None
        small.fill(net[index].weight)
        net[index] = small
    x = draw(1, 3, 16, 16)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(net, (x,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=0, atol=1e-5)


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], sam: Any = None, **fields: Any) -> str:
    with pytest.raises(error) as caught:
        run(sam, **fields)
    return str(caught.value)


def test_twice() -> None:
    small = run()
    count = len(sc.lineage(small)[-1].state["layers"])
    assert message(errors.NoEffectError, small).splitlines() == [
        "quantize.int8_weights found no layer left to quantise.",
        "  where     Where(include=('image_encoder.**', 'mask_decoder.**'), exclude=())",
        f"  got       {count} layers that are int8 already",
        "  try       leave this step out",
    ]


def test_all_layers_too_small() -> None:
    text = message(errors.NoEffectError, min_size=10**9)
    assert text.startswith("quantize.int8_weights found no layer left to quantise.")
    assert "layers of fewer than 1000000000 weights" in text
    assert "a smaller min_size=" in text


def test_nothing_matched() -> None:
    text = message(errors.NoEffectError, where="image_encoder.blocks.*.norm1")
    assert text.startswith("quantize.int8_weights matched no module it can act on.")
    text = message(errors.NoEffectError, where="image_encoder.layers.**")
    assert text.startswith("quantize.int8_weights matched no module.")


def test_negative_min_size() -> None:
    text = message(errors.ConfigError, min_size=-1)
    assert text.startswith("quantize.int8_weights: min_size is negative.")


def test_weights_that_are_not_finite() -> None:
    sam = random_sam()
    sam.image_encoder.neck[0].weight.data[0, 0] = float("inf")
    assert message(errors.ModelError, sam).splitlines() == [
        "quantize.int8_weights met a weight that is not finite.",
        "  where     image_encoder.neck.0.weight",
        "  got       1 of 1024 values",
        "  expected  finite numbers",
    ]
