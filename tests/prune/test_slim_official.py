"""SlimSAM in other formats: official files of every layout in, transformers out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import equal
from safetensors.torch import save_file
from slimming import BLIND, geometry, lopsided, run, slimmable
from torch import nn
from zoo_goldens import Reference, answer, check, embed, eps_of

import samcompress as sc
from samcompress.core import errors, zoo
from samcompress.core.history import history
from samcompress.prune import _official
from samcompress.prune.slim_sam import SlimSAM

UNIFORM = {50: "slimsam50_uniform", 77: "slimsam77_uniform"}
GLOBAL = "slimsam_global_example"
TOLERANCE = 1e-4


def official(reference: Reference) -> dict[str, torch.Tensor]:
    """Names and shapes alone."""
    tensors = reference.manifest["tensors"]
    return {name: torch.empty(shape, device="meta") for name, shape, *_ in tensors}


def saved(content: Any, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def errors_of(reference: Reference, sam: Any) -> dict[str, float]:
    """Of image, embedding and every prompt."""
    # Same function, several times as fast, and without maps of a gigabyte.
    runner = sc.attention.Fused()(sam, progress=False)
    embedding, found = embed(reference, runner)
    for key, prompt in reference.prompts().items():
        one, three = (answer(sam, embedding, [prompt], multimask=m) for m in (False, True))
        rows = [np.concatenate([a[0], b[0]]) for a, b in zip(one, three, strict=True)]
        found |= check(reference, key, *rows)
    return found


# --- one width for all blocks ---------------------------------------------------------------------


@pytest.mark.parametrize("percent", [pytest.param(50, marks=pytest.mark.slow), 77])
def test_uniform_is_the_reference(percent: int, shared: Path, tmp_path: Path) -> None:
    reference = Reference.of(UNIFORM[percent], shared)
    sam = sc.load(saved(reference.state(), tmp_path / f"SlimSAM-{percent}-uniform.pth"))
    assert sc.lineage(sam) == ()
    assert history(sam).base.config == _official.BASES[percent]
    assert eps_of(sam.image_encoder, "LayerNorm") == {1e-6}
    assert eps_of(sam.mask_decoder, "LayerNorm") == {1e-5}
    found = errors_of(reference, sam)
    assert found["input"] < 1e-6
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("percent", UNIFORM)
def test_uniform_on_the_hub_is_the_same(
    percent: int, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of transformers, the cache of the Hub, the official file: one model."""
    plain = Reference.of(UNIFORM[percent], shared)
    sam = sc.load(saved(plain.state(), tmp_path / "SlimSAM.pth"))
    manifest = json.loads((shared / f"golden/hf_{UNIFORM[percent]}.json").read_text())
    assert manifest["same_weights_as"] == UNIFORM[percent]
    folder = tmp_path / f"Zigeng--SlimSAM-uniform-{percent}"
    folder.mkdir()
    # Tensors that have two names are saved once.
    state = {
        name: tensor.contiguous()
        for name, tensor in plain.synthetic.synthetic_state_dict(manifest).items()
        if not name.startswith("prompt_encoder.shared_embedding.")
    }
    save_file(state, folder / "model.safetensors")
    monkeypatch.setenv("SAMCOMPRESS_CACHE", str(tmp_path))
    named = sc.load(f"slim_sam_{percent}")
    base = history(named).base
    assert (base.source, base.licence) == (f"slim_sam_{percent}", "Apache-2.0")
    assert equal(named, sam)
    (folder / "config.json").write_text(json.dumps({**manifest["config"], "model_type": "sam"}))
    found = sc.load(folder)
    assert equal(found, sam)
    assert history(found).base.config == history(named).base.config == _official.BASES[percent]


@pytest.mark.parametrize("percent", UNIFORM)
def test_uniform_entry(percent: int, shared: Path) -> None:
    reference, entry = Reference.of(UNIFORM[percent], shared), zoo.find(f"slim_sam_{percent}")
    manifest, state = reference.manifest, official(reference)
    assert zoo.recognise(state) is entry
    assert entry.parameters == manifest["parameters"]["total"]
    assert entry.macs == manifest["macs"]["encoder_gmacs"]
    assert entry.licence == manifest["upstream"]["licence"]
    assert entry.upstream.endswith(manifest["upstream"]["project"])
    with torch.device("meta"):
        sam = entry.build()
    assert sum(p.numel() for p in sam.parameters()) == entry.parameters
    wanted = {name: tensor.shape for name, tensor in sam.state_dict().items()}
    assert {name: t.shape for name, t in entry.convert(state).items()} == wanted
    published = SlimSAM.published(percent)
    assert geometry(sam)[1] == 12
    assert published.ratio == percent / 100


