"""Tensors of pickled modules: the right ones, and none of the code that comes with them."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.serialization import get_safe_globals, safe_globals

import samcompress as sc
from samcompress.core._pickled import KNOWN, Dummy, module_state
from samcompress.core._weights import read_state
from samcompress.core.errors import CheckpointError

# A library whose code leaves a trace of every time that it is run.
CODE = """
import enum, os, torch
from pathlib import Path
from torch import nn

def trace(name):
    Path(os.environ["TRACES"], name).touch()

trace("import")

class Kind(enum.Enum):
    A = 1

class Items(dict):
    pass

class Options:
    def __init__(self, **options):
        self.__dict__.update(options)

class Layer(nn.Module):
    def __init__(self, width):
        trace("init")
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.absent = None
        self.register_parameter("none", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.kind = Kind.A

    def __setstate__(self, state):
        trace("setstate")
        super().__setstate__(state)

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.model = nn.Sequential(Layer(width), nn.SiLU(), nn.Identity())
        self.args = Options(lr=0.1)
        self.yaml = {"depth": 1}

def build(*args):
    trace("build")
"""


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    monkeypatch.setenv("TRACES", str(folder))
    return folder


@pytest.fixture
def library(
    tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ModuleType]]:
    """Makes ``NAME.nn.tasks``, which can be imported until the test ends."""
    made = []

    def make(name: str = "ultralytics") -> ModuleType:
        folder = tmp_path / "site" / name / "nn"
        folder.mkdir(parents=True)
        for package in (folder.parent, folder):
            (package / "__init__.py").touch()
        (folder / "tasks.py").write_text(CODE)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        made.append(name)
        return importlib.import_module(f"{name}.nn.tasks")

    yield make
    forget(*made)


def forget(*names: str) -> None:
    for module in list(sys.modules):
        if module.split(".")[0] in names:
            del sys.modules[module]


def read(path: Path, traces: Path) -> dict[str, torch.Tensor]:
    """The state, after a check that no code of the library was run for it."""
    forget("ultralytics", "segment_anything_kd")
    for trace in traces.iterdir():
        trace.unlink()
    before = set(get_safe_globals())
    try:
        return read_state(path)
    finally:
        assert list(traces.iterdir()) == []
        assert not {"ultralytics", "segment_anything_kd"} & set(sys.modules)
        assert set(get_safe_globals()) == before


def refusal(path: Path, traces: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path, traces)
    return str(caught.value)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ultralytics", "segment_anything_kd"])
def test_a_module_alone(name: str, library: Any, traces: Path, tmp_path: Path) -> None:
    net = library(name).Net()
    path = tmp_path / "net.pth"
    torch.save(net, path)
    expected = {n.removeprefix("model."): t for n, t in net.state_dict().items()}
    assert len(expected) == 8
    same(read(path, traces), expected)
    same(module_state(path, refused=""), net.state_dict())
    torch.load(path, weights_only=False)  # the library is really there, and its code runs
    assert {t.name for t in traces.iterdir()} == {"import", "setstate"}


def test_half_precision_in_a_dict(library: Any, traces: Path, tmp_path: Path) -> None:
    tasks = library()
    net, averaged = tasks.Net().half(), tasks.Net()
    content = {"epoch": -1, "model": net, "ema": None, "train_args": {"lr": 0.1}, "date": "2023"}
    torch.save(content, tmp_path / "net.pt")
    torch.save(content | {"ema": averaged}, tmp_path / "trained.pt")
    state = read(tmp_path / "net.pt", traces)
    same(state, {n.removeprefix("model."): t for n, t in net.state_dict().items()})
    assert state["0.conv.weight"].dtype == torch.float16
    state = read(tmp_path / "trained.pt", traces)
    same(state, {n.removeprefix("model."): t for n, t in averaged.state_dict().items()})


def test_data_parallel_wrappers(library: Any, traces: Path, tmp_path: Path) -> None:
    whole = nn.Module()
    whole.image_encoder = library("segment_anything_kd").Net()
    whole.mask_decoder = nn.Linear(2, 3)
    inside = nn.Module()
    inside.image_encoder = nn.DataParallel(whole.image_encoder)
    inside.mask_decoder = whole.mask_decoder
    assert "image_encoder.module.model.0.conv.bias" in inside.state_dict()
    nets = {"inside": inside, "outside": nn.DataParallel(whole), "both": nn.DataParallel(inside)}
    for name, net in nets.items():
        torch.save(net, tmp_path / name)
    for name in nets:
        same(read(tmp_path / name, traces), whole.state_dict())


def test_a_sam_with_shared_weights(tmp_path: Path, traces: Path) -> None:
    sam = sc.build("tiny", seed=1)
    blocks = sam.image_encoder.blocks
    blocks[1].mlp = blocks[0].mlp
    path = tmp_path / "sam.pth"
    torch.save(sam, path)
    same(read(path, traces), sam.state_dict())


def test_classes_that_torch_was_told_to_trust(library: Any, traces: Path, tmp_path: Path) -> None:
    net, path = library().Net(), tmp_path / "net.pth"
    torch.save(net, path)
    with safe_globals([nn.Sequential]):
        state = read(path, traces)
    same(state, {n.removeprefix("model."): t for n, t in net.state_dict().items()})


# --- what is refused ------------------------------------------------------------------------------


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize("place", ["dict", "module", "deep", "setstate"])
def test_hidden_code_is_refused_and_not_run(
    place: str, library: Any, traces: Path, tmp_path: Path
) -> None:
    payload = Payload(os.system, f"touch {traces / 'payload'}")
    net: Any = library().Net()
    content: Any = net
    if place == "dict":
        content = {"model": net, "args": payload}
    elif place == "module":
        net.extra = payload
    elif place == "deep":
        net.model[0]._forward_hooks["0"] = [payload]
    else:  # the state that a dummy would be built from is the payload itself
        content = Payload(nn.Identity)
        content.reduced = (nn.Identity, (), payload)
    path = tmp_path / "net.pt"
    torch.save(content, path)
    assert refusal(path, traces) == (
        "the file holds code, not only tensors; it was refused and nothing of it was run.\n"
        f"  where     {path}\n"
        f"  got       a pickled {os.system.__module__}.system\n"
        "  expected  tensors by name, as torch.save(model.state_dict(), path) writes them\n"
        "  try       if you trust the file: load it where its code is and save the state dict alone"
    )
    with contextlib.suppress(TypeError):  # a number is no state of nn.Identity's
        torch.load(path, weights_only=False)
    assert (traces / "payload").exists()  # the payload is a real one


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda tasks: Payload(getattr, {}, "keys"), "builtins.getattr"),
        (lambda tasks: Payload(eval, "1 + 1"), "builtins.eval"),
        (lambda tasks: Payload(tasks.build, 1), "ultralytics.nn.tasks.build"),
        (lambda tasks: tasks.build, "ultralytics.nn.tasks.build"),
        (lambda tasks: os.system, f"{os.system.__module__}.system"),
        (lambda tasks: Path("x"), "pathlib"),
        (lambda tasks: Payload(nn.functional.relu, torch.ones(1)), "torch.nn.functional.relu"),
    ],
    ids=["getattr", "eval", "call", "function", "callable", "class", "torch"],
)
def test_names_off_the_list(
    make: Any, name: str, library: Any, traces: Path, tmp_path: Path
) -> None:
    tasks = library()
    net, path = tasks.Net(), tmp_path / "net.pt"
    net.extra = make(tasks)
    torch.save(net, path)
    assert f"  got       a pickled {name}" in refusal(path, traces)


def test_the_list() -> None:
    good = (
        "torch.nn.modules.conv.Conv2d torch.nn.parallel.data_parallel.DataParallel"
        " ultralytics.nn.tasks.SegmentationModel ultralytics.nn.modules.C2f ultralytics.yolo.utils"
        ".IterableSimpleNamespace ultralytics.utils.loss.v8SegmentationLoss"
        " segment_anything.modeling.sam.Sam segment_anything_kd.modeling.common.LayerNorm2d"
    )
    bad = (
        "posix.system builtins.getattr os.System subprocess.Popen torch.nn.functional.relu"
        " torch.nn.modules torch.jit.ScriptModule torch.nn.init.Popen ultralytics"
        " ultralytics.nn.tasks.attempt_load xultralytics.A ultralytics_x.A my.torch.nn.modules.A"
        " segment_anything.build_sam.build_sam numpy.core.multiarray.scalar"
    )
    assert [name for name in good.split() if not KNOWN.fullmatch(name)] == []
    assert [name for name in bad.split() if KNOWN.fullmatch(name)] == []


ODD: dict[str, Callable[[Any, Any], object]] = {
    "items of a dummy": lambda net, tasks: setattr(net, "items", tasks.Items(a=1)),
    "a module inside itself": lambda net, tasks: net._modules.update(again=net),
    "a number for a tensor": lambda net, tasks: net._parameters.update(odd=3),
    "a number for a module": lambda net, tasks: net._modules.update(odd=3),
    "no module": lambda net, tasks: net._modules.update(odd=tasks.Options()),
    "a number for a name": lambda net, tasks: net._parameters.update({3: torch.ones(1)}),
}


@pytest.mark.parametrize("odd", ODD)
def test_modules_unlike_modules(odd: str, library: Any, traces: Path, tmp_path: Path) -> None:
    tasks = library()
    net, path = tasks.Net(), tmp_path / "net.pth"
    ODD[odd](net, tasks)
    torch.save(net, path)
    assert refusal(path, traces).startswith("the file holds code, not only tensors; it was refused")


def test_files_without_a_module(library: Any, traces: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    tasks = library()
    torch.save({"options": tasks.Options(), "weights": torch.ones(1)}, path)
    assert "a pickled ultralytics.nn.tasks.Options" in refusal(path, traces)
    torch.save(nn.Sequential(nn.Identity()), path)
    assert refusal(path, traces).startswith("the file holds no tensors by name.")


def test_the_format_before_zip_archives(library: Any, traces: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(library().Net(), path, _use_new_zipfile_serialization=False)
    assert refusal(path, traces).startswith(("the file holds code", "this is not a checkpoint."))


# --- dummies --------------------------------------------------------------------------------------


def test_a_dummy_does_nothing(traces: Path, tmp_path: Path) -> None:
    # Written by hand: what no torch.save would write, under names that are on the list.
    known = "ultralytics.nn.tasks\nNet"
    calls = {
        "its object is called": f"c{known}\n)\x81)R.",
        "what it was built from is called": f"c{known}\n)\x81}}X\x01\x00\x00\x00acos\nsystem\nsb.",
        "an item of it is set": f"c{known}\n)\x81X\x01\x00\x00\x00aK\x01s.",
        "it is appended to": f"c{known}\n)\x81K\x01a.",
        "its own method is called": f"c{known}.__init__\n)R.",
    }
    for what, opcodes in calls.items():
        path = tmp_path / "net.pt"
        torch.save({}, path)
        rewrite(path, b"\x80\x02" + opcodes.encode())
        assert refusal(path, traces).startswith(
            ("the file holds code", "this is not a checkpoint.")
        ), what
    dummy: Any = type("Dummy", (Dummy,), {"__slots__": ()})(1, [2], key=3)
    assert dummy.state is None
    dummy.__setstate__({"__class__": int, "__setstate__": print, "state": 1})
    assert dummy.state["state"] == 1
    assert type(dummy).__name__ == "Dummy"
    with pytest.raises(AttributeError):
        dummy.anything = 1


def rewrite(path: Path, content: bytes) -> None:
    """Another pickle in an archive of torch.save."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in entries.items():
            new.writestr(name, content if name.endswith("/data.pkl") else data)
