"""The timer against sleeping stubs, and the split of a model's time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import random_sam

import samcompress as sc
from samcompress.core.errors import ConfigError
from samcompress.evaluate import devices
from samcompress.evaluate.devices import Device, device, unavailable
from samcompress.evaluate.latency import Rounds, latency, latency_many, time_many

FEW = Rounds(warmup_calls=1, warmup_seconds=0, calls=9, seconds=0, max_seconds=30)


def test_a_sleep_of_20_ms_reads_20_ms() -> None:
    timing = time_many({"stub": lambda: time.sleep(0.02)}, device("cpu"), FEW)["stub"]
    assert min(timing.samples_ms) == pytest.approx(20, abs=1)
    assert 20 <= timing.median_ms < 30  # a busy machine wakes us late, never early
    assert timing.n == 9


def test_first_call_is_apart() -> None:
    calls = iter([1.0])

    def stub() -> None:
        time.sleep(next(calls, 0.002))

    timing = time_many({"stub": stub}, device("cpu"), FEW)["stub"]
    assert timing.first_call_ms == pytest.approx(1000, abs=20)
    assert max(timing.samples_ms) < 500


class Queue(Device):
    """A device that returns at once and works on in the background, as a GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = threading.Event()
        self.idle.set()

    def launch(self) -> None:
        self.idle.clear()
        threading.Timer(0.02, self.idle.set).start()

    def synchronize(self) -> None:
        self.idle.wait()


class Unsynchronised(Queue):
    def synchronize(self) -> None:
        pass


def test_background_work_is_waited_for() -> None:
    queue = Queue()
    assert min(time_many({"k": queue.launch}, queue, FEW)["k"].samples_ms) >= 19.5
    hasty = Unsynchronised()
    assert time_many({"k": hasty.launch}, hasty, FEW)["k"].median_ms < 15


@pytest.mark.skipif(not torch.cuda.is_available(), reason=str(unavailable("cuda")))
def test_events_and_wall_clock_agree_on_cuda() -> None:
    at = device("cuda")
    x = torch.randn(4096, 4096, device="cuda")

    def chain() -> None:
        for _ in range(20):
            torch.mm(x, x)

    timing = time_many({"chain": chain}, at, Rounds.quick())["chain"]
    assert timing.median_ms > 2
    assert timing.wall_median_ms == pytest.approx(timing.median_ms, rel=0.05)
    start = time.perf_counter()
    chain()
    launched = (time.perf_counter() - start) * 1e3
    at.synchronize()
    assert launched < timing.median_ms / 2  # without the synchronise it would read this


def test_models_take_turns() -> None:
    seen: list[str] = []
    calls: dict[str, Callable[[], object]] = {
        name: (lambda name=name: seen.append(name)) for name in ("a", "b")
    }
    rounds = Rounds(warmup_calls=1, warmup_seconds=0, calls=4, seconds=0)
    timings = time_many(calls, device("cpu"), rounds)
    assert seen == ["a", "b", *"abba" * 2]
    assert timings["a"].n == timings["b"].n == 4


def test_limits_of_time() -> None:
    def stub() -> None:
        time.sleep(0.02)

    capped = Rounds(warmup_calls=100, warmup_seconds=9, calls=100, seconds=9, max_seconds=0.1)
    start = time.perf_counter()
    timing = time_many({"s": stub}, device("cpu"), capped)["s"]
    assert time.perf_counter() - start < 1
    assert timing.n >= 3
    long = Rounds(warmup_calls=0, warmup_seconds=0, calls=1, seconds=0.2)
    assert time_many({"s": stub}, device("cpu"), long)["s"].n >= 5


def test_exactly_so_many_calls_after_the_first() -> None:
    calls: list[int] = []
    timing = time_many({"s": lambda: calls.append(0)}, device("cpu"), Rounds.exactly(4))["s"]
    assert (timing.n, len(calls)) == (4, 5)


def test_statistics_by_hand() -> None:
    timing = time_many({"s": lambda: None}, device("cpu"), FEW)["s"]
    timing = type(timing)((1.0, 2.0, 3.0, 4.0, 5.0), 9.0, 3.0)
    found = timing.to_dict()
    assert (found["median_ms"], found["iqr_ms"], found["min_ms"], found["n"]) == (3, 2, 1, 5)
    assert found["p90_ms"] == pytest.approx(4.6)
    assert found["p99_ms"] == pytest.approx(4.96)
    assert found["first_call_ms"] == 9
    assert found["samples_ms"] == [1, 2, 3, 4, 5]


