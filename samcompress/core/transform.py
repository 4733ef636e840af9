"""The base class of every technique."""

from __future__ import annotations

import dataclasses
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as _hints

import torch
from torch import nn

from ._progress import Progress
from .errors import ConfigError, DataError, ModelError, SamCompressError, closest
from .where import Where

if TYPE_CHECKING:
    from .data import Dataset
    from .pipeline import Pipeline

State = dict[str, Any]
T = TypeVar("T", bound="Transform")


@dataclass(kw_only=True)
class Context:
    """What a step may use while it runs, besides the model.

    Attributes:
        step: name of the step, for messages.
        teacher: the model that entered the pipeline, or that given as ``teacher=``; never changed.
        dataset: the samples given as ``data=``, None if none were given.
        device: where the model is.
        progress: counts through long loops.
        workdir: folder for caches, checkpoints of training and exported files; None if not given.
    """

    step: str
    teacher: nn.Module | None = None
    dataset: Dataset | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = field(default_factory=Progress)
    workdir: Path | None = None

    @property
    def data(self) -> Dataset:
        """The samples.

        Raises:
            DataError: if none were given.
        """
        if self.dataset is None:
            raise DataError(
                f"{self.step} needs images.",
                got="no data",
                fix="pass data=, e.g. pipe(sam, data=sc.shapes(32))",
            )
        return self.dataset

    @property
    def original(self) -> nn.Module:
        """The teacher.

        Raises:
            ModelError: if the pipeline consumed its input and no teacher was given.
        """
        if self.teacher is None:
            raise ModelError(
                f"{self.step} needs a teacher.",
                got="consume=True, which leaves no original model",
                fix="pass teacher=, or leave out consume=True",
            )
        return self.teacher


class Transform(ABC):
    """One technique: a frozen dataclass that is called on a model and returns a smaller one.

    A subclass is declared as ``class Mlp(Transform, family="prune", phase=20)`` under
    ``@register @dataclass(frozen=True, kw_only=True)``. Its fields are plain values: numbers,
    strings, booleans, tuples, nested frozen dataclasses. `apply` works on a private copy and
    returns what it decided; `rebuild` makes the same shapes again from that, without data.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    phase: ClassVar[int]
    version: ClassVar[int] = 1
    terminal: ClassVar[bool] = False
    simulated: ClassVar[bool] = False  # floating point imitates what would run: no figures of speed
    extras: ClassVar[tuple[str, ...]] = ()
    needs_teacher: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        family: str | None = None,
        phase: int | None = None,
        terminal: bool = False,
        extras: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None and phase is not None:
            cls.family, cls.phase, cls.terminal, cls.extras = family, phase, terminal, extras
        # A dataclass keeps a __repr__ that the class itself defines.
        cls.__repr__ = Transform.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            kind = _hints(type(self))[f.name]
            object.__setattr__(self, f.name, _coerce(self, f.name, getattr(self, f.name), kind))
        self.validate()

    @classmethod
    def readiness(cls) -> dict[str, SamCompressError | None]:
        """What the technique could use on this machine, and what keeps it from that."""
        return {}

    @property
    def needs_data(self) -> bool:
        """Whether `apply` reads samples."""
        return False

    def validate(self) -> None:  # noqa: B027 - most techniques need none
        """Check the fields; called when the transform is made. Raises ConfigError."""

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Check that the step fits the model; called before any step of a pipeline runs."""

    @abstractmethod
    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Change the private copy and return what was decided, as plain JSON values."""

    @abstractmethod
    def rebuild(self, model: nn.Module, state: State) -> State:
        """Give the model the same modules and shapes again, from `state` alone; return `state`."""

    def between(self, name: str, low: float, high: float, *, closed: bool = False) -> None:
        """Raise ConfigError unless ``low < field < high`` (``<=`` where `closed`)."""
        value = getattr(self, name)
        inside = low <= value <= high if closed else low < value < high
        if not inside:
            sign = "<=" if closed else "<"
            raise ConfigError(
                f"{self.label}: {name} is out of range.",
                got=value,
                expected=f"{low} {sign} {name} {sign} {high}",
            )

    @property
    def label(self) -> str:
        """The registered name, or the class name of a technique that is not registered."""
        return getattr(type(self), "name", type(self).__name__)

    def __call__(self, model: nn.Module, **run: Any) -> nn.Module:
        """Apply the technique to a copy of the model; see `Pipeline.__call__` for the arguments."""
        return self._pipeline()(model, **run)

    def __or__(self, other: Transform | Pipeline) -> Pipeline:
        return self._pipeline() | other

    def _pipeline(self) -> Pipeline:
        from .pipeline import Pipeline

        return Pipeline([self])

    def params(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: _plain(v) for k, v in self._fields()}

    @classmethod
    def from_params(cls: type[T], params: dict[str, Any]) -> T:
        """Make the technique from `params`.

        Raises:
            ConfigError: on an unknown or missing field, or a value out of range.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in params:
            if key not in known:
                raise ConfigError(
                    f"{getattr(cls, 'name', cls.__name__)} has no field {key!r}.",
                    got=key,
                    expected=", ".join(known) or "no fields",
                    fix=closest(key, known),
                )
        missing = [
            k
            for k, f in known.items()
            if k not in params
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(
                f"{getattr(cls, 'name', cls.__name__)} lacks a value for {', '.join(missing)}.",
                expected=", ".join(known),
            )
        return cls(**params)

    @classmethod
    def upgrade(cls, params: dict[str, Any], version: int) -> dict[str, Any]:
        """Fields of an older `version` of this technique in today's meaning."""
        return params

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            yield f.name, getattr(self, f.name)

    def __repr__(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        shown = ", ".join(f"{k}={v!r}" for k, v in self._fields() if v != defaults[k])
        return f"sc.{self.family}.{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        from .display import transform_card

        return transform_card(self)


def _coerce(owner: Transform, name: str, value: Any, kind: Any) -> Any:
    """Bring a field to its declared type, or raise ConfigError."""
    if get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        kinds = [k for k in options if k is not type(None)]
        if len(kinds) > 1:
            return tuple(value) if isinstance(value, list) else value
        kind = kinds[0]
    if kind is Where:
        if isinstance(value, dict):
            return Where(**value)
        return value if isinstance(value, Where) else Where(value)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        inside = get_args(kind)[0]
        return tuple(_coerce(owner, name, v, inside) for v in value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return kind(**value)  # type: ignore[operator]
    if get_origin(kind) is Literal:
        right, expected = value in get_args(kind), " | ".join(map(repr, get_args(kind)))
    elif kind is float:
        right, expected = (
            isinstance(value, (int, float)) and not isinstance(value, bool),
            "a number",
        )
        value = float(value) if right else value
    elif kind is int:
        right, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif kind in (bool, str):
        right, expected = isinstance(value, kind), kind.__name__
    elif get_origin(kind) is tuple:
        right, expected = False, "a tuple or list"
    else:
        return value
    if not right:
        raise ConfigError(
            f"{owner.label}: {name} has a value it cannot take.", got=repr(value), expected=expected
        )
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
