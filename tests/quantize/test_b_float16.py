"""quantize.b_float16: half the bytes, float32 at the doors, predictors that notice nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from quantizing import DATA, change, deep_sam, embedding, logits, mask_iou, same_after_loading
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT

import samcompress as sc
from samcompress.core import errors
from samcompress.core.checkpoint import fingerprint
from samcompress.core.sizes import tensor_bytes
from samcompress.quantize.b_float16 import BFloat16
from samcompress.quantize.int8_weights import Int8Weights


def run(sam: Any = None, **fields: Any) -> Any:
    return BFloat16(**fields)(random_sam() if sam is None else sam, progress=False)


def test_types_inside_and_at_the_doors() -> None:
    sam = random_sam()
    before = fingerprint(sam)
    small = run(sam)
    assert fingerprint(sam) == before
    for part in (small.image_encoder, small.mask_decoder):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    for name, tensor in sam.prompt_encoder.state_dict().items():
        kept = small.prompt_encoder.state_dict()[name]
        assert kept.dtype == torch.float32
        assert torch.equal(kept, tensor)
    assert small.pixel_mean.dtype == torch.float32
    assert isinstance(small.image_encoder, ImageEncoderViT)
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in sam.named_parameters()]
    with torch.no_grad():
        for x in (torch.ones(1, 3, 64, 64), torch.ones(1, 3, 64, 64).bfloat16()):
            assert small.image_encoder(x).dtype == torch.float32


def test_equals_a_cast_of_the_whole() -> None:
    sam = random_sam()
    plain = copy.deepcopy(sam.image_encoder).bfloat16()
    x = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(run(sam).image_encoder(x), plain(x.bfloat16()).float())


def test_half_the_file_and_small_errors() -> None:
    sam = deep_sam()
    small = run(sam)
    prompts = tensor_bytes(sam.prompt_encoder) + 4 * 6  # and mean and deviation of pixels
    assert tensor_bytes(small) - prompts == (tensor_bytes(sam) - prompts) / 2
    assert 0 < change(embedding(small), embedding(sam)) <= 0.02


def test_encoder_alone() -> None:
    small = run(decoder=False)
    assert small.image_encoder.pos_embed.dtype == torch.bfloat16
    assert {p.dtype for p in small.mask_decoder.parameters()} == {torch.float32}
    assert torch.isfinite(logits(small)).all()


def test_predictor_gives_float32() -> None:
    predictor = SamPredictor(run())
    predictor.set_image(DATA[0].image)
    assert predictor.features.dtype == torch.float32
    masks, scores, low = predictor.predict(box=np.array([5, 8, 60, 50]))
    assert masks.shape == (3, 60, 80)
    assert scores.dtype == low.dtype == np.float32


def test_masks_of_trained_tiny(trained: Any) -> None:
    assert mask_iou(run(trained), trained) >= 0.97


def test_saved_and_loaded(tmp_path: Path) -> None:
    small = run()
    again = same_after_loading(small, tmp_path / "small")
    assert type(again.image_encoder) is type(small.image_encoder)
    assert torch.equal(embedding(copy.deepcopy(again)), embedding(small))


@pytest.mark.parametrize(
    "step",
    [
        sc.substitute.TinyViT(),
        sc.substitute.RepViT(variant="m1"),
        sc.substitute.EfficientViT(variant="l0"),
        sc.substitute.ViT(variant="tiny"),
        sc.substitute.HQ(),
        sc.attention.Fused(),
        Int8Weights(min_size=0),
    ],
    ids=lambda step: step.label,
)
def test_follows_other_steps(step: Any) -> None:
    sam = step(random_sam(), progress=False)
    small = run(sam)
    assert change(embedding(small), embedding(sam)) < 0.1
    assert logits(small).dtype == torch.float32
    assert torch.isfinite(logits(small)).all()


def test_exports_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    small = run()
    exported = sc.compile.Export()(small, progress=False, workdir=tmp_path)
    assert change(embedding(exported), embedding(small)) < 0.03


def test_twice() -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        run(run())
    assert str(caught.value).splitlines() == [
        "quantize.b_float16 finds every part in bfloat16 already.",
        "  where     image_encoder, mask_decoder",
        "  try       leave this step out",
    ]
    both = run(run(decoder=False))  # what is left
    assert sc.lineage(both)[-1].state == {"parts": ["mask_decoder"]}


def test_values_out_of_range() -> None:
    sam = random_sam()
    sam.image_encoder.neck[0].weight.data[0, 0] = 3.4e38  # bfloat16 ends a little earlier
    with pytest.raises(errors.ModelError) as caught:
        run(sam)
    assert str(caught.value).splitlines() == [
        "quantize.b_float16 met values that are not finite in bfloat16.",
        "  where     image_encoder.neck.0.weight",
        "  got       1 of 1024 values",
        "  expected  finite numbers below 3.38e38",
    ]