# --- a width for each block -----------------------------------------------------------------------


@pytest.mark.slow
def test_global_is_the_reference(shared: Path, tmp_path: Path) -> None:
    reference = Reference.of(GLOBAL, shared)
    sam = sc.load(saved(reference.state(), tmp_path / "SlimSAM-50.pth"))
    config = reference.manifest["config"]
    assert [geometry(sam, i)[3] for i in range(12)] == config["mlp_dim"]
    assert [12 * geometry(sam, i)[2] for i in range(12)] == config["qkv_width"]
    assert sum(p.numel() for p in sam.parameters()) == reference.manifest["parameters"]["total"]
    work = sc.evaluate.macs(sam).encoder / 1e9
    assert work == pytest.approx(reference.manifest["macs"]["encoder_gmacs"], rel=1e-4)
    found = errors_of(reference, sam)
    assert max(found.values()) < TOLERANCE, found


def test_global_layout_is_recognised(shared: Path) -> None:
    state = official(Reference.of(GLOBAL, shared))
    assert zoo.recognise(state) is zoo.find("slim_sam_50_global")
    found = zoo.find("slim_sam_50_global").convert({**state, "strange": torch.empty(1)})
    assert found["image_encoder.blocks.1.attn.qkv.weight"].shape == (3 * 336, 384)
    assert "strange" in found
    assert not any(".attn.q." in name or ".attn.k." in name for name in found)


class Pruned:
    """What upstream's global pruning saves: a whole model, pickled, here with tiny widths."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.dims, self.hidden = (
            [1 + i % 3 for i in range(12)],
            [12 + 12 * (i % 2) for i in range(12)],
        )
        sam: Any = sc.SamConfig().build(empty=True)
        state = {
            "kept": {"image_encoder": list(range(168))}
            | {f"image_encoder.blocks.{i}.mlp": list(range(n)) for i, n in enumerate(self.hidden)},
            "heads": {},
            "head_dims": {
                f"image_encoder.blocks.{i}.attn": list(range(n)) for i, n in enumerate(self.dims)
            },
        }
        SlimSAM().rebuild(sam, state)
        for parameter in sam.parameters():
            parameter.data = torch.randn(parameter.shape, generator=drawn)
        sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.normal_(generator=drawn)
        self.expected = {name: t.clone() for name, t in sam.state_dict().items()}
        for block in sam.image_encoder.blocks:
            block.attn = split(block.attn)
        sam.image_encoder = nn.DataParallel(sam.image_encoder)
        self.sam = sam


def split(attn: Any) -> nn.Module:
    """Queries, keys and values in layers of their own."""
    found: Any = nn.Module()
    found.rel_pos_h, found.rel_pos_w, found.proj = attn.rel_pos_h, attn.rel_pos_w, attn.proj
    for name, weight, bias in zip(
        "qkv", attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True
    ):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight.data.clone(), bias.data.clone()
        setattr(found, name, layer)
    return found


@pytest.fixture(scope="module")
def pruned() -> Pruned:
    return Pruned()


def test_global_file_is_a_pickled_module(pruned: Pruned, tmp_path: Path) -> None:
    path = saved(pruned.sam, tmp_path / "SlimSAM-77.pth")
    sam = sc.load(path)
    path.unlink()
    for index in range(12):
        assert geometry(sam, index) == (168, 12, pruned.dims[index], pruned.hidden[index])
        attn = sam.image_encoder.blocks[index].attn
        assert attn.scale == pruned.dims[index] ** -0.5
    state = sam.state_dict()
    assert state.keys() == pruned.expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in pruned.expected.items())
    (step,) = sc.lineage(sam)
    assert step.transform == SlimSAM.published(77, scope="global")
    assert step.facts["before"]["parameters"] == 93_735_472
    assert step.facts["after"]["parameters"] == sum(p.numel() for p in sam.parameters())
    assert history(sam).base.config == sc.SamConfig()
    assert not sam.training
    # Like any other model from here on.
    sc.save(sam, tmp_path / "saved")
    again = sc.load(tmp_path / "saved")
    assert equal(again, sam)
    assert sc.lineage(again) == sc.lineage(sam)
    small = sc.prune.Mlp(ratio=0.5, criterion="magnitude", round_to=1)(again, progress=False)
    assert small.image_encoder.blocks[1].mlp.lin1.out_features == 12


def test_global_state_dict_and_other_widths(pruned: Pruned, tmp_path: Path) -> None:
    """Tensors alone will do; of a width that was not published it must be said what they are."""
    names = {n.replace(".module.", "."): t for n, t in pruned.sam.state_dict().items()}
    assert equal(
        sc.load(saved(names, tmp_path / "a.pth")), sc.load(saved(pruned.sam, tmp_path / "b.pth"))
    )
    narrow = {n: cut(n, t, 100) for n, t in names.items()}
    path = saved(narrow, tmp_path / "narrow.pth")
    with pytest.raises(errors.CheckpointError):
        sc.load(path)
    assert geometry(sc.load(path, model="slim_sam_77_global"), 2)[0] == 100


def cut(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Fewer channels of the tokens."""
    if name.startswith("image_encoder.") and ".neck.1" not in name and ".rel_pos_" not in name:
        for axis, size in enumerate(tensor.shape):
            if size == 168:
                tensor = tensor.narrow(axis, 0, width)
    return tensor.clone()


