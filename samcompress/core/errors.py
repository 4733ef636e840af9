"""Every error samcompress raises, and the one way its text is put together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class SamCompressError(Exception):
    """Base of all samcompress errors: what happened, where, got against expected, what to do.

    Args:
        what: one sentence saying what went wrong.
        where: module name, file, field or step concerned.
        got: what was found.
        expected: what would have been right.
        fix: what the user can do, ideally a line to paste.

    Example:
        >>> raise ConfigError("ratio is out of range.", got=1.0, expected="0 < ratio < 1")
        Traceback (most recent call last):
        samcompress.core.errors.ConfigError: ratio is out of range.
          got       1.0
          expected  0 < ratio < 1
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        parts = {"where": self.where, "got": self.got, "expected": self.expected, "try": self.fix}
        return "\n".join(
            [self.what] + [f"  {k:<8}  {v}" for k, v in parts.items() if v is not None]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(cls: type[SamCompressError], fields: dict[str, Any]) -> SamCompressError:
    known = ("where", "got", "expected", "fix")
    return cls(fields["what"], **{k: fields[k] for k in known})


class ConfigError(SamCompressError, ValueError):
    """A field has a value it cannot take."""


class UnknownTransformError(SamCompressError, KeyError):
    """No technique, model or recipe has this name."""


class ModelError(SamCompressError, TypeError):
    """Not a SAM, or a part that the step needs is absent."""


class OrderError(SamCompressError, ValueError):
    """A step was put after one that must come later."""


class NoEffectError(SamCompressError, ValueError):
    """Nothing matched, or nothing would change."""


class DataError(SamCompressError, ValueError):
    """Data are missing, damaged or of the wrong shape."""


class ShapeError(SamCompressError, ValueError):
    """A tensor does not have the shape it must have."""


class MissingDependencyError(SamCompressError, ImportError):
    """An optional package is not installed."""


class CheckpointError(SamCompressError, ValueError):
    """A file cannot be read, has another format, or was changed."""


class BackendError(SamCompressError, RuntimeError):
    """A runtime could not export, load or run a model."""


def closest(name: str, names: Iterable[str], n: int = 3) -> str | None:
    """The nearest known names, for the `try` line of an error; None where nothing is near."""
    near = difflib.get_close_matches(name, list(names), n=n, cutoff=0.4)
    return ", ".join(near) or None


def sentence(err: BaseException) -> str:
    """An error in one line, as tables and logs give reasons."""
    if isinstance(err, SamCompressError):
        return " ".join(str(part) for part in (err.what, err.where, err.got) if part is not None)
    return f"{type(err).__name__}: {err}".splitlines()[0]
