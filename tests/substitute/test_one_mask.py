"""Decoders that give one mask: MobileSAMv2's files, TinySAM's best of three."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_sam

from samcompress.core import errors
from samcompress.substitute._one_mask import BestMask, best_first, merge


def inputs(sam: Any, prompts: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    position = sam.prompt_encoder.get_dense_pe()
    boxes = 64 * torch.rand(prompts, 4, generator=g)
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    return {
        "image_embeddings": torch.randn(position.shape, generator=g),
        "image_pe": position,
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }


def test_best_first_by_hand() -> None:
    masks = torch.arange(8.0).view(2, 4, 1, 1)
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0], [9.0, 5.0, 0.0, 4.0]])
    masks, scores = best_first(masks, scores)
    assert masks.flatten(1).tolist() == [[2, 1, 2, 3], [5, 5, 6, 7]]
    assert scores.tolist() == [[3, 1, 3, 2], [5, 5, 0, 4]]


@torch.no_grad()
def test_single_mask_is_the_best_of_the_three() -> None:
    sam: Any = random_sam()
    asked = inputs(sam)
    three, scores = sam.mask_decoder(**asked, multimask_output=True)
    names = list(sam.mask_decoder.state_dict())
    best = BestMask(sam.mask_decoder)
    assert list(best.state_dict()) == names
    assert best.training is False
    again = best(**asked, multimask_output=True)
    assert torch.equal(again[0], three)
    assert torch.equal(again[1], scores)
    mask, score = best(**asked, multimask_output=False)
    assert mask.shape == (3, 1, *three.shape[2:])
    assert torch.equal(score[:, 0], scores.amax(1))
    assert torch.equal(mask[:, 0], three[torch.arange(3), scores.argmax(1)])


@torch.no_grad()
def test_can_be_exported() -> None:
    sam: Any = random_sam()
    asked = inputs(sam) | {"multimask_output": False}
    best = BestMask(sam.mask_decoder)
    program = torch.export.export(best, (), asked).module()
    torch.testing.assert_close(program(**asked)[0], best(**asked)[0])


@pytest.mark.parametrize("whole", [True, False])
def test_two_files_make_one_model(whole: bool) -> None:
    sam: Any = random_sam()
    encoder = sam.state_dict() if whole else sam.image_encoder.state_dict()
    other: Any = random_sam(seed=4)
    file = {
        "PromtEncoder": other.prompt_encoder.state_dict(),
        "MaskDecoder": other.mask_decoder.state_dict(),
    }
    state = merge(encoder, file)
    expected = other.state_dict() | {
        f"image_encoder.{k}": v for k, v in sam.image_encoder.state_dict().items()
    }
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_another_file_is_refused() -> None:
    with pytest.raises(errors.CheckpointError) as caught:
        merge({}, {"MaskDecoder": {}, "PromptEncoder": {}})
    text = str(caught.value)
    assert "this is not the decoder file of MobileSAMv2." in text
    assert "'MaskDecoder', 'PromptEncoder'" in text
    assert "'PromtEncoder' and 'MaskDecoder'" in text
