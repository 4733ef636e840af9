"""Where the time of a run goes, and how much memory it takes at most."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..devices import MIB, Device

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class Meter:
    """Seconds by stage, and the highest memory use since it was made.

    Args:
        at: the device that the model is on.
    """

    def __init__(self, at: Device) -> None:
        self.at = at
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.began = time.perf_counter()
        at.reset_peak()
        self.start = self._held(reset=True)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time of a block for a stage."""
        begin = time.perf_counter()
        yield
        self.at.synchronize()
        self.seconds[stage] += time.perf_counter() - begin

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    @property
    def peak_bytes(self) -> int | None:
        """Memory beyond what was held at the start, at most."""
        if self.start is None:
            return None
        held = self.at.memory()
        peak = _status("VmHWM") if held is None else int(held["peak_mb"] * MIB)
        return None if peak is None else max(0, peak - self.start)

    def _held(self, *, reset: bool) -> int | None:
        held = self.at.memory()
        if held is not None:
            return int(held["now_mb"] * MIB)
        if sys.platform != "linux":
            return None
        try:
            RESET.write_text("5")  # forget the process's highest use so far
        except OSError:
            return None
        return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * 1024 for words in found), None)
