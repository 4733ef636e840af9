"""One row of a benchmark: one model on one device."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core._progress import ProgressLike
from ..core.checkpoint import fingerprint, save
from ..core.contract import check_sam, device_of, dtype_of
from ..core.data import Dataset
from ..core.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    sentence,
)
from ..core.everything import Everything
from ..core.history import history
from ..core.load import load
from ..core.pipeline import Pipeline
from . import _beside
from .accuracy import Accuracy, accuracies
from .detections import Boxes
from .devices import device as device_of_name
from .devices import refusal
from .energy import energy
from .finite import first_nonfinite
from .latency import PARTS, Rounds, latency_many
from .macs import macs
from .memory import memory
from .processes import latency_processes, median_interval, ratios
from .protocol import NonFiniteError
from .size import bytes_on_disk, parameters

log = logging.getLogger("samcompress.benchmark")
Row = dict[str, Any]
# What a device or runtime may fail with on a model that is otherwise sound.
FAILURES = (ModelError, CheckpointError, RuntimeError, NotImplementedError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured in every row; the fields are arguments of `benchmark`."""

    data: Dataset
    prompts: tuple[str, ...]
    accuracy: bool
    latency: bool
    memory: bool
    energy: bool
    rounds: Rounds
    batches: tuple[int, ...]
    threads: int | None
    batch_size: int
    protocol: dict[str, Any]
    progress: ProgressLike
    detections: Boxes | None = None
    everything: int | Everything | None = None

    @property
    def scores(self) -> bool:
        """Whether masks are made, not only times."""
        return self.accuracy or self.detections is not None or self.everything is not None

    def settings(self) -> Row:
        """All that must be equal for two rows to stand in one file, as plain JSON values."""
        return {
            "prompts": list(self.prompts),
            "protocol": dict(self.protocol),
            "accuracy": self.accuracy,
            "latency": self.latency,
            "memory": self.memory,
            "rounds": self.rounds.to_dict(),
            "batches": list(self.batches),
            "threads": self.threads,
            "batch_size": self.batch_size,
            # Only where it is asked for: files from before there was a choice say nothing of it.
            **({"energy": True} if self.energy else {}),
            **({"detections": self.detections.facts()} if self.detections else {}),
            **({"everything": self._everything} if self.everything else {}),
        }

    @property
    def _everything(self) -> int | str | None:
        asked = self.everything
        return _beside.generator_id(asked) if isinstance(asked, Everything) else asked

    @classmethod
    def of(cls, settings: Row, data: Dataset, detections: Boxes | None = None) -> Job:
        """The job of `settings`, without progress.

        Args:
            settings: as plain JSON values.
            data: the images.
            detections: the boxes, of which settings hold the hash only.

        Raises:
            ConfigError: if these are no settings of a job.
        """
        try:
            fields = {"energy": False, **settings, "rounds": Rounds(**settings["rounds"])}
            for name in ("prompts", "batches"):
                fields[name] = tuple(fields[name])
            return cls(data=data, progress=False, **{**fields, "detections": detections})
        except (KeyError, TypeError) as err:
            raise ConfigError("these are no settings of a job.", got=str(err)) from err


@dataclass(frozen=True)
class Subject:
    """A model on the device it is measured on.

    Attributes:
        name: what tables call it.
        model: the SAM.
        sha256: hash of its weights.
        identity: hash of weights, structure and history: equal only for the same computation.
    """

    name: str
    model: Any
    sha256: str
    identity: str

    @classmethod
    def of(cls, name: str, source: nn.Module | str | Path, device: str) -> Subject:
        """Load or take the model, and copy it if it is on another device."""
        at = device_of_name(device).torch_device
        model = load(source, device=at) if isinstance(source, (str, Path)) else source
        check_sam(model)
        if _place(device_of(model)) != _place(at):
            model = copy.deepcopy(model).to(at)
        weights = fingerprint(model)
        steps = [(s.transform.label, s.transform.params()) for s in history(model).steps]
        text = f"{weights}\n{model!r}\n{json.dumps(steps, sort_keys=True)}"
        return cls(name, model, weights, hashlib.sha256(text.encode()).hexdigest())


