"""Every technique on every model of the zoo: it works, or refuses and says why.

`REFUSED` is what is expected. A technique that it does not name yet may do either.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from zoo_models import MODELS, plain, small_sizes

import samcompress as sc
from samcompress.core import errors
from samcompress.core.zoo import find

REFUSALS = (errors.ModelError, errors.NoEffectError, errors.OrderError, errors.ConfigError)
PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
SAVED = ("tiny_sam", "efficient_sam", "sam_hq", "slim_sam", "sam2")
FIRST_OF_FAMILY = {case.name.split(".")[0]: case for case in reversed(CASES)}

# Encoders of segment_anything's ViT blocks, and all others.
BLOCKS = ("efficient_sam", "sam_hq", "slim_sam")
OTHERS = tuple(name for name in MODELS if name not in BLOCKS)
# Decoders that take further channels.
FURTHER = ("sam_hq", "sam_hq_vit_tiny", "sam2", "edgetam")
# Their decoders, prompts and framing are those of other models here.
UNPUBLISHED = ("efficient_former", "lite_vit", "u_net", "rwkv", "hiera", "timm")


def but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in MODELS if name not in names)


LATER = {"comes after prune.slim_sam": ("slim_sam",)}
ENCODER = {"this mask decoder reads more than an embedding": FURTHER, **LATER}
NO_BLOCKS = {"finds no ViT blocks of segment_anything": OTHERS}
SHARED_TOKENS = {"cannot change tokens that the mask decoder reads too": ("sam_hq",)}
NO_LAYER = "lacks a layer that is tapped"
NO_SHAPE = "student and teacher differ in width where they are compared"
ALIGN = {
    NO_LAYER: tuple(name for name in OTHERS if name != "rwkv"),
    NO_SHAPE: BLOCKS,
    "compares block with block": ("rwkv",),
}

# Technique, part of what the refusal says, models.
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "substitute.image_size": LATER,
    **{
        f"substitute.{encoder}": ENCODER
        for encoder in (
            "tiny_vit", "rep_vit", "efficient_vit", "vit", "res_net", "efficient_former",
            "lite_vit", "u_net", "rwkv", "hiera", "timm",
        )
    },
    "substitute.conventions": {
        "follows these conventions already": ("tiny_sam",),
        "does not know this model's parts": ("edge_sam", "efficient_sam", *FURTHER),
        **LATER,
    },
    "substitute.hq": {
        "has the token already": ("sam_hq", "sam_hq_vit_tiny"),
        "does not know this model's parts": but(
            "mobile_sam", "sam_hq", "sam_hq_vit_tiny", "slim_sam"
        ),
        **LATER,
    },
    "substitute.light_decoder": LATER,
    "prune.mlp": {"finds no ViT of segment_anything": OTHERS},
    "prune.heads": {
        "finds no ViT of segment_anything": OTHERS,
        "nothing of a module would be left": ("slim_sam",),
    },
    "prune.head_dims": {"finds no ViT of segment_anything": OTHERS},
    "prune.channels": NO_BLOCKS | SHARED_TOKENS,
    "prune.blocks": NO_BLOCKS | SHARED_TOKENS,
    "prune.slim_sam": NO_BLOCKS | SHARED_TOKENS,
    "prune.filters": {"does not cut a ViT of segment_anything": BLOCKS},
    "prune.decoder": {"matched no module it can act on": ("efficient_sam",)},
    "attention.fused": {
        "finds neither ViT blocks nor the mask decoder": (
            "tiny_sam", "edge_sam", "sam_hq_vit_tiny", "sam2", "edgetam",
        ),
    },
    "distill.encoder": {},
    "distill.prompt_loop": {},
    "distill.full_stage": {},
    "distill.layer_wise": {
        NO_LAYER: tuple(name for name in OTHERS if name != "rwkv"),
        NO_SHAPE: ("sam_hq",),
    },
    "distill.sami": {NO_LAYER: OTHERS},
    "distill.align_bottleneck": ALIGN,
    "distill.align_embedding": ALIGN,
    "distill.supervised": {"feeds masks back": ("efficient_sam",)},
    "quantize.int8_weights": {},
    "compile.export": {"cannot make a graph": ("efficient_sam",)},
}  # fmt: skip
TRAINING = ("distill.prompt_loop", "distill.full_stage", "distill.supervised")


def slow(technique: str, model: str) -> bool:
    """Seconds each; or training a model whose decoder another model has too."""
    return technique == "compile.export" or (technique in TRAINING and model in UNPUBLISHED)


PAIRS = [
    pytest.param(
        case,
        name,
        id=f"{case.name}-{name}",
        marks=[pytest.mark.slow] if slow(case.name, name) else [],
    )
    for case in CASES
    for name in MODELS
]


@cache
def model(name: str) -> Any:
    """Tests must not change it, as no technique does."""
    return MODELS[name]()


@cache
def teacher() -> Any:
    """A plain SAM of other weights, whose embedding has the shape of all models'."""
    return plain(seed=5)


@pytest.fixture(autouse=True)
def _small() -> Any:
    with small_sizes():
        yield


def test_the_table_names_techniques_and_models() -> None:
    known = {case.name for case in CASES}
    for technique, reasons in REFUSED.items():
        assert technique in known, technique
        named = [name for names in reasons.values() for name in names]
        assert len(named) == len(set(named)), technique
        assert set(named) <= set(MODELS), technique


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_pair(case: Case, name: str, tmp_path: Path) -> None:
    step = sc.get(case.name, **case.params)
    run: dict[str, Any] = {"data": sc.shapes(2, seed=3, size=(60, 80)), "progress": False}
    if step.family == "distill":
        run["teacher"] = teacher()
    reasons = REFUSED.get(case.name, {})
    expected = [text for text, names in reasons.items() if name in names]
    small, said = None, ""
    try:
        small = step(model(name), **run)
    except REFUSALS as refusal:
        said = str(refusal)
    if small is None:
        assert expected or case.name not in REFUSED, f"it should work: {said}"
        assert not expected or expected[0] in said
        # Where or what it was, what fits, and what to do.
        assert sum(f"\n  {part} " in said for part in ("where", "got", "expected", "try")) >= 2
        return
    assert not expected, f"it should say: {expected[0]}"
    assert sc.lineage(small)[-1].transform == step
    found = answer(small)
    assert found.masks.shape == (2, 3, 60, 80)
    assert torch.isfinite(found.logits).all()
    assert torch.isfinite(found.scores).all()
    if FIRST_OF_FAMILY[step.family] is case and name in SAVED:
        sc.save(small, tmp_path / "model")
        again = answer(sc.load(tmp_path / "model"))
        torch.testing.assert_close(again.logits, found.logits, rtol=0, atol=case.tolerance)


def answer(sam: Any) -> Any:
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    return sc.predict(sam, [image], [PROMPTS], multimask=True)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_of_proposals_is_no_sam(case: Case) -> None:
    fast = proposals()
    with pytest.raises(errors.ModelError, match="this is not a SAM"):
        sc.get(case.name, **case.params)(fast, data=sc.shapes(2))


@cache
def proposals() -> Any:
    return find("fast_sam_s").build()
