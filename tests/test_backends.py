"""What every runtime must do; one that is not installed is skipped with its own words."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samcompress.compile.backends import BACKENDS, Backend, Options, onnxruntime
from samcompress.core.errors import BackendError

DYNAMIC = Options(
    inputs=("x", "y"), outputs=("sum", "share"), dynamic={"x": {0: "rows"}, "y": {0: "rows"}}
)
EXAMPLE = (torch.zeros(2, 3), torch.zeros(2, 4))


class Small(nn.Module):
    """Two inputs, two outputs, and a buffer that is a permuted view."""

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

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x, y) if x.sum() > 0 else (y, x)


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    reason = request.param.unavailable()
    if reason:
        pytest.skip(reason)
    return request.param


def test_rows_of_the_support_table() -> None:
    for name, row in BACKENDS.items():
        assert row.name == name
        assert row.suffix.startswith(".")
        assert row.extra
        assert "cpu" in row.devices
        assert set(row.dtypes) <= {"float32", "float16", "bfloat16", "int8"}
        assert isinstance(row.dynamic_shapes, bool)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    reason = BACKENDS["onnxruntime"].unavailable()
    assert reason is not None
    assert reason.startswith("onnxscript is needed for onnxruntime and could not be imported.")
    assert "pip install 'samcompress[onnx]'" in reason


def test_conformance(backend: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = Small().eval()
    options = DYNAMIC if backend.dynamic_shapes else Options(inputs=("x", "y"), outputs=("a", "b"))
    path = tmp_path / f"small{backend.suffix}"
    files = backend.export(module, EXAMPLE, path, dtype="float32", options=options)
    assert files[0] == path
    assert sorted(tmp_path.iterdir()) == sorted(files)
    generator = torch.Generator().manual_seed(1)
    for threads in (1, 2):
        run = backend.load(path, device="cpu", threads=threads)
        for rows in (1, 2, 5, 0) if backend.dynamic_shapes else (2,):
            x, y = (torch.randn(rows, n, generator=generator) for n in (3, 4))
            # Strided inputs too: a runtime that reads the bare memory would see other numbers.
            x = x.T.contiguous().T
            found = run(x, y)
            assert [t.dtype for t in found] == [torch.float32] * 2
            for ours, expected in zip(found, module(x, y), strict=True):
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with pytest.raises(BackendError, match=f"{backend.name} could not run a graph") as caught:
        run(torch.zeros(2, 7), torch.zeros(2, 4))
    assert str(path) in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_damaged_file(backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / f"bad{backend.suffix}"
    path.write_bytes(b"\x08\x0anot a graph")
    with pytest.raises(BackendError, match=f"{backend.name} could not open a file") as caught:
        backend.load(path, device="cpu", threads=1)
    assert str(path) in str(caught.value)
    assert "export the model again" in str(caught.value)


def test_what_cannot_be_a_graph(backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / f"branch{backend.suffix}"
    with pytest.raises(BackendError, match=f"{backend.name} could not export a Branch") as caught:
        backend.export(
            Branch(), EXAMPLE, path, dtype="float32", options=Options(inputs=("x", "y"), outputs=())
        )
    assert "where     export" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_onnx_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["onnxruntime"]
    if backend.unavailable():
        pytest.skip(str(backend.unavailable()))
    monkeypatch.setattr(onnxruntime, "LARGEST_FILE", 10)
    # Tensors of a few numbers stay in the graph in any case.
    module = nn.Sequential(nn.Linear(3, 999), nn.Linear(999, 3)).eval()
    path = tmp_path / "a.onnx"
    options = Options(inputs=("x",), outputs=("y",))
    files = backend.export(module, (torch.zeros(2, 3),), path, dtype="float32", options=options)
    assert [file.name for file in files] == ["a.onnx", "a.onnx.data"]
    other = tmp_path / "other"
    other.mkdir()
    for file in files:
        shutil.move(file, other)
    x = torch.ones(2, 3)
    (found,) = backend.load(other / "a.onnx", device="cpu", threads=1)(x)
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-5)


def test_onnx_names_modules_and_no_paths(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    backend = BACKENDS["onnxruntime"]
    path = tmp_path / "small.onnx"
    backend.export(Small().eval(), EXAMPLE, path, dtype="float32", options=DYNAMIC)
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["x", "y"]
    assert [o.name for o in graph.output] == ["sum", "share"]
    assert "layer/node_linear" in [node.name for node in graph.node]
    assert b".py" not in path.read_bytes()
