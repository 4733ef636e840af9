"""Hidden states of encoders, and the images that models look at together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import random_sam
from learners import scenes
from torch import nn

import samcompress as sc
from samcompress.core import errors
from samcompress.core._objective import Share
from samcompress.core.data import Dataset, Sample, _dataset
from samcompress.core.predict import preprocess
from samcompress.distill import _views
from samcompress.distill._samples import Frame
from samcompress.distill._taps import EMBEDDING, HIDDEN, QKV, block, states, widths
from samcompress.distill._views import Views


@pytest.fixture(scope="module")
def data() -> Dataset:
    return scenes()


# -------------------------------------------------------------------------------------------- taps


def images(sam: nn.Module) -> torch.Tensor:
    return torch.stack([preprocess(sam, s.image)[0] for s in sc.shapes(3, size=(40, 64))])


def test_states_are_what_the_layers_compute() -> None:
    sam = random_sam()
    encoder, shown = sam.image_encoder, images(sam)
    names = [block(0), block(1), block(0, QKV), block(1, QKV), block(0, HIDDEN), EMBEDDING]
    found = states(encoder, shown, names)
    x = encoder.patch_embed(shown) + encoder.pos_embed
    first = encoder.blocks[0]
    expected = {block(0): first(x), block(0, QKV): first.attn.qkv(first.norm1(x))}
    x = encoder.blocks[0](x)
    second = encoder.blocks[1]
    expected |= {block(1): second(x), block(1, QKV): second.attn.qkv(second.norm1(x))}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].permute(0, 2, 3, 1), value, rtol=0, atol=1e-6)
    units = found[block(0, HIDDEN)].permute(0, 2, 3, 1)
    assert units.shape == (3, 8, 8, 96)
    assert torch.equal(found[EMBEDDING], encoder(shown))
    assert not any(m._forward_hooks for m in encoder.modules())


def test_states_of_a_fused_encoder() -> None:
    """Its windows have no padded tokens, and windows may be larger than the map."""
    for window in (3, 4, 11):
        sam = random_sam(window_size=window)
        fused = sc.attention.Fused()(sam, progress=False)
        names = [*(block(i, layer) for i in (0, 1) for layer in ("", QKV, HIDDEN)), EMBEDDING]
        one, two = (states(m.image_encoder, images(sam), names) for m in (sam, fused))
        for name in names:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)
    assert widths(sam, names[:3]) == {block(0): 32, block(0, QKV): 96, block(0, HIDDEN): 96}


def test_hooks_are_gone_after_an_error() -> None:
    sam = random_sam()
    with pytest.raises(RuntimeError):
        states(sam.image_encoder, torch.zeros(1, 4, 64, 64), [block(0)])
    assert not any(m._forward_hooks for m in sam.modules())


def test_layer_without_a_map() -> None:
    sam = random_sam()
    sam.image_encoder.blocks[0] = nn.Sequential(nn.Flatten(1, 2), nn.Unflatten(1, (8, 8)))
    with pytest.raises(errors.ModelError) as caught:
        states(sam.image_encoder, torch.zeros(1, 3, 64, 64), [block(0, "0")])
    assert str(caught.value).startswith(
        "a tapped layer gives no map of tokens.\n  where     image_encoder.blocks.0.0\n"
        "  got       ImageEncoderViT with an output of (1, 64, 32)\n"
    )


# ------------------------------------------------------------------------------------------- views


def test_views_are_the_predictors_pixels(data: Dataset) -> None:
    student, teacher = random_sam(), random_sam(image_size=96)
    teacher.pixel_mean = teacher.pixel_mean + 3
    source = Views(data, [Frame.of(m) for m in (student, teacher)], batch_size=len(data), seed=1)
    seen = source.draw(2, Share())
    for part in (0, 1):  # the second time from memory
        split = source.draw(2, Share(part, 2))
        half = slice(split.places[0], split.places[-1] + 1)
        assert torch.equal(split.images[1], seen.images[1][half])
        assert split.places == seen.places[half]
    for number, model in enumerate((student, teacher)):
        ready = [preprocess(model, sample.image)[0] for sample in data]
        assert all(any(torch.equal(v, r) for r in ready) for v in seen.images[number])
    assert sorted(seen.sizes) == sorted(sample.size for sample in data)
    assert len(set(seen.sizes)) > 1
    assert seen.valid((8, 8)).sum((1, 2, 3)).tolist() == [h // 8 * w // 8 for h, w in seen.sizes]
    assert seen.weight == len(data)


def test_models_of_one_frame_share_their_images(data: Dataset) -> None:
    frame = Frame.of(random_sam())
    seen = Views(data, [frame, frame], batch_size=2, seed=0).draw(0, Share())
    assert seen.images[0] is seen.images[1]


class Broken(Sample):
    """A sample whose picture cannot be decoded."""

    @property
    def image(self) -> Any:
        raise errors.DataError("an image cannot be decoded.", where=str(self.id), got="cut short")


def test_damaged_images_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = list(sc.shapes(4, size=64))
    samples[1] = copy.copy(samples[1])
    object.__setattr__(samples[1], "__class__", Broken)
    data = _dataset.Dataset(samples, "four", skips=_dataset.Skips("skip"))
    source = Views(data, [Frame.of(random_sam())], batch_size=4, seed=0)
    seen = source.draw(0, Share())
    assert seen.weight == 4
    assert torch.equal(source.draw(0, Share()).images[0], seen.images[0])
    assert [s.id for s in data.skipped] == [samples[1].id]
    monkeypatch.setattr(_views, "TRIES", 1)
    with pytest.raises(errors.DataError) as caught:
        source.draw(0, Share())
    assert str(caught.value).startswith("images that cannot be decoded, one after the other.\n")
    strict = Views(sc.data.as_dataset(samples), source.frames, batch_size=4, seed=0)
    with pytest.raises(errors.DataError, match="image of 1 cannot be used"):
        strict.draw(0, Share())
