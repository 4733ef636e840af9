"""What the measurements ran on, and whether this machine is ready for them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from ..core._require import EXTRAS
from ..core.errors import MissingDependencyError, sentence
from ..core.registry import find, list_transforms, plugin_failures
from . import devices

ROOT = Path(__file__).resolve().parents[2]
# Distribution, module, oldest version: what samcompress needs to run at all.
REQUIRED = (
    ("torch", "torch", (2, 8)),
    ("torchvision", "torchvision", (0, 23)),
    ("segment-anything", "segment_anything", (1, 0)),
    ("numpy", "numpy", (1, 26)),
    ("pillow", "PIL", (10,)),
    ("safetensors", "safetensors", (0, 4)),
    ("transformers", "transformers", (5,)),
    ("pycocotools", "pycocotools", (2,)),
    ("scipy", "scipy", (1, 11)),
    ("matplotlib", "matplotlib", (3, 8)),
    ("jsonschema", "jsonschema", (4, 20)),
)
GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mb": "memory.total",
    "clock_mhz": "clocks.sm",
    "max_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "mig": "mig.mode.current",
}


def environment() -> dict[str, Any]:
    """The machine and the software, as plain JSON values; None for what the system does not tell.

    Example:
        >>> environment()["versions"]["torch"] is not None
        True
    """
    from .. import __version__

    names = [name for name, _, _ in REQUIRED] + [m for ms in EXTRAS.values() for m in ms]
    return {
        "samcompress": __version__,
        **_commit(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "kernel": platform.release(),
        "container": _container(),
        "cpu": devices.cpu_name(),
        "architecture": platform.machine(),
        "cores": _physical_cores(),
        "logical_cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_mb": _memory_mb(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "versions": {name: _version(name) for name in names},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpus": _gpus(),
    }


@dataclass(frozen=True)
class Check:
    """One thing `doctor` looked at.

    Attributes:
        name: what was looked at.
        status: ``ready``; ``absent``, which is no fault; ``broken``, which is one.
        detail: version, name, or the reason.
        fix: the line that mends it, None where there is none.
    """

    name: str
    status: Literal["ready", "absent", "broken"]
    detail: str
    fix: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.status != "broken"


def doctor() -> list[Check]:
    """Look at versions, devices, optional packages and plug-ins; says what mends each.

    Example:
        >>> [check.status for check in doctor() if check.name == "torch"]
        ['ready']
    """
    checks = [Check("python", "ready", platform.python_version())]
    checks += [_package(*entry) for entry in REQUIRED]
    for kind, cls in devices.KINDS.items():
        reason = cls.unavailable()
        if reason is None:
            checks.append(Check(f"device {kind}", "ready", devices.device(kind).name))
        else:
            checks.append(Check(f"device {kind}", "absent", reason))
    users: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for name in list_transforms():
        for extra in find(name).extras:
            users.setdefault(extra, []).append(name)
    checks += [_extra(extra, names) for extra, names in users.items()]
    for name in list_transforms():
        for part, err in find(name).readiness().items():
            if err is None:
                checks.append(Check(part, "ready", f"for {name}"))
            elif not isinstance(err, MissingDependencyError):  # which its extra's line says
                checks.append(Check(part, "absent", sentence(err), err.fix))
    checks += [
        Check(
            f"plug-in {name}", "broken", reason, f"pip install -U or uninstall what brings {name}"
        )
        for name, reason in plugin_failures().items()
    ]
    return checks


def _package(name: str, module: str, least: tuple[int, ...]) -> Check:
    wanted = ".".join(map(str, least))
    version = _version(name)
    if version is None and importlib.util.find_spec(module) is None:
        return Check(name, "broken", "not installed", f"pip install '{name}>={wanted}'")
    if version is not None and _numbers(version) < least:
        return Check(name, "broken", f"{version} is too old", f"pip install -U '{name}>={wanted}'")
    return Check(name, "ready", version or "version unknown")


def _extra(extra: str, users: list[str]) -> Check:
    modules = EXTRAS.get(extra, (extra,))
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    needed = f", for {', '.join(users)}" if users else ""
    if missing:
        detail = f"{', '.join(missing)} not installed{needed}"
        return Check(f"extra {extra}", "absent", detail, f"pip install 'samcompress[{extra}]'")
    found = ", ".join(f"{m} {_version(m) or ''}".strip() for m in modules)
    return Check(f"extra {extra}", "ready", f"{found}{needed}")


def _numbers(version: str) -> tuple[int, ...]:
    found = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Commit of the checkout that runs, and whether it has changes; None if installed."""
    commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    changes = _run("git", "-C", str(ROOT), "status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _container() -> str | None:
    for kind, mark in (("docker", "/.dockerenv"), ("podman", "/run/.containerenv")):
        if Path(mark).exists():
            return kind
    return None


def _physical_cores() -> int | None:
    cores = {
        (_read(f"{folder}/physical_package_id"), _read(f"{folder}/core_id"))
        for folder in map(str, Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology"))
    }
    return len(cores) or None


def _memory_mb() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // devices.MIB


def _gpus() -> list[dict[str, Any]]:
    query = f"--query-gpu={','.join(GPU_FIELDS.values())}"
    found = _run("nvidia-smi", query, "--format=csv,noheader,nounits")
    if found is None:
        return [{"name": torch.cuda.get_device_name(i)} for i in range(torch.cuda.device_count())]
    lines = [line.split(", ") for line in found.splitlines() if line]
    return [dict(zip(GPU_FIELDS, line, strict=False)) for line in lines]
