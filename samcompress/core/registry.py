"""The names of techniques, and how others add theirs."""

from __future__ import annotations

import fnmatch
import logging
import re
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, UnknownTransformError, closest

if TYPE_CHECKING:
    from .transform import Transform

log = logging.getLogger("samcompress.registry")
GROUP = "samcompress.transforms"
_known: dict[str, type[Transform]] = {}
_failed: dict[str, str] | None = None
C = TypeVar("C", bound="type[Transform]")


def register(cls: C) -> C:
    """Class decorator: make a technique known as ``family.snake_case_name``.

    Raises:
        ConfigError: if another class already has the name.
    """
    name = f"{cls.family}.{snake(cls.__name__)}"
    if name in _known:
        raise ConfigError(
            f"the technique {name} is registered twice.",
            got=f"{cls.__module__}.{cls.__qualname__}",
            expected=f"only {_known[name].__module__}.{_known[name].__qualname__}",
            fix="give the class another name",
        )
    cls.name = name
    _known[name] = cls
    return cls


def find(name: str) -> type[Transform]:
    """The class of a technique.

    Raises:
        UnknownTransformError: if no technique has this name; suggests the nearest ones.
    """
    _load_plugins()
    if name not in _known:
        raise UnknownTransformError(
            f"there is no technique {name!r}.",
            got=name,
            expected="a name from sc.list_transforms()",
            fix=closest(name, _known),
        )
    return _known[name]


def get(name: str, **params: Any) -> Transform:
    """Make a technique by name: ``sc.get("prune.mlp", ratio=0.3)``.

    Raises:
        UnknownTransformError: if no technique has this name.
        ConfigError: if it has no such field, or a value is out of range.
    """
    return find(name).from_params(params)


def list_transforms(pattern: str = "*") -> list[str]:
    """Names of registered techniques, in natural order.

    Args:
        pattern: shell wildcards, e.g. ``"quant*"``.
    """
    _load_plugins()
    return sorted(fnmatch.filter(_known, pattern), key=natural)


def plugin_failures() -> dict[str, str]:
    """Entry points that could not be loaded, with the reason; shown by ``samcompress doctor``."""
    _load_plugins()
    return dict(_failed or {})


def snake(name: str) -> str:
    """``Int8Weights`` to ``int8_weights``, ``TinyViT`` to ``tiny_vit``."""
    words = name.replace("ViT", "Vit")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", words).lower()


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts ``m2`` before ``m10``."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name)]


def _load_plugins() -> None:
    global _failed
    if _failed is not None:
        return
    _failed = {}
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as err:  # noqa: PERF203 - a plug-in may fail in any way; we go on
            _failed[point.name] = f"{type(err).__name__}: {err}"
            log.warning("entry point %s (%s) could not be loaded: %s", point.name, point.value, err)
