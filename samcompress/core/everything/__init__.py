"""Segment everything: one generator, samplers as data."""

from . import choose, samplers
from .generator import Everything
from .segments import EverythingStats, Segments

__all__ = ["Everything", "EverythingStats", "Segments", "choose", "samplers"]
