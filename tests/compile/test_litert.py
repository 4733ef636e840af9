"""LiteRT files: converted in an environment of its own, run in this one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_sam
from halves import DECODER, ENCODER, decoder_half, encoder_half, furthest
from torch import Tensor, nn

from samcompress.compile.backends import Options, litert
from samcompress.compile.backends.litert import PYTHON, LiteRt
from samcompress.compile.edge_tpu import edge_tpu_check
from samcompress.core.errors import BackendError

BACKEND = LiteRt()
needs = pytest.mark.skipif(
    BACKEND.unavailable("int8") is not None, reason=str(BACKEND.unavailable("int8"))
)
OPTIONS = Options(inputs=("x", "y"), outputs=("sum", "share"))


class Small(nn.Module):
    """Two inputs, whose names are not in the order of the alphabet, and a permuted view."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(3, 4)
        self.layer.weight.data = torch.randn(4, 3, generator=generator)
        self.register_buffer("strided", torch.randn(4, 2, generator=generator).T)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.layer(x).relu() + y @ self.strided.T @ self.strided
        return out, out.softmax(-1)


class Branch(nn.Module):
    """Goes one way or another by value, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    reason = BACKEND.unavailable()
    assert reason is not None
    assert reason.startswith("ai_edge_litert is needed for litert and could not be imported.")
    assert "pip install 'samcompress[litert]'" in reason


def test_no_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(litert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError) as caught:
        litert.converter()
    assert str(caught.value) == (
        "litert finds no converter.\n"
        "  where     SAMCOMPRESS_LITERT_PYTHON\n"
        "  got       not set\n"
        "  expected  the Python of an environment of its own: litert-torch needs torch < 2.15\n"
        "  try       python -m venv litert && litert/bin/pip install litert-torch && "
        "export SAMCOMPRESS_LITERT_PYTHON=$PWD/litert/bin/python"
    )


def test_environment_of_another_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PYTHON, str(tmp_path / "python"))
    with pytest.raises(BackendError, match="cannot be run, No such file or directory"):
        litert.converter()
    plain = tmp_path / "env"
    import venv

    venv.create(plain, with_pip=False, symlinks=True)
    monkeypatch.setenv(PYTHON, str(plain / "bin" / "python"))
    with pytest.raises(BackendError, match="No package metadata was found for litert-torch"):
        litert.converter()


def test_what_cannot_be_a_graph(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="litert could not export a Branch"):
        BACKEND.export(
            Branch(), (torch.zeros(2),), tmp_path / "a.tflite", dtype="float32", options=OPTIONS
        )
    assert list(tmp_path.iterdir()) == []


def test_converter_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last words are in the error, and no file is left."""
    worker = tmp_path / "worker.py"
    worker.write_text("import sys; sys.exit('no such operator')")
    monkeypatch.setattr(litert, "WORKER", worker)
    monkeypatch.setattr(litert, "converter", lambda: (sys.executable, "litert-torch 0, torch 0"))
    path = tmp_path / "made" / "a.tflite"
    path.parent.mkdir()
    module, options = nn.Linear(2, 2).eval(), Options(inputs=("x",), outputs=("y",))
    with pytest.raises(BackendError) as caught:
        BACKEND.export(module, (torch.zeros(1, 2),), path, dtype="float32", options=options)
    assert "RuntimeError: litert-torch 0, torch 0, exit 1 | no such operator" in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_integers_by_hand() -> None:
    tensor = {"dtype": np.int8, "quantization": (0.5, -3)}
    stored = litert._stored(np.float32([0, 0.7, 99, -99]), tensor)
    assert stored.dtype == np.int8
    assert stored.tolist() == [-3, -2, 127, -128]
    np.testing.assert_array_equal(litert._plain(stored, tensor), [0, 0.5, 65, -62.5])
    floats = {"dtype": np.float32, "quantization": (0.0, 0)}
    assert litert._stored(np.float32([7]), floats).tolist() == [7]


def test_ranges_hold_every_sample() -> None:
    ranges: dict[str, dict[str, np.ndarray]] = {}
    for low, high in ((-1, 2), (-3, 1)):
        seen = {"a": {"min": np.float32([low]), "max": np.float32([high])}, "weight": {}}
        litert._widen(ranges, seen)
    assert ranges["a"]["min"].tolist() == [-3]
    assert ranges["a"]["max"].tolist() == [2]
    assert ranges["weight"] == {}


@needs
@pytest.mark.slow
def test_small_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, path = Small().eval(), tmp_path / "small.tflite"
    example = torch.zeros(2, 3), torch.zeros(2, 4)
    # The file's own list of inputs is sorted by name; ours are in the order of arguments.
    options = Options(inputs=("z", "a"), outputs=("sum", "share"))
    files = BACKEND.export(module, example, path, dtype="float32", options=options)
    assert files == [path] == list(tmp_path.iterdir())
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, n, generator=generator) for n in (3, 4))
    run = BACKEND.load(path, device="cpu", threads=2)
    first = run(x.T.contiguous().T, y)
    kept = [t.clone() for t in first]
    assert furthest(first, module, (x, y)) < 1e-5
    run(x + 1, y + 1)
    assert all(torch.equal(ours, before) for ours, before in zip(first, kept, strict=True))
    with pytest.raises(BackendError, match=r"ValueError: z is \(2, 7\)") as caught:
        run(torch.zeros(2, 7), y)
    assert "z [2 3], a [2 4]" in str(caught.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BackendError, match="litert could not open a file"):
        BACKEND.load(path, device="cpu", threads=1)
    assert tuple(capfd.readouterr()) == ("", "")


@needs
@pytest.mark.slow
def test_integers_of_a_convolution_run_on_an_edge_tpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6()
    )
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    module.eval().requires_grad_(False)
    samples = [(torch.randn(1, 3, 32, 32, generator=generator),) for _ in range(4)]
    options, sizes = Options(inputs=("image",), outputs=("y",)), {}
    for kind, allowed in (("float32", 1e-5), ("int8", 0.05)):
        path = tmp_path / f"{kind}.tflite"
        BACKEND.export(module, samples[0], path, dtype=kind, options=options, samples=samples)
        (found,) = BACKEND.load(path, device="cpu", threads=1)(*samples[0])
        assert found.dtype == torch.float32
        expected = module(*samples[0])
        assert float((found - expected).norm() / expected.norm()) < allowed
        sizes[kind] = edge_tpu_check(path).mapped
    report = edge_tpu_check(tmp_path / "int8.tflite")
    assert report.ready, str(report)
    assert sizes["float32"] == 0
    assert tuple(capfd.readouterr()) == ("", "")


@needs
@pytest.mark.slow
def test_halves(tmp_path: Path) -> None:
    sam = random_sam()
    encoder, image = encoder_half(sam)
    path = tmp_path / "encoder.tflite"
    BACKEND.export(encoder, image, path, dtype="float32", options=ENCODER)
    (found,) = BACKEND.load(path, device="cpu", threads=1)(*image)
    assert float((found - encoder(*image)).abs().max()) < 1e-4
    assert not edge_tpu_check(path).ready
    decoder, _ = decoder_half(sam, 2, 3)
    path = tmp_path / "decoder.tflite"
    BACKEND.export(decoder, _, path, dtype="float32", options=DECODER)
    run = BACKEND.load(path, device="cpu", threads=1)
    for mask in (False, True):
        _, prompts = decoder_half(sam, 2, 3, mask=mask, seed=1)
        assert furthest(run(*prompts), decoder, prompts) < 5e-6
