"""Budgets: how much of something a model may take, written ``"latency_ms<=50 on cpu"``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from .contract import device_of
from .devices import device
from .display import number
from .errors import ConfigError, closest
from .macs import macs
from .sizes import parameter_count
from .timing import Rounds, Timing, Work, evaluating, time_many

# What a technique measures by itself, and what a finished benchmark row tells as well.
QUANTITIES = ("parameters", "macs", "latency_ms")
MEASURED = (*QUANTITIES, "encoder_ms", "prompt_ms", "memory_mb", "size_mb")
EVERYWHERE = ("parameters", "macs", "size_mb")  # the same on every device
COUNTS = ("parameters", "macs")
SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "%": 0.01}
EXAMPLES = '"parameters<=30M", "macs<=50%" or "latency_ms<=50 on cpu"'
RULE = re.compile(r"(\w+)\s*<=\s*(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([kMG%]?)(?:\s+on\s+(\S+))?")
ROUNDS = Rounds(warmup_calls=1, warmup_seconds=0.2, calls=7, seconds=2.0, max_seconds=60.0)
K = TypeVar("K")


@dataclass(frozen=True)
class Limit:
    """A budget: an upper limit of what a model may cost.

    Attributes:
        quantity: ``parameters`` of the whole model; ``macs``, multiply-accumulates of the image
            encoder on one image and of prompt encoder and decoder on one box; or ``latency_ms``,
            the time of the same on a device, in milliseconds. Of a benchmark's row also its
            ``encoder_ms``, ``prompt_ms``, ``memory_mb`` and ``size_mb``.
        most: the limit, or the share of what the base costs.
        relative: whether `most` is such a share.
        device: where time is measured; None for where the model is.

    Example:
        >>> Limit.parse("macs<=200G").most
        200000000000.0
        >>> Limit.parse("latency_ms<=50%").bound(80.0)
        40.0
    """

    quantity: str
    most: float
    relative: bool = False
    device: str | None = None

    @classmethod
    def parse(cls, text: str, quantities: Sequence[str] = QUANTITIES) -> Limit:
        """Read a budget: a quantity, ``<=``, a number, for time or memory ``on`` a device.

        Args:
            text: the number may end in ``k``, ``M`` or ``G``, or in ``%`` of what the base costs.
            quantities: what it may be of; `MEASURED` where a benchmark's row is there to ask.

        Raises:
            ConfigError: if the text is none, there is no such quantity, or the number makes no
                sense.
        """
        found = RULE.fullmatch(text.strip())
        if found is None:
            raise ConfigError("this is not a budget.", got=repr(text), expected=EXAMPLES)
        quantity, digits, exponent, scale, place = found.groups(default="")
        if quantity not in quantities:
            raise ConfigError(
                f"a budget cannot be of {quantity!r}.",
                got=repr(text),
                expected=", ".join(quantities),
                fix=closest(quantity, quantities),
            )
        if place and quantity in EVERYWHERE:
            raise ConfigError(
                f"{quantity} {'are' if quantity in COUNTS else 'is'} the same on every device.",
                got=repr(text),
                fix=text.partition(" on ")[0],
            )
        most, relative = float(digits + exponent) * SCALES[scale], scale == "%"
        if relative and not 0 < most < 1:
            raise ConfigError(
                "a budget is a part of what the base costs.",
                got=repr(text),
                expected="more than 0% and less than 100%",
            )
        if most <= 0 or (quantity in COUNTS and not relative and most < 1):
            raise ConfigError(
                "a budget leaves nothing.",
                got=repr(text),
                expected=EXAMPLES,
                fix=f"{quantity}<={100 * most:g}% for a share of the base" if most else None,
            )
        return cls(quantity, most, relative, place or None)

    def bound(self, base: float) -> float:
        """The limit in the quantity's own unit, given what the base costs."""
        return self.most * base if self.relative else self.most

    def place(self, model: nn.Module) -> str:
        """Name of the device where time is measured."""
        return self.device or str(device_of(model))

    def timed(self, models: Mapping[K, nn.Module]) -> dict[K, Timing]:
        """Time models that take turns: one image and one box each, as `Work.end_to_end` does it.

        Args:
            models: SAMs that are on the budget's device.

        Raises:
            ConfigError: if the device is not there.
        """
        at = device(self.place(next(iter(models.values()))))
        with evaluating(models.values()), torch.inference_mode():
            return time_many({k: Work(model).end_to_end for k, model in models.items()}, at, ROUNDS)

    def cost(self, model: nn.Module) -> float:
        """What a model costs; for time the median of several calls where the model is."""
        if self.quantity == "parameters":
            return parameter_count(model)
        if self.quantity == "macs":
            work = macs(model)
            return work.encoder + work.decoder_per_prompt
        return self.timed({0: model})[0].median_ms

    def shown(self, cost: float) -> str:
        """A cost with its unit, in three digits."""
        if self.quantity == "latency_ms":
            return f"{number(float(cost))} ms"
        scale = next((s for s in ("G", "M", "k") if cost >= SCALES[s]), "")
        return f"{number(cost / SCALES[scale])}{' ' * bool(scale)}{scale} {self.quantity}"

    def __str__(self) -> str:
        value = f"{100 * self.most:g}%" if self.relative else f"{self.most:g}"
        return f"{self.quantity}<={value}" + (f" on {self.device}" if self.device else "")
