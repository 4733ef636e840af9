"""One interface to CPU, CUDA and MPS: is it there, wait for it, time a call, read its memory."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Lap:
    """The time of one call.

    Attributes:
        ms: time on the device's own clock: events on CUDA, the wall clock elsewhere.
        wall_ms: wall clock from before the call until the device was idle again.
    """

    ms: float
    wall_ms: float


class Device:
    """The CPU, and what every other device has in common with it."""

    kind = "cpu"

    def __init__(self, spec: str = "cpu") -> None:
        self.torch_device = torch.device(spec)

    @classmethod
    def unavailable(cls, index: int | None = None) -> str | None:
        """None where the device can be used, or the reason why not."""
        return f"there is only one CPU device, not cpu:{index}" if index else None

    @property
    def name(self) -> str:
        """Name of the hardware, for reports."""
        return cpu_name()

    def synchronize(self) -> None:
        """Wait until everything handed to the device has been done."""

    def time(self, fn: Callable[[], Any]) -> Lap:
        """Run `fn` once between two synchronisations and time it."""
        self.synchronize()
        start = time.perf_counter_ns()
        fn()
        self.synchronize()
        wall = (time.perf_counter_ns() - start) / 1e6
        return Lap(wall, wall)

    def memory(self) -> dict[str, float] | None:
        """MiB on the device, now and at most since `reset_peak`; None for the CPU."""
        return None

    def reset_peak(self) -> None:
        """Forget the highest memory use so far."""

    def __repr__(self) -> str:
        return f"<{self.torch_device}: {self.name}>"


class Cuda(Device):
    """An NVIDIA (or ROCm) GPU."""

    kind = "cuda"

    @classmethod
    def unavailable(cls, index: int | None = None) -> str | None:
        """None where the device can be used, or the reason why not."""
        if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
            return "this torch was built without CUDA"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        count = torch.cuda.device_count()
        if index is not None and index >= count:
            return f"there are {count} CUDA devices, numbered from 0"
        return None

    @property
    def name(self) -> str:
        """Name of the hardware, for reports."""
        return torch.cuda.get_device_name(self.torch_device)

    def synchronize(self) -> None:
        """Wait until everything handed to the device has been done."""
        torch.cuda.synchronize(self.torch_device)

    def time(self, fn: Callable[[], Any]) -> Lap:
        """Run `fn` once; events on the current stream, and the wall clock around both."""
        stream = torch.cuda.current_stream(self.torch_device)
        event = partial(torch.cuda.Event, enable_timing=True)
        begin, end = event(), event()
        self.synchronize()
        start = time.perf_counter_ns()
        begin.record(stream)
        fn()
        end.record(stream)
        self.synchronize()
        wall = (time.perf_counter_ns() - start) / 1e6
        return Lap(begin.elapsed_time(end), wall)

    def memory(self) -> dict[str, float] | None:
        """MiB of the allocator: held by tensors now and at most, and reserved from the driver."""
        at = self.torch_device
        return {
            "now_mb": torch.cuda.memory_allocated(at) / MIB,
            "peak_mb": torch.cuda.max_memory_allocated(at) / MIB,
            "reserved_mb": torch.cuda.max_memory_reserved(at) / MIB,
        }

    def reset_peak(self) -> None:
        """Forget the highest memory use so far."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)


class Mps(Device):
    """An Apple GPU."""

    kind = "mps"

    @classmethod
    def unavailable(cls, index: int | None = None) -> str | None:
        """None where the device can be used, or the reason why not."""
        if not torch.backends.mps.is_built():
            return "this torch was built without MPS"
        if not torch.backends.mps.is_available():
            return "torch finds no Apple GPU"
        return f"there is only one Apple GPU, not mps:{index}" if index else None

    @property
    def name(self) -> str:
        """Name of the hardware, for reports."""
        return f"{cpu_name()} GPU"

    def synchronize(self) -> None:
        """Wait until everything handed to the device has been done."""
        torch.mps.synchronize()

    def memory(self) -> dict[str, float] | None:
        """MiB held by tensors now; as peak, what the driver has given, which it keeps."""
        driver = torch.mps.driver_allocated_memory() / MIB
        return {
            "now_mb": torch.mps.current_allocated_memory() / MIB,
            "peak_mb": driver,
            "reserved_mb": driver,
        }

    def reset_peak(self) -> None:
        """Give cached memory back to the driver, so that its figure can fall."""
        torch.mps.empty_cache()


KINDS: dict[str, type[Device]] = {cls.kind: cls for cls in (Device, Cuda, Mps)}


def device(spec: str | torch.device = "cpu") -> Device:
    """The device of a name.

    Args:
        spec: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        ConfigError: if there is no such kind of device, or it is not in this machine.

    Example:
        >>> device("cpu").kind
        'cpu'
    """
    kind, index = _read(spec)
    reason = KINDS[kind].unavailable(index)
    if reason is not None:
        raise ConfigError(
            f"the device {str(spec)!r} is not there.",
            got=reason,
            expected=f"one of {', '.join(available())}",
            fix="samcompress doctor says what this machine has",
        )
    return KINDS[kind](str(spec))


def unavailable(spec: str | torch.device) -> str | None:
    """Why a device cannot be used; None if it can.

    Raises:
        ConfigError: if there is no such kind of device at all.
    """
    kind, index = _read(spec)
    return KINDS[kind].unavailable(index)


def available() -> list[str]:
    """Kinds of device this machine has."""
    return [kind for kind, cls in KINDS.items() if cls.unavailable() is None]


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read(spec: str | torch.device) -> tuple[str, int | None]:
    try:
        parsed = torch.device(spec)
    except (RuntimeError, TypeError) as err:
        raise _unknown(spec) from err
    if parsed.type not in KINDS:
        raise _unknown(spec)
    return parsed.type, parsed.index


def _unknown(spec: object) -> ConfigError:
    return ConfigError(
        f"{str(spec)!r} is not a device we measure on.",
        expected="cpu, cuda, cuda:<number> or mps",
    )
