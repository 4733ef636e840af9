"""Official files of published models, opened through the public door, against reference outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_models import FAST, REFERENCES, SLOW
from PIL import Image
from segment_anything import SamPredictor
from torch import Tensor
from zoo_goldens import Reference, check, error

import samcompress as sc
from samcompress.core import errors, zoo
from samcompress.core._weights import read_state
from samcompress.core.framing import Framing, Stretched, Truncated, framing_of
from samcompress.core.predict import Embedding, Prediction, decode, encode, preprocess
from samcompress.substitute import _official
from samcompress.substitute.conventions import Conventions
from samcompress.substitute.hq import HQ

pytest.importorskip("timm")

assert _official.__all__  # imported for what it registers
TOLERANCE = 1e-4
# Those whose encoder has attention over the whole image, and is run with attention.fused.
PLAIN = ("sam_vit", "sam_hq_vit_b", "efficient_sam")
# Rules that are not SAM's.
RULES = {"nano_sam": Truncated, "efficient_sam_ti": Stretched, "efficient_sam_s": Stretched}


@dataclass
class Opened:
    """One model, opened from its official files, and the image encoded by it once."""

    name: str
    entry: zoo.Published
    reference: Reference
    sam: Any
    recognised: list[zoo.Published | None]
    pixels: Tensor
    embedding: Embedding
    reports: dict[str, float] = field(default_factory=dict)


def official_files(name: str, reference: Reference) -> dict[str, Any]:
    """What its authors save, by file name, in the wrappers that they use."""
    state = reference.state()
    entry = zoo.find(name)
    if len(entry.files) == 1:
        wrapper = {"efficient_s": "model", "efficient_v": "state_dict"}.get(name[:11])
        return {entry.files[0].name: {wrapper: state} if wrapper else state}
    parts = {
        part: {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(part)}
        for part in ("image_encoder", "prompt_encoder", "mask_decoder")
    }
    first, second = (file.name for file in entry.files)
    whole = {k: t for k, t in state.items() if not k.startswith("image_encoder.")}
    if name == "nano_sam":
        # Its decoder comes with an image encoder that is not NanoSAM's.
        other = {"image_encoder.neck.0.weight": torch.zeros(256, 320, 1, 1)}
        checkpoint = {"epoch": 3, "model": parts["image_encoder"], "optimizer": {"state": {}}}
        return {first: checkpoint, second: whole | other}
    decoder = {"PromtEncoder": parts["prompt_encoder"], "MaskDecoder": parts["mask_decoder"]}
    if name == "mobile_sam_v2_l2":
        # Those of EfficientViT-SAM's own decoder are in the encoder's file too.
        return {first: {"state_dict": state}, second: decoder}
    return {first: {"model": parts["image_encoder"]}, second: decoder}


def open_model(name: str, shared: Path, folder: Path) -> Opened:
    reference = Reference.of(REFERENCES[name], shared)
    folder.mkdir()
    files = official_files(name, reference)
    for file, content in files.items():
        torch.save(content, folder / file)
    del files
    paths = list(folder.iterdir())
    recognised = [zoo.recognise(read_state(path), path.name) for path in paths]
    sam: Any = sc.load(paths[0] if len(paths) == 1 else folder)
    for path in paths:
        path.unlink()
    image = reference.image()
    pixels, _ = preprocess(sam, image)
    # Same function, several times as fast, and without maps of a gigabyte.
    runner = sc.attention.Fused()(sam, progress=False) if name.startswith(PLAIN) else sam
    (embedding,) = encode(runner, [image])
    del runner
    return Opened(name, zoo.find(name), reference, sam, recognised, pixels.cpu(), embedding)


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(name, id=name) for name in FAST),
        *(pytest.param(name, id=name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def opened(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    made = open_model(request.param, shared, tmp_path_factory.mktemp("official") / "files")
    yield made
    for key, value in made.reports.items():
        print(f"{made.name} {key} {value:.1e}")


def rows(opened: Opened, key: str, prompt: sc.Prompt) -> Prediction:
    """All masks that the reference has of a prompt, in its order."""
    sam, embedding, name = opened.sam, opened.embedding, opened.name

    def ask(multimask: bool, model: Any = sam) -> Prediction:
        return decode(model, embedding, [prompt], multimask=multimask, full_size=False)

    many = ask(True)
    if name == "tiny_sam":
        found = [(many, slice(None))]
    elif name.startswith("sam_hq"):
        # Upstream keeps the best of the three, and has the fine mask alone as a mode.
        best = int(many.scores[0].argmax())
        sam.mask_decoder.hq_token_only = True
        only = ask(False)
        sam.mask_decoder.hq_token_only = False
        found = [(ask(False), slice(None)), (only, slice(None)), (many, slice(best, best + 1))]
    else:
        found = [(ask(False), slice(None)), (many, slice(None))]
    return Prediction(
        None,
        torch.cat([part.scores[0, kept] for part, kept in found]),
        torch.cat([part.logits[0, kept] for part, kept in found]),
    )


def boxes(reference: Reference) -> list[sc.Prompt]:
    """The two of MobileSAMv2's reference."""
    known = reference.synthetic.PROMPTS
    return [sc.Prompt(box=known[key]["box"]) for key in ("box", "box_point")]


