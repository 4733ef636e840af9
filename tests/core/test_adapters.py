from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import samcompress as sc
from samcompress.core.adapters import (
    SHARED,
    TIED,
    from_transformers,
    rename,
    rules,
    state_from_transformers,
    to_transformers,
)
from samcompress.core.build import config_of
from samcompress.core.errors import MissingDependencyError, ModelError

# Sizes that differ from every default of transformers, so that each field must be handed over.
ODD: dict[str, Any] = {
    "image_size": 48,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.71,
    "window_size": 4,
    "global_attn_indexes": (0, 2),
    "out_chans": 32,
    "mask_in_chans": 12,
    "decoder_depth": 3,
    "decoder_mlp_dim": 40,
    "decoder_num_heads": 2,
    "num_multimask_outputs": 4,
    "iou_head_depth": 4,
    "iou_head_hidden_dim": 20,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small, threads that wait for one another cost more than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def full(**sizes: Any) -> nn.Module:
    """A SAM whose every tensor is random, so that no exchange of two goes unseen."""
    sam = sc.build("tiny", **{**ODD, **sizes})
    generator = torch.Generator().manual_seed(5)
    for name, p in sam.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if p.ndim == 1 or "rel_pos" in name or "pos_embed" in name else 0.3
        p.data.copy_(scale * noise + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0))
    return sam


def prompts(size: int) -> dict[str, dict[str, torch.Tensor]]:
    points = torch.tensor([[[10.0, 7.0], [30.5, 20.0]], [[1.0, 2.0], [40.0, 33.0]]])
    labels = torch.tensor([[1, 0], [1, 1]])
    boxes = torch.tensor([[4.0, 5.0, 30.0, 40.0], [0.0, 0.0, 20.0, 12.0]])
    generator = torch.Generator().manual_seed(2)
    masks = torch.randn((1, 1, size, size), generator=generator)
    return {
        "points": {"points": points, "labels": labels},
        "boxes": {"boxes": boxes},
        "both": {"points": points, "labels": labels, "boxes": boxes},
        "mask": {"points": points[:1], "labels": labels[:1], "masks": masks},
    }


