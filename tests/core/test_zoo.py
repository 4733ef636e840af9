"""Published models: made-up ones of a few thousand weights, and MobileSAM as it is."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import samcompress as sc
from samcompress.cli._shared import source_of
from samcompress.core import zoo
from samcompress.core.display import Table
from samcompress.core.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    UnknownTransformError,
)
from samcompress.core.history import history
from samcompress.core.zoo import Figure, File, Published
from samcompress.substitute import _tiny_vit
from tests.zoo_goldens import Reference

BASE = sc.SamConfig(
    **{
        **dataclasses.asdict(sc.ARCHITECTURES["tiny"]),
        **{"image_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3},
        "global_attn_indexes": (1,),
    }
)
STATE = dict[str, torch.Tensor]


def convert(state: STATE) -> STATE:
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return {
        f"image_encoder.{name[4:]}" if name.startswith("enc.") else name: tensor
        for name, tensor in kept.items()
    }


def official(sam: Any) -> STATE:
    """As the authors of the toy call its tensors, and a classifier that nobody needs."""
    state = {n.replace("image_encoder.", "enc."): t.clone() for n, t in sam.state_dict().items()}
    return {**state, "head.weight": torch.zeros(3)}


TOY = Published(
    name="toy",
    title="ToySAM",
    base=BASE,
    steps=lambda: (sc.substitute.ImageSize(size=32),),
    files=(File(name="toy.pt", page="https://example.org/toy", size=None, md5="0123"),),
    signature={"enc.pos_embed": (1, 4, 4, 32), "enc.neck.0.weight": (64, 32, 1, 1)},
    convert=convert,
    parameters=123_456,
    macs=1.5,
    input_size=32,
    licence="Apache-2.0",
    paper="arXiv 2306.14289",
    upstream="https://example.org/toy",
    figures=(Figure(metric="mIoU, box", value=0.75, setting="COCO", source="arXiv 1, table 2"),),
    note="A toy.",
)
TWIN = dataclasses.replace(
    TOY, name="toy_twin", title="TwinSAM", files=(File(name="twin.pt"),), licence="S-Lab"
)
# All of the toy's tensors and one more.
PLUS = dataclasses.replace(
    TOY,
    name="toy_plus",
    title="PlusSAM",
    files=(File(name="plus.pt"),),
    signature={**TOY.signature, "extra.weight": (3,)},
    convert=lambda state: convert({n: t for n, t in state.items() if n != "extra.weight"}),
)
# An encoder by itself, beside another model's decoder.
TWO = dataclasses.replace(
    TOY,
    name="toy_two",
    title="TwoSAM",
    files=(
        File(name="encoder.pt", prefix="enc."),
        File(name="both.pt", only=("prompt_encoder.", "mask_decoder.")),
    ),
)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Published]:
    monkeypatch.setattr(zoo, "_known", {})
    monkeypatch.setenv("SAMCOMPRESS_CACHE", str(tmp_path / "cache"))
    for entry in (TOY, TWIN, PLUS, TWO):
        zoo.register(entry)
    return zoo.published()


@pytest.fixture
def sam() -> Any:
    return TOY.build(seed=3)


@pytest.fixture
def state(sam: Any) -> STATE:
    return official(sam)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as info:
        sc.load(path, **options)
    return str(info.value)


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


# --- the list ----------------------------------------------------------------------------------


def test_register_refuses(known: dict[str, Published]) -> None:
    assert list(known) == ["toy", "toy_twin", "toy_plus", "toy_two"]
    with pytest.raises(ConfigError) as info:
        zoo.register(TOY)
    assert str(info.value) == (
        "the published model toy is registered twice.\n  expected  another name"
    )
    with pytest.raises(ConfigError) as info:
        zoo.register(dataclasses.replace(TOY, name="Toy SAM"))
    assert str(info.value) == (
        "this cannot be the name of a published model.\n"
        "  got       Toy SAM\n"
        "  expected  small letters, digits, dots and underscores"
    )
    with pytest.raises(ConfigError) as info:
        zoo.register(dataclasses.replace(TOY, name="toy3", base=None))
    assert str(info.value) == (
        "the published model toy3 cannot be made.\n  expected  either base and steps, or make"
    )


def test_list_models_and_their_facts() -> None:
    table = sc.list_models("toy*n")
    assert table.records() == [
        {
            "name": "toy_twin",
            "parameters": 0.123456,
            "MACs": 1.5,
            "input": 32,
            "licence": "S-Lab",
            "paper": "arXiv 2306.14289",
        }
    ]
    assert "MACs: of the image encoder" in table.text()
    assert len(sc.list_models().rows) == 4
    info = sc.model_info("toy")
    assert info is TOY
    text = repr(info)
    assert "123,456" in text
    assert "sc.substitute.ImageSize(size=32)" in text
    assert "mIoU, box  0.750" in text
    assert "md5 0123" in text
    assert "https://example.org/toy (by hand)" in text
    assert max(map(len, text.splitlines())) <= 100
    assert info._repr_html_().count("<table") == 3
    plain = dataclasses.replace(TOY, figures=(), note="")
    assert "published figures" not in repr(plain)
    assert "note" not in repr(plain)


def test_unknown_name() -> None:
    with pytest.raises(UnknownTransformError) as info:
        sc.model_info("toys")
    assert str(info.value) == (
        "there is no published model 'toys'.\n"
        "  got       toys\n"
        "  expected  a name from sc.list_models()\n"
        "  try       toy, toy_plus, toy_two"
    )
    assert refusal("toys").endswith("  try       toy, toy_plus, toy_two")


def test_command_line_knows_them() -> None:
    from samcompress.evaluate.catalog import catalog, describe

    assert [row["name"] for row in catalog("toy_t*")[3].records()] == ["toy_twin", "toy_two"]
    title, tables = describe("toy")
    assert title == "ToySAM"
    assert all(isinstance(table, Table) for table in tables)
    assert source_of("toy") == "toy"
    assert same(source_of("toy:random"), sc.build("toy"))
    larger = source_of("toy:random@image_size=48")
    assert larger.image_encoder.img_size == 48
    assert len(sc.lineage(larger)) == 2


# --- random weights ----------------------------------------------------------------------------


def test_random_weights() -> None:
    before = torch.get_rng_state()
    sam = sc.build("toy", seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert same(sam, sc.build("toy", seed=5))
    assert not same(sam, sc.build("toy"))
    assert [step.transform.label for step in sc.lineage(sam)] == ["substitute.image_size"]
    base = history(sam).base
    assert base is not None
    assert (base.config, base.source, base.licence) == (BASE, "random", None)


def test_seed_reaches_the_steps() -> None:
    steps = lambda: (sc.substitute.ResNet(),)  # noqa: E731
    zoo.register(dataclasses.replace(TOY, name="seeded", steps=steps))
    encoders = [sc.build("seeded", seed=seed).image_encoder for seed in (0, 1, 1)]
    assert not same(encoders[0], encoders[1])
    assert same(encoders[1], encoders[2])


def test_sizes_of_a_published_model_are_fixed() -> None:
    with pytest.raises(ConfigError) as info:
        sc.build("toy", image_size=96, depth=3)
    assert str(info.value) == (
        "toy has the sizes it was published with.\n"
        "  got       image_size=96, depth=3\n"
        "  expected  no sizes\n"
        '  try       sc.substitute.ImageSize(size=96)(sc.build("toy")) for another input'
    )
    with pytest.raises(UnknownTransformError) as unknown:
        sc.build("toi")
    assert str(unknown.value) == (
        "there is no architecture 'toi'.\n"
        "  expected  vit_b, vit_l, vit_h, mini, tiny, or a name of sc.list_models()\n"
        "  try       toy, tiny, toy_twin"
    )


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"net": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
        lambda s: {f"student.backbone.{name}": t for name, t in s.items()},
        lambda s: {n.replace("enc.blocks", "image_encoder.blocks"): t for n, t in s.items()},
    ],
    ids=["plain", "model", "net", "prefix", "our names"],
)
def test_file_is_recognised_by_its_keys(wrap: Any, sam: Any, state: STATE, tmp_path: Path) -> None:
    path = saved(tmp_path / "mine.pt", wrap(state))
    found = sc.load(path)
    assert same(sam, found)
    assert found.image_encoder.img_size == 32
    assert not found.training
    assert [step.transform.label for step in sc.lineage(found)] == ["substitute.image_size"]
    base = history(found).base
    assert base is not None
    # Anyone may have trained a model of this architecture.
    assert (base.source, base.licence) == ("mine.pt", None)
    path.write_bytes(b"")
    assert torch.isfinite(found.image_encoder.pos_embed).all()


def test_names_that_are_ours_already(sam: Any, state: STATE, tmp_path: Path) -> None:
    state["image_encoder.neck.0.weight"] = state.pop("enc.neck.0.weight").half().double()
    found = sc.load(saved(tmp_path / "mine.pt", state))
    assert zoo.recognise(state) is None
    assert torch.equal(found.image_encoder.pos_embed, sam.image_encoder.pos_embed)
    assert found.image_encoder.neck[0].weight.dtype is torch.float32


def test_file_name_tells_models_with_the_same_tensors(state: STATE, tmp_path: Path) -> None:
    for name, licence in (("toy.pt", "Apache-2.0"), ("twin.pt", "S-Lab")):
        base = history(sc.load(saved(tmp_path / name, state))).base
        assert base is not None
        assert (base.source, base.licence) == (name, licence)
    assert zoo.recognise(state) is TOY
    assert zoo.recognise(state, "twin.pt") is TWIN
    assert zoo.recognise({**state, "extra.weight": torch.zeros(3)}, "toy.pt") is PLUS
    assert zoo.recognise({}) is None


def test_model_says_which(state: STATE, tmp_path: Path) -> None:
    path = saved(tmp_path / "renamed.pt", {"student": state})
    assert same(sc.load(path, model="toy_twin"), sc.load(path))
    with pytest.raises(UnknownTransformError, match="no published model 'toy_tvin'"):
        sc.load(path, model="toy_tvin")


def test_saved_model_needs_no_zoo(
    sam: Any, state: STATE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sc.load(saved(tmp_path / "toy.pt", state))
    sc.save(found, tmp_path / "out")
    monkeypatch.setattr(zoo, "_known", {})
    again = sc.load(tmp_path / "out")
    assert same(sam, again)
    assert history(again).base == history(found).base


def test_sizes_of_a_plain_sam_are_read_off_its_tensors(tmp_path: Path) -> None:
    signature = {"image_encoder.pos_embed": (1, 8, 8, 32)}
    facts: dict[str, Any] = {"steps": tuple, "signature": signature, "convert": dict}
    zoo.register(dataclasses.replace(TOY, name="plain", **facts))
    other = dataclasses.replace(BASE, mlp_ratio=2.0).build()
    path = saved(tmp_path / "toy.pt", other.state_dict())
    assert same(other, sc.load(path))
    text = refusal(path, model="plain")
    assert "plain weights of a pruned model." in text
    sam = sc.load(saved(path, BASE.build().state_dict()), model="plain")
    assert history(sam).base.licence == "Apache-2.0"  # type: ignore[union-attr]


def test_statistics_of_pixels_in_the_file(state: STATE, tmp_path: Path) -> None:
    state |= {"pixel_mean": torch.full((3, 1, 1), 7.0), "pixel_std": torch.full((3, 1, 1), 2.0)}
    found = sc.load(saved(tmp_path / "toy.pt", state))
    assert found.pixel_mean.flatten().tolist() == [7.0] * 3
    assert history(found).base.config.pixel_std == (2.0, 2.0, 2.0)  # type: ignore[union-attr]


def test_name_reads_the_cache(sam: Any, state: STATE, tmp_path: Path) -> None:
    saved(tmp_path / "cache" / "toy.pt", state)
    found = sc.load("toy")
    assert same(sam, found)
    base = history(found).base
    assert base is not None
    assert (base.source, base.licence) == ("toy", "Apache-2.0")


def test_name_downloads(sam: Any, state: STATE, tmp_path: Path) -> None:
    path = saved(tmp_path / "there" / "x.pt", {"weights": state})
    file = File(name="far.pt", url=path.as_uri(), size=path.stat().st_size)
    zoo.register(dataclasses.replace(TOY, name="far", files=(file,)))
    assert same(sam, sc.load("far", progress=False))
    assert (tmp_path / "cache" / "far.pt").is_file()
    path.unlink()
    assert same(sam, sc.load("far"))


def test_name_without_a_file_or_connection(tmp_path: Path) -> None:
    assert refusal("toy") == (
        "toy.pt has to be downloaded by hand.\n"
        "  where     https://example.org/toy\n"
        f"  got       no toy.pt in {tmp_path / 'cache'}\n"
        "  try       get toy.pt from https://example.org/toy and put it into "
        f"{tmp_path / 'cache'}"
    )


def test_model_goes_with_files_alone(sam: Any, tmp_path: Path) -> None:
    sc.save(sam, tmp_path / "out")
    for source in ("toy", "tiny", tmp_path / "out", torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError) as info:
            sc.load(source, model="toy_twin")
        assert str(info.value) == (
            "this source says itself which model it is.\n"
            "  got       model='toy_twin'\n"
            "  expected  model= with an official file, or a folder of such files, alone"
        )


def test_model_that_is_no_sam(tmp_path: Path) -> None:
    def make(state: STATE | None) -> torch.nn.Module:
        module = torch.nn.Linear(2, 1, bias=False)
        if state is not None:
            module.load_state_dict(state)
        return module

    entry = dataclasses.replace(
        TOY, name="boxes", base=None, make=make, signature={"weight": (1, 2)}, convert=dict
    )
    zoo.register(entry)
    weight = torch.tensor([[1.0, 2.0]])
    near = zoo.nearest({"weight": weight[0], "other": weight})
    assert near is not None
    assert (near.name, near.differences) == (
        "ToySAM (boxes)",
        "unknown other; of another shape weight",
    )
    found: Any = sc.load(saved(tmp_path / "boxes.pt", {"weight": weight}))
    assert torch.equal(found.weight, weight)
    assert same(sc.build("boxes"), sc.build("boxes"))
    assert not same(sc.build("boxes"), sc.build("boxes", seed=1))


# --- models of several files -------------------------------------------------------------------


def two_files(folder: Path, state: STATE) -> None:
    encoder = {name[4:]: tensor for name, tensor in state.items() if name.startswith("enc.")}
    saved(folder / "encoder.pt", {"model": encoder})
    parts = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
    saved(
        folder / "both.pt",
        {
            part: {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
            for part, start in parts.items()
        },
    )


def test_model_of_two_files(sam: Any, state: STATE, tmp_path: Path) -> None:
    two_files(tmp_path / "cache", state)
    for found in (
        sc.load("toy_two"),
        sc.load(tmp_path / "cache"),
        sc.load(tmp_path / "cache", model="toy_two"),
        sc.load(tmp_path / "cache" / "encoder.pt", model="toy_two"),
    ):
        assert same(sam, found)
        base = history(found).base
        assert base is not None
        assert (base.source, base.licence) == ("toy_two", "Apache-2.0")


def test_decoder_may_come_from_a_whole_model(sam: Any, state: STATE, tmp_path: Path) -> None:
    two_files(tmp_path / "two", state)
    other = {n: torch.ones_like(t) if n.startswith("enc.") else t for n, t in state.items()}
    saved(tmp_path / "two" / "both.pt", other)
    assert same(sam, sc.load(tmp_path / "two"))


def test_one_of_two_files(state: STATE, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    two_files(folder, state)
    text = refusal(folder / "encoder.pt")
    assert text.startswith(f"this is one of the files of TwoSAM.\n  where     {folder}/encoder.pt")
    assert text.endswith(
        "  expected  both.pt in the same folder\n"
        f'  try       sc.load("{folder}", model="toy_two"), or sc.load("toy_two")'
    )
    (folder / "both.pt").unlink()
    assert refusal(folder, model="toy_two") == (
        "the folder lacks files of TwoSAM.\n"
        f"  where     {folder}\n"
        "  got       encoder.pt\n"
        "  expected  both.pt too\n"
        '  try       sc.load("toy_two") gets them'
    )


def test_folder_for_several_models(state: STATE, tmp_path: Path) -> None:
    two_files(tmp_path / "two", state)
    zoo.register(dataclasses.replace(TWO, name="toy_two_b"))
    assert refusal(tmp_path / "two") == (
        "the folder holds the files of several models.\n"
        f"  where     {tmp_path / 'two'}\n"
        "  got       toy_two, toy_two_b\n"
        "  expected  to be told which one\n"
        f'  try       sc.load("{tmp_path / "two"}", model="toy_two")'
    )


# --- what it refuses ---------------------------------------------------------------------------


def test_missing_and_renamed_tensors(state: STATE, tmp_path: Path) -> None:
    name = "blocks.1.norm2.weight"
    state["enc.blocks.1.norm_2.weight"] = state.pop(f"enc.{name}")
    path = saved(tmp_path / "toy.pt", state)
    assert refusal(path) == (
        "the tensors do not fit.\n"
        f"  where     {path}\n"
        f"  got       missing image_encoder.{name}; unknown enc.blocks.1.norm_2.weight\n"
        "  expected  the tensors of ToySAM (toy)\n"
        f"  try       rename enc.blocks.1.norm_2.weight to image_encoder.{name}"
    )
    # The advice is good: our names pass.
    state[f"image_encoder.{name}"] = state.pop("enc.blocks.1.norm_2.weight")
    assert sc.load(saved(path, state)).image_encoder.img_size == 32
    state[f"image_encoder.{name}"] = torch.zeros(7)
    text = refusal(saved(path, state))
    assert f"  got       wrong image_encoder.{name} (7,) instead of (32,)\n" in text
    state["enc.blocks.0.norm2.weight"] = torch.zeros(32, dtype=torch.int64)
    text = refusal(saved(path, state))
    assert "wrong enc.blocks.0.norm2.weight (32,) torch.int64 instead of (32,)" in text


def test_convert_that_stumbles(state: STATE, tmp_path: Path) -> None:
    def stumble(state: STATE) -> STATE:
        return {"q": state["enc.qkv"]}

    zoo.register(dataclasses.replace(TOY, name="stumbling", convert=stumble))
    path = saved(tmp_path / "toy.pt", state)
    assert refusal(path, model="stumbling") == (
        "the tensors do not fit.\n"
        f"  where     {path}\n"
        "  got       KeyError: 'enc.qkv'\n"
        "  expected  the tensors of ToySAM (stumbling)"
    )


def test_file_of_another_model(state: STATE, tmp_path: Path) -> None:
    path = saved(tmp_path / "toy.pt", state)
    assert refusal(path, model="toy_plus") == (
        "the file is of another model.\n"
        f"  where     {path}\n"
        "  got       the tensors of ToySAM (toy), without extra.weight\n"
        "  expected  the tensors of PlusSAM (toy_plus)\n"
        f'  try       sc.load("{path}")'
    )


def test_unknown_file_is_compared_with_the_nearest(state: STATE, tmp_path: Path) -> None:
    state["enc.pos_embed_"] = state.pop("enc.pos_embed")
    path = saved(tmp_path / "mine.pt", state)
    assert refusal(path) == (
        "no known format has these tensors.\n"
        f"  where     {path}\n"
        f"  got       {len(state)} tensors, most like ToySAM (toy); "
        "missing image_encoder.pos_embed; unknown enc.pos_embed_\n"
        "  expected  those of segment_anything, transformers, or a model of sc.list_models()\n"
        "  try       rename enc.pos_embed_ to image_encoder.pos_embed"
    )
    state["enc.pos_embed"] = torch.zeros(1, 5, 5, 32)
    state["pixel_mean"] = torch.zeros(3)
    state["enc.blocks.7"] = torch.zeros(1)
    text = refusal(saved(path, state))
    unknown = "unknown enc.pos_embed_, enc.blocks.7; of another shape enc.pos_embed\n"
    assert f"tensors, most like ToySAM (toy); {unknown}" in text


def test_nearest_needs_no_optional_package(
    state: STATE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> tuple[Any, ...]:
        return (sc.substitute.TinyViT(),)

    monkeypatch.setattr(zoo, "_known", {})
    zoo.register(dataclasses.replace(TOY, steps=steps))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError):
        sc.load(saved(tmp_path / "toy.pt", state))
    del state["enc.pos_embed"]
    text = refusal(saved(tmp_path / "toy.pt", state))
    assert "most like ToySAM (toy); missing enc.pos_embed\n" in text


def test_damaged_sam_is_compared_with_sam(tmp_path: Path) -> None:
    state = BASE.build().state_dict()
    name = "image_encoder.blocks.0.mlp.lin1.weight"
    state["image_encoder.blocks.0.mlp.fc1.weight"] = state.pop(name)
    path = saved(tmp_path / "mine.pt", state)
    assert refusal(path) == (
        "no known format has these tensors.\n"
        f"  where     {path}\n"
        f"  got       {len(state)} tensors, most like segment_anything; "
        f"missing {name}; unknown image_encoder.blocks.0.mlp.fc1.weight\n"
        "  expected  those of segment_anything, transformers, or a model of sc.list_models()\n"
        f"  try       rename image_encoder.blocks.0.mlp.fc1.weight to {name}"
    )


def test_nothing_alike(tmp_path: Path) -> None:
    path = saved(tmp_path / "mine.pt", {"layer.weight": torch.zeros(2), "b": torch.zeros(1)})
    assert refusal(path) == (
        "this is not a SAM.\n"
        f"  where     {path}\n"
        "  got       2 tensors: layer.weight, b ...\n"
        "  expected  tensors image_encoder.*, mask_decoder.*, prompt_encoder.* too, "
        "as in segment_anything's layout\n"
        "  try       give a whole SAM: image encoder, prompt encoder and mask decoder in one file"
    )
    assert zoo.nearest({"b": torch.zeros(1)}) is None


# --- a real one --------------------------------------------------------------------------------

MOBILE = Published(
    name="mobile_sam",
    title="MobileSAM",
    base=sc.SamConfig(),
    steps=lambda: (sc.substitute.TinyViT(),),
    files=(File(name="mobile_sam.pt", page="https://github.com/ChaoningZhang/MobileSAM"),),
    signature={
        "image_encoder.patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "image_encoder.layers.3.blocks.1.attn.attention_biases": (10, 49),
        "image_encoder.neck.0.weight": (256, 320, 1, 1),
    },
    convert=_tiny_vit.convert,
    parameters=10_130_092,
    macs=38.77,
    input_size=1024,
    licence="Apache-2.0",
    paper="arXiv 2306.14289",
    upstream="https://github.com/ChaoningZhang/MobileSAM",
)


@pytest.fixture
def mobile(shared: Path, tmp_path: Path) -> Iterator[tuple[Path, STATE]]:
    pytest.importorskip("timm")
    zoo.register(MOBILE)
    state = Reference.of("mobilesam", shared).state()
    path = saved(tmp_path / "mobile_sam.pt", state)
    yield path, state
    path.unlink()


def test_mobile_sam(mobile: tuple[Path, STATE], tmp_path: Path) -> None:
    path, state = mobile
    sam = sc.load(path)
    base = history(sam).base
    assert base is not None
    assert (base.source, base.licence) == ("mobile_sam.pt", "Apache-2.0")
    assert [step.transform for step in sc.lineage(sam)] == [sc.substitute.TinyViT()]
    used = {name: t for name, t in state.items() if not _tiny_vit.UNUSED.fullmatch(name)}
    assert len(used) == len(state) - 4
    assert sum(t.numel() for t in sam.state_dict().values()) == sum(
        t.numel() for t in used.values()
    )
    first = sam.image_encoder.patch_embed.conv1.conv.weight
    assert torch.equal(first, state["image_encoder.patch_embed.seq.0.c.weight"])
    sc.save(sam, tmp_path / "out")
    assert same(sam, sc.load(tmp_path / "out"))


def test_mobile_sam_damaged(mobile: tuple[Path, STATE], tmp_path: Path) -> None:
    path, state = mobile
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    text = refusal(path)
    assert text.startswith("the checkpoint is damaged or cut short.\n")
    name = "image_encoder.patch_embed.seq.0.c.weight"  # of the signature
    state["image_encoder.patch_embed.seq.0.k.weight"] = state.pop(name)
    text = refusal(saved(path, state))
    assert (
        "  got       439 tensors, most like MobileSAM (mobile_sam); missing "
        "image_encoder.patch_embed.conv1.conv.weight; unknown "
        "image_encoder.patch_embed.seq.0.k.weight\n"
    ) in text
    del state["image_encoder.patch_embed.seq.0.k.weight"]
    text = refusal(saved(path, state), model="mobile_sam")
    assert (
        "  got       missing image_encoder.patch_embed.conv1.conv.weight\n"
        "  expected  the tensors of MobileSAM (mobile_sam)" in text
    )


def test_licence_of_a_plain_sam_by_another_official_name(tmp_path: Path) -> None:
    plain = sc.SamConfig(**{**dataclasses.asdict(BASE), "decoder_num_heads": 8}).build()
    state = plain.state_dict()
    signature = {"image_encoder.pos_embed": (1, 8, 8, 32)}
    zoo.register(
        dataclasses.replace(
            TOY,
            name="toy_plain",
            steps=tuple,
            files=(File(name="plain.safetensors", hub="somebody/plain"),),
            also=("plain-uniform.pth",),
            signature=signature,
            convert=dict,
        )
    )
    for name, licence in (("plain-uniform.pth", "Apache-2.0"), ("mine.pth", None)):
        path = saved(tmp_path / name, state)
        for found in (sc.load(path), sc.load(path, model="toy_plain")):
            base = history(found).base
            assert base is not None
            assert (base.source, base.licence) == (name, licence)