def answers(opened: Opened) -> Iterator[tuple[str, Prediction]]:
    """Every set of prompts of the reference."""
    if opened.name.startswith("mobile_sam_v2"):
        one = decode(opened.sam, opened.embedding, boxes(opened.reference), full_size=False)
        yield "boxes", Prediction(None, one.scores[:, 0], one.logits[:, 0])
        return
    for key, prompt in opened.reference.prompts().items():
        if opened.name.startswith("efficient_sam") and prompt.mask is not None:
            with pytest.raises(errors.ModelError, match="takes no mask"):
                rows(opened, key, prompt)
            continue
        yield key, rows(opened, key, prompt)


# --- one model at a time --------------------------------------------------------------------------


def test_file_is_recognised(opened: Opened) -> None:
    sam, entry = opened.sam, opened.entry
    if len(entry.files) == 1:
        assert opened.recognised == [entry]
    assert [step.transform for step in sc.lineage(sam)] == list(entry.steps())
    base = sc.core.history.history(sam).base
    assert base.licence == entry.licence
    assert base.config == entry.base
    assert not sam.training
    assert sam.image_encoder.img_size == entry.input_size
    assert type(framing_of(sam)) is RULES.get(opened.name, Framing)
    assert framing_of(sam).frame == 1024


def test_image_and_embedding(opened: Opened) -> None:
    reference, embedding = opened.reference, opened.embedding
    assert tuple(opened.pixels[None].shape) == tuple(reference.arrays["input_shape"])
    features = embedding.features[0, :256].numpy()
    assert features.shape == tuple(reference.arrays["embedding_shape"])
    found = {
        "input": reference.compare("input", "input", opened.pixels.numpy()),
        "embedding": reference.compare("embedding", "embedding", features),
        "channel mean": error(features.mean((1, 2)), reference.arrays["embedding_channel_mean"]),
    }
    opened.reports.update(found)
    # Dividing by 255 before or after the mean rounds differently; nothing else may.
    assert found["input"] < 1e-6
    assert max(found.values()) < TOLERANCE, found


def test_masks_of_every_prompt(opened: Opened) -> None:
    framing, found = framing_of(opened.sam), {}
    asked = []
    for key, answer in answers(opened):
        asked.append(key)
        full = framing.full_size(answer.logits[None], opened.embedding.size)[0].numpy()
        scores = answer.scores.numpy()
        found |= check(opened.reference, key, answer.logits.numpy(), scores, full)
    stored = {key.split("__")[0] for key in opened.reference.arrays if "__" in key}
    assert set(asked) == stored
    for kind in ("low_res", "iou", "full"):
        opened.reports[kind] = max(v for key, v in found.items() if key.endswith(kind))
    assert max(found.values()) < TOLERANCE, found


def test_public_masks_are_the_reference(opened: Opened) -> None:
    """At the image's own size and cut at the model's threshold, as users get them."""
    reference, name = opened.reference, opened.name
    prompts, key, multimask = [reference.prompts()["box"]], "box", True
    if name.startswith("mobile_sam_v2"):
        prompts, key, multimask = boxes(reference), "boxes", False
    found = decode(opened.sam, opened.embedding, prompts, multimask=multimask)
    counts = found.masks.sum((2, 3)).flatten().numpy()
    # Several masks are the last ones of the reference; of SAM-HQ's it has the best alone.
    if name.startswith("sam_hq"):
        counts = counts[[int(found.scores[0].argmax())]]
    stored = reference.arrays[f"{key}__full_positive"]
    assert np.abs(counts - stored[-len(counts) :]).max() <= 20


def test_saved_and_loaded(opened: Opened, tmp_path: Path) -> None:
    sc.save(opened.sam, tmp_path / "model")
    again: Any = sc.load(tmp_path / "model")
    state = again.state_dict()
    expected = opened.sam.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert framing_of(again) == framing_of(opened.sam)
    assert sc.lineage(again) == sc.lineage(opened.sam)
    prompts = [sc.Prompt(points=[[250, 187.5]]), sc.Prompt(box=[120, 80, 470, 390])]
    for multimask in (False, True):
        before, after = (
            decode(model, opened.embedding, prompts, multimask=multimask)
            for model in (opened.sam, again)
        )
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.scores, before.scores)
        assert torch.equal(after.masks, before.masks)
    # The encoder, at a size at which a call takes no time.
    size = sc.substitute.ImageSize(size=128)
    before, after = (
        sc.predict(size(model, progress=False), [opened.reference.image()], [prompts])[0]
        for model in (opened.sam, again)
    )
    assert torch.equal(after.logits, before.logits)