def plan_row(subject: Subject, device: str, base: Subject) -> Row:
    """What is known of a row before anything is measured."""
    model = subject.model
    record = history(model)
    steps = [step.transform for step in record.steps]
    terminal = next((s for s in steps if s.terminal), None)
    return {
        "name": subject.name,
        "base": subject is base,
        "device": device,
        "device_name": device_of_name(device).name,
        "dtype": str(dtype_of(model.image_encoder)).removeprefix("torch."),
        "backend": terminal.params().get("backend", terminal.label) if terminal else "torch",
        "image_size": model.image_encoder.img_size,
        "status": "measured",
        "reason": None,
        "missing": {},
        "recipe": Pipeline(steps, any_order=True).to_dict() if steps else None,
        # The states would repeat every index that was kept; the checkpoint has them.
        "lineage": [{k: v for k, v in s.to_dict().items() if k != "state"} for s in record.steps],
        "source": record.base.source if record.base else None,
        "licence": record.base.licence if record.base else None,
        "weights_sha256": subject.sha256,
        "identity": subject.identity,
        "base_identity": base.identity,
    }


def absent_row(name: str, device: str, *, base: bool, reason: str) -> Row:
    """The row of a device that is not there."""
    return {
        "name": name,
        "base": base,
        "device": device,
        "status": "not_measured",
        "reason": reason,
        "lineage": [],
    }


def measure_row(row: Row, subject: Subject, base: Subject, base_row: Row | None, job: Job) -> None:
    """Fill a planned row.

    Args:
        row: made by `plan_row`.
        subject: its model.
        base: the model it is compared with, on the same device.
        base_row: the base's finished row on this device; None if this is the base.
        job: what to measure.
    """
    start = time.perf_counter()
    try:
        _sizes(row, subject)
        _finite(row, subject, job)
        if row["status"] == "measured" and job.accuracy:
            row["accuracy"] = _accuracy(subject, base_row, job)
        if row["status"] == "measured":
            _beside_accuracy(row, subject, base_row, job)
        if row["status"] == "measured" and job.latency:
            row["latency"] = _try(
                row, "latency", lambda: _latency(subject, base, base_row, row["device"], job)
            )
        if row["status"] == "measured" and job.energy:
            row["energy"] = _try(row, "energy", lambda: _energy(subject, row["device"], job))
    except NonFiniteError as err:
        _broken(row, _search(subject, job), str(err.where))
    except FAILURES as err:
        log.warning("%s on %s could not be measured: %s", row["name"], row["device"], err)
        row.update(status="not_measured", reason=sentence(err))
    if row["status"] == "measured":
        _disk_and_memory(row, subject, job)
    row["seconds"] = time.perf_counter() - start
    row["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")


def _sizes(row: Row, subject: Subject) -> None:
    row["params"] = parameters(subject.model)
    row["macs"] = _try(row, "macs", lambda: macs(subject.model).to_dict())


def _finite(row: Row, subject: Subject, job: Job) -> None:
    """Look before anything is timed: broken numbers can be fast."""
    row["first_nonfinite"] = None
    sample = next(job.data.readable())
    layer = first_nonfinite(subject.model, sample.image)
    if layer is not None:
        _broken(row, layer, f"image {sample.id}")


def _search(subject: Subject, job: Job) -> str | None:
    layers = (first_nonfinite(subject.model, s.image) for s in job.data.readable())
    return next((layer for layer in layers if layer is not None), None)


def _broken(row: Row, layer: str | None, where: str) -> None:
    first = f"; {layer} is the first layer that breaks" if layer else ""
    row.update(
        status="not_measured",
        reason=f"the output is not finite at {where}{first}",
        first_nonfinite=layer,
    )


