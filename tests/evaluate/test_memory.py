"""Memory read in a fresh process: by stages, whatever the parent had done before."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core.errors import BackendError, ConfigError
from samcompress.evaluate.memory import Memory, Process, memory, run_child

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
# The function of the same name hides the module.
module = importlib.import_module("samcompress.evaluate.memory")
ROOT = Path(sc.__file__).resolve().parents[1]

# Phase one touches 512 MiB and lets go; phase two, after a reset, touches 64.
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from samcompress.evaluate.memory import Process
process = Process()
found = [process.now_mb()]
for size in (512, 64):
    before = process.now_mb()
    reset = process.reset_peak()
    block = bytearray(b"x") * (size << 20)
    del block
    found.append(process.peak_mb() - before)
print(json.dumps({"method": process.method, "reset": reset, "found": found}))
"""
PARENT = """
import subprocess, sys
block = bytearray(b"x") * (2 << 30)
del block
print(subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True).stdout)
"""


@linux
def test_512_mib_read_as_512_after_a_parent_of_2_gib() -> None:
    command = [sys.executable, "-c", PARENT, "-c", CHILD, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    baseline, first, second = found["found"]
    assert found["method"].startswith("VmHWM")
    assert baseline < 2048
    assert first == pytest.approx(512, abs=16)
    if found["reset"]:
        assert second == pytest.approx(64, abs=16)  # the first phase's peak is forgotten


@pytest.fixture(scope="module")
def measured() -> Memory:
    return memory(random_sam(), threads=1)


def test_stages(measured: Memory) -> None:
    assert measured.baseline_mb <= measured.loaded_mb + 1
    assert measured.loaded_mb <= measured.peak_mb
    assert measured.steady_mb <= measured.peak_mb + 1
    assert measured.reserved_mb is None
    if sys.platform == "linux":
        assert measured.method.startswith("VmHWM")


def test_a_larger_model_takes_more(tmp_path: Path, measured: Memory) -> None:
    big = sc.build("tiny", embed_dim=512, num_heads=4, image_size=256)
    sc.save(big, tmp_path / "big")
    found = memory(tmp_path / "big", threads=1)
    size = sum(p.numel() * p.element_size() for p in big.parameters()) / 2**20
    assert found.peak_mb - found.baseline_mb > size
    assert found.peak_mb > measured.peak_mb + 0.8 * size


def test_child_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        memory(tmp_path / "nothing")
    assert caught.value.what == "a measurement in a process of its own failed."
    assert "exit code 1: " in caught.value.got
    assert "not a samcompress checkpoint" in caught.value.got


def test_child_that_is_killed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "loading\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: killed)
    with pytest.raises(
        BackendError, match=r"when memory runs out\): loading[\s\S]*free some memory"
    ):
        run_child("any", [], timeout=1)


def test_child_that_says_nothing_or_takes_too_long() -> None:
    with pytest.raises(BackendError, match=r"gave no result[\s\S]*no output"):
        run_child("opcode", [], timeout=60)
    with pytest.raises(BackendError, match=r"took too long[\s\S]*0.01 s"):
        run_child("opcode", [], timeout=0.01)


def test_absent_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="'cuda' is not there"):
        memory(random_sam(), device="cuda")


def test_systems_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "STATUS", tmp_path / "none")
    process = Process()
    assert process.method == "ru_maxrss"
    assert process.now_mb() == process.peak_mb() > 10


def test_reset_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "VmHWM" not in module._status():
        pytest.skip("no VmHWM on this system")
    monkeypatch.setattr(module, "RESET", tmp_path)  # a folder cannot be written to
    assert Process().method == "VmHWM, not reset between stages"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_reads_the_allocator() -> None:
    found = memory(random_sam(), device="cuda")
    assert found.method == "cuda allocator"
    assert found.peak_mb > found.loaded_mb > found.baseline_mb
    assert found.reserved_mb >= found.peak_mb
