"""prune.blocks: which go, which stay, and that the rest computes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import SCENES, encode, off, on_meta, prune, toy
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import errors
from samcompress.core.build import config_of
from samcompress.core.predict import preprocess
from samcompress.prune.blocks import influence
from samcompress.substitute.hq import HQ

BLOCKS = "image_encoder.blocks"


def left(model: Any) -> list[int]:
    [(name, kept)] = sc.lineage(model)[-1].state["kept"].items()
    assert name == BLOCKS
    return kept


# --- the cut --------------------------------------------------------------------------------------


def test_check5_removing_a_block_is_silencing_it() -> None:
    sam = toy()
    for index in range(1, 4):
        small = copy.deepcopy(sam)
        sc.prune.Blocks().rebuild(small, {"kept": {BLOCKS: [i for i in range(4) if i != index]}})
        silent = copy.deepcopy(sam)
        block = silent.image_encoder.blocks[index]
        for layer in (block.attn.proj, block.mlp.lin2):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
        assert torch.equal(encode(small), encode(silent))
        assert off(encode(small), encode(sam)) > 1e-3


def test_check5_global_blocks_are_found_under_their_new_numbers() -> None:
    sam = on_meta()
    sc.prune.Blocks().rebuild(sam, {"kept": {BLOCKS: [i for i in range(12) if i != 3]}})
    config = config_of(sam)  # compares windows, tables and all shapes
    assert (config.depth, config.global_attn_indexes) == (11, (2, 4, 7, 10))


def test_check5_saved_and_loaded(tmp_path: Path) -> None:
    small = prune(sc.prune.Blocks(count=2, criterion="random"))
    sc.save(small, tmp_path / "small")
    again = sc.load(tmp_path / "small")
    assert torch.equal(encode(again), encode(small))
    assert left(again) == left(small)


# --- which ----------------------------------------------------------------------------------------


def test_influence_is_the_change_of_direction() -> None:
    sam = toy()
    by_hand = []
    with torch.no_grad():
        for scene in SCENES:
            encoder = sam.image_encoder
            x = encoder.patch_embed(preprocess(sam, scene.image)[0][None]) + encoder.pos_embed
            row = []
            for block in encoder.blocks:
                y = block(x)
                cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
                row.append(1 - cosine.mean())
                x = y
            by_hand.append(torch.stack(row))
    found = torch.tensor(influence(sam, SCENES))
    torch.testing.assert_close(found, torch.stack(by_hand).mean(0), rtol=1e-4, atol=0)


def quiet(sam: Any, index: int, factor: float) -> None:
    block = sam.image_encoder.blocks[index]
    for layer in (block.attn.proj, block.mlp.lin2):
        layer.weight.data *= factor
        layer.bias.data *= factor


@pytest.mark.parametrize("criterion", ["influence", "embedding"])
def test_the_quietest_go_one_after_another(criterion: Any) -> None:
    sam = toy(depth=6, global_attn_indexes=(1, 5))
    quiet(sam, 4, 1e-4)
    quiet(sam, 2, 1e-2)
    small = prune(sc.prune.Blocks(criterion=criterion), sam)
    assert left(small) == [0, 1, 2, 3, 5]
    smaller = prune(sc.prune.Blocks(criterion=criterion, count=2), sam)
    assert left(smaller) == [0, 1, 3, 5]
    for block, index in zip(smaller.image_encoder.blocks, left(smaller), strict=True):
        assert torch.equal(block.mlp.lin1.weight, sam.image_encoder.blocks[index].mlp.lin1.weight)


def test_embedding_is_that_of_the_model_without_the_block() -> None:
    sam = toy()
    images = [preprocess(sam, scene.image)[0][None] for scene in SCENES]
    distances = {}
    with torch.no_grad():
        whole = [sam.image_encoder(image) for image in images]
        for index in (1, 2):
            small = copy.deepcopy(sam)
            del small.image_encoder.blocks[index]
            found = [small.image_encoder(image) for image in images]
            distances[index] = sum(F.mse_loss(a, b) for a, b in zip(found, whole, strict=True))
    least = min(distances, key=distances.__getitem__)
    small = prune(sc.prune.Blocks(criterion="embedding"), sam)
    assert left(small) == [i for i in range(4) if i != least]


def test_what_is_left_is_looked_at_again() -> None:
    """Two blocks say the same: either may go before a louder third, but not both."""
    sam = toy(depth=5, global_attn_indexes=(4,))
    for index in range(5):
        quiet(sam, index, 0)
    same, other = torch.zeros(32), torch.zeros(32)
    same[:16:2], same[1:16:2], other[16::2], other[17::2] = 1, -1, 1, -1
    for index, says in ((1, same), (2, same), (3, 1.3 * other)):
        sam.image_encoder.blocks[index].mlp.lin2.bias.data = 0.05 * says
    assert left(prune(sc.prune.Blocks(criterion="embedding"), sam)) == [0, 2, 3, 4]
    assert left(prune(sc.prune.Blocks(criterion="embedding", count=2), sam)) == [0, 2, 4]


def test_first_and_last_global_stay_whatever_their_scores() -> None:
    sam = toy()
    quiet(sam, 0, 0)
    quiet(sam, 3, 0)
    assert left(prune(sc.prune.Blocks(count=2), sam)) == [0, 3]


def test_keep_global() -> None:
    small = prune(sc.prune.Blocks(keep_global=True, criterion="random"))
    assert left(small) == [0, 1, 3]


def test_random_follows_its_seed() -> None:
    sam = toy(depth=8, global_attn_indexes=(7,))
    draws = [
        left(prune(sc.prune.Blocks(criterion="random", count=3, seed=s), sam)) for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert not sc.prune.Blocks(criterion="random").needs_data


def test_progress() -> None:
    events: list[Any] = []
    technique = sc.prune.Blocks(criterion="embedding", images=1)
    technique(toy(), data=SCENES, progress=events.append)
    assert [(e.label, e.done, e.total) for e in events] == [
        ("images", 1, 1),
        ("blocks", 1, 2),
        ("blocks", 2, 2),
    ]


# --- what it refuses ------------------------------------------------------------------------------


def message(error: type[Exception], technique: Any, sam: Any = None) -> list[str]:
    with pytest.raises(error) as caught:
        prune(sc.Pipeline([technique], any_order=True), sam)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", ["count", "images"])
def test_counts_out_of_range(name: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        sc.prune.Blocks(**{name: 0})
    assert str(caught.value).splitlines() == [
        f"prune.blocks: {name} is out of range.",
        "  got       0",
        "  expected  at least 1",
    ]


def test_too_many() -> None:
    assert message(errors.ConfigError, sc.prune.Blocks(count=2, keep_global=True)) == [
        "prune.blocks: so many blocks cannot go.",
        "  where     image_encoder.blocks, 4 in all",
        "  got       count=2",
        "  expected  at most 1",
        "  try       keep_global=False",
    ]
    assert message(errors.ConfigError, sc.prune.Blocks(count=3))[3:] == ["  expected  at most 2"]


def test_sam_hq_reads_the_tokens() -> None:
    lines = message(errors.ModelError, sc.prune.Blocks(), HQ()(toy(), progress=False))
    assert lines[0] == "prune.blocks cannot change tokens that the mask decoder reads too."
    assert lines[2] == "  got       HqMaskDecoder"


def test_after_fused_attention() -> None:
    fused = sc.attention.Fused()(toy(), progress=False)
    lines = message(errors.ModelError, sc.prune.Blocks(), fused)
    assert lines[0] == "prune.blocks finds no ViT blocks of segment_anything."
    assert lines[2] == "  got       ImageEncoderViT, FusedBlock"
    assert lines[4].startswith("  try       prune before modules are replaced")


def test_outputs_that_are_not_finite() -> None:
    sam = toy()
    sam.image_encoder.blocks[2].mlp.lin2.bias.data[0] = float("nan")
    assert message(errors.ModelError, sc.prune.Blocks(), sam) == [
        "prune.blocks: the importance of units is not a finite number.",
        "  where     image_encoder.blocks",
        "  got       1 of 2 scores",
        "  expected  a model with finite weights and outputs",
    ]
