"""What a device is, what it can run, and how threads are bound to CPUs."""

from __future__ import annotations

import ctypes.util
import os
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core import devices as core
from samcompress.core.errors import ConfigError
from samcompress.evaluate import Rounds, benchmark, doctor
from samcompress.evaluate.devices import cpus, device, pinned, refusal, unavailable
from samcompress.evaluate.latency import latency, time_many

ONE = Rounds(warmup_calls=0, warmup_seconds=0, calls=1, seconds=0)
FAST: dict[str, Any] = {"rounds": ONE, "memory": False, "progress": False, "threads": 1}
binds = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot bind threads")


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An Edge TPU on USB, by fake system files."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    stick = tmp_path / "usb" / "1-1"
    stick.mkdir(parents=True)
    (stick / "idVendor").write_text("18d1\n")
    (stick / "idProduct").write_text("9302\n")
    monkeypatch.setattr(core.EdgeTpu, "usb", (str(tmp_path / "usb"), "*/idVendor"))
    monkeypatch.setattr(core.EdgeTpu, "pcie", (str(tmp_path), "apex_*"))
    return tmp_path


def test_edge_tpu_that_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert unavailable("edge-tpu") == "the runtime of Edge TPUs, libedgetpu.so.1, is not installed"
    with pytest.raises(ConfigError, match=r"'edge-tpu' is not there[\s\S]*libedgetpu"):
        device("edge-tpu")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    monkeypatch.setattr(core.EdgeTpu, "usb", (str(tmp_path), "*/idVendor"))
    monkeypatch.setattr(core.EdgeTpu, "pcie", (str(tmp_path), "apex_*"))
    assert unavailable("edge-tpu") == "libedgetpu is installed, but no Edge TPU is on USB or PCIe"
    absent = {check.name: check for check in doctor()}["device edge-tpu"]
    assert (absent.status, absent.detail) == ("absent", unavailable("edge-tpu"))
    with pytest.raises(ConfigError, match="'edge-tpu:x' is not a device"):
        device("edge-tpu:x")


def test_edge_tpu_that_is_there_takes_no_model_of_torch(chip: Path) -> None:
    assert unavailable("edge-tpu") is None
    at = device("edge-tpu")
    assert at.torch_device == torch.device("cpu")
    assert at.name.startswith("Edge TPU on USB")
    assert "edge-tpu" in repr(at)
    assert refusal(random_sam(), "edge-tpu") == (
        "an Edge TPU runs int8 files that were made for it, not models of torch"
    )
    (chip / "apex_0").touch()
    assert device("edge-tpu").name.startswith("Edge TPU on PCIe")
    assert unavailable("edge-tpu:1") == "there is only one Edge TPU to choose, not edge-tpu:1"


def test_rows_of_an_edge_tpu(chip: Path) -> None:
    sam = random_sam()
    report = benchmark(
        {"base": sam}, sc.shapes(1, size=48), devices=("cpu", "edge-tpu"), latency=False, **FAST
    )
    assert [r["status"] for r in report.rows] == ["measured", "not_measured"]
    assert report.rows[1]["reason"].startswith("an Edge TPU runs int8 files")
    assert "not measured: an Edge TPU" in report.table("edge-tpu").text()


def test_a_file_of_another_device_is_never_measured_as_this_one() -> None:
    sam = random_sam()
    assert refusal(sam, "cpu") is None
    sam.image_encoder.backend, sam.image_encoder.devices = "litert", ("edge-tpu", "npu")
    assert refusal(sam, "cpu") == "litert runs this model on edge-tpu and npu only"
    sam.image_encoder.devices = ("cpu",)
    assert refusal(sam, "cpu") is None
    # A model that runs on the chip is taken, and the base, which cannot, is no yardstick there.
    row = benchmark({"base": random_sam(), "x": sam}, sc.shapes(1, size=48), **FAST).rows[1]
    assert row["latency"]["vs_base"]


def test_no_speed_up_over_a_base_that_ran_elsewhere(chip: Path) -> None:
    made = random_sam()
    made.image_encoder.backend, made.image_encoder.devices = "litert", ("edge-tpu",)
    settings = {**FAST, "accuracy": False, "devices": ("edge-tpu",)}
    base, row = benchmark({"base": random_sam(), "x": made}, sc.shapes(1, size=48), **settings).rows
    assert (base["status"], row["status"]) == ("not_measured", "measured")
    assert "vs_base" not in row["latency"]
    energy = benchmark(
        {"x": made}, sc.shapes(1, size=48), energy=True, **{**settings, "latency": False}
    )
    assert energy.rows[0]["missing"]["energy"].endswith("no counter on edge-tpu")


