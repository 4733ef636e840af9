"""Devices behind one interface, which is `core.devices`; which models they can run."""

from __future__ import annotations

from typing import Any

from ..core.contract import parts
from ..core.devices import (
    KINDS,
    MIB,
    Device,
    EdgeTpu,
    Lap,
    available,
    cpu_name,
    cpus,
    device,
    pinned,
    unavailable,
)

__all__ = [
    "KINDS",
    "MIB",
    "Device",
    "Lap",
    "available",
    "cpu_name",
    "cpus",
    "device",
    "pinned",
    "refusal",
    "unavailable",
]


def refusal(model: Any, spec: str) -> str | None:
    """Why a device that is there cannot run a model; None if it can.

    Parts that run from files of a runtime say where that runs, as `devices`; those of torch run
    wherever torch does. A model that would quietly run elsewhere is not measured.

    Args:
        model: a SAM.
        spec: name of the device.
    """
    kind = device(spec).kind
    for part in parts(model):
        kinds = getattr(part, "devices", None)
        if kinds is not None and kind not in kinds:
            return f"{part.backend} runs this model on {' and '.join(kinds)} only"
    if kind == EdgeTpu.kind and not hasattr(parts(model).image_encoder, "devices"):
        return "an Edge TPU runs int8 files that were made for it, not models of torch"
    return None
