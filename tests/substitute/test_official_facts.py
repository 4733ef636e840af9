"""What is said of published models: sizes, work, names of tensors, figures, places of files."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_models import OURS, REFERENCES
from zoo_goldens import eps_of, parameters

import samcompress as sc
from samcompress.core import zoo
from samcompress.substitute import _official
from samcompress.substitute._tiny_vit import UNUSED

pytest.importorskip("timm")

assert _official.__all__  # imported for what it registers
every = pytest.mark.parametrize("name", REFERENCES)


@functools.cache
def empty(name: str) -> Any:
    entry = zoo.find(name)
    with torch.device("meta"):
        return entry.build()


@every
def test_parameters_are_those_of_the_manifest(name: str, shared: Path) -> None:
    entry = zoo.find(name)
    manifest = manifest_of(name, shared)
    sam = empty(name)
    tensors = manifest["tensors"]
    # A classifier that files of TinyViT carry: the one thing that no encoder runs.
    unused = sum(int(np.prod(shape)) for key, shape, *_ in tensors if UNUSED.fullmatch(key))
    assert unused == (321_640 if "image_encoder.head.weight" in dict_of(tensors) else 0)
    found = {
        "image_encoder": parameters(sam.image_encoder) + unused,
        "prompt_encoder": parameters(sam.prompt_encoder),
        "mask_decoder": parameters(sam.mask_decoder),
        "total": parameters(sam) + unused,
    }
    assert found == manifest["parameters"]
    assert entry.parameters == manifest["parameters"]["total"]
    assert entry.licence == manifest["upstream"]["licence"]
    assert entry.upstream.endswith(manifest["upstream"]["project"])
    assert entry.input_size == manifest["input"]["size"]


@every
def test_nothing_but_the_classifier_is_dropped(name: str, shared: Path) -> None:
    manifest = manifest_of(name, shared)
    official = {key: torch.empty(s, device="meta") for key, s, *_ in manifest["tensors"]}
    found = zoo.find(name).convert(dict(official))
    wanted = empty(name).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    dropped = {id(t) for t in official.values()} - {id(t) for t in found.values()}
    assert all(UNUSED.fullmatch(key) for key, t in official.items() if id(t) in dropped)
    # A name that is not official stays, and is refused when the weights are poured in.
    strange = {**official, "image_encoder.strange.weight": torch.empty(1, device="meta")}
    assert "image_encoder.strange.weight" in zoo.find(name).convert(strange)


@every
def test_macs_are_those_of_the_table(name: str, shared: Path) -> None:
    manifest = manifest_of(name, shared)["macs"]
    work = sc.evaluate.macs(empty(name))
    assert work.encoder / 1e9 == pytest.approx(manifest["encoder_gmacs"], rel=0.005)
    assert zoo.find(name).macs == manifest["encoder_gmacs"]
    if "decode_one_point_gmacs" in manifest:
        expected = manifest["decode_one_point_gmacs"]
        assert work.decoder_per_prompt / 1e9 == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("name", "plain"), [("sam_hq_vit_l", "sam_vit_l"), ("sam_hq_vit_h", "sam_vit_h")]
)
def test_sizes_that_have_no_reference(name: str, plain: str) -> None:
    entry, sam = zoo.find(name), empty(name)
    assert parameters(sam) == entry.parameters
    work = sc.evaluate.macs(sam)
    assert work.encoder / 1e9 == pytest.approx(entry.macs, rel=0.005)
    assert entry.macs == zoo.find(plain).macs
    state = sam.state_dict()
    assert zoo.recognise(state, "") is entry
    assert parameters(sam.image_encoder) == parameters(empty(plain).image_encoder)


@every
def test_signature_tells_from_all_others(name: str, shared: Path) -> None:
    manifest = manifest_of(name, shared)
    official = {key: torch.empty(s, device="meta") for key, s, *_ in manifest["tensors"]}
    files = zoo.find(name).files
    found = zoo.recognise(official, files[0].name)
    same = {"mobile_sam_v2": "mobile_sam", "mobile_sam_v2_l2": "efficient_vit_sam_l2"}
    assert found is zoo.find(same.get(name, name))


@functools.cache
def manifest_of(name: str, shared: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared / f"golden/{REFERENCES[name]}.json").read_text())
    return found


def dict_of(tensors: list[Any]) -> dict[str, Any]:
    return {key: shape for key, shape, *_ in tensors}


def test_norms_have_the_published_eps() -> None:
    for name, eps in (("efficient_vit_sam_l0", 1e-6), ("mobile_sam_v2_l2", 1e-5)):
        assert eps_of(empty(name).mask_decoder, "LayerNorm") == {eps}
        assert eps_of(empty(name).image_encoder, "BatchNorm2d") == {1e-6}
    assert eps_of(empty("mobile_sam").image_encoder, "LayerNorm") == {1e-5}
    assert eps_of(empty("efficient_sam_ti").image_encoder, "LayerNorm") == {1e-6}


# --- facts ----------------------------------------------------------------------------------------


def test_every_figure_is_in_the_collection(shared: Path) -> None:
    """No number is copied wrongly: value, metric, data and source are in one row."""
    with (shared / "published.csv").open(newline="") as file:
        published = list(csv.DictReader(file))
    metrics = {"latency, ms": "latency_ms", "encoder, ms": "latency_ms", "AP": "AP"}
    metrics |= {"mIoU, box": "mIoU", "mIoU, point": "mIoU", "boundary mIoU, box": "mBIoU"}
    metrics |= {"AR@1000": "AR@1000", "images a second": "throughput_ips"}
    count = 0
    for entry in map(zoo.find, OURS):
        count += len(entry.figures)
        for figure in entry.figures:
            share = metrics[figure.metric] not in ("latency_ms", "throughput_ips")
            value = 100 * figure.value if share else figure.value
            place = figure.source.replace("survey ", "").split(",")[0].split(" and ")[0]
            place = place.removeprefix("README of ")
            data = figure.setting.split(",")[0] if share else ""
            assert [
                row
                for row in published
                if row["metric"] == metrics[figure.metric]
                and float(row["value"]) == pytest.approx(value)
                and place in row["source"]
                and (data in row["dataset"] or data.startswith("DIS"))
            ], (entry.name, figure)
    assert count > 60


def test_files_say_where_they_are() -> None:
    for entry in map(zoo.find, OURS):
        for file in entry.files:
            assert file.url or file.page or file.hub, (entry.name, file.name)
            if file.url is not None:
                assert file.url.startswith("https://")
                assert file.url.removesuffix(".zip").endswith(file.name)
    assert zoo.find("sam_vit_b").files[0].md5 == "01ec64"
    assert zoo.find("efficient_sam_s").files[0].url.endswith(".pt.zip")