def _accuracy(subject: Subject, base_row: Row | None, job: Job) -> list[Row]:
    found = accuracies(
        subject.model,
        job.data,
        job.prompts,
        keep_masks=True,
        batch_size=job.batch_size,
        progress=job.progress,
        **job.protocol,
    )
    if base_row is None:
        return [entry.to_dict() for entry in found]
    bases = {a["protocol"]: Accuracy.from_dict(a) for a in base_row.get("accuracy") or ()}
    entries = [entry.to_dict(bases.get(entry.protocol)) for entry in found]
    for entry in entries:
        # Agreement is known now. Only the base's masks are needed again, by rows still to come.
        entry["samples"] = [
            {k: v for k, v in sample.items() if k != "mask"} for sample in entry["samples"]
        ]
    return entries


def _beside_accuracy(row: Row, subject: Subject, base_row: Row | None, job: Job) -> None:
    model = subject.model
    for part, asked in (("detection", job.detections), ("everything", job.everything)):
        if asked is not None:
            base = (base_row or {}).get(part)
            measure = partial(getattr(_beside, part), model, base, job)
            row[part] = _try(row, part, measure)
    found = _try(row, "checks", lambda: _beside.checks(model))
    if found:
        row["checks"] = found


def _latency(subject: Subject, base: Subject, base_row: Row | None, device: str, job: Job) -> Row:
    simulated = any(step.simulated for step in history(base.model).steps)
    beside = subject is not base and not simulated and refusal(base.model, device) is None
    models = {"this": subject.model} | ({"base": base.model} if beside else {})
    settings: dict[str, Any] = {
        "image": next(job.data.readable()).image,
        "rounds": job.rounds,
        "batches": job.batches,
        "threads": job.threads,
    }
    if job.rounds.processes > 1:
        times = latency_processes(models, device=device, **settings)
    else:
        times = {name: t.to_dict() for name, t in latency_many(models, **settings).items()}
    entry, other = times["this"], times.get("base")
    if other is None:
        return entry
    entry["vs_base"] = {part: other[part]["median_ms"] / entry[part]["median_ms"] for part in PARTS}
    if job.rounds.processes > 1:
        entry["vs_base_ci"] = {p: list(median_interval(ratios(other, entry, p))) for p in PARTS}
    own = (base_row or {}).get("latency")
    if own:
        # The machine may be busier now than it was when the base's own row was measured.
        entry["scale"] = {part: own[part]["median_ms"] / other[part]["median_ms"] for part in PARTS}
    return entry


def _energy(subject: Subject, device: str, job: Job) -> Row:
    at = device_of_name(device)
    if at.kind != device_of(subject.model).type:
        # The CPU calls such a device, and its counter knows nothing of it.
        raise BackendError("energy cannot be measured here.", got=f"no counter on {at.kind}")
    image = next(job.data.readable()).image
    return energy(subject.model, image=image, threads=job.threads).to_dict()


def _disk_and_memory(row: Row, subject: Subject, job: Job) -> None:
    with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
        folder = Path(scratch) / "model"

        def stored() -> int:
            save(subject.model, folder)
            return bytes_on_disk(folder)

        row["bytes_on_disk"] = _try(row, "bytes_on_disk", stored)
        if not job.memory:
            return
        if row["bytes_on_disk"] is None:
            row["missing"]["memory"] = row["missing"]["bytes_on_disk"]
            return
        row["memory"] = _try(
            row,
            "memory",
            lambda: memory(folder, device=row["device"], threads=job.threads).to_dict(),
        )


def _try(row: Row, what: str, measure: Callable[[], Any]) -> Any:
    """The measurement, or None with the reason noted: one gap does not cost the row."""
    try:
        return measure()
    except (*FAILURES, DataError) as err:
        log.warning("%s of %s was not measured: %s", what, row["name"], sentence(err))
        row["missing"][what] = sentence(err)
        return None


def _place(at: torch.device) -> tuple[str, int]:
    return at.type, at.index or 0