def test_photo_in_batches_at_another_size(opened: Opened, shared: Path) -> None:
    photo = np.asarray(Image.open(sorted((shared / "data/coco/val2017").glob("*.jpg"))[0]))
    photo = photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, 2)
    height, width = photo.shape[:2]
    small: Any = sc.substitute.ImageSize(size=256)(opened.sam, progress=False)
    assert small.image_encoder.img_size == 256
    prompts = [
        sc.Prompt(points=[[0.3 * width, 0.6 * height]]),
        sc.Prompt(points=[[0.7 * width, 0.2 * height]]),
        sc.Prompt(points=[[9, 9], [width - 9, height - 9]], labels=[1, 0]),
        sc.Prompt(box=[0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height]),
        sc.Prompt(box=[0.5 * width, 0.1 * height, 0.6 * width, 0.3 * height]),
    ]
    turned = np.ascontiguousarray(photo.transpose(1, 0, 2))
    found = sc.predict(small, [photo, turned], [prompts, prompts[:1]], batch_size=2)
    assert found[0].masks.shape == (5, 1, height, width)
    assert found[1].masks.shape == (1, 1, width, height)
    (alone,) = sc.predict(small, [photo], [prompts[3:4]])
    scale = found[0].logits.abs().max()
    assert (alone.logits[0] - found[0].logits[3]).abs().max() <= 1e-4 * scale
    framing = framing_of(small)
    if framing == Framing(256, 256):
        # SAM's own rule: its predictor gives the same.
        predictor = SamPredictor(small)
        predictor.set_image(photo)
        masks, _, _ = predictor.predict(box=prompts[3].box, multimask_output=False)
        assert (masks != found[0].masks[3].numpy()).mean() < 1e-4


# --- what is particular to one --------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["edge_sam"], indirect=True)
def test_stability_of_edge_sam(opened: Opened) -> None:
    step = Conventions(of="edge_sam", stability=True)
    sam = step(opened.sam, progress=False)
    for key, prompt in opened.reference.prompts().items():
        both = [decode(sam, opened.embedding, [prompt], multimask=m).scores[0] for m in (0, 1)]
        apart = np.abs(torch.cat(both).numpy() - opened.reference.arrays[f"{key}__stability"])
        assert apart.max() < 1e-3


@pytest.mark.parametrize("opened", ["sam_hq_vit_tiny"], indirect=True)
def test_fine_mask_alone_as_a_step(opened: Opened) -> None:
    sam = HQ(hq_token_only=True)(opened.sam, progress=False)
    prompt = opened.reference.prompts()["box"]
    found = decode(sam, opened.embedding, [prompt], full_size=False).logits[0].numpy()
    stored = opened.reference.arrays["box__low_res"][1:2]
    assert error(opened.reference.synthetic.subsample("low_res", found), stored) < TOLERANCE


def test_mobile_sam_is_not_taken_for_its_successor(shared: Path, tmp_path: Path) -> None:
    """Its whole file serves as MobileSAMv2's encoder; without the other file nothing is opened."""
    reference = Reference.of("mobilesam", shared)
    torch.save(reference.state(), tmp_path / "mobile_sam.pt")
    with pytest.raises(errors.CheckpointError, match=r"lacks files of MobileSAMv2"):
        sc.load(tmp_path, model="mobile_sam_v2")
    state = reference.state()
    parts = {
        title: {k.removeprefix(f"{part}."): 2 * t for k, t in state.items() if k.startswith(part)}
        for title, part in (("PromtEncoder", "prompt_encoder"), ("MaskDecoder", "mask_decoder"))
    }
    torch.save(parts, tmp_path / "Prompt_guided_Mask_Decoder.pt")
    whole: Any = sc.load(tmp_path)
    assert sc.core.history.history(whole).base.source == "mobile_sam_v2"
    token = "mask_decoder.iou_token.weight"
    assert torch.equal(whole.state_dict()[token], 2 * state[token])
    named: Any = sc.load(tmp_path / "mobile_sam.pt")
    assert torch.equal(named.state_dict()[token], state[token])
    tiny: Any = sc.load(tmp_path / "mobile_sam.pt", model="tiny_sam")
    assert sc.lineage(tiny)[-1].transform == Conventions(of="tiny_sam")
    assert sc.core.history.history(tiny).base.licence is None


def test_files_that_do_not_fit(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "edge_sam.pth"
    state = Reference.of("edgesam", shared).state()
    name = "image_encoder.fuse_stage3.op_list.0.weight"
    short = copy.copy(state)
    tensor = short.pop(name)
    torch.save(short, path)
    with pytest.raises(errors.CheckpointError, match="the tensors do not fit") as caught:
        sc.load(path)
    assert name in str(caught.value)
    torch.save({**short, f"{name}_": tensor}, path)
    with pytest.raises(errors.CheckpointError) as caught:
        sc.load(path)
    assert f"rename {name}_ to {name}" in str(caught.value)
