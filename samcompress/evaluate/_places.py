"""Where the rows of a benchmark are measured: here, or on another machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..core.errors import sentence
from . import schema
from .devices import refusal, unavailable
from .environment import environment
from .remote import Launcher
from .row import FAILURES, Job, Row, Subject, absent_row, measure_row, plan_row

log = logging.getLogger("samcompress.benchmark")


class Here:
    """This machine measures."""

    def __init__(self) -> None:
        self.environment = environment()
        self.settings: Row = {}

    def unavailable(self, device: str) -> str | None:
        return unavailable(device)

    def holds(self, device: str) -> str:
        """Where models are held while they are measured."""
        return device

    def row(
        self, subject: Subject, device: str, base: Subject, base_row: Row | None, job: Job
    ) -> Row:
        reason = refusal(subject.model, device)
        if reason is not None:
            return absent_row(subject.name, device, base=subject is base, reason=reason)
        row = plan_row(subject, device, base)
        measure_row(row, subject, base, base_row, job)
        return row


class There:
    """Another machine measures; a row comes from it whole or says what happened."""

    def __init__(self, on: str | Launcher, devices: Sequence[str]) -> None:
        self.launcher = Launcher(on) if isinstance(on, str) else on
        found = self.launcher.look(devices)
        self.environment: Row = found["environment"]
        self.settings: Row = {"on": self.launcher.spec}
        self.reasons: dict[str, str | None] = found["unavailable"]

    def unavailable(self, device: str) -> str | None:
        return self.reasons.get(device, "the other machine does not know this device")

    def holds(self, device: str) -> str:
        return "cpu"

    def row(
        self, subject: Subject, device: str, base: Subject, base_row: Row | None, job: Job
    ) -> Row:
        try:
            row = self.launcher.row(subject, device, base, base_row, job)
            schema.check_row(row, where=self.launcher.spec)
        except FAILURES as err:
            log.warning("%s on %s was not measured: %s", subject.name, self.launcher.spec, err)
            is_base, reason = subject is base, sentence(err)
            return absent_row(subject.name, device, base=is_base, reason=reason)
        # The machine measures; which model it was is known here.
        return row | {
            "name": subject.name,
            "device": device,
            "base": subject is base,
            "identity": subject.identity,
            "base_identity": base.identity,
        }
