from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import samcompress as sc
from samcompress.core import zoo
from samcompress.core._infer import config_from_state
from samcompress.core.adapters import SHARED, TIED, rename, rules
from samcompress.core.build import ARCHITECTURES, config_of
from samcompress.core.errors import CheckpointError, ModelError
from samcompress.core.history import history
from samcompress.core.load import LICENCES, SHIPPED, load

# The decoder of "tiny" keeps its widths, so that its number of heads is known.
SMALL: dict[str, Any] = {"image_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL |= {"window_size": 3, "global_attn_indexes": (1,)}


@pytest.fixture
def sam() -> torch.nn.Module:
    return sc.build("tiny", seed=3, **SMALL)


@pytest.fixture
def state(sam: torch.nn.Module) -> dict[str, torch.Tensor]:
    return sam.state_dict()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def hf_folder(sam: torch.nn.Module, folder: Path, **settings: Any) -> Path:
    """A folder as save_pretrained writes it, made without transformers."""
    names = rules(len(sam.mask_decoder.iou_prediction_head.layers))
    state = {rename(name, names): t.clone() for name, t in sam.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    heads = {"mask_decoder_config": {"num_attention_heads": config_of(sam).decoder_num_heads}}
    (folder / "config.json").write_text(json.dumps({"model_type": "sam", **heads, **settings}))
    return folder


# --- what it opens -----------------------------------------------------------------------------


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: t for name, t in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": prefixed("module.", s), "optimizer": {"lr": 0.1}},
        lambda s: {"model_state_dict": {"model": s}},
        lambda s: prefixed("module.sam.", s),
        lambda s: {**s, "pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)},
    ],
    ids=["plain", "model", "state_dict+module", "nested", "module.sam", "statistics"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(
    wrap: Callable[[dict], dict], zipped: bool, sam: Any, state: dict, tmp_path: Path
) -> None:
    content = wrap(state)
    path = tmp_path / "sam.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = load(path)
    assert same(sam, found)
    assert not found.training
    assert found.mask_decoder.transformer.layers[0].self_attn.num_heads == 4
    mean = content.get("pixel_mean", sam.pixel_mean)
    assert torch.equal(found.pixel_mean, mean)
    base = history(found).base
    assert base is not None
    assert (base.source, base.licence) == ("sam.pth", None)
    path.write_bytes(b"")  # the weights are copies: they do not hang on the file
    assert same(sam, found)


def test_safetensors_file_and_half_precision(sam: Any, state: dict, tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "sam.safetensors")
    found = load(str(tmp_path / "sam.safetensors"))
    assert found.image_encoder.pos_embed.dtype is torch.float32
    half = sam.half().float()
    assert same(half, found)


def test_official_name_brings_its_licence(state: dict, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "sam_vit_b_01ec64.pth")
    assert history(load(tmp_path / "sam_vit_b_01ec64.pth")).base.licence == "Apache-2.0"  # type: ignore[union-attr]


def test_shipped_model() -> None:
    sam = load("tiny")
    assert config_of(sam) == ARCHITECTURES["tiny"]
    assert history(sam).base.source == "tiny"  # type: ignore[union-attr]


def test_own_folder(sam: Any, tmp_path: Path) -> None:
    sc.save(sam, tmp_path / "out")
    assert same(sam, load(tmp_path / "out"))
    assert same(sam, load(str(tmp_path / "out")))


def test_transformers_folder_without_transformers(
    sam: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it would fail
    folder = hf_folder(sam, tmp_path / "hf")
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.4, 1.0]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    found = load(folder)
    assert same(sam, found)
    assert found.pixel_mean.flatten().tolist() == [127.5] * 3
    assert found.pixel_std.flatten().tolist() == [51.0, 102.0, 255.0]
    assert history(found).base.source == "hf"  # type: ignore[union-attr]


def test_transformers_pickled_weights_and_bare_file(sam: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = hf_folder(sam, tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    state[TIED] = state.pop(SHARED)  # either of the two names will do
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert same(sam, load(folder))
    assert same(sam, load(folder / "pytorch_model.bin"))


def test_transformers_shards(sam: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = hf_folder(sam, tmp_path / "hf")
    state = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    save_file(dict(state[:70]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(state[70:]), folder / "model-00002-of-00002.safetensors")
    assert same(sam, load(folder))


def test_hub_id_downloads_no_pickle(
    sam: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def fake(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(hf_folder(sam, tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    found = load("facebook/sam-vit-base")
    assert same(sam, found)
    assert asked == [("facebook/sam-vit-base", ["*.safetensors", "*.json"])]
    base = history(found).base
    assert base is not None
    assert (base.source, base.licence) == ("facebook/sam-vit-base", "Apache-2.0")


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_hub_id_offline_reads_the_cache(
    sam: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(tmp_path, monkeypatch)
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--someone--my-sam"
    hf_folder(sam, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert same(sam, load("someone/my-sam"))


def test_hub_id_offline_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError) as info:
        load("someone/my-sam")
    text = str(info.value)
    assert text.startswith(
        "'someone/my-sam' is neither a local folder nor a model that the Hub gave us.\n"
        "  where     someone/my-sam\n"
        "  got       LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder"
    )
    assert text.endswith(
        '  expected  an existing path, or a Hub id such as "facebook/sam-vit-base"\n'
        "  try       check the name and the connection; "
        "offline, give the folder of a downloaded model"
    )


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        SMALL,
        {"mlp_ratio": 2.71, "num_heads": 2, "image_size": 96},
        {"iou_head_depth": 2, "num_multimask_outputs": 2, "decoder_depth": 1, "mask_in_chans": 12},
        {"window_size": 0, "global_attn_indexes": (0, 1, 2, 3)},
        {"window_size": 5, "global_attn_indexes": ()},
    ],
)
def test_sizes_from_tensors_equal_those_of_the_model(sizes: dict[str, Any]) -> None:
    sam = sc.build("tiny", **sizes)
    assert config_from_state(sam.state_dict()) == config_of(sam)


def test_window_as_large_as_the_grid_is_global_attention() -> None:
    sam = sc.build("tiny", image_size=56, window_size=7)  # 7 x 7 cells
    twin = config_from_state(sam.state_dict()).build()
    twin.load_state_dict(sam.state_dict())
    x = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(sam.image_encoder(x), twin.image_encoder(x))


def test_decoder_heads_must_be_given_where_no_shape_shows_them(tmp_path: Path) -> None:
    sam = sc.build("tiny", out_chans=32, decoder_num_heads=2, **SMALL)
    path = tmp_path / "sam.pth"
    torch.save(sam.state_dict(), path)
    found = load(path, decoder_num_heads=2)
    assert config_of(found) == config_of(sam)
    with pytest.raises(CheckpointError) as info:
        load(path)
    assert str(info.value) == (
        "the decoder's number of attention heads cannot be read off its tensors.\n"
        f"  where     {path}\n"
        "  got       a decoder of width 32 with 128 hidden units\n"
        "  expected  256 with 2048 or 128 with 512 or 64 with 128\n"
        "  try       say it: sc.load(path, decoder_num_heads=8); or keep models with sc.save"
    )


# --- official checkpoints ----------------------------------------------------------------------


def manifest(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "golden" / f"{name}.json").read_text())


def on_meta(tensors: list[list[Any]]) -> dict[str, torch.Tensor]:
    return {row[0]: torch.empty(row[1], device="meta") for row in tensors}


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_official_layouts(name: str, shared: Path) -> None:
    facts = manifest(shared, f"sam_{name}")
    config = config_from_state(on_meta(facts["tensors"]))
    assert config == ARCHITECTURES[name]
    with torch.device("meta"):
        sam = config.build()
    wanted = {row[0]: tuple(row[1]) for row in facts["tensors"]}
    assert {k: tuple(v.shape) for k, v in sam.state_dict().items()} == wanted
    assert (
        sum(p.numel() for p in sam.image_encoder.parameters())
        == (facts["parameters"]["image_encoder"])
    )


@pytest.mark.parametrize("name", ["slimsam50_uniform", "slimsam77_uniform"])
def test_uniformly_pruned_checkpoint_is_a_plain_narrower_sam(name: str, shared: Path) -> None:
    facts = manifest(shared, name)
    config = config_from_state(on_meta(facts["tensors"]))
    assert (config.embed_dim, config.num_heads) == (facts["config"]["embed_dim"], 12)
    with torch.device("meta"):
        sam = config.build()
    wanted = {row[0]: tuple(row[1]) for row in facts["tensors"]}
    assert {k: tuple(v.shape) for k, v in sam.state_dict().items()} == wanted


def close(found: Any, golden: np.ndarray) -> float:
    found = np.asarray(found)
    assert found.shape == golden.shape
    return float(np.abs(found - golden).max() / np.abs(golden).max())


@pytest.mark.slow
def test_official_vit_b_gives_the_reference_outputs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segment_anything import SamPredictor

    monkeypatch.syspath_prepend(str(shared / "golden"))
    import synthetic as syn

    golden = np.load(shared / "golden" / "sam_vit_b.npz")
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(syn.synthetic_state_dict(manifest(shared, "sam_vit_b")), path)
    predictor = SamPredictor(load(path))
    path.unlink()
    predictor.set_image(syn.synthetic_image(**syn.IMAGE))
    features = predictor.features[0].numpy()
    assert close(syn.subsample("embedding", features), golden["embedding"]) < 1e-4
    for name, prompt in syn.PROMPTS.items():
        given: dict[str, Any] = {"box": np.array(prompt["box"]) if "box" in prompt else None}
        if "points" in prompt:
            given["point_coords"] = np.array(prompt["points"])
            given["point_labels"] = np.array(prompt["labels"])
        if "mask_seed" in prompt:
            given["mask_input"] = syn.synthetic_mask_logits(prompt["mask_seed"])
        rows = [
            predictor.predict(**given, multimask_output=many, return_logits=True)
            for many in (False, True)
        ]
        full, iou, low = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        assert close(syn.subsample("low_res", low), golden[f"{name}__low_res"]) < 1e-4
        assert close(syn.subsample("full", full), golden[f"{name}__full"]) < 1e-4
        assert np.abs(iou - golden[f"{name}__iou"]).max() < 1e-4


# --- what it refuses ---------------------------------------------------------------------------


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as info:
        load(path)
    return str(info.value)


def test_unknown_name_suggests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_known", {})
    assert refusal("tyni") == (
        "there is no such model.\n"
        "  where     tyni\n"
        "  got       neither a name, nor a file, nor a folder\n"
        "  expected  'mini', 'tiny', a name of sc.list_models(), a file, a folder, or a Hub id\n"
        "  try       tiny, mini"
    )


def test_architecture_name_is_not_a_model() -> None:
    assert refusal("vit_b").endswith(
        '  try       sc.build("vit_b") for random weights, or the path of a checkpoint of it'
    )


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "sam_vit_b.pth").write_bytes(b"x")
    text = refusal(tmp_path / "sam_vitb.pth")
    assert text.startswith("there is no such model.\n")
    assert text.endswith(f"  try       in {tmp_path}: sam_vit_b.pth")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    path.touch()
    assert refusal(path) == (
        "the checkpoint is empty.\n"
        f"  where     {path}\n"
        "  got       0 bytes\n"
        "  try       get the file again"
    )


@pytest.mark.parametrize("keep", [0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_file(kind: str, keep: float, state: dict, tmp_path: Path) -> None:
    path = tmp_path / ("sam.safetensors" if kind == "safetensors" else "sam.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    text = refusal(path)
    assert text.startswith("the checkpoint is damaged or cut short.\n")
    assert f"  where     {path}\n  got       {path.stat().st_size:,} bytes; " in text
    assert text.endswith(
        "  expected  a complete file\n"
        "  try       get the file again and compare its size with the source's"
    )


class Payload:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped: bool, state: dict, tmp_path: Path) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "sam.pth"
    content = {**state, "extra": Payload(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert refusal(path) == (
        "the file holds code, not only tensors; it was refused and nothing of it was run.\n"
        f"  where     {path}\n"
        f"  got       a pickled {os.system.__module__}.system\n"
        "  expected  tensors by name, as torch.save(model.state_dict(), path) writes them\n"
        "  try       if you trust the file: load it where its code is and save the state dict alone"
    )
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert proof.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_bare_pickle_with_code_is_not_run(protocol: int, tmp_path: Path) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "sam.pt"
    path.write_bytes(pickle.dumps({"model": Payload(proof)}, protocol=protocol))
    assert refusal(path).startswith(("the file holds code", "this is not a checkpoint."))
    assert not proof.exists()


def test_pickled_module_and_other_objects(sam: Any, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save(sam, path)
    found = sc.load(path).state_dict()
    assert all(torch.equal(t, sam.state_dict()[name]) for name, t in found.items())
    torch.save({"model": sam.state_dict(), "args": argparse.Namespace(lr=1)}, path)
    assert "  got       a pickled argparse.Namespace\n" in refusal(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    path.write_text("<!DOCTYPE html><title>404</title>")
    assert refusal(path) == (
        "this is not a checkpoint.\n"
        f"  where     {path}\n"
        "  got       a file that begins with b'<!DOCTYPE html><'\n"
        "  expected  a .safetensors file, or one written by torch.save"
    )
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "  got       a zip archive that torch.save did not write\n" in refusal(path)
    torch.save([1, 2], path)
    assert refusal(path) == (
        "the file holds no tensors by name.\n"
        f"  where     {path}\n"
        "  got       a list\n"
        "  expected  a state dict, alone or under 'model', 'state_dict', 'model_state_dict'"
    )
    torch.save({"epoch": 1, "model": {}}, path)
    assert "  got       an empty dict\n" in refusal(path)


def test_random_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, prefix in (("a.pth", b""), ("b.pth", b"\x80\x02}"), ("c.safetensors", b"")):
        for _ in range(60):
            (tmp_path / name).write_bytes(prefix + generator.bytes(64))
            assert refusal(tmp_path / name).startswith(
                (
                    "this is not a checkpoint.",
                    "the checkpoint is damaged or cut short.",
                    "the file holds",
                )
            )


def test_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "sam.pth"
    torch.save({"a": torch.zeros(1)}, path)
    monkeypatch.setattr(torch, "load", refuse)
    assert refusal(path) == (
        "the checkpoint cannot be opened.\n"
        f"  where     {path}\n"
        "  got       PermissionError: [Errno 13] Permission denied"
    )


def test_not_a_sam(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2)}, path)
    assert refusal(path) == (
        "this is not a SAM.\n"
        f"  where     {path}\n"
        "  got       2 tensors: conv1.weight, fc.weight ...\n"
        "  expected  tensors image_encoder.*, mask_decoder.*, prompt_encoder.* too, "
        "as in segment_anything's layout\n"
        "  try       give a whole SAM: image encoder, prompt encoder and mask decoder in one file"
    )
    torch.save({k: v for k, v in state.items() if k.startswith("image_encoder")}, path)
    assert "expected  tensors mask_decoder.*, prompt_encoder.* too" in refusal(path)


def test_sam_with_another_encoder(shared: Path) -> None:
    with pytest.raises(CheckpointError) as info:
        config_from_state(on_meta(manifest(shared, "mobilesam")["tensors"]), where="mobile_sam.pt")
    assert str(info.value) == (
        "this is not a SAM with a ViT encoder.\n"
        "  where     mobile_sam.pt\n"
        "  got       no image_encoder.pos_embed, image_encoder.patch_embed.proj.weight, "
        "image_encoder.blocks.0.attn.rel_pos_h and 1 more\n"
        "  expected  every tensor of segment_anything's Sam\n"
        "  try       a checkpoint of another architecture needs its own loader"
    )


def test_missing_and_renamed_tensors(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    name = "image_encoder.blocks.1.norm2.weight"
    state["image_encoder.blocks.1.norm_2.weight"] = state.pop(name)
    torch.save(state, path)
    assert refusal(path) == (
        "the tensors do not fit.\n"
        f"  where     {path}\n"
        f"  got       missing {name}; unknown image_encoder.blocks.1.norm_2.weight\n"
        "  expected  a SAM with depth=2, embed_dim=32, image_size=64\n"
        f"  try       rename image_encoder.blocks.1.norm_2.weight to {name}"
    )
    state.update({f"adapter.{i}": torch.zeros(1) for i in range(9)})
    torch.save(state, path)
    assert "adapter.0, adapter.1 and 7 more\n" in refusal(path)


def test_wrong_shapes(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    name = "image_encoder.blocks.1.norm1.weight"
    torch.save({**state, name: torch.zeros(7)}, path)
    assert f"  got       wrong {name} (7,) instead of (32,)\n" in refusal(path)
    torch.save({**state, "image_encoder.pos_embed": torch.zeros(64, 32)}, path)
    assert refusal(path) == (
        "a tensor has the wrong shape.\n"
        f"  where     {path}: image_encoder.pos_embed\n"
        "  got       (64, 32)\n"
        "  expected  4 dimensions"
    )
    torch.save({**state, "image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(5, 0)}, path)
    assert refusal(path).startswith("the shapes of the tensors contradict one another.\n")
    name = "image_encoder.blocks.0.mlp.lin1.weight"
    torch.save({**state, name: state[name].to(torch.int8)}, path)
    assert f"  got       wrong {name} (96, 32) torch.int8 instead of (96, 32)\n" in refusal(path)


def test_plain_weights_of_a_pruned_model(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    block = "image_encoder.blocks.1.mlp"
    for name, cut in (("lin1.weight", (slice(50),)), ("lin1.bias", (slice(50),))):
        state[f"{block}.{name}"] = state[f"{block}.{name}"][cut].clone()
    state[f"{block}.lin2.weight"] = state[f"{block}.lin2.weight"][:, :50].clone()
    torch.save(state, path)
    assert refusal(path) == (
        "plain weights of a pruned model.\n"
        f"  where     {path}: {block}.lin1.weight, {block}.lin1.bias, {block}.lin2.weight\n"
        "  got       blocks of different widths, without the record of what was removed\n"
        "  expected  one width for all blocks, or a folder written by sc.save\n"
        "  try       save the pruned model with sc.save(model, folder) and load that folder"
    )


def test_folders_without_a_model(state: dict, tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        "the folder holds no model.\n"
        f"  where     {tmp_path}\n"
        "  got       an empty folder\n"
        "  expected  samcompress.json (written by sc.save) or config.json (a transformers SamModel)"
    )
    torch.save(state, tmp_path / "sam.pth")
    text = refusal(tmp_path)
    assert "  got       sam.pth\n" in text
    assert text.endswith(f'  try       sc.load("{tmp_path / "sam.pth"}")')


def test_transformers_folder_of_another_model(sam: Any, tmp_path: Path) -> None:
    folder = hf_folder(sam, tmp_path / "hf", model_type="sam_hq")
    assert refusal(folder) == (
        "this transformers model is not a SAM that can be read.\n"
        f"  where     {folder / 'config.json'}\n"
        "  got       model_type 'sam_hq'\n"
        "  expected  model_type 'sam', 'sam2', 'edgetam'"
    )
    (folder / "config.json").write_text("{")
    text = refusal(folder)
    assert text.startswith("a configuration file cannot be read.\n")
    assert text.endswith("  expected  JSON, as save_pretrained writes it")


def test_transformers_folder_without_weights(sam: Any, tmp_path: Path) -> None:
    folder = hf_folder(sam, tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        "the folder has a configuration but no weights.\n"
        f"  where     {folder}\n"
        "  expected  model.safetensors or model-*-of-*.safetensors or pytorch_model.bin or "
        "pytorch_model-*-of-*.bin\n"
        "  try       copy the whole folder, or save the model again with save_pretrained"
    )


def test_other_objects(sam: Any) -> None:
    with pytest.raises(ModelError) as info:
        load(sam)
    assert str(info.value) == (
        "this object cannot be loaded.\n"
        "  got       segment_anything.modeling.sam.Sam\n"
        "  expected  a name, path or Hub id, or transformers' SamModel, Sam2Model or EdgeTamModel\n"
        "  try       a segment_anything Sam needs no loading: give it to a pipeline as it is"
    )


def test_every_shipped_name_is_an_architecture_with_a_licence() -> None:
    assert "tiny" in SHIPPED
    assert SHIPPED.keys() <= ARCHITECTURES.keys() & LICENCES.keys()