@torch.no_grad()
def by_sam(sam: Any, x: torch.Tensor, prompt: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    features = sam.image_encoder(x)
    points = (prompt["points"], prompt["labels"]) if "points" in prompt else None
    sparse, dense = sam.prompt_encoder(
        points=points, boxes=prompt.get("boxes"), masks=prompt.get("masks")
    )
    pe = sam.prompt_encoder.get_dense_pe()
    return features, *sam.mask_decoder(
        image_embeddings=features,
        image_pe=pe,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )


@torch.no_grad()
def by_transformers(hf: Any, x: torch.Tensor, prompt: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    features = hf.get_image_embeddings(x)
    given = {
        "input_points": prompt["points"][None] if "points" in prompt else None,
        "input_labels": prompt["labels"][None] if "labels" in prompt else None,
        "input_boxes": prompt["boxes"][None] if "boxes" in prompt else None,
        "input_masks": prompt.get("masks"),
    }
    out = hf(image_embeddings=features, **given, multimask_output=True)
    return features, out.pred_masks[0], out.iou_scores[0]


def difference(sam: nn.Module, hf: nn.Module) -> float:
    """Largest difference of embedding, masks and scores, relative to the largest value."""
    size = sam.image_encoder.img_size
    x = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for prompt in prompts(sam.prompt_encoder.mask_input_size[0]).values():
        ours, theirs = by_sam(sam, x, prompt), by_transformers(hf, x, prompt)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


def test_to_transformers_is_equal_for_any_size() -> None:
    sam = full()
    hf = to_transformers(sam)
    assert type(hf).__name__ == "SamModel"
    assert not hf.training
    assert difference(sam, hf) < 1e-5


def test_there_and_back_is_exact_through_objects_and_folders(tmp_path: Path) -> None:
    sam = full()
    hf = to_transformers(sam)
    hf.save_pretrained(tmp_path / "hf")
    for found in (from_transformers(hf), from_transformers(tmp_path / "hf"), sc.load(hf)):
        assert config_of(found) == config_of(sam)
        assert all(torch.equal(sam.state_dict()[k], t) for k, t in found.state_dict().items())


def test_a_model_made_by_transformers_comes_in() -> None:
    import transformers

    settings = to_transformers(full()).config
    settings.mask_decoder_config.layer_norm_eps = 1e-6  # the default of transformers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.SamModel(settings).eval()
    sam = from_transformers(hf)
    # Not to rounding: the decoder's norms have another eps there.
    assert difference(sam, hf) < 1e-3
    assert difference(sam, to_transformers(sam)) < 1e-5


def test_dtype_is_kept_both_ways() -> None:
    sam = full().to(torch.float64)
    hf = to_transformers(sam)
    assert hf.dtype is torch.float64
    back = from_transformers(hf)
    assert back.pixel_mean.dtype is torch.float64
    assert all(torch.equal(sam.state_dict()[k], t) for k, t in back.state_dict().items())


def test_input_is_untouched() -> None:
    sam = full()
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    hf = to_transformers(sam)
    for p in hf.parameters():
        p.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in sam.state_dict().items())


def test_names_of_the_published_layout(shared: Path) -> None:
    facts = json.loads((shared / "golden" / "hf_sam_vit_b.json").read_text())
    names = rules(3)
    for theirs, _, _, source in facts["tensors"]:
        ours = source.removeprefix("= ")
        assert rename(ours, names) == (SHARED if theirs == TIED else theirs)
        assert rename(theirs, names, back=True) == (ours if theirs != TIED else TIED)


def test_published_shapes(shared: Path) -> None:
    facts = json.loads((shared / "golden" / "hf_sam_vit_b.json").read_text())
    hf = {row[0]: torch.empty(row[1], device="meta") for row in facts["tensors"]}
    with torch.device("meta"):
        sam = sc.ARCHITECTURES["vit_b"].build()
    ours = {k: v.shape for k, v in sam.state_dict().items()}
    assert {k: v.shape for k, v in state_from_transformers(hf).items()} == ours


@pytest.mark.slow
def test_vit_b_becomes_exactly_the_published_layout(shared: Path) -> None:
    facts = json.loads((shared / "golden" / "hf_sam_vit_b.json").read_text())
    hf = to_transformers(sc.build("vit_b"))
    found = {k: tuple(v.shape) for k, v in hf.state_dict().items()}
    assert found == {row[0]: tuple(row[1]) for row in facts["tensors"]}
    wanted = facts["config"]["vision_config"]
    settings = hf.config.vision_config.to_dict()
    assert {k: settings[k] for k in wanted if k != "global_attn_indexes"} == {
        k: v for k, v in wanted.items() if k != "global_attn_indexes"
    }
    assert list(settings["global_attn_indexes"]) == wanted["global_attn_indexes"]


# --- what it refuses ---------------------------------------------------------------------------


def narrower(sam: nn.Module) -> None:
    mlp = sam.image_encoder.blocks[1].mlp
    width = mlp.lin1.in_features
    mlp.lin1, mlp.lin2 = nn.Linear(width, 10), nn.Linear(10, width)


def foreign(sam: nn.Module) -> None:
    sam.image_encoder.neck[1] = nn.BatchNorm2d(32)


@pytest.mark.parametrize(
    ("change", "module"),
    [(narrower, "image_encoder.blocks.1.mlp.lin1.bias"), (foreign, "image_encoder.neck.1.num_bat")],
)
def test_the_module_in_the_way_is_named(change: Any, module: str) -> None:
    sam = full()
    change(sam)
    with pytest.raises(ModelError) as info:
        to_transformers(sam)
    text = str(info.value)
    assert text.startswith("a transformers SamModel cannot hold this model.\n")
    assert f"  where     {module}" in text
    assert text.endswith(
        "  got       a module or width that differs from the other blocks'\n"
        "  expected  SAM's own modules, every block with the same widths\n"
        "  try       save it with sc.save, or convert it before the step that made the difference"
    )


def test_shapes_transformers_does_not_know() -> None:
    with pytest.raises(ModelError) as info:
        to_transformers(full(iou_head_depth=1))
    assert str(info.value) == (
        "a transformers SamModel cannot hold this model.\n"
        "  where     mask_decoder.iou_prediction_head, prompt_encoder.mask_downscaling\n"
        "  got       iou_head_depth=1, mask_in_chans=12\n"
        "  expected  an IoU head of two layers or more, mask_in_chans a multiple of 4"
    )


def test_settings_that_sam_does_not_have() -> None:
    hf = to_transformers(full())
    hf.config.vision_config.hidden_act = "relu"
    with pytest.raises(ModelError) as info:
        from_transformers(hf)
    assert str(info.value) == (
        "this model computes something else than SAM.\n"
        "  where     SamModel: vision_config.hidden_act\n"
        "  got       relu\n"
        "  expected  gelu"
    )


def test_other_modules() -> None:
    with pytest.raises(ModelError) as info:
        from_transformers(nn.Linear(2, 2))
    assert str(info.value) == (
        "this is not a SAM of transformers.\n"
        "  got       torch.nn.modules.linear.Linear\n"
        "  expected  transformers.SamModel, transformers.Sam2Model, transformers.EdgeTamModel"
    )


def test_transformers_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers is needed for to_transformers"):
        to_transformers(full())


@pytest.mark.parametrize(
    "step",
    [sc.prune.MergeTokens(), sc.prune.ClusterTokens(), sc.prune.SkipPadding(photo=True)],
    ids=lambda step: step.name,
)
def test_what_only_approximates_is_refused(step: sc.Transform) -> None:
    sam = sc.build("tiny", image_size=128, window_size=5)
    with pytest.raises(ModelError, match="cannot hold"):
        to_transformers(step(sam, progress=False))
