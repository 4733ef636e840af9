"""Multiply-accumulates and parameters: counter against closed form, and work that hides."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_sam
from torch import Tensor, nn

import samcompress as sc
from samcompress.core.build import ARCHITECTURES, SamConfig, config_of
from samcompress.core.errors import ModelError
from samcompress.evaluate.macs import closed_form, decoder_macs, macs
from samcompress.evaluate.size import bytes_on_disk, parameters
from samcompress.substitute.hq import HQ

GMAC = {"vit_b": 486.04, "vit_l": 1492.84, "vit_h": 2980.54}
PLAIN = {"vit_b": 368.70, "vit_l": 1311.1, "vit_h": 2732.3}


@pytest.fixture(scope="module", params=GMAC)
def large(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    with torch.device("meta"):
        return request.param, ARCHITECTURES[request.param].build()


def test_counter_equals_closed_form(large: tuple[str, nn.Module]) -> None:
    name, sam = large
    found = macs(sam)
    assert found.encoder == closed_form(ARCHITECTURES[name])
    assert found.encoder / 1e9 == pytest.approx(GMAC[name], abs=0.01)
    assert found.encoder_no_attention / 1e9 == pytest.approx(PLAIN[name], abs=0.05)
    assert found.decoder_per_prompt / 1e9 == pytest.approx(1.812, abs=0.001)


def test_decoder_is_linear_in_prompts(large: tuple[str, nn.Module]) -> None:
    _, sam = large
    one, two, five = (decoder_macs(sam, n) for n in (1, 2, 5))
    assert five - two == 3 * (two - one)
    assert (two - one) / 1e9 == pytest.approx(1.811, abs=0.001)


def test_parameters_of_the_paper(large: tuple[str, nn.Module]) -> None:
    name, sam = large
    found = parameters(sam)
    total = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}[name]
    encoder = {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048}[name]
    assert (found["total"], found["encoder"]) == (total, encoder)
    assert (found["prompt_encoder"], found["mask_decoder"]) == (6_220, 4_058_340)
    assert found["buffers"] == 2 * 128 + 6


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"window_size": 0, "global_attn_indexes": ()},
        {"image_size": 72, "window_size": 4, "mlp_ratio": 2.5, "out_chans": 64},
    ],
)
def test_closed_form_of_other_sizes(sizes: dict[str, object]) -> None:
    sam = sc.build("tiny", **sizes)
    config = config_of(sam)
    assert macs(sam).encoder == closed_form(config)


def test_closed_form_by_hand() -> None:
    # 2 x 2 tokens of width 4, one global block: patches, neck, 4 D^2 + 2 D * hidden a token,
    # 2 N^2 D of attention, 2 N D g of positions.
    config = SamConfig(
        image_size=8, patch_size=4, embed_dim=4, depth=1, num_heads=1, mlp_ratio=2.0,
        window_size=0, global_attn_indexes=(), out_chans=32, decoder_num_heads=2,
    )  # fmt: skip
    by_hand = 4 * 48 * 4 + 4 * 32 * (4 + 9 * 32) + 4 * (4 * 16 + 2 * 4 * 8) + 2 * 16 * 4 + 4 * 4 * 4
    assert closed_form(config) == by_hand


def test_model_is_left_alone() -> None:
    sam = random_sam().train()
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    macs(sam)
    assert all(module.training for module in sam.modules())
    assert all(torch.equal(v, before[k]) for k, v in sam.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sam.modules())


def test_decoder_that_takes_further_channels_of_the_encoder() -> None:
    sam = random_sam()
    with_token = HQ()(sam, progress=False)
    plain, fine = macs(sam), macs(with_token)
    assert fine.encoder == plain.encoder
    # Four cells of 16 for each of 64; convolutions by hand, C = 32, features = 32.
    cells = 8 * 8
    upscaling = cells * 4 * (32 * 32 + 4 * 32 * 4) + cells * 4 * (32 * 8 + 4 * 8 * 4)
    refining = 16 * cells * 9 * 2 * 4 * 8
    # Three layers for one more token, its product with the map, and the token in the transformer.
    head = 2 * 32 * 32 + 32 * 4 + 16 * cells * 4
    more = fine.decoder_per_prompt - plain.decoder_per_prompt
    token = more - upscaling - refining - head
    assert 0 < token < 0.1 * more
    assert decoder_macs(with_token, 1) == fine.decoder_per_prompt


def test_tied_weights_count_once() -> None:
    sam = random_sam()
    plain = parameters(sam)["total"]
    first, second = sam.image_encoder.blocks[0].mlp, sam.image_encoder.blocks[1].mlp
    second.lin1.weight = first.lin1.weight
    assert parameters(sam)["total"] == plain - first.lin1.weight.numel()


def test_operator_without_formula_raises() -> None:
    with torch.library._scoped_library("samcompress_test", "FRAGMENT") as library:
        library.define("hidden(Tensor x, Tensor w) -> Tensor")
        library.impl("hidden", lambda x, w: x @ w.t(), "CompositeExplicitAutograd")

        class Hidden(nn.Module):
            def __init__(self, linear: nn.Linear) -> None:
                super().__init__()
                self.weight = linear.weight

            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.samcompress_test.hidden(x, self.weight)

        sam = random_sam()
        sam.image_encoder.blocks[0].attn.proj = Hidden(sam.image_encoder.blocks[0].attn.proj)
        with pytest.raises(ModelError) as caught:
            macs(sam)
    assert "cannot be counted" in caught.value.what
    assert caught.value.where == "samcompress_test::hidden"
    assert "macs(*inputs)" in caught.value.fix


def test_part_outside_torch_raises() -> None:
    class Elsewhere(nn.Module):
        img_size = 64

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(1, 32, 8, 8, device=x.device)

    sam = random_sam()
    sam.image_encoder = Elsewhere()
    with pytest.raises(ModelError, match="ran outside torch"):
        macs(sam)


class Elsewhere(nn.Module):
    """A linear layer whose product torch does not see."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Declares(Elsewhere):
    """One that says its work, and also does some that torch sees."""

    def macs(self, x: Tensor) -> int:
        return 1234

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ x.new_zeros(self.in_features, 1))