def test_parts_add_up() -> None:
    rounds = Rounds(warmup_calls=5, warmup_seconds=0.1, calls=60, seconds=1)
    sam = sc.build("tiny")
    ratios = []
    for _ in range(4):  # another process may get into one run; what adds up wrongly does so in all
        times = latency(sam, rounds=rounds, threads=1)
        parts = np.array([getattr(times, p).samples_ms for p in ("encoder", "prompt")]).sum(0)
        # Calls of one turn follow each other closely, so that both sides see the same machine.
        ratios.append(float(np.median(parts / np.array(times.end_to_end.samples_ms))))
        assert min(times.preprocess.samples_ms) > 0
        assert min(times.postprocess.samples_ms) > 0
        if abs(ratios[-1] - 1) < 0.05:
            return
    pytest.fail(f"encoder + prompt over end to end: {ratios}")


def _note(values: list[float], modes: set[bool], value: float, mode: bool) -> None:
    values.append(value)
    modes.add(mode)


def test_inputs_change_and_modes_are_restored() -> None:
    sam = random_sam().train()
    pixels, boxes, modes = [], [], set()
    sam.image_encoder.register_forward_pre_hook(
        lambda m, x: _note(pixels, modes, float(x[0][0, 0, 0, 0]), m.training)
    )
    sam.prompt_encoder.register_forward_pre_hook(
        lambda m, a, k: boxes.append(float(k["boxes"][0, 0])), with_kwargs=True
    )
    latency(sam, rounds=FEW, threads=1)
    assert all(a != b for a, b in itertools.pairwise(pixels))
    assert all(a != b for a, b in itertools.pairwise(boxes))
    assert modes == {False}
    assert all(module.training for module in sam.modules())


def test_throughput_and_threads() -> None:
    before = torch.get_num_threads()
    found = latency_many(
        {"a": random_sam(), "b": random_sam(depth=1, global_attn_indexes=())},
        rounds=FEW,
        batches=(1, 2),
        threads=1,
    )
    assert torch.get_num_threads() == before
    entry = found["b"].to_dict()
    assert entry["threads"] == 1
    assert set(entry["throughput"]["images_per_s"]) == {"1", "2"}
    best = entry["throughput"]["images_per_s"][str(entry["throughput"]["best_batch"])]
    assert best == max(entry["throughput"]["images_per_s"].values())


def test_image_sets_the_size_of_pre_and_postprocessing() -> None:
    sam = random_sam()
    small = latency(sam, image=np.zeros((32, 32, 3), np.uint8), rounds=FEW, threads=1)
    big = latency(sam, image=np.zeros((1024, 1024, 3), np.uint8), rounds=FEW, threads=1)
    assert big.postprocess.median_ms > 3 * small.postprocess.median_ms


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"timed together on one device[\s\S]*no model"):
        latency_many({})
    with pytest.raises(ConfigError, match=r"Rounds.calls is out of range[\s\S]*at least 1"):
        Rounds(calls=0)
    with pytest.raises(ConfigError, match=r"threads is out of range[\s\S]*at least 1"):
        latency(random_sam(), rounds=FEW, threads=0)


def test_devices() -> None:
    cpu = device("cpu")
    assert (cpu.kind, cpu.memory(), unavailable("cpu")) == ("cpu", None, None)
    assert cpu.name == devices.cpu_name() != ""
    assert "cpu" in devices.available()
    with pytest.raises(ConfigError, match=r"'tpu' is not a device[\s\S]*cpu, cuda"):
        device("tpu")
    with pytest.raises(ConfigError, match=r"'meta' is not a device"):
        device("meta")
    with pytest.raises(ConfigError, match="only one CPU device"):
        device("cpu:3")


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_device_that_is_absent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = devices.KINDS[kind]
    monkeypatch.setattr(cls, "unavailable", classmethod(lambda cls, index=None: "taken out"))
    assert unavailable(kind) == "taken out"
    with pytest.raises(ConfigError, match=r"is not there[\s\S]*taken out[\s\S]*doctor"):
        device(kind)


def test_cuda_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert unavailable("cuda") == "this torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable("cuda") == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert unavailable("cuda:2") == "there are 2 CUDA devices, numbered from 0"
    assert unavailable("cuda:1") is None
