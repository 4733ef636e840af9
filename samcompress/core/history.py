"""What was done to a model, kept on the model itself as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._sam2 import Sam2Config
from .build import SamConfig, config_of
from .errors import ModelError
from .registry import find
from .transform import State, Transform

_ATTRIBUTE = "_samcompress"


@dataclass(frozen=True)
class Base:
    """What a chain of steps started from.

    Attributes:
        config: sizes of the SAM before any step.
        source: where its weights came from, e.g. a file name or ``"random"``.
        licence: of those weights, None where unknown.
    """

    config: SamConfig | Sam2Config
    source: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Step:
    """One step of a model's lineage.

    Attributes:
        transform: the technique with its settings.
        state: what it decided, as plain JSON values.
        facts: what it cost and won: parameters and bytes before and after, seconds.
    """

    transform: Transform
    state: State = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def simulated(self) -> bool:
        """Whether floating point imitates what would run, so that no speed can be measured."""
        return self.transform.simulated

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**step_dict(self.transform), "state": self.state, "facts": self.facts}


@dataclass(frozen=True)
class History:
    """Base and steps; `base` is None for a model whose sizes cannot be described."""

    base: Base | None
    steps: tuple[Step, ...] = ()


def history(model: nn.Module) -> History:
    """The model's record; made from its modules if it has none yet."""
    found: History | None = model.__dict__.get(_ATTRIBUTE)
    if found is not None:
        return found
    try:
        return History(Base(config_of(model)))
    except ModelError:
        return History(None)


def remember(model: nn.Module, record: History) -> None:
    """Keep the record on the model; it survives ``copy.deepcopy``."""
    model.__dict__[_ATTRIBUTE] = record


def lineage(model: nn.Module) -> tuple[Step, ...]:
    """The steps a model went through, oldest first.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.ImageSize(size=64)(sc.build("tiny"))
        >>> [step.transform for step in lineage(small)]
        [sc.substitute.ImageSize(size=64)]
    """
    found = model.__dict__.get(_ATTRIBUTE)
    return found.steps if found is not None else ()


def describe(model: nn.Module, *, source: str, licence: str | None = None) -> None:
    """Note where the weights of a freshly made model come from, and under which licence."""
    record = history(model)
    if record.base is not None:
        base = dataclasses.replace(record.base, source=source, licence=licence)
        remember(model, dataclasses.replace(record, base=base))


def step_dict(transform: Transform) -> dict[str, Any]:
    """Type, version and settings of a technique, as recipes and checkpoints hold them."""
    return {
        "type": transform.label,
        "version": transform.version,
        "params": transform.params(),
    }


def step_from(entry: dict[str, Any], *, where: str) -> Transform:
    """The technique of an entry made by `step_dict`.

    Raises:
        ConfigError: if the entry is malformed, of a later version, or has an unknown field.
        UnknownTransformError: if no technique has its name.
    """
    from .errors import ConfigError

    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise ConfigError(
            "a step is not readable.",
            where=where,
            got=str(entry)[:80],
            expected='{"type": "family.name", "params": {...}}',
        )
    unknown = set(entry) - {"type", "version", "params", "state", "facts"}
    if unknown:
        raise ConfigError(
            f"a step has unknown keys: {', '.join(sorted(unknown))}.",
            where=where,
            expected='"type", "version", "params"',
            fix='settings go under "params"',
        )
    cls = find(entry["type"])
    version = entry.get("version", cls.version)
    if version > cls.version:
        raise ConfigError(
            f"{entry['type']} was written by a newer samcompress.",
            where=where,
            got=f"version {version}",
            expected=f"at most version {cls.version}",
            fix="pip install -U samcompress",
        )
    params = dict(entry.get("params", {}))
    return cls.from_params(params if version == cls.version else cls.upgrade(params, version))
