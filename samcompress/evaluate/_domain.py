"""What one decision of a search can be: some values, or a range; and its JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError, closest


@dataclass(frozen=True)
class Choices:
    """One of several values, which need no order."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...]:
        """Every value."""
        return self.values

    def ends(self) -> tuple[Any, ...]:
        """Values that all must be allowed."""
        return self.values

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"choices": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A number between two, both included.

    Attributes:
        low: the smallest; whole numbers if both ends are.
        high: the largest.
        step: distance of the values that are tried; 1 for whole numbers, None for any.
        log: equal factors instead of equal steps.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def stepped(self) -> bool:
        """Whether it has an end of values."""
        return self.whole or self.step is not None

    def grid(self) -> tuple[float, ...]:
        """Every value.

        Raises:
            ConfigError: for a range without steps.
        """
        step = self.step or (1 if self.whole else None)
        if step is None:
            raise ConfigError(
                "a range without steps has no end of values.",
                got=json.dumps(self.to_dict()),
                expected='"step", or "choices"',
            )
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = (self.low + k * step for k in range(count))
        return tuple(int(v) if self.whole else round(v, 10) for v in values)

    def ends(self) -> tuple[float, ...]:
        """Values that all must be allowed."""
        return (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {"low": self.low, "high": self.high}
        return {**found, **{k: v for k in ("step", "log") if (v := getattr(self, k))}}


Domain = Choices | Range


def middle(domain: Domain) -> Any:
    """The value in the middle; of choices the one before it."""
    if isinstance(domain, Range) and not domain.stepped:
        both = domain.low * domain.high if domain.log else (domain.low + domain.high) / 2
        return math.sqrt(both) if domain.log else both
    values = domain.grid()
    return values[(len(values) - 1) // 2]


def domain(value: Any, where: str) -> Any:
    """`Choices` or `Range` of a dictionary that is one; anything else is a value."""
    if not isinstance(value, dict) or not value.keys() & {"choices", "low", "high"}:
        return value
    if "choices" in value:
        check_keys(value, ("choices",), (), where)
        found = check_list(value["choices"], where)
        return Choices(tuple(tuple(v) if isinstance(v, list) else v for v in found))
    check_keys(value, ("low", "high"), ("step", "log"), where)
    ends = (value["low"], value["high"])
    step, log = value.get("step"), bool(value.get("log", False))
    numbers = [v for v in (*ends, step) if v is not None]
    fit = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
    if not fit or ends[0] >= ends[1] or (step is not None and step <= 0) or (log and ends[0] <= 0):
        raise ConfigError(
            "this is no range.",
            where=where,
            got=json.dumps(value),
            expected='{"low": 0.1, "high": 0.5}, perhaps with "step" above 0, or "log" and low > 0',
        )
    return Range(*ends, step, log)


def check_keys(found: Any, needed: Sequence[str], more: Sequence[str], where: str) -> None:
    """Raise ConfigError unless it is a dictionary of these keys, the needed ones among them."""
    if not isinstance(found, dict):
        raise ConfigError(
            "a part of the space is no object.", where=where, got=str(found)[:80], expected="{...}"
        )
    missing = next((key for key in needed if key not in found), None)
    unknown = next((key for key in found if key not in (*needed, *more)), None)
    if missing or unknown:
        raise ConfigError(
            f"a part of the space lacks {missing!r}."
            if missing
            else f"a part of the space has a key {unknown!r}.",
            where=where,
            got=str(found)[:80],
            expected=", ".join((*needed, *more)),
            fix=closest(unknown, (*needed, *more)) if unknown and not missing else None,
        )


def check_list(found: Any, where: str) -> list[Any]:
    """The list, if it is one that holds something; raise ConfigError otherwise."""
    if not isinstance(found, list) or not found:
        raise ConfigError(
            "a part of the space is no list of something.", where=where, got=str(found)[:80]
        )
    return found
