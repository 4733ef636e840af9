"""Core ML packages: what can be checked off Apple."""

from __future__ import annotations

import platform
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import random_sam
from halves import DECODER, ENCODER, decoder_half, encoder_half
from torch import Tensor, nn

from samcompress.compile.backends import Options, coreml
from samcompress.compile.backends.coreml import CoreMl
from samcompress.core.errors import BackendError

BACKEND = CoreMl()
needs = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))


class Two(nn.Module):
    """A permuted view, and two of everything."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("strided", torch.randn(4, 3, generator=generator).T)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = x @ self.strided + y
        return out, out.softmax(-1)


class Scattered(nn.Module):
    """Writes where values say."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(4).scatter(0, x.long(), x)


class Written(nn.Module):
    """Writes into a copy, as segment_anything does with coordinates."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1] = 2 * x[:, 1]
        x[1:, :2] = torch.where(x[1:, :2] > 0, 0.0, x[1:, :2])
        return torch.where(x == 1, x, 7.0)


def spec_of(path: Path, folder: Path) -> object:
    from coremltools.models import MLModel

    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder)
    return MLModel(str(folder / path.name.removesuffix(".zip")), skip_model_load=True).get_spec()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    reason = BACKEND.unavailable()
    assert reason is not None
    assert reason.startswith("coremltools is needed for coreml and could not be imported.")
    assert "pip install 'samcompress[coreml]'" in reason


def test_running_is_refused_off_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert BACKEND.unrunnable() == "Core ML is part of macOS and iOS; this is Linux"
    with pytest.raises(BackendError) as caught:
        BACKEND.load(Path("encoder.mlpackage.zip"), device="cpu", threads=1)
    assert str(caught.value) == (
        "coreml cannot run a package here.\n"
        "  where     encoder.mlpackage.zip\n"
        "  got       Core ML is part of macOS and iOS; this is Linux\n"
        "  try       open the folder on a Mac, or export for this machine with another backend"
    )
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert BACKEND.unrunnable() is None


@needs
def test_names_sizes_and_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, example = tmp_path / "two.mlpackage.zip", (torch.zeros(2, 3), torch.zeros(2, 4))
    # Names of a package's inputs, not of the arguments; and crossed over.
    options = Options(inputs=("y", "x"), outputs=("masks", "iou"))
    files = BACKEND.export(Two().eval(), example, path, dtype="float32", options=options)
    assert files == [path] == list(tmp_path.iterdir())
    names = zipfile.ZipFile(path).namelist()
    assert names[0] == "two.mlpackage/Manifest.json"
    # Nothing of the table for debugging that the converter adds.
    assert all(name.startswith("two.mlpackage/Data/com.apple.CoreML/") for name in names[1:])
    description = spec_of(path, tmp_path / "out").description
    found = [(i.name, tuple(i.type.multiArrayType.shape)) for i in description.input]
    assert found == [("y", (2, 3)), ("x", (2, 4))]
    assert [o.name for o in description.output] == ["masks", "iou"]
    assert tuple(capfd.readouterr()) == ("", "")


def test_writing_without_scatter() -> None:
    x = torch.arange(12.0).view(3, 4) - 5
    program = torch.export.export(Written(), (x,)).run_decompositions(coreml._plainer())
    assert "scatter" not in str(program.graph)
    assert "where.Scalar" not in str(program.graph)
    assert torch.equal(program.module()(x), Written()(x))


@needs
def test_operators_that_leave_the_neural_engine(tmp_path: Path) -> None:
    options = Options(inputs=("x",), outputs=("y",))
    with pytest.raises(BackendError, match="coreml could not export a Scattered") as caught:
        BACKEND.export(
            Scattered(),
            (torch.ones(2),),
            tmp_path / "a.mlpackage.zip",
            dtype="float32",
            options=options,
        )
    assert "operators that leave the Neural Engine: scatter_along_axis" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs
@pytest.mark.slow
def test_halves(tmp_path: Path) -> None:
    sam, sizes = random_sam(), {}
    for half, options in ((encoder_half(sam), ENCODER), (decoder_half(sam, 2, 3), DECODER)):
        for dtype in ("float32", "float16"):
            path = tmp_path / f"{options.outputs[0]}_{dtype}.mlpackage.zip"
            BACKEND.export(*half, path, dtype=dtype, options=options)
            with zipfile.ZipFile(path) as packed:
                weights = [f.file_size for f in packed.infolist() if f.filename.endswith(".bin")]
            sizes[dtype] = sizes.get(dtype, 0) + sum(weights)
            spec = spec_of(path, tmp_path / "out")
            assert coreml.operators(spec)["linear"] > 0
    assert sizes["float16"] < 0.6 * sizes["float32"]
