"""One interface to every device: is it there, wait for it, time a call, read its memory."""

from __future__ import annotations

import ctypes.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

    def clock_mhz(self) -> float | None:
        """The clock it computes with now; None where nothing tells."""
        return None

    def settings(self) -> dict[str, Any]:
        """Switches that change times, for the record."""
        return {
            "cpus": cpus(),
            "interop_threads": torch.get_num_interop_threads(),
            "denormals": "kept" if float(torch.tensor(1e-310).double() + 1e-310) else "flushed",
        }

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

    def clock_mhz(self) -> float | None:
        """Clock of the multiprocessors; None without the driver's Python package."""
        try:
            return float(torch.cuda.clock_rate(self.torch_device))
        except (ImportError, RuntimeError):
            return None

    def settings(self) -> dict[str, Any]:
        """Switches that change times, for the record."""
        cudnn: Any = torch.backends.cudnn
        return {
            **super().settings(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "tf32_convolutions": bool(cudnn.allow_tf32),
            "cudnn_benchmark": bool(cudnn.benchmark),
        }


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


class EdgeTpu(Device):
    """A Coral Edge TPU: it runs files made for it, called from the CPU, which holds the tensors."""

    kind = "edge-tpu"
    library = "edgetpu"
    # The chip on PCIe, and on USB before and after its firmware has been loaded.
    pcie = ("/dev", "apex_*")
    usb = ("/sys/bus/usb/devices", "*/idVendor")
    vendors = frozenset({"1a6e", "18d1"})

    def __init__(self, spec: str = "edge-tpu") -> None:
        super().__init__("cpu")

    @classmethod
    def unavailable(cls, index: int | None = None) -> str | None:
        """None where the device can be used, or the reason why not."""
        if ctypes.util.find_library(cls.library) is None:
            return "the runtime of Edge TPUs, libedgetpu.so.1, is not installed"
        if not cls._chips():
            return "libedgetpu is installed, but no Edge TPU is on USB or PCIe"
        return f"there is only one Edge TPU to choose, not edge-tpu:{index}" if index else None

    @classmethod
    def _chips(cls) -> list[Path]:
        folder, pattern = cls.usb
        on_usb = [
            file
            for file in Path(folder).glob(pattern)
            if file.read_text().strip() in cls.vendors
            and (file.parent / "idProduct").read_text().strip() in ("089a", "9302")
        ]
        return [*Path(cls.pcie[0]).glob(cls.pcie[1]), *on_usb]

    @property
    def name(self) -> str:
        """Name of the hardware, for reports."""
        chips = self._chips()
        bus = "PCIe" if chips and chips[0].name.startswith("apex") else "USB"
        return f"Edge TPU on {bus}, called from {cpu_name()}"

    def __repr__(self) -> str:
        return f"<edge-tpu: {self.name}>"


KINDS: dict[str, type[Device]] = {cls.kind: cls for cls in (Device, Cuda, Mps, EdgeTpu)}


def device(spec: str | torch.device = "cpu") -> Device:
    """The device of a name.

    Args:
        spec: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or ``edge-tpu``.

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


def cpus() -> list[int] | None:
    """Numbers of the CPUs this process may run on; None where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


@contextmanager
def pinned(threads: int | None) -> Iterator[int]:
    """Compute with so many CPU threads, bound to as many CPUs.

    Left free, threads move between CPUs and pairs of them share one core, and times with them. The
    CPUs are of different cores where there are enough, first of all the one that the system has
    chosen for the caller. All threads of the process are bound, those of other libraries too, and
    let go again. Where the system cannot bind, only the number is set.

    Args:
        threads: inside an operator; None leaves everything as it is.

    Yields:
        The number of threads that compute.

    Raises:
        ConfigError: if the number is below 1.
    """
    if threads is not None and threads < 1:
        raise ConfigError("threads is out of range.", got=threads, expected="at least 1")
    before, free = torch.get_num_threads(), cpus() or []
    bound = _bound() if threads is not None and threads < len(free) else {}
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        for task in bound:
            _bind(task, _spread(free)[:threads])
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        # Threads that were born meanwhile inherited the few CPUs.
        for task in _bound() if bound else ():
            _bind(task, bound.get(task, free))


def _bound() -> dict[int, list[int]]:
    """CPUs of every thread of this process."""
    found = {}
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # it may have ended meanwhile
            found[int(task.name)] = sorted(os.sched_getaffinity(int(task.name)))
    return found


def _bind(task: int, numbers: list[int]) -> None:
    with suppress(OSError):
        os.sched_setaffinity(task, numbers)


def _spread(free: list[int], topology: str = "/sys/devices/system/cpu") -> list[int]:
    """CPUs of different cores first, beginning with the one this thread is on."""
    here = _current_cpu()
    order = sorted(free, key=lambda number: (number != here, number))
    seen: dict[object, int] = {}
    rank = {}
    for number in order:
        folder = Path(topology) / f"cpu{number}" / "topology"
        try:
            files = (folder / "physical_package_id", folder / "core_id")
            core: object = tuple(file.read_text().strip() for file in files)
        except OSError:
            core = number
        rank[number] = seen[core] = seen.get(core, -1) + 1
    return sorted(order, key=lambda number: rank[number])


def _current_cpu() -> int | None:
    try:
        # The name of the program may hold anything; what follows it is numbers.
        return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])
    except (OSError, IndexError, ValueError):
        return None


def _read(spec: str | torch.device) -> tuple[str, int | None]:
    name, _, number = str(spec).partition(":")
    if name == EdgeTpu.kind and (not number or number.isdigit()):
        return name, int(number) if number else None
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
        expected="cpu, cuda, cuda:<number>, mps or edge-tpu",
    )
