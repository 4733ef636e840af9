"""TensorRT: refusals, and the line to build with elsewhere; an engine needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from samcompress.compile.backends import tensorrt
from samcompress.compile.backends.tensorrt import TensorRt
from samcompress.core.errors import BackendError

BACKEND = TensorRt()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKEND.packages:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = BACKEND.unavailable()
    assert reason is not None
    assert reason.startswith("tensorrt is needed for tensorrt and could not be imported.")
    assert "pip install 'samcompress[tensorrt]'" in reason


def test_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKEND.packages:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKEND.unavailable() == (
        "tensorrt finds no NVIDIA GPU.\n"
        f"  where     torch {torch.__version__}\n"
        "  got       torch.cuda.is_available() is False\n"
        "  expected  the GPU that is to run the engine: engines are built where they run\n"
        "  try       export with backend='onnxruntime', and there: "
        "trtexec --onnx=encoder.onnx --saveEngine=encoder.engine --noTF32"
    )
    with pytest.raises(BackendError, match="tensorrt finds no NVIDIA GPU"):
        BACKEND.load(Path("encoder.engine"), device="cuda", threads=1)


def test_line_that_builds_elsewhere() -> None:
    assert tensorrt.command(Path("a/prompt_decoder.onnx")) == (
        "trtexec --onnx=a/prompt_decoder.onnx --saveEngine=a/prompt_decoder.engine --noTF32"
    )


@pytest.mark.skipif(BACKEND.unavailable() is not None, reason="no TensorRT, or no GPU")
def test_engine(tmp_path: Path) -> None:
    from samcompress.compile.backends import Options

    module, path = torch.nn.Linear(3, 4).eval().requires_grad_(False), tmp_path / "a.engine"
    options = Options(inputs=("x",), outputs=("y",))
    files = BACKEND.export(module, (torch.zeros(2, 3),), path, dtype="float32", options=options)
    assert files == [path, tmp_path / "a.onnx"]
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    run = BACKEND.load(path, device="cuda", threads=1)
    torch.testing.assert_close(run(x)[0], module(x), rtol=0, atol=1e-5)
    with pytest.raises(BackendError, match=r"x is \(2, 7\)"):
        run(torch.zeros(2, 7))
