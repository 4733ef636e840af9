"""SAM-HQ's token as a step: on which encoders, what stays, what is kept and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import errors
from samcompress.substitute._hq import HqMaskDecoder, HqTinyViT, HqViT
from samcompress.substitute._swap import OnGrid
from samcompress.substitute.conventions import Conventions
from samcompress.substitute.hq import HQ

PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]


def ask(model: Any) -> Any:
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    return sc.predict(model, [image], [PROMPTS], multimask=True)[0]


def with_tiny_vit(patch_size: int) -> Any:
    pytest.importorskip("timm")
    return sc.substitute.TinyViT()(random_sam(patch_size=patch_size), progress=False)


def test_all_weights_stay() -> None:
    sam: Any = random_sam()
    fine: Any = HQ()(sam, progress=False)
    assert type(fine.image_encoder) is HqViT
    assert fine.image_encoder.tap == 1
    assert sc.lineage(fine)[0].state == {"features": 32}
    state = fine.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in sam.state_dict().items())
    new = {name.split(".")[1] for name in state.keys() - sam.state_dict().keys()}
    parts = {"compress_vit_feat", "embedding_encoder", "embedding_maskfeature"}
    assert new == {"hf_token", "hf_mlp"} | parts


@pytest.mark.parametrize(("patch_size", "resized"), [(16, False), (8, True)])
def test_on_tiny_vit(patch_size: int, resized: bool, tmp_path: Path) -> None:
    sam = with_tiny_vit(patch_size)
    fine: Any = HQ()(sam, progress=False)
    encoder = fine.image_encoder
    assert (type(encoder) is OnGrid) is resized
    assert type(encoder.encoder if resized else encoder) is HqTinyViT
    assert sc.lineage(fine)[1].state == {"features": 160}
    grid = 64 // patch_size
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 32 + 160, grid, grid)
    sc.save(fine, tmp_path / "model")
    assert torch.equal(ask(sc.load(tmp_path / "model")).logits, ask(fine).logits)


@pytest.mark.parametrize("only", [False, True])
def test_kept_by_save_and_load(only: bool, tmp_path: Path) -> None:
    fine = HQ(hq_token_only=only)(random_sam(), progress=False)
    sc.save(fine, tmp_path / "model")
    again: Any = sc.load(tmp_path / "model")
    assert again.mask_decoder.hq_token_only is only
    assert torch.equal(ask(again).logits, ask(fine).logits)
    assert torch.equal(ask(again).scores, ask(fine).scores)


def test_fine_mask_alone_on_a_model_that_has_it(tmp_path: Path) -> None:
    both = HQ()(random_sam(), progress=False)
    alone: Any = HQ(hq_token_only=True)(both, progress=False)
    assert torch.equal(alone.mask_decoder.hf_token.weight, both.mask_decoder.hf_token.weight)
    logits = ask(alone).logits
    assert torch.equal(logits, logits[:, :1].expand_as(logits))
    assert not both.mask_decoder.hq_token_only
    sc.save(alone, tmp_path / "model")
    assert torch.equal(ask(sc.load(tmp_path / "model")).logits, logits)


def test_other_image_size_before_and_after() -> None:
    size = sc.substitute.ImageSize(size=96)
    for chain in (size | HQ(), HQ() | size):
        found = ask(chain(random_sam(), progress=False))
        assert found.logits.shape == (2, 3, 48, 48)


def test_weights_of_the_new_parts_depend_on_the_seed() -> None:
    torch.manual_seed(3)
    tokens = [
        HQ(seed=s)(random_sam(), progress=False).mask_decoder.hf_token.weight for s in (0, 0, 1)
    ]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_dtype_and_mode_stay() -> None:
    sam: Any = random_sam().double()
    sam.mask_decoder.train()
    fine: Any = HQ()(sam, progress=False)
    assert {p.dtype for p in fine.parameters()} == {torch.float64}
    assert fine.mask_decoder.training
    assert not fine.image_encoder.training


# --- refused --------------------------------------------------------------------------------------


def test_twice() -> None:
    with pytest.raises(errors.NoEffectError) as caught:
        HQ()(HQ()(random_sam(), progress=False))
    assert str(caught.value) == (
        "substitute.hq: the model has the token already.\n"
        "  where     mask_decoder\n"
        "  got       hq_token_only=False\n"
        "  try       leave this step out"
    )


def test_decoder_of_another_kind() -> None:
    sam = Conventions(of="tiny_sam")(random_sam(), progress=False)
    with pytest.raises(errors.ModelError) as caught:
        HQ()(sam)
    assert str(caught.value) == (
        "substitute.hq does not know this model's parts.\n"
        "  where     mask_decoder\n"
        "  got       samcompress.substitute._one_mask.BestMask\n"
        "  expected  segment_anything's own\n"
        "  try       put this step right after the one that made the image encoder"
    )


def test_encoder_without_early_features() -> None:
    expected = "segment_anything's ViT with a block of global attention, or TinyViT"
    local = random_sam(global_attn_indexes=())
    other = sc.substitute.ResNet()(random_sam(), progress=False)
    for sam in (local, other):
        with pytest.raises(errors.ModelError) as caught:
            HQ()(sam)
        assert caught.value.where == "image_encoder"
        assert caught.value.expected == expected
    assert isinstance(HQ()(random_sam(), progress=False).mask_decoder, HqMaskDecoder)
