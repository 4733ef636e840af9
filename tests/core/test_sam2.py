from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import samcompress as sc
from samcompress.core._sam2 import CONFIGS, Sam2Config
from samcompress.core._sam2_parts import settle
from samcompress.core.adapters import from_transformers, state_from_sam2
from samcompress.core.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    ModelError,
)
from samcompress.core.framing import framing_of
from samcompress.core.history import history
from samcompress.core.predict import preprocess
from samcompress.core.sizes import parameter_count

transformers = pytest.importorskip("transformers")

SIZE, WIDTH = 128, 32
# Sizes that differ from every default of transformers, so that each field must be handed over.
HIERA: dict[str, Any] = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 4, 6, 2],
    "window_positional_embedding_background_size": [5, 5],
    "global_attention_blocks": [2, 4],
    "mlp_ratio": 2.0,
}
REPVIT: dict[str, Any] = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m0_9",
    "model_args": {
        "features_only": True,
        "out_indices": [0, 1, 2, 3],
        "embed_dim": [8, 16, 24, 32],
        "depth": [1, 1, 1, 1],
    },
    "num_classes": 0,
    "label_names": [],
}


def settings(kind: str = "sam2", size: int = SIZE, **decoder: Any) -> dict[str, Any]:
    """A configuration of transformers, small."""
    backbone = HIERA if kind == "sam2" else REPVIT
    channels = [64, 32, 16, 8] if kind == "sam2" else [32, 24, 16, 8]
    return {
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "backbone_config": copy.deepcopy(backbone),
            "backbone_channel_list": channels,
            "backbone_feature_sizes": [[size // n, size // n] for n in (4, 8, 16)],
            "fpn_hidden_size": WIDTH,
        },
        "prompt_encoder_config": {
            "hidden_size": WIDTH,
            "image_size": size,
            "mask_input_channels": 12,
        },
        "mask_decoder_config": {
            "hidden_size": WIDTH,
            "mlp_dim": 40,
            "num_attention_heads": 4,
            "attention_downsample_rate": 4,
            "iou_head_depth": 4,
            "iou_head_hidden_dim": 20,
            **decoder,
        },
    }


def theirs(kind: str = "sam2", size: int = SIZE, video: bool = False, **decoder: Any) -> Any:
    """A model of transformers whose every tensor is random, so that no exchange goes unseen."""
    name = f"{kind}_video" if video else kind
    config = transformers.AutoConfig.for_model(name, **settings(kind, size, **decoder))
    if video:
        config.image_size = size
    module = transformers.models.sam2_video if video else transformers
    make = {
        "sam2": getattr(module, "Sam2VideoModel" if video else "Sam2Model"),
        "edgetam": transformers.EdgeTamModel,
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config).eval()
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if p.ndim == 1 else 0.3
        if name.startswith("vision_encoder.backbone.timm_model"):
            scale = 0.02  # no norm follows its residuals
        p.data.copy_(scale * noise + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0))
    return model


@pytest.fixture(scope="module")
def hf() -> Any:
    return theirs()


@pytest.fixture(scope="module")
def sam(hf: Any) -> Any:
    """Tests must not change it."""
    return from_transformers(hf)


def image(size: int = SIZE, count: int = 1) -> torch.Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(0))


