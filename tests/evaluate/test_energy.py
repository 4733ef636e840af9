"""Energy: counters over fake trees and a fake driver, windows on a clock that nobody waits for."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core.errors import BackendError, ConfigError, ModelError
from samcompress.evaluate import Rounds, benchmark
from samcompress.evaluate.devices import EdgeTpu, device
from samcompress.evaluate.schema import check

# The function of the same name may hide the module.
module = importlib.import_module("samcompress.evaluate.energy")
RANGE = 1000_000_000  # microjoules, after which a counter begins again


class Clock:
    """Every look at it takes a tenth of a second; sleeping takes no time of ours."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def zone(root: Path, place: str, name: str, energy: int = 0) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages with their parts, as Linux shows them; the second has no memory of its own."""
    zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:0:1", "dram")
    zone(tmp_path, "intel-rapl:1", "package-1")
    zone(tmp_path, "intel-rapl:2", "psys")
    zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    monkeypatch.setattr(module, "POWERCAP", tmp_path)
    return tmp_path


def add(root: Path, place: str, microjoules: int) -> None:
    file = root / place / "energy_uj"
    file.write_text(str((int(file.read_text()) + microjoules) % (RANGE + 1)))


def test_packages_and_memory_count_once(tree: Path) -> None:
    counter = module.Rapl()
    assert counter.joules() == {"package-0": 0, "package-0 dram": 0, "package-1": 0}
    add(tree, "intel-rapl:0", 2_000_000)
    add(tree, "intel-rapl:0:0", 1_900_000)
    add(tree, "intel-rapl:0:1", 500_000)
    add(tree, "intel-rapl:2", 9_000_000)
    assert counter.joules() == {"package-0": 2, "package-0 dram": 0.5, "package-1": 0}


def test_a_counter_that_begins_again(tree: Path) -> None:
    counter = module.Rapl()
    for times in range(1, 5):  # the range is passed twice over; no joule is lost
        add(tree, "intel-rapl:0", 700_000_000)
        assert counter.joules()["package-0"] == pytest.approx(700 * times)


