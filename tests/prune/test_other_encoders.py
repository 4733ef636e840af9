"""Which techniques of pruning take which image encoder, and what the others are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam, randomise
from encoders import ENCODERS, OUT
from pruning import TECHNIQUES, answers, kept_of, off, prune, toy
from torch import Tensor

import samcompress as sc
from samcompress.core import errors
from samcompress.core.sizes import parameter_count
from samcompress.prune._filters import Part, silence
from samcompress.prune._traced import _randomise
from samcompress.prune.filters import Filters
from samcompress.substitute.hq import HQ

OF_THE_ENCODER = [name for name in TECHNIQUES if name != "decoder"]
each_encoder = pytest.mark.parametrize("encoder", list(ENCODERS))


def blind(name: str, **fields: Any) -> Any:
    criterion = "random" if name == "blocks" else "magnitude"
    return replace(TECHNIQUES[name], criterion=criterion, **fields)


def with_encoder(name: str) -> Any:
    sam: Any = random_sam(out_chans=OUT)
    sam.image_encoder = ENCODERS[name]().eval()
    return sam


@torch.no_grad()
def encode(sam: Any, side: int = 64) -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    return sam.image_encoder(torch.randn(1, 3, side, side, generator=drawn))


# --- encoders that are no ViT of segment_anything -------------------------------------------------


@each_encoder
@pytest.mark.parametrize("name", OF_THE_ENCODER)
def test_others_are_refused_and_told_of_filters(name: str, encoder: str) -> None:
    pytest.importorskip("timm")
    sam = with_encoder(encoder)
    with pytest.raises(errors.ModelError) as caught:
        blind(name).check(sam)
    lines = str(caught.value).splitlines()
    if name in ("channels", "blocks"):
        assert lines[0] == f"prune.{name} finds no ViT blocks of segment_anything."
    else:
        assert lines[0] == f"prune.{name} finds no ViT of segment_anything in the image encoder."
    assert lines[1] == "  where     image_encoder"
    assert lines[2].startswith(f"  got       {type(sam.image_encoder).__name__}")
    assert lines[-1].startswith("  try       ")
    assert "sc.prune.Filters" in lines[-1]


def test_an_encoder_on_another_grid_is_called_by_its_own_name() -> None:
    sam = sc.substitute.LiteViT()(random_sam(), progress=False)
    with pytest.raises(errors.ModelError) as caught:
        prune(blind("mlp"), sam)
    assert "  got       LiteViT" in str(caught.value).splitlines()


@pytest.mark.parametrize("encoder", ["u_net", "lite_vit"])
def test_their_blocks_of_segment_anything_can_be_named(encoder: str) -> None:
    sam = with_encoder(encoder)
    names = [
        n for n, m in sam.named_modules() if n.startswith("image_encoder") and n.endswith("mlp")
    ]
    names = [n for n in names if hasattr(sam.get_submodule(n), "lin1")]
    small = prune(blind("mlp", where=tuple(names)), sam)
    assert set(kept_of(small)) == set(names)
    assert encode(small).shape == encode(sam).shape


@pytest.mark.parametrize("encoder", ["tiny_vit", "res_net"])
def test_the_decoder_does_not_ask_what_the_encoder_is(encoder: str) -> None:
    pytest.importorskip("timm")
    sam = with_encoder(encoder)
    small = prune(blind("decoder"), sam)
    assert parameter_count(small.mask_decoder) < parameter_count(sam.mask_decoder)
    assert torch.equal(encode(small), encode(sam))


@pytest.mark.parametrize(
    "swap",
    [
        sc.substitute.TinyViT(),
        sc.substitute.RepViT(fuse=True),
        sc.substitute.Timm(model="test_efficientnet", fuse=True),
        sc.substitute.TinyViT() | HQ(),
    ],
    ids=["tiny_vit", "rep_vit", "timm", "hq"],
)
def test_filters_of_encoders_in_their_own_size(swap: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    pytest.importorskip("timm")
    sam: Any = swap(random_sam(image_size=128, patch_size=16), progress=False)
    _randomise(sam.image_encoder, torch.Generator().manual_seed(1))
    small = prune(Filters(ratio=0.5, criterion="random"), sam)
    assert parameter_count(small.image_encoder) < 0.75 * parameter_count(sam.image_encoder)
    sc.save(small, tmp_path / "small")
    found = encode(sc.load(tmp_path / "small"), 128)
    assert torch.equal(found, encode(small, 128))
    state = sc.lineage(small)[-1].state
    parts = {name: [Part(*p) for p in plain] for name, plain in state["parts"].items()}
    silence(sam, state["kept"], parts)
    assert off(found, encode(sam, 128)) < 1e-5


# --- ViTs of segment_anything in other models -----------------------------------------------------


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_encoder_of_efficient_sam(name: str, tmp_path: Path) -> None:
    sam = randomise(sc.substitute.ViT(variant="tiny")(random_sam(patch_size=16), progress=False))
    technique = blind(name, **({} if name == "blocks" else {"ratio": 0.34}))
    small = prune(technique, sam)
    assert parameter_count(small) < parameter_count(sam)
    assert encode(small).shape == encode(sam).shape
    sc.save(small, tmp_path / "small")
    assert torch.equal(answers(sc.load(tmp_path / "small")), answers(small))


@pytest.mark.parametrize("name", ["mlp", "heads", "head_dims", "decoder"])
def test_hq(name: str, tmp_path: Path) -> None:
    sam = HQ()(toy(), progress=False)
    small = prune(blind(name), sam)
    assert parameter_count(small) < parameter_count(sam)
    sc.save(small, tmp_path / "small")
    assert torch.equal(answers(sc.load(tmp_path / "small")), answers(small))


@pytest.mark.parametrize("name", ["channels", "blocks"])
def test_hq_reads_the_tokens(name: str) -> None:
    with pytest.raises(errors.ModelError) as caught:
        prune(blind(name), HQ()(toy(), progress=False))
    assert "cannot change tokens that the mask decoder reads too" in str(caught.value)


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sam = toy()
    source = sc.to_transformers(sam)
    taken = sc.load(source)
    small = prune(blind(name), taken)
    assert kept_of(small) == kept_of(prune(blind(name), sam))
    assert off(encode(small), encode(prune(blind(name), sam))) < 1e-5
    sc.save(small, tmp_path / "small")
    assert torch.equal(answers(sc.load(tmp_path / "small")), answers(small))


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_back_to_transformers_where_it_can_hold_the_model(name: str) -> None:
    pytest.importorskip("transformers")
    small = prune(blind(name), toy())
    if name in ("mlp", "blocks"):
        again = sc.load(sc.to_transformers(small))
        assert off(answers(again), answers(small)) < 1e-4
    else:
        with pytest.raises(errors.ModelError, match="a transformers SamModel cannot hold"):
            sc.to_transformers(small)


def test_filters_of_a_transformers_model() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("torch_pruning")
    with pytest.raises(errors.ModelError, match=r"sc\.prune\.Heads"):
        prune(Filters(criterion="random"), sc.load(sc.to_transformers(toy())))
