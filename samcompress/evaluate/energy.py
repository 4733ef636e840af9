"""Energy an image takes, read from counters of the hardware; where there is none, no number.

On ``cuda``: NVML's total energy of the board, Volta and newer, through the package
``nvidia-ml-py``. On ``cpu``: RAPL through Linux' powercap, where the user may read it: packages,
and memory where it is counted apart. Both count all that runs there, other programs too. Nothing is
estimated from rated power.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..core.contract import check_sam, device_of
from ..core.errors import BackendError, ConfigError
from ..core.timing import Call, Work, evaluating
from .devices import Device, device, pinned
from .latency import check_real

POWERCAP = Path("/sys/class/powercap")
# Counters are refreshed every 20 to 100 ms; shorter windows than this read chance.
SECONDS, CALLS = 5.0, 100
TICK = 1.0  # seconds between readings: a counter that begins again at zero must be seen before


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of one image: encoder and one box.

    Attributes:
        counter: what was read.
        joules_per_image: of everything the counter counts.
        joules_per_image_above_idle: less what it counts in the same time with the model loaded and
            nothing to do.
        watts: mean power while the model ran.
        idle_watts: mean power before.
        seconds: length of the window.
        calls: images in it.
        idle_seconds: length of the window of doing nothing.
        parts: joules of an image by what the counter tells apart.
    """

    counter: str
    joules_per_image: float
    joules_per_image_above_idle: float
    watts: float
    idle_watts: float
    seconds: float
    calls: int
    idle_seconds: float
    parts: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"Energy({self.joules_per_image:.3g} J an image, "
            f"{self.joules_per_image_above_idle:.3g} above idle, {self.counter})"
        )


class Counter(Protocol):
    """Counts joules."""

    name: str

    def joules(self) -> dict[str, float]:
        """Joules since the counter was made, by part."""


def energy(
    model: nn.Module,
    *,
    image: np.ndarray | None = None,
    seconds: float = SECONDS,
    calls: int = CALLS,
    threads: int | None = None,
) -> Energy:
    """Measure the energy a SAM takes for an image and one box, on the device it is on.

    Args:
        model: a SAM.
        image: (H, W, 3) uint8; 480 x 640 of noise if left out.
        seconds: length of the window, and of the idle one before it; at least 5.
        calls: images in the window; at least 100, however long they take.
        threads: CPU threads inside an operator, as for `latency`.

    Raises:
        ConfigError: if the window is too short for a counter.
        ModelError: if the model is simulated.
        BackendError: if this device has no counter that can be read; with the reason.
    """
    for name, value, least in (("seconds", seconds, SECONDS), ("calls", calls, CALLS)):
        if not value >= least:
            raise ConfigError(
                f"{name} is too few for a counter of energy.",
                got=value,
                expected=f"at least {least:g}",
            )
    check_sam(model)
    check_real("model", model)
    at = device(device_of(model))
    counter = counter_of(at)
    with pinned(threads), evaluating([model]), torch.inference_mode():
        work = Work(model, image)
        work.end_to_end()
        idle, idle_seconds, _ = _window(lambda: time.sleep(0.1), counter, at, seconds, 1)
        work.end_to_end()
        spent, took, made = _window(work.end_to_end, counter, at, seconds, calls)
    if not sum(spent.values()) > 0:
        raise BackendError(
            "the counter of energy does not move.",
            where=counter.name,
            got=f"0 J in {took:.3g} s and {made} calls",
        )
    watts, idle_watts = sum(spent.values()) / took, sum(idle.values()) / idle_seconds
    return Energy(
        counter=counter.name,
        joules_per_image=watts * took / made,
        joules_per_image_above_idle=(watts - idle_watts) * took / made,
        watts=watts,
        idle_watts=idle_watts,
        seconds=took,
        calls=made,
        idle_seconds=idle_seconds,
        parts={name: joules / made for name, joules in spent.items()},
    )