def test_reasons_where_there_is_no_counter(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(BackendError, match=r"cannot be measured here[\s\S]*no RAPL counter in"):
        module.Rapl(empty)
    real = Path.read_text

    def guarded(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", guarded)
        with pytest.raises(BackendError, match=r"may be read by root only[\s\S]*sudo chmod"):
            module.Rapl()
    (tree / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(BackendError, match="cannot be read: No such file"):
        module.Rapl()
    with pytest.raises(BackendError, match="no counter of energy we can read on edge-tpu"):
        module.counter_of(EdgeTpu())


class Working:
    """Counts 40 W while a model runs and 10 W while nothing does, by the fake clock."""

    name = "fake"

    def __init__(self, clock: Clock, sam: torch.nn.Module) -> None:
        self.clock, self.total, self.seen, self.busy = clock, 0.0, clock.now, False
        sam.image_encoder.register_forward_hook(self.ran)

    def ran(self, *_: Any) -> None:
        self.account()
        self.clock.now += 0.5
        self.total += 40 * 0.5
        self.seen = self.clock.now

    def account(self) -> None:
        self.total += 10 * (self.clock.now - self.seen)
        self.seen = self.clock.now

    def joules(self) -> dict[str, float]:
        self.account()
        return {"chip": self.total}


def test_joules_of_an_image_with_and_without_idle_power(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam = random_sam().train()
    counter = Working(clock, sam)
    monkeypatch.setattr(module, "counter_of", lambda at: counter)
    found = module.energy(sam, threads=1)
    assert found.calls == 100  # fewer would fill the five seconds
    assert found.seconds >= 5
    assert found.idle_seconds >= 5
    assert found.idle_watts == pytest.approx(10, rel=0.03)  # the looks at the clock
    # Half a second at 40 W an image; the rest of the window, the looks at the clock, at 10 W.
    per_call = found.seconds / 100
    whole = 40 * 0.5 + 10 * (per_call - 0.5)
    assert found.joules_per_image == pytest.approx(whole, rel=0.01)
    above = found.joules_per_image_above_idle
    assert above == pytest.approx(found.joules_per_image - found.idle_watts * per_call)
    assert above == pytest.approx(30 * 0.5, rel=0.03)
    assert found.parts == {"chip": pytest.approx(found.joules_per_image)}
    assert "fake" in repr(found)
    assert all(module_.training for module_ in sam.modules())


def test_long_windows_are_read_in_between(tree: Path, clock: Clock) -> None:
    counter = module.Rapl()

    def call() -> None:
        clock.sleep(10)
        add(tree, "intel-rapl:0", 400_000_000)

    spent, took, made = module._window(call, counter, device("cpu"), 5, 100)
    assert (made, took > 1000) == (100, True)
    assert spent["package-0"] == pytest.approx(40_000)  # the range is 1000 J


def test_errors(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    sam = random_sam()
    with pytest.raises(ConfigError, match=r"seconds is too few[\s\S]*at least 5"):
        module.energy(sam, seconds=1)
    with pytest.raises(ConfigError, match=r"calls is too few[\s\S]*at least 100"):
        module.energy(sam, calls=10)
    with pytest.raises(ModelError, match="not a SAM"):
        module.energy(torch.nn.Linear(1, 1))
    dead = types.SimpleNamespace(name="dead", joules=lambda: {"chip": 3.0})
    monkeypatch.setattr(module, "counter_of", lambda at: dead)
    with pytest.raises(BackendError, match=r"does not move[\s\S]*dead"):
        module.energy(sam, threads=1)


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The driver's package with one GPU."""
    state = types.SimpleNamespace(millijoules=[1000, 1000, 3500], asked=[], error=None)

    def energy(gpu: str) -> int:
        if state.error:
            raise NVMLError(state.error)
        return state.millijoules.pop(0)

    def handle(uuid: str) -> str:
        state.asked.append(uuid)
        return "gpu"

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n: fake if n == "pynvml" else real(n))
    properties = types.SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: properties)
    return state


def test_gpu_is_found_by_its_name_and_counted_in_joules(nvml: types.SimpleNamespace) -> None:
    counter = module.counter_of(types.SimpleNamespace(kind="cuda", torch_device="cuda:0"))
    assert nvml.asked == ["GPU-1234-abcd"]
    assert counter.joules() == {"gpu": 0}
    assert counter.joules() == {"gpu": 2.5}


def test_gpus_without_a_counter(
    nvml: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.millijoules[:] = [5000, 100]
    with pytest.raises(BackendError, match="went back, from 5000 to 100 mJ"):
        module.Nvml(torch.device("cuda")).joules()
    nvml.error = "Not Supported"
    with pytest.raises(BackendError, match="NVML says Not Supported; GPUs before Volta"):
        module.Nvml(torch.device("cuda"))

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(
        BackendError, match=r"nvidia-ml-py is not installed[\s\S]*pip install nvidia-ml-py"
    ):
        module.Nvml(torch.device("cuda"))


def test_column_of_a_benchmark(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sam = random_sam()
    monkeypatch.setattr(module, "counter_of", lambda at: Working(clock, sam))
    few = Rounds(warmup_calls=0, warmup_seconds=0, calls=1, seconds=0)
    settings: dict[str, Any] = {
        "rounds": few, "memory": False, "accuracy": False, "latency": False, "progress": False
    }  # fmt: skip
    data = sc.shapes(1, size=48)
    report = benchmark({"base": sam}, data, energy=True, **settings)
    check(report.doc)
    row = report.rows[0]
    assert row["energy"]["counter"] == "fake"
    record = report.table().records()[0]
    assert record["energy of an image"] == row["energy"]["joules_per_image"]
    assert "energy" not in benchmark({"base": sam}, data, **settings).rows[0]

    def none(at: Any) -> None:
        raise BackendError("energy cannot be measured here.", got="no counter")

    monkeypatch.setattr(module, "counter_of", none)
    gap = benchmark({"base": sam}, data, energy=True, **settings)
    assert gap.rows[0]["energy"] is None
    assert gap.rows[0]["missing"] == {"energy": "energy cannot be measured here. no counter"}
    assert "energy (energy cannot be measured here. no counter) of base" in gap.text()
