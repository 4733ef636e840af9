"""Multiply-accumulates, counted by shape; the counting is `core.macs`."""

from __future__ import annotations

from ..core.macs import Macs, before_export, closed_form, decoder_macs, macs

__all__ = ["Macs", "before_export", "closed_form", "decoder_macs", "macs"]