def counter_of(at: Device) -> Counter:
    """The counter of a device.

    Raises:
        BackendError: if it has none, or it may not be read.
    """
    if at.kind == "cuda":
        return Nvml(at.torch_device)
    if at.kind == "cpu":
        return Rapl()
    raise _none(f"there is no counter of energy we can read on {at.kind}")


def _window(
    call: Call, counter: Counter, at: Device, seconds: float, calls: int
) -> tuple[dict[str, float], float, int]:
    """Joules by part, seconds and calls between two synchronised readings."""
    at.synchronize()
    before, start = counter.joules(), time.perf_counter()
    seen, made = start, 0
    while made < calls or time.perf_counter() - start < seconds:
        call()
        made += 1
        if time.perf_counter() - seen > TICK:
            counter.joules()
            seen = time.perf_counter()
    at.synchronize()
    after, end = counter.joules(), time.perf_counter()
    return {name: after[name] - before[name] for name in after}, end - start, made


class Rapl:
    """Packages of the CPU, and their memory where it is counted apart.

    Args:
        root: where the system shows power zones.
    """

    name = "RAPL"

    def __init__(self, root: Path | None = None) -> None:
        root = root or POWERCAP
        self.zones: dict[str, Path] = {}
        # A package's parts would count twice, but for memory, which lies outside of it; "psys"
        # holds packages; "intel-rapl-mmio" shows them again.
        for zone in sorted(root.glob("intel-rapl:*")):
            name, parent = _text(zone / "name"), root / zone.name.rpartition(":")[0]
            if name.startswith("package"):
                self.zones[name] = zone
            elif name == "dram":
                self.zones[f"{_text(parent / 'name')} {name}"] = zone
        if not self.zones:
            raise _none(f"this system shows no RAPL counter in {root}")
        self.ranges = {n: int(_text(z / "max_energy_range_uj")) for n, z in self.zones.items()}
        self.last = self._read()
        self.total = dict.fromkeys(self.zones, 0)

    def joules(self) -> dict[str, float]:
        """Joules since the counter was made; to be asked more often than it begins again at 0."""
        now = self._read()
        for name, value in now.items():
            step = value - self.last[name]
            self.total[name] += step if step >= 0 else step + self.ranges[name] + 1
        self.last = now
        return {name: value / 1e6 for name, value in self.total.items()}

    def _read(self) -> dict[str, int]:
        return {name: int(_text(zone / "energy_uj")) for name, zone in self.zones.items()}


class Nvml:
    """The counter of an NVIDIA GPU.

    Args:
        at: the GPU, as torch numbers it.
    """

    name = "NVML"

    def __init__(self, at: torch.device) -> None:
        try:
            self.nvml: Any = importlib.import_module("pynvml")
        except ImportError as err:
            raise _none("nvidia-ml-py is not installed", fix="pip install nvidia-ml-py") from err
        # Torch counts only the GPUs it may see; the driver counts all.
        uuid = torch.cuda.get_device_properties(at).uuid
        with_prefix = str(uuid) if str(uuid).startswith("GPU-") else f"GPU-{uuid}"
        self._asked(self.nvml.nvmlInit)
        self.gpu = self._asked(lambda: self.nvml.nvmlDeviceGetHandleByUUID(with_prefix))
        self.start = self._millijoules()

    def joules(self) -> dict[str, float]:
        """Joules since the counter was made."""
        now = self._millijoules()
        if now < self.start:
            raise _none(f"the counter went back, from {self.start} to {now} mJ: a reset of the GPU")
        return {"gpu": (now - self.start) / 1e3}

    def _millijoules(self) -> int:
        return int(self._asked(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu)))

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self.nvml.NVMLError as err:
            raise _none(f"NVML says {err}; GPUs before Volta have no counter") from err


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError as err:
        raise _none(
            f"{file} may be read by root only", fix=f"sudo chmod -R a+r {POWERCAP}/*/energy_uj"
        ) from err
    except OSError as err:
        raise _none(f"{file} cannot be read: {err.strerror}") from err


def _none(reason: str, fix: str | None = None) -> BackendError:
    return BackendError("energy cannot be measured here.", got=reason, fix=fix)