def test_global_file_that_does_not_fit(pruned: Pruned, tmp_path: Path) -> None:
    names = {n.replace(".module.", "."): t for n, t in pruned.sam.state_dict().items()}
    missing = {n: t for n, t in names.items() if n != "image_encoder.blocks.3.mlp.lin1.bias"}
    with pytest.raises(errors.CheckpointError) as caught:
        sc.load(saved(missing, tmp_path / "missing.pth"))
    text = str(caught.value)
    assert text.startswith(f"the tensors do not fit.\n  where     {tmp_path / 'missing.pth'}\n")
    assert "missing image_encoder.blocks.3.mlp.lin1.bias" in text
    assert "  expected  the tensors of SlimSAM-77, global" in text
    without = {n: t for n, t in names.items() if n != _official.POSITIONS}
    with pytest.raises(errors.CheckpointError, match=f"missing {_official.POSITIONS}"):
        sc.load(saved(without, tmp_path / "without.pth"))
    one = {n: t for n, t in names.items() if n != "image_encoder.blocks.3.attn.k.weight"}
    with pytest.raises(errors.CheckpointError) as caught:
        sc.load(saved(one, tmp_path / "one.pth"))
    assert "KeyError: 'image_encoder.blocks.3.attn.k.weight'" in str(caught.value)


def test_global_model_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights have the uniform widths, as the file alone tells its own."""
    sam, same = (sc.build("slim_sam_77_global", seed=3) for _ in range(2))
    assert sum(p.numel() for p in sam.parameters()) == 9_723_528
    assert equal(sam, same)
    assert not equal(sam, sc.build("slim_sam_77_global"))
    assert history(sam).base.source == "random"
    monkeypatch.setenv("SAMCOMPRESS_CACHE", str(tmp_path))
    with pytest.raises(
        errors.CheckpointError, match=r"SlimSAM-50\.pth has to be downloaded by hand"
    ):
        sc.load("slim_sam_50_global")
    assert "SlimSAM" in repr(sc.model_info("slim_sam_77_global"))
    assert len(sc.list_models("slim_sam*").rows) == 4
    assert _official.UPSTREAM in repr(sc.model_info("slim_sam_50"))


# --- out to transformers --------------------------------------------------------------------------


def test_to_transformers() -> None:
    pytest.importorskip("transformers")
    for fields in ({}, {"attention": "head_dims", "scale": "reset"}):
        small = run(slimmable(), **{**BLIND, **fields})
        channels, heads, dims, _ = geometry(small)
        assert heads * dims == channels
        theirs = sc.to_transformers(small)
        assert theirs.config.vision_config.num_attention_heads == heads
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = small.image_encoder(images)
            found = theirs.get_image_embeddings(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert equal(sc.load(theirs), small)


OTHERS = "a module or width that differs from the other blocks'"


@pytest.mark.parametrize(
    ("width", "fields", "got"),
    [
        (64, {"ratio": 0.3, "attention": "heads"}, OTHERS),
        (
            48,
            {"attention": "heads"},
            "SamConfig.embed_dim does not fit: 32, not a multiple of num_heads=3",
        ),
        (None, {"scope": "global", "criterion": "magnitude"}, OTHERS),
    ],
)
def test_to_transformers_refuses_other_shapes(width: int | None, fields: Any, got: str) -> None:
    sam = slimmable(embed_dim=width) if width else lopsided()
    small = run(sam, **{**BLIND, "ratio": 0.25, **fields})
    with pytest.raises(errors.ModelError) as caught:
        sc.to_transformers(small)
    text = str(caught.value)
    assert text.startswith("a transformers SamModel cannot hold this model.")
    assert f"  got       {got}\n" in text
    assert text.endswith("or convert it before the step that made the difference")
