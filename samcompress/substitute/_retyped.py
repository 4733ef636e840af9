"""A module as another class that has the same parts."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def retyped(module: nn.Module, kind: type[M]) -> M:
    """The module with the methods of another class, and with its own weights, modes and names.

    Args:
        module: its parts move over; do not use it afterwards.
        kind: a class whose methods find what they need in `module`.
    """
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    return made
