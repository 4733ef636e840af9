"""Models as other runtimes run them: a row each, beside the model in torch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.data import Dataset
from ..core.errors import ConfigError
from ..core.history import history
from ..core.registry import find, get

EXPORT = "compile.export"
Model = nn.Module | str | Path


@dataclass(frozen=True)
class Variant:
    """A model that is to be exported before it is measured.

    Attributes:
        model: what is exported.
        backend: the runtime.
        precision: what its encoder computes in; None for the runtime's own choice.
        calibration: images for runtimes that look at some.
    """

    model: Model
    backend: str
    precision: str | None = None
    calibration: Dataset | None = None

    @property
    def params(self) -> dict[str, str]:
        """Settings of the export."""
        return {"backend": self.backend} | ({"precision": self.precision} if self.precision else {})

    def identity(self, before: str) -> str:
        """Hash that is equal for the same export of the same model."""
        seen = None
        if self.calibration is not None and get(EXPORT, **self.params).needs_data:
            seen = self.calibration.fingerprint
        text = json.dumps([before, EXPORT, find(EXPORT).version, self.params, seen])
        return hashlib.sha256(text.encode()).hexdigest()

    def make(self, model: nn.Module) -> Any:
        """Export a model; it is not changed.

        Raises:
            SamCompressError: if the runtime is not installed, cannot express the model, or wants
                images and there are none.
        """
        if any(step.transform.terminal for step in history(model).steps):
            raise ConfigError(
                "a model that runs from files is not exported again.", where=self.backend
            )
        return get(EXPORT, **self.params)(model, data=self.calibration, progress=False)


def known() -> tuple[str, ...]:
    """Names of the runtimes."""
    return tuple(vars(sys.modules[find(EXPORT).__module__])["BACKENDS"])


def with_runtimes(
    models: Mapping[str, Model], backends: Sequence[str], calibration: Dataset | None = None
) -> dict[str, Model | Variant]:
    """Models, each followed by what it becomes on other runtimes.

    Args:
        models: by name.
        backends: names of runtimes, with a precision where it is not the usual one:
            ``"openvino:int8"``; ``"all"`` for every runtime in float32.
        calibration: images for runtimes that look at some.

    Raises:
        ConfigError: if there is no such runtime, or it does not compute in that.

    Example:
        >>> list(with_runtimes({"base": "tiny"}, ["onnxruntime", "onnxruntime:int8"]))
        ['base', 'base [onnxruntime]', 'base [onnxruntime:int8]']
    """
    if isinstance(backends, str):
        raise ConfigError("backends is a list.", got=repr(backends), expected='("onnxruntime",)')
    names = [n for name in backends for n in (known() if name == "all" else (name,))]
    for name in names:
        backend, _, precision = name.partition(":")
        get(EXPORT, **Variant("", backend, precision or None).params)
    found: dict[str, Model | Variant] = {}
    for name, model in models.items():
        found[name] = model
        for label in dict.fromkeys(names):
            backend, _, precision = label.partition(":")
            found[f"{name} [{label}]"] = Variant(model, backend, precision or None, calibration)
    return found
