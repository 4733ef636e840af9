"""CPU, CUDA and MPS behind one interface, which is `core.devices`."""

from __future__ import annotations

from ..core.devices import KINDS, MIB, Device, Lap, available, cpu_name, device, unavailable

__all__ = [
    "KINDS",
    "MIB",
    "Device",
    "Lap",
    "available",
    "cpu_name",
    "device",
    "unavailable",
]