def test_linear_of_another_kind_counts_by_its_features() -> None:
    sam = random_sam()
    plain = macs(sam)
    sam.image_encoder.blocks[0].attn.qkv = Elsewhere(sam.image_encoder.blocks[0].attn.qkv)
    assert macs(sam) == plain


def test_declared_work_replaces_what_is_seen() -> None:
    sam = random_sam()
    plain = macs(sam).encoder
    lin1 = sam.image_encoder.blocks[0].mlp.lin1
    work = 64 * lin1.in_features * lin1.out_features
    sam.image_encoder.blocks[0].mlp.lin1 = Declares(lin1)
    assert macs(sam).encoder == plain - work + 1234


def test_convolution_of_another_kind_must_say_its_work() -> None:
    class Quiet(nn.Module):
        in_channels, out_channels = 32, 32

        def forward(self, x: Tensor) -> Tensor:
            return x

    sam = random_sam()
    sam.image_encoder.neck[2] = Quiet()
    with pytest.raises(ModelError, match=r"image_encoder\.neck\.2 \(Quiet\)"):
        macs(sam)


def test_integer_product_is_counted() -> None:
    class IntMm(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros_like(linear.weight, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1]).to(torch.int8)
            return torch._int_mm(flat, self.weight.t()).view(*x.shape[:-1], -1).to(x.dtype)

    sam = random_sam()
    plain = macs(sam)
    sam.image_encoder.blocks[1].mlp.lin2 = IntMm(sam.image_encoder.blocks[1].mlp.lin2)
    assert macs(sam) == plain


def test_values_are_read_where_shapes_are_not_enough() -> None:
    class Picks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().isfinite()  # a copy without storage cannot say
            return self.inner(x)

    sam = random_sam()
    plain = macs(sam)
    sam.image_encoder.blocks[0].mlp = Picks(sam.image_encoder.blocks[0].mlp)
    assert macs(sam) == plain


def test_bytes_are_those_of_the_folder(tmp_path) -> None:
    sam = random_sam()
    sc.save(sam, tmp_path / "m")
    files = [f for f in (tmp_path / "m").rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    assert bytes_on_disk(tmp_path / "m") == bytes_on_disk(sam) == size
    floats = sum(v.numel() for v in sam.state_dict().values())
    assert size > 4 * floats
    half = copy.deepcopy(sam).half()
    assert bytes_on_disk(half) == pytest.approx(size - 2 * floats, rel=0.01)
