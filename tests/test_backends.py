"""What every runtime must do; one that is not installed is skipped with its own words."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch import Tensor, nn

import samcompress as sc
from samcompress.compile.backends import BACKENDS, Backend, Options, aot, onnxruntime, openvino
from samcompress.compile.backends._base import check_sizes
from samcompress.core.errors import BackendError, ConfigError

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


SLOW = ("aot", "executorch", "litert", "coreml")  # they compile, or convert elsewhere
ROWS = [
    pytest.param(row, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, row in BACKENDS.items()
]


@pytest.fixture(params=ROWS)
def backend(request: pytest.FixtureRequest) -> Backend:
    reason = request.param.unavailable() or request.param.unrunnable()
    if reason:
        pytest.skip(reason)
    return request.param


def test_rows_of_the_support_table() -> None:
    for name, row in BACKENDS.items():
        assert row.name == name
        assert row.suffix.startswith(".")
        assert (row.extra is None) == (row.packages == ())
        assert set(row.calibrated) <= set(row.dtypes)
        assert "float32" in row.dtypes
        assert set(row.devices) in ({"cpu"}, {"cuda"})
        assert set(row.dtypes) <= {"float32", "float16", "bfloat16", "int8"}
        assert isinstance(row.dynamic_shapes, bool)


@pytest.mark.parametrize(
    ("name", "dtype", "package", "extra"),
    [
        ("onnxruntime", "float32", "onnxscript", "onnx"),
        ("openvino", "float32", "openvino", "openvino"),
        ("openvino", "int8", "nncf", "openvino"),
    ],
)
def test_missing_package_is_named(
    name: str, dtype: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "nncf" and BACKENDS[name].unavailable():
        pytest.skip(str(BACKENDS[name].unavailable()))
    monkeypatch.setitem(sys.modules, package, None)
    reason = BACKENDS[name].unavailable(dtype)
    assert reason is not None
    assert reason.startswith(f"{package} is needed for {name} and could not be imported.")
    assert f"pip install 'samcompress[{extra}]'" in reason


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    reason = BACKENDS["aot"].unavailable()
    assert reason is not None
    assert reason.startswith("compile.export with aot needs a compiler of C++.")
    assert "apt-get install g++" in reason


def test_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["openvino"]
    if backend.unavailable():
        pytest.skip(str(backend.unavailable()))
    monkeypatch.setattr(openvino, "_has_bfloat16", lambda core: False)
    assert backend.unavailable() is None
    reason = backend.unavailable("bfloat16")
    assert reason is not None
    assert reason.startswith("openvino finds no bfloat16 on this processor.")
    assert openvino._floats_as("bfloat16", None) == openvino._floats_as("int8", None) == "f32"


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux: where this thread's signals are handled."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> int | None:
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    place: int | None = found.place
    return place


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are laid out as Linux has them")
def test_files_end_in_any_order(tmp_path: Path) -> None:
    """Else the next child of this process that ends is a segmentation fault."""
    backend = BACKENDS["openvino"]
    if backend.unavailable():
        pytest.skip(str(backend.unavailable()))
    path = tmp_path / "small.xml"
    backend.export(Small().eval(), EXAMPLE, path, dtype="float32", options=DYNAMIC)
    opened = [backend.open(path, device="cpu", threads=1) for _ in range(2)]
    before = signal_stack()
    while opened:
        opened.pop(0).run(*EXAMPLE)
        gc.collect()
        assert signal_stack() == before


def test_sizes_are_checked() -> None:
    takes: dict[str, list[int | str]] = {"x": ["rows", 3], "y": ["rows", 4]}
    check_sizes((torch.zeros(5, 3), torch.zeros(5, 4)), takes)
    for x, y in (
        (torch.zeros(5, 4), torch.zeros(5, 4)),
        (torch.zeros(5, 3), torch.zeros(6, 4)),
        (torch.zeros(5, 3), torch.zeros(5)),
        (torch.zeros(5, 3), torch.zeros(5, 4).double()),
    ):
        with pytest.raises(ValueError, match=r"(x|y) is \("):
            check_sizes((x, y), takes)


def test_machine_code_for_another_processor(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    facts = {
        aot.INPUTS: "{}",
        aot.PROCESSOR: " ".join([*aot.processor(), "avx9", "amx_all"]),
    }
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("a/data/aotinductor/model/a.wrapper_metadata.json", json.dumps(facts))
    with pytest.raises(BackendError) as caught:
        BACKENDS["aot"].load(path, device="cpu", threads=1)
    assert str(caught.value) == (
        "a file holds machine code for another processor.\n"
        f"  where     {path}\n"
        "  got       this one lacks amx_all, avx9\n"
        "  try       export the model again on this machine"
    )


@pytest.mark.parametrize("row", BACKENDS.values(), ids=list(BACKENDS))
def test_threads_and_devices(row: Backend, tmp_path: Path) -> None:
    """Looked at before the file."""
    for threads in (0, -1):
        with pytest.raises(ConfigError, match=f"{row.name}: threads is out of range") as caught:
            row.open(tmp_path / "none", device=row.devices[0], threads=threads)
        assert "expected  at least 1" in str(caught.value)
    with pytest.raises(ConfigError, match=f"{row.name}: device is out of range"):
        row.open(tmp_path / "none", device="abacus")


@pytest.mark.parametrize(
    ("name", "dtype"), [("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "bfloat16")]
)
def test_fewer_bits(
    name: str, dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Close to torch, not equal to it, and smaller; what goes in and comes out is float32."""
    backend = BACKENDS[name]
    if backend.unavailable(dtype):
        pytest.skip(str(backend.unavailable(dtype)))
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 192), nn.GELU(), nn.Linear(192, 96))
    module.eval().requires_grad_(False)
    samples = [(torch.randn(1, 7, 96, generator=generator),) for _ in range(3)]
    options = Options(inputs=("x",), outputs=("y",))
    sizes = {}
    for kind in ("float32", dtype):
        path = tmp_path / f"{kind}{backend.suffix}"
        files = backend.export(
            module, samples[0], path, dtype=kind, options=options, samples=samples
        )
        sizes[kind] = max(file.stat().st_size for file in files)
        (found,) = backend.load(path, device="cpu", threads=1)(*samples[0])
        assert found.dtype == torch.float32
        expected = module(*samples[0])
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-5 if kind == "float32" else 1e-4 < error < 0.05
    assert sizes[dtype] < (0.6 if dtype == "bfloat16" else 0.45) * sizes["float32"]
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_conformance(backend: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = Small().eval()
    options = DYNAMIC if backend.dynamic_shapes else Options(inputs=("x", "y"), outputs=("a", "b"))
    path = tmp_path / f"small{backend.suffix}"
    files = backend.export(module, EXAMPLE, path, dtype="float32", options=options)
    assert files[0] == path
    assert sorted(tmp_path.iterdir()) == sorted(files)
    generator = torch.Generator().manual_seed(1)
    for threads in (1, 2):
        run = backend.open(path, threads=threads)
        assert json.loads(json.dumps(run.granted)) == run.granted
        for rows in (1, 2, 5, 0) if backend.dynamic_shapes else (2,):
            x, y = (torch.randn(rows, n, generator=generator) for n in (3, 4))
            # Strided inputs too: a runtime that reads the bare memory would see other numbers.
            x = x.T.contiguous().T
            found = run(x, y)
            assert [t.dtype for t in found] == [torch.float32] * 2
            for ours, expected in zip(found, module(x, y), strict=True):
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    for x, y in ((2, 7), (2, 4)), ((3, 3), (2, 4)):
        with pytest.raises(BackendError, match=f"{backend.name} could not run a graph") as caught:
            run(torch.zeros(x), torch.zeros(y))
        assert str(path) in str(caught.value)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


AGAIN = """
import sys, numpy as np, samcompress as sc
image = sc.shapes(1, seed=9)[0].image
prompts = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
found = sc.predict(sc.load(sys.argv[1]), [image], [prompts], multimask=True)[0].logits
np.save(sys.argv[2], found.numpy())
"""


@pytest.mark.parametrize("name", ["tiny", pytest.param("mini", marks=[pytest.mark.slow])])
def test_conformance_of_a_sam(backend: Backend, name: str, tmp_path: Path) -> None:
    """Masks are torch's, everywhere a SAM is used, here and in a process of its own."""
    sam = sc.load(name)
    exported: Any = sc.compile.Export(backend=backend.name)(sam, progress=False)
    assert max(sc.lineage(exported)[-1].state["errors"].values()) < 1e-5
    image = sc.shapes(1, seed=9)[0].image
    prompts = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
    found, expected = (
        sc.predict(model, [image], [prompts], multimask=True)[0] for model in (exported, sam)
    )
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-3)
    low, boxes = [], []
    for model in (exported, sam):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        first = predictor.predict(np.array([[20, 30]]), np.array([1]))[2]
        low.append(predictor.predict(box=np.array([5, 8, 40, 40]), mask_input=first[:1])[2])
        generator = SamAutomaticMaskGenerator(model, points_per_side=3)
        boxes.append(sorted(mask["bbox"] for mask in generator.generate(image)))
    np.testing.assert_allclose(low[0], low[1], rtol=1e-4, atol=1e-3)
    assert boxes[0] == boxes[1]
    folder = tmp_path / "saved"
    sc.save(exported, folder)
    arguments = [sys.executable, "-c", AGAIN, str(folder), str(tmp_path / "found.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), found.logits, rtol=0, atol=1e-4)


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
