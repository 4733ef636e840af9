from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import samcompress as sc
from samcompress.core import zoo
from samcompress.core.sizes import parameter_count
from samcompress.substitute import _official_sam2  # noqa: F401 - registers its entries

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

NAMES = [
    "sam2.1_hiera_tiny",
    "sam2.1_hiera_small",
    "sam2.1_hiera_base_plus",
    "sam2.1_hiera_large",
    "edgetam",
]


def official(name: str) -> Any:
    """The model with its memory, as it is published, without storage."""
    base: Any = zoo.find(name).base
    kind = f"{base.model_type}_video"
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(base.settings))
    made = "Sam2VideoModel" if base.model_type == "sam2" else "EdgeTamVideoModel"
    with torch.device("meta"):
        return getattr(getattr(transformers.models, kind), made)(config)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_recognised_and_fit(name: str) -> None:
    entry = zoo.find(name)
    state = official(name).state_dict()
    assert zoo.recognise(state) is entry
    with torch.device("meta"):
        sam = entry.base.build()
    shapes = {k: v.shape for k, v in sam.state_dict().items()}
    assert {k: v.shape for k, v in entry.convert(state).items()} == shapes
    assert parameter_count(sam) == entry.parameters
    assert sc.evaluate.macs(sam).encoder / 1e9 == pytest.approx(entry.macs, rel=5e-4)
    told = float(re.search(r"([\d.]+) M parameters", entry.note)[1])
    assert parameter_count(official(name)) / 1e6 == pytest.approx(told, abs=0.1)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    state = {
        name: torch.full(tensor.shape, 0.01 * index, dtype=tensor.dtype)
        for index, (name, tensor) in enumerate(official("edgetam").state_dict().items())
    }
    save_file(state, tmp_path / "edgetam.safetensors")
    sam = sc.load(tmp_path / "edgetam.safetensors")
    assert type(sam.image_encoder).__name__ == "Sam2Encoder"
    assert torch.equal(
        sam.state_dict()["mask_decoder.obj_score_token.weight"],
        state["mask_decoder.obj_score_token.weight"],
    )
    assert sam.framing.size == 1024
