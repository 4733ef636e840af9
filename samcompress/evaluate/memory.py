"""Peak memory of a model, read in a fresh process.

In the process that measures, other models have come and gone, and the highest mark remembers them
all; so the model is saved, and a new interpreter loads it and runs it once. All figures are MiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.checkpoint import save
from ..core.contract import check_sam
from ..core.errors import BackendError
from . import devices
from .devices import MIB

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Memory of one model on one device, in MiB.

    Attributes:
        method: what was read. On the CPU the whole process counts, interpreter and libraries
            included; on a GPU what its allocator gave to tensors.
        baseline_mb: after the imports.
        loaded_mb: with the model loaded; weights mapped from the file count once they are read.
        peak_mb: highest during three calls: one image through the encoder, one box.
        steady_mb: after these calls, when all that can be freed is free again.
        reserved_mb: what a GPU's allocator held back from the driver at most; None on the CPU.
    """

    method: str
    baseline_mb: float
    loaded_mb: float
    peak_mb: float
    steady_mb: float
    reserved_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"Memory(peak {self.peak_mb:.0f} MiB = {self.peak_mb - self.baseline_mb:.0f} above the "
            f"imports, {self.method})"
        )


def memory(
    source: nn.Module | str | Path,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    timeout: float = 900.0,
) -> Memory:
    """Measure the memory a model needs, in a process of its own.

    Args:
        source: a SAM, which is saved to a temporary folder first, or a folder that `sc.save` wrote.
        device: where the child runs it.
        threads: CPU threads of the child, bound to as many CPUs; as torch chooses if left out.
        timeout: seconds after which the child is given up.

    Raises:
        ConfigError: if the device is not there.
        ModelError: if the model cannot be saved.
        BackendError: if the child fails or takes too long; with its last lines.
    """
    devices.device(device)
    with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
        folder = Path(source) if isinstance(source, (str, Path)) else Path(scratch) / "model"
        if isinstance(source, nn.Module):
            check_sam(source)
            save(source, folder)
        arguments = [str(folder), str(device), str(threads or 0)]
        return Memory(**run_child("samcompress.evaluate._child", arguments, timeout=timeout))


def run_child(module: str, arguments: list[str], *, timeout: float) -> dict[str, Any]:
    """Run a module in a new interpreter and read the JSON line it ends with.

    Raises:
        BackendError: if it fails, takes too long, or prints no such line.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=package_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise BackendError(
            "a measurement took too long.", where=module, got=f"more than {timeout:g} s"
        ) from err
    if done.returncode != 0:
        tail = [line for line in done.stderr.splitlines() if line.strip()][-5:]
        raise BackendError(
            "a measurement in a process of its own failed.",
            where=module,
            got=f"exit code {done.returncode}{_meaning(done.returncode)}: {' | '.join(tail)}",
            fix="free some memory" if done.returncode == -9 else None,
        )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as err:
        raise BackendError(
            "a measurement in a process of its own gave no result.",
            where=module,
            got=done.stdout[-200:] or "no output",
        ) from err
    return found


def package_environment() -> dict[str, str]:
    """Variables with which a child finds this very package, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class Process:
    """The memory of this process, as the operating system counts it."""

    def __init__(self) -> None:
        self.resets = False
        if sys.platform == "linux" and "VmHWM" in _status():
            self.resets = self.reset_peak()
            self.method = "VmHWM" if self.resets else "VmHWM, not reset between stages"
        else:
            self.method = "ru_maxrss"

    def reset_peak(self) -> bool:
        """Forget the highest use so far; False where the system does not allow it."""
        try:
            RESET.write_text("5")
        except OSError:
            return False
        return True

    def now_mb(self) -> float:
        """MiB held now; where the system does not say, the highest so far."""
        return _status()["VmRSS"] if self.method != "ru_maxrss" else self.peak_mb()

    def peak_mb(self) -> float:
        """MiB held at most since the last reset."""
        if self.method != "ru_maxrss":
            return _status()["VmHWM"]
        import resource

        # Bytes on macOS, KiB elsewhere. Linux hands this figure down from parent to child, so it is
        # the last resort there.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / MIB if sys.platform == "darwin" else peak / 1024


def _status() -> dict[str, float]:
    """The sizes in /proc/self/status, in MiB."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in fields}


def _meaning(code: int) -> str:
    # The kernel ends a process that takes more memory than there is by signal 9.
    return " (ended by the system, which happens when memory runs out)" if code == -9 else ""