@binds
def test_threads_are_bound_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {0: {0, 1, 2, 3}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda task: masks.get(task, masks[0]))
    monkeypatch.setattr(os, "sched_setaffinity", lambda task, to: masks.update({task: set(to)}))
    monkeypatch.setattr(core, "_current_cpu", lambda: 2)
    monkeypatch.setattr(core, "_spread", lambda free: [2, 0, 1, 3])
    before = torch.get_num_threads()
    go, done = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (go.set(), done.wait()))
    other.start()
    go.wait()
    with pinned(2) as used:
        assert used == torch.get_num_threads() == 2
        bound = {task: mask for task, mask in masks.items() if task}
        assert {os.getpid(), other.native_id} <= set(bound)
        assert set(map(frozenset, bound.values())) == {frozenset({0, 2})}
    done.set()
    other.join()
    assert torch.get_num_threads() == before
    assert {frozenset(m) for m in masks.values()} == {frozenset(range(4))}
    with pinned(None):
        assert {frozenset(m) for m in masks.values()} == {frozenset(range(4))}


@binds
def test_affinity_of_this_process_comes_back() -> None:
    before = cpus()
    with pinned(1):
        assert len(cpus() or ()) == 1
    assert cpus() == before
    with pytest.raises(ConfigError, match=r"threads is out of range[\s\S]*at least 1"), pinned(0):
        pass


def test_cores_of_their_own_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two packages of two cores of two threads: CPU n and n + 4 share a core.
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(str(number % 4 // 2))
        (folder / "core_id").write_text(str(number % 2))
    monkeypatch.setattr(core, "_current_cpu", lambda: 5)
    assert core._spread(list(range(8)), str(tmp_path)) == [5, 0, 2, 3, 1, 4, 6, 7]
    assert core._spread([1, 5], str(tmp_path)) == [5, 1]
    assert core._spread([1, 9], str(tmp_path / "none")) == [1, 9]


def test_settings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = latency(random_sam(), rounds=ONE, threads=1).to_dict()["settings"]
    assert found["cpus"] is None or len(found["cpus"]) == 1
    with pinned(1):  # as bound: the pool may not have begun
        assert found["interop_threads"] == torch.get_num_interop_threads()
    assert found["denormals"] == "kept"
    torch.set_flush_denormal(True)
    try:
        assert device("cpu").settings()["denormals"] == "flushed"
    finally:
        torch.set_flush_denormal(False)
    assert device("cpu").clock_mhz() is None


def test_a_clock_that_falls_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([1000.0, 940.0, 1000.0, 960.0])
    monkeypatch.setattr(core.Device, "clock_mhz", lambda self: next(clocks))
    hot = latency(random_sam(), rounds=ONE, threads=1).settings
    assert (hot["clock_mhz"], hot["throttled"]) == ([1000, 940], True)
    assert latency(random_sam(), rounds=ONE, threads=1).settings["throttled"] is False


def test_settings_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = core.Cuda.__new__(core.Cuda)
    gpu.torch_device = torch.device("cuda")
    found = gpu.settings()
    assert {"cpus", "matmul_precision", "tf32_convolutions", "cudnn_benchmark"} <= found.keys()
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda at: 1755)
    assert gpu.clock_mhz() == 1755

    def absent(at: object) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "clock_rate", absent)
    assert gpu.clock_mhz() is None


def test_mps_synchronises_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fake = types.SimpleNamespace(
        synchronize=lambda: seen.append("wait"),
        empty_cache=lambda: seen.append("empty"),
        driver_allocated_memory=lambda: 3 * core.MIB,
        current_allocated_memory=lambda: core.MIB,
    )
    monkeypatch.setattr(torch, "mps", fake)
    gpu = core.Mps.__new__(core.Mps)
    gpu.time(lambda: seen.append("call"))
    gpu.reset_peak()
    assert seen == ["wait", "call", "wait", "empty"]
    assert gpu.memory() == {"now_mb": 1, "peak_mb": 3, "reserved_mb": 3}


def test_what_compiles_itself_is_warmed_up_until_it_settles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walls = iter([9, 9, 5, 2, 1.04, 1.0, 1.02] + [1.0] * 100)
    at = device("cpu")
    borders: list[float] = []
    monkeypatch.setattr(at, "time", lambda fn: core.Lap(*[next(walls)] * 2))
    rounds = Rounds(warmup_calls=2, warmup_seconds=0, calls=3, seconds=0)
    timing = time_many(
        {"x": lambda: None}, at, rounds, settle=True, border=lambda: borders.append(0)
    )["x"]
    assert timing.first_call_ms == 9
    assert timing.samples_ms == (1.0, 1.0, 1.0)  # three in a row came before, within a twentieth
    assert len(borders) == 2
    walls = iter(range(1, 1000))  # it never settles
    assert time_many({"x": lambda: None}, at, rounds, settle=True)["x"].n == 3
    assert next(walls) < 100