def prompts(size: int = SIZE) -> dict[str, dict[str, torch.Tensor]]:
    """Three prompts of each kind, in the square."""
    generator = torch.Generator().manual_seed(2)
    points = size * torch.rand((3, 2, 2), generator=generator)
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    boxes = (
        size
        / 128
        * torch.tensor([[4.0, 5.0, 60.0, 70.0], [0.0, 0.0, 20.0, 12.0], [30.0, 30.0, 100.0, 120.0]])
    )
    masks = torch.randn((1, 1, size // 4, size // 4), generator=generator)
    return {
        "point": {"points": points[:, :1], "labels": labels[:, :1]},
        "points": {"points": points, "labels": labels},
        "box": {"boxes": boxes},
        "box and points": {"points": points, "labels": labels, "boxes": boxes},
        "mask": {"masks": masks},
        "points and mask": {"points": points, "labels": labels, "masks": masks},
        "box and mask": {"boxes": boxes, "masks": masks},
    }


@torch.no_grad()
def by_sam(sam: Any, features: Any, prompt: dict[str, Any], multimask: bool) -> tuple[Any, ...]:
    points = (prompt["points"], prompt["labels"]) if "points" in prompt else None
    sparse, dense = sam.prompt_encoder(
        points=points, boxes=prompt.get("boxes"), masks=prompt.get("masks")
    )
    given = {
        "image_embeddings": features,
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }
    masks, scores = sam.mask_decoder(**given, multimask_output=multimask)
    return masks, scores, sam.mask_decoder.predict_all(**given)[2]


@torch.no_grad()
def by_transformers(hf: Any, x: Any, prompt: dict[str, Any], multimask: bool) -> tuple[Any, ...]:
    out = hf(
        pixel_values=x,
        input_points=prompt["points"][None] if "points" in prompt else None,
        input_labels=prompt["labels"][None] if "points" in prompt else None,
        input_boxes=prompt["boxes"][None] if "boxes" in prompt else None,
        input_masks=prompt.get("masks"),
        multimask_output=multimask,
    )
    return out.pred_masks[0], out.iou_scores[0], out.object_score_logits[0]


def difference(sam: Any, hf: Any, size: int = SIZE) -> float:
    """Largest of masks, scores and object logits, relative to the largest value of each."""
    x = image(size)
    with torch.no_grad():
        features = sam.image_encoder(x)
    worst = 0.0
    for prompt in prompts(size).values():
        for multimask in (False, True):
            both = zip(
                by_sam(sam, features, prompt, multimask),
                by_transformers(hf, x, prompt, multimask),
                strict=True,
            )
            for ours, other in both:
                assert ours.shape == other.shape
                worst = max(worst, float((ours - other).abs().max() / other.abs().max()))
    return worst


# --- equal to transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", prompts())
@pytest.mark.parametrize("multimask", [False, True])
def test_masks_and_scores_are_those_of_transformers(
    sam: Any, hf: Any, kind: str, multimask: bool
) -> None:
    x, prompt = image(), prompts()[kind]
    with torch.no_grad():
        features = sam.image_encoder(x)
    masks, scores, present = by_sam(sam, features, prompt, multimask)
    wanted, iou, objects = by_transformers(hf, x, prompt, multimask)
    count = 1 if kind == "mask" else 3
    assert masks.shape == wanted.shape == (count, 3 if multimask else 1, SIZE // 4, SIZE // 4)
    assert (masks - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (scores - iou).abs().max() < 1e-5
    assert (present - objects).abs().max() < 1e-5


def test_three_levels_travel_in_one_tensor(sam: Any, hf: Any) -> None:
    x = image(count=2)
    with torch.no_grad():
        found = sam.image_encoder(x)
        wanted = hf.get_image_embeddings(x)
    assert found.shape == (2, 4 * WIDTH, SIZE // 16, SIZE // 16)
    embedding, finer, finest = found.split([WIDTH, WIDTH, 2 * WIDTH], 1)
    levels = (F.pixel_shuffle(finest, 4), F.pixel_shuffle(finer, 2), embedding)
    for level, other in zip(levels, wanted, strict=True):
        assert torch.allclose(level, other, atol=1e-6)


@pytest.mark.parametrize(
    ("decoder", "replaced"),
    [
        ({"dynamic_multimask_stability_thresh": 0.945}, [False, False, True]),
        ({"dynamic_multimask_via_stability": False}, [False, False, False]),
    ],
)
def test_an_unstable_single_mask_is_replaced(decoder: dict[str, Any], replaced: list[bool]) -> None:
    hf = theirs(**decoder)
    sam = from_transformers(hf)
    x, prompt = image(), prompts()["box"]
    features = sam.image_encoder(x).detach()
    masks, scores, _ = by_sam(sam, features, prompt, False)
    wanted, iou, _ = by_transformers(hf, x, prompt, False)
    assert (masks - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (scores - iou).abs().max() < 1e-5
    first, _, _ = by_sam(sam.train(), features, prompt, False)  # in training it is left alone
    assert [not torch.equal(a, b) for a, b in zip(masks, first, strict=True)] == replaced


def test_settle_by_hand() -> None:
    masks = torch.zeros(3, 3, 2, 2) - 9
    masks[0, 0, 0] = torch.tensor([5.0, 0.5])  # cut at 1: one cell, at -1: two
    masks[1, 0, 0] = torch.tensor([5.0, 5.0])
    masks[:, 2] = 7.0
    scores = torch.tensor([[0.9, 0.2, 0.3]]).repeat(3, 1)
    found, score = settle(masks, scores, 1.0, 0.6)
    assert torch.equal(found[0, 0], masks[0, 2])
    assert torch.equal(found[1:, 0], masks[1:, 0])  # the last is empty, hence stable
    assert torch.equal(found[:, 1:], masks[:, 1:])
    assert (
        score.tolist() == torch.tensor([[0.3, 0.2, 0.3], [0.9, 0.2, 0.3], [0.9, 0.2, 0.3]]).tolist()
    )


def test_edgetam() -> None:
    pytest.importorskip("timm")
    hf = theirs("edgetam", 64)
    sam = from_transformers(hf)
    assert sam.image_encoder.img_size == 64
    assert difference(sam, hf, 64) < 1e-5


# --- as one of our models ------------------------------------------------------------------------

SCENE = sc.shapes(1, seed=3, size=(150, 211))[0]
ASKED = [
    sc.Prompt(points=[[100, 50], [20, 30]], labels=[1, 0], box=[10, 20, 150, 120]),
    sc.Prompt(points=[[60, 70]]),
    sc.Prompt(box=[5, 6, 120, 110]),
]


def test_photo_prompts_and_masks_go_through_the_square_as_in_the_processor(
    sam: Any, hf: Any
) -> None:
    processor = transformers.Sam2Processor(
        transformers.Sam2ImageProcessor(size={"height": SIZE, "width": SIZE})
    )
    first = ASKED[0]
    inputs = processor(
        images=SCENE.image,
        input_points=[[first.points.tolist()]],
        input_labels=[[first.labels.astype(int).tolist()]],
        input_boxes=[[first.box.tolist()]],
        return_tensors="pt",
    )
    sizes = inputs.pop("original_sizes")
    pixels, inside = preprocess(sam, SCENE.image)
    assert inside == (SIZE, SIZE)
    assert (pixels - inputs["pixel_values"][0]).abs().max() < 1e-6
    with torch.no_grad():
        out = hf(**inputs, multimask_output=True)
    wanted = processor.post_process_masks(out.pred_masks, sizes, binarize=False)[0]
    found = sc.predict(sam, [SCENE.image], [[first]], multimask=True)[0]
    logits = framing_of(sam).full_size(found.logits, SCENE.size)
    assert logits.shape == wanted.shape == (1, 3, 150, 211)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert ((wanted > 0) != found.masks).float().mean() < 1e-4
    assert (found.scores - out.iou_scores[0]).abs().max() < 1e-5


def test_ragged_prompts_of_two_images_are_those_of_each_alone(sam: Any) -> None:
    images = [SCENE.image, np.ascontiguousarray(SCENE.image[:, :90])]
    asked = [ASKED, [sc.Prompt(points=[[20, 30]])]]
    together = sc.predict(sam, images, asked, batch_size=2)
    for picture, wanted, found in zip(images, asked, together, strict=True):
        for index, prompt in enumerate(wanted):
            alone = sc.predict(sam, [picture], [[prompt]])[0]
            assert torch.allclose(found.logits[index], alone.logits[0], atol=1e-4)
            assert torch.allclose(found.scores[index], alone.scores[0], atol=1e-5)
    again = sc.Prompt(points=[[60, 70]], mask=together[0].logits[1])
    assert sc.predict(sam, [SCENE.image], [[again]])[0].masks.shape == (1, 1, 150, 211)


def test_what_measures_a_sam_measures_this_one(sam: Any) -> None:
    found = sc.evaluate.accuracy(sam, sc.shapes(2, seed=1), prompts="box")
    assert 0 <= found.mean() <= 1
    counted = sc.evaluate.macs(sam)
    assert counted.encoder > counted.encoder_no_attention > 0
    assert counted.decoder_per_prompt > 0


def test_saved_and_loaded_bit_for_bit(sam: Any, tmp_path: Path) -> None:
    sc.save(sam, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "samcompress.json").read_text())
    assert record["base"]["architecture"] == "sam2"
    back = sc.load(tmp_path / "out")
    assert framing_of(back) == framing_of(sam)
    assert history(back).base.config == history(sam).base.config
    first, second = (sc.predict(m, [SCENE.image], [ASKED], multimask=True)[0] for m in (sam, back))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.scores, second.scores)
    assert "image size 128, " in (tmp_path / "out" / "README.md").read_text()


def test_techniques_change_it_and_are_saved(sam: Any, tmp_path: Path) -> None:
    recipe = sc.substitute.ImageSize(size=96) | sc.quantize.Int8Weights(min_size=16)
    small = recipe(sam, progress=False)
    assert small.image_encoder.vision.backbone.patch_embed.projection.weight.dtype is torch.int8
    sc.save(small, tmp_path / "out")
    back = sc.load(tmp_path / "out")
    found, again = (sc.predict(m, [SCENE.image], [ASKED])[0] for m in (small, back))
    assert found.logits.shape[-1] == 24
    assert torch.equal(found.logits, again.logits)


def test_another_image_size_is_that_of_transformers(sam: Any, hf: Any) -> None:
    other = theirs(size=192)
    other.load_state_dict(hf.state_dict())
    assert difference(sc.substitute.ImageSize(size=192)(sam, progress=False), other, 192) < 1e-5


def test_sizes_that_do_not_fit(sam: Any) -> None:
    assert sam.image_encoder.multiple == 32
    with pytest.raises(ConfigError) as info:
        copy.deepcopy(sam).image_encoder.resize(80)
    assert str(info.value) == (
        "the image size does not fit this encoder.\n  got       80\n  expected  a multiple of 32"
    )


# --- sources -------------------------------------------------------------------------------------


def test_the_model_that_came_in_is_untouched(hf: Any) -> None:
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    sam = from_transformers(hf)
    assert type(hf.vision_encoder.neck).__name__ == "Sam2VisionNeck"
    for p in sam.parameters():
        p.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in hf.state_dict().items())


def test_dtype_is_kept() -> None:
    sam = sc.load(theirs().to(torch.float64))
    assert {p.dtype for p in sam.parameters()} == {torch.float64}
    assert sam.pixel_mean.dtype is torch.float64


def test_a_folder_holds_the_same_model(sam: Any, hf: Any, tmp_path: Path) -> None:
    hf.save_pretrained(tmp_path)
    found = sc.load(tmp_path)
    assert history(found).base.config == history(sam).base.config
    assert history(found).base.source == tmp_path.name
    assert all(torch.equal(found.state_dict()[k], t) for k, t in sam.state_dict().items())
    assert found.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    processor = transformers.Sam2ImageProcessor(image_mean=[0.5, 0.4, 0.2], image_std=[0.2] * 3)
    transformers.Sam2Processor(processor).save_pretrained(tmp_path)
    found = sc.load(tmp_path)
    assert found.pixel_mean.flatten().tolist() == pytest.approx([127.5, 102.0, 51.0])
    assert found.pixel_std.flatten().tolist() == pytest.approx([51.0] * 3)


def test_a_video_model_gives_what_it_does_to_an_image(tmp_path: Path) -> None:
    video = theirs(video=True)
    whole = video.state_dict()
    image_model = theirs()
    image_model.load_state_dict({k: whole[k] for k in image_model.state_dict()})
    assert difference(from_transformers(video), image_model) < 1e-5
    video.save_pretrained(tmp_path)
    assert difference(sc.load(tmp_path), image_model) < 1e-5


def test_a_file_may_hold_the_positions_once(hf: Any) -> None:
    state = hf.state_dict()
    shared = state.pop("prompt_encoder.shared_embedding.positional_embedding")
    named = state_from_sam2(state)
    for layer in ("pe_layer", "grid_layer"):
        matrix = named[f"prompt_encoder.{layer}.positional_encoding_gaussian_matrix"]
        assert torch.equal(matrix, state["shared_image_embedding.positional_embedding"])
    assert not torch.equal(shared, state["shared_image_embedding.positional_embedding"])


# --- published sizes -----------------------------------------------------------------------------

# Parameters of the whole model, in millions, as published: facebookresearch/sam2 and EdgeTAM.
PUBLISHED = {"tiny": 38.9, "small": 46.0, "base_plus": 80.8, "large": 224.4, "edgetam": 13.9}
# Without the memory that links the frames of a video.
ON_IMAGES = {
    "tiny": 31_440_721,
    "small": 38_538_577,
    "base_plus": 73_328_401,
    "large": 216_924_865,
    "edgetam": 9_120_641,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_the_published_models(name: str) -> None:
    config = CONFIGS[name]
    if name == "edgetam":
        pytest.importorskip("timm")
    whole = config.spelt_out()
    assert whole.image_size == config.image_size == 1024
    assert whole.spelt_out() == whole == Sam2Config(**json.loads(json.dumps(whole.to_dict())))
    kind = f"{config.model_type}_video"
    full = transformers.AutoConfig.for_model(kind, **copy.deepcopy(config.settings))
    module = getattr(transformers.models, kind)
    with torch.device("meta"):
        sam, plain = config.build(), whole.build()
        video = getattr(module, "Sam2VideoModel" if name != "edgetam" else "EdgeTamVideoModel")(
            full
        )
    assert parameter_count(sam) == parameter_count(plain) == ON_IMAGES[name]
    assert parameter_count(video) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.1)
    named = state_from_sam2(video.state_dict())
    shapes = {k: v.shape for k, v in sam.state_dict().items()}
    assert {k: v.shape for k, v in named.items()} == shapes


# --- what it refuses -----------------------------------------------------------------------------


def test_settings_that_are_not_ours(hf: Any) -> None:
    hf = copy.deepcopy(hf)
    hf.config.mask_decoder_config.num_hidden_layers = 3
    with pytest.raises(ModelError) as info:
        from_transformers(hf)
    assert str(info.value) == (
        "this model computes something else than SAM.\n"
        "  where     Sam2Model: mask_decoder_config.num_hidden_layers\n"
        "  got       3\n"
        "  expected  2"
    )


def test_parts_of_a_model(hf: Any) -> None:
    with pytest.raises(ModelError) as info:
        from_transformers(hf.vision_encoder)
    assert str(info.value) == (
        "this is not a SAM of transformers.\n"
        "  got       transformers.models.sam2.modeling_sam2.Sam2VisionModel\n"
        "  expected  transformers.SamModel, transformers.Sam2Model, transformers.EdgeTamModel"
    )


def test_a_folder_with_other_tensors(hf: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["mask_decoder.conv_s9.weight"] = state.pop("mask_decoder.conv_s0.weight")
    save_file(state, path)
    with pytest.raises(CheckpointError) as info:
        sc.load(tmp_path)
    assert str(info.value) == (
        "the tensors do not fit.\n"
        f"  where     {tmp_path}\n"
        "  got       missing image_encoder.conv_s0.weight; unknown image_encoder.conv_s9.weight\n"
        "  expected  a model of type 'sam2' with the sizes in its configuration\n"
        "  try       rename image_encoder.conv_s9.weight to image_encoder.conv_s0.weight"
    )


def test_a_record_of_an_unknown_kind(sam: Any, tmp_path: Path) -> None:
    sc.save(sam, tmp_path / "out")
    path = tmp_path / "out" / "samcompress.json"
    record = json.loads(path.read_text())
    record["base"]["architecture"] = "sam9"
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="the record of a checkpoint is damaged"):
        sc.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "package", "line"),
    [("sam2", "transformers", "transformers"), ("edgetam", "timm", "'samcompress[zoo]'")],
)
def test_packages_that_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str, line: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as info:
        Sam2Config(kind, settings(kind)).build()
    assert str(info.value).startswith(f"{package} is needed for ")
    assert str(info.value).endswith(f"pip install {line}")
