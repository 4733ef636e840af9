"""quantize.smooth_quant: the function stays, outliers move, and only exact folds are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam
from quantizing import DATA, change, embedding, same_after_loading

import samcompress as sc
from samcompress.core import errors
from samcompress.quantize.int8_dynamic import Int8Dynamic
from samcompress.quantize.int8_static import Int8Static
from samcompress.quantize.smooth_quant import SmoothQuant


def run(sam: Any = None, data: Any = DATA, **fields: Any) -> Any:
    step = SmoothQuant(**{"images": 2, **fields})
    return step(random_sam() if sam is None else sam, data=data, progress=False)


def outliers() -> Any:
    """A SAM of which a few channels are a hundred times as large after the norms."""
    sam = random_sam()
    for block in sam.image_encoder.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.data[3] *= 100
    return sam


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_function_stays(alpha: float, fused: bool) -> None:
    sam = random_sam()  # windows of 3 on a grid of 8: padded
    sam = sc.attention.Fused()(sam, progress=False) if fused else sam
    smooth = run(sam, alpha=alpha)
    assert change(embedding(smooth), embedding(sam)) < 1e-5
    blocks = zip(sam.image_encoder.blocks, smooth.image_encoder.blocks, strict=True)
    for before, after in blocks:
        for name in ("attn.qkv", "attn.proj", "mlp.lin1"):
            assert not torch.equal(
                before.get_submodule(name).weight, after.get_submodule(name).weight
            )
        assert torch.equal(before.mlp.lin2.weight, after.mlp.lin2.weight)
        assert torch.equal(before.attn.rel_pos_h, after.attn.rel_pos_h)


def test_factors_by_hand() -> None:
    sam = random_sam()
    smooth = run(sam, images=1, where="image_encoder.blocks.0")
    before, after = sam.image_encoder.blocks[0], smooth.image_encoder.blocks[0]
    seen = []
    handle = before.norm1.register_forward_hook(lambda m, i, out: seen.append(out))
    sc.predict(sam, [DATA[0].image], [[]])
    handle.remove()
    largest, columns = seen[0].abs().amax((0, 1, 2)), before.attn.qkv.weight.abs().amax(0)
    factor = (largest / columns).sqrt()
    torch.testing.assert_close(after.norm1.weight, before.norm1.weight / factor)
    third = slice(0, 64)  # queries and keys: no other fold touches their rows
    torch.testing.assert_close(after.attn.qkv.weight[third], before.attn.qkv.weight[third] * factor)


@pytest.mark.parametrize("step", [Int8Static(images=2, force=True), Int8Dynamic(force=True)])
def test_integers_lose_less_after_it(step: Any) -> None:
    sam = outliers()
    plain = step(sam, data=DATA, progress=False)
    smooth = (SmoothQuant(images=2) | step)(sam, data=DATA, progress=False)
    expected = embedding(sam)
    assert change(embedding(smooth), expected) < 0.7 * change(embedding(plain), expected)


def test_saved_and_loaded(tmp_path: Path) -> None:
    same_after_loading(run(), tmp_path / "smooth")


def test_follows_pruned_heads() -> None:
    sam = sc.prune.Heads(ratio=0.5, criterion="magnitude")(random_sam(), progress=False)
    assert change(embedding(run(sam)), embedding(sam)) < 1e-5


def message(error: type[Exception], sam: Any = None, **fields: Any) -> str:
    with pytest.raises(error) as caught:
        run(sam, **fields)
    return str(caught.value)


def test_decoder() -> None:
    text = message(errors.ModelError, where="mask_decoder.transformer.layers.*")
    assert text.splitlines()[:3] == [
        "quantize.smooth_quant finds nothing that it can fold exactly.",
        "  where     mask_decoder.transformer.layers.0",
        "  got       a decoder, whose norms feed residuals and position codes too",
    ]


def test_nothing_to_fold() -> None:
    integers = Int8Dynamic(force=True)(random_sam(), progress=False)
    assert "expected  pre-norm blocks" in message(errors.ModelError, integers)


def test_norm_that_feeds_more_than_its_linear() -> None:
    sam = random_sam()
    block = sam.image_encoder.blocks[0]
    sam.image_encoder.neck[1] = torch.nn.Sequential(sam.image_encoder.neck[1])

    class Leaky(type(block)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.norm1(x)

    block.__class__ = Leaky
    text = message(errors.ModelError, sam)
    assert text.startswith("quantize.smooth_quant would change what this model computes.")


def test_bad_input() -> None:
    assert "needs images" in message(errors.DataError, data=None)
    assert "alpha is out of range" in message(errors.ConfigError, alpha=1.5)
    assert "images is out of range" in message(errors.ConfigError, images=0)
    assert "matched no module" in message(errors.NoEffectError, where="image_encoder.layers.*")
    sam = random_sam()
    sam.image_encoder.blocks[0].norm1.bias.data[0] = float("inf")
    assert "image_encoder.blocks.0.attn.qkv" in message(errors.DataError, sam)
