"""Measure several models on the same data and devices, row by row, so that nothing is lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core._progress import Progress, ProgressLike
from ..core.contract import check_sam
from ..core.data import Dataset, Sample, as_dataset
from ..core.errors import CheckpointError, ConfigError, DataError, SamCompressError, sentence
from ..core.everything import Everything
from ..core.files import write_whole
from . import schema
from ._beside import generator
from ._places import Here, There
from .detections import Boxes, boxes_of
from .devices import unavailable
from .latency import Rounds
from .presets import preset_protocol
from .protocol import Protocol
from .remote import Launcher
from .row import Job, Row, Subject, absent_row
from .runtimes import Variant, with_runtimes

if TYPE_CHECKING:
    from .report import Report

log = logging.getLogger("samcompress.benchmark")
Model = nn.Module | str | Path


def benchmark(
    models: Mapping[str, Model],
    data: Dataset | Sequence[Sample],
    *,
    prompts: Sequence[str] | None = None,
    presets: Sequence[str] = (),
    devices: Sequence[str] = ("cpu",),
    base: str | None = None,
    accuracy: bool = True,
    latency: bool = True,
    memory: bool = True,
    energy: bool = False,
    detections: Boxes | str | Path | Iterable[Mapping[str, Any]] | None = None,
    everything: int | Everything | None = None,
    backends: Sequence[str] = (),
    calibration: Dataset | Sequence[Sample] | None = None,
    on: str | Launcher | None = None,
    rounds: Rounds | int | None = None,
    batches: Sequence[int] = (),
    threads: int | None = None,
    batch_size: int = 1,
    out: str | Path | None = None,
    resume: bool = True,
    progress: ProgressLike = True,
    **protocol: Any,
) -> Report:
    """Accuracy, size, speed and memory of models, each beside a base.

    A row is one model on one device. With `out` each finished row is written at once; the same call
    again, after Ctrl-C or a crash, takes finished rows from the file. A row is finished if it was
    measured, its model and the base have the same weights and history as now, and data, settings,
    machine and torch are those of the file. If these differ, nothing is mixed: the call is refused.

    A model whose output is not finite gets no accuracy and no speed; the first layer that breaks is
    named. A device that is absent, or a model that a device or runtime cannot run, gives a row that
    says so.

    Args:
        models: SAMs, or what `sc.load` takes, by the names they get in tables.
        data: images with masks.
        prompts: how objects are asked for, see `samcompress.evaluate.prompts`; box and point if
            neither these nor presets are given.
        presets: protocols of published tables, such as ``"edgesam-box"``, see `PRESETS`.
        devices: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``edge-tpu``.
        base: name of the model the others are compared with; the first if left out.
        accuracy: measure it.
        latency: measure it; other models take turns with the base, call by call, and tables show
            their times as the base's over the ratio so found.
        memory: measure it, in a process of its own for each row.
        energy: measure it where the device has a counter, else say why not.
        detections: boxes of a detector, as for `detections`: adds the AP of one mask for each.
        everything: points along each side of a grid: adds AR@1000 and mask recall of what is found
            so, nothing filtered, as in SAM's paper, where it is 64; or an `Everything` of your own.
        backends: runtimes that each model is exported to, a row each: ``"onnxruntime"``,
            ``"openvino:int8"``, ``"all"``. One that is not installed gives a row that says so.
        calibration: images for those of them that calibrate, other ones than `data`.
        on: another machine: ``"ssh:me@pi"``, ``"cmd:..."``, see `Launcher`. The devices are then
            its devices, the environment of the result its environment. A machine that cannot be
            reached at the start is an error; one that fails later gives rows that say so.
        rounds: how often calls are repeated; ``Rounds.quick()`` for a first look; a number for
            exactly so many calls, see `Rounds.exactly`; ``Rounds(processes=5)`` for intervals.
        batches: batch sizes for the encoder's throughput.
        threads: CPU threads inside an operator for speed and memory, bound to as many CPUs.
        batch_size: images encoded at once for accuracy.
        out: JSON file, or a folder that gets a ``results.json``.
        resume: take finished rows from `out`; False starts anew and replaces the file.
        progress: True for bars, False for silence, a callable for events.
        protocol: choice, feedback, include_crowd, min_area, average, seed of `accuracy`.

    Raises:
        ConfigError: if a name, device, prompt or preset is unknown, or `out` holds results of other
            conditions.
        DataError: if there is nothing to score, or no box is of these images.
        BackendError: if the other machine cannot be reached.
        CheckpointError: if `out` cannot be read or written.

    Example:
        >>> import samcompress as sc
        >>> sam = sc.build("tiny")
        >>> report = benchmark(
        ...     {"base": sam}, sc.shapes(2), rounds=Rounds.quick(), memory=False, progress=False
        ... )
        >>> report.rows[0]["status"]
        'measured'
    """
    from .report import Report

    data = as_dataset(data)
    if prompts is None:
        prompts = () if presets else ("box", "point")
    if presets:
        protocol["presets"] = _listed("presets", presets, '("edgesam-box",)')
    job = Job(
        data=data,
        prompts=tuple(_listed("prompts", prompts, '("box", "point")')),
        accuracy=accuracy,
        latency=latency,
        memory=memory,
        energy=energy,
        rounds=Rounds.exactly(rounds) if isinstance(rounds, int) else rounds or Rounds(),
        batches=tuple(batches),
        threads=threads,
        batch_size=batch_size,
        protocol=protocol,
        progress=progress,
        detections=None if detections is None else boxes_of(detections, data),
        everything=everything,
    )
    base = _check(models, base, devices, job, remote=on is not None)
    seen = None if calibration is None else as_dataset(calibration)
    every = with_runtimes(models, backends, seen)
    place = Here() if on is None else There(on, devices)
    doc = _document(job, place)
    path = None if out is None else _file(Path(out))
    run = _Run(every, base, doc, path, job, place)
    if path is not None and resume and path.exists():
        run.resume(_read(path))
    order = [base, *(name for name in every if name != base)]
    pairs = [(device, name) for device in devices for name in order]
    for device, name in Progress(progress, "benchmark").track(pairs, label="rows"):
        run.row(name, device)
    asked = [(device, name) for device in devices for name in every]
    doc["rows"].sort(key=lambda row: asked.index((row["device"], row["name"])))
    run.write()
    return Report(doc)


class _Run:
    """The rows so far, and where they are kept."""

    def __init__(
        self,
        models: Mapping[str, Model | Variant],
        base: str,
        doc: Row,
        path: Path | None,
        job: Job,
        place: Here | There,
    ) -> None:
        self.place = place
        self.models = models
        self.base = base
        self.doc = doc
        self.path = path
        self.job = job
        self.before: dict[tuple[str, str], Row] = {}
        self.base_subject: Subject | None = None

    def resume(self, old: Row) -> None:
        """Take over what a file holds, if it was made under the same conditions."""
        here, there = _conditions(self.doc), _conditions(old)
        differ = [
            f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
            for name in here | there
            if here.get(name) != there.get(name)
        ]
        names = {row["name"] for row in old["rows"]} - set(self.models)
        differ += [f"a row of {name!r}, which is not measured now" for name in sorted(names)]
        if differ:
            raise ConfigError(
                "the results in this file were made under other conditions.",
                where=str(self.path),
                got="; ".join(differ[:4]) + (" ..." if len(differ) > 4 else ""),
                expected="the same data, settings, models, machine and torch",
                fix="give another out=, or resume=False to start anew",
            )
        self.before = {(row["name"], row["device"]): row for row in old["rows"]}
        self.doc["data"]["skipped"] = old["data"].get("skipped", [])

    def row(self, name: str, device: str) -> None:
        """Measure one row, or take it over, and write the file."""
        old = self.before.pop((name, device), None)
        is_base = name == self.base
        if is_base:
            self.base_subject = None  # the one on the device before; two at once may be too much
        reason = self.place.unavailable(device)
        if reason is not None:
            row = absent_row(name, device, base=is_base, reason=reason)
        else:
            row = self._present(name, device, old)
        self.doc["rows"].append(row)
        self.write()

    def _present(self, name: str, device: str, old: Row | None) -> Row:
        source, is_base = self.models[name], name == self.base
        variant = source if isinstance(source, Variant) else None
        model = source.model if isinstance(source, Variant) else source
        subject = Subject.of(name, model, self.place.holds(device))
        if is_base:
            self.base_subject = subject
        base = self.base_subject or subject
        identity = variant.identity(subject.identity) if variant else subject.identity
        known = {"identity": identity, "base_identity": base.identity, "base": is_base}
        if old and old["status"] == "measured" and all(old.get(k) == v for k, v in known.items()):
            log.info("%s on %s: taken from %s", name, device, self.path)
            return old
        if variant:
            try:
                made = variant.make(subject.model)
            except SamCompressError as err:
                log.warning("%s could not be exported: %s", name, err)
                return absent_row(name, device, base=False, reason=sentence(err))
            subject = replace(Subject.of(name, made, self.place.holds(device)), identity=identity)
        return self.place.row(subject, device, base, self._base_row(device), self.job)

    def write(self) -> None:
        """Write all rows, whole or not at all; old ones not yet reached again stay."""
        known = self.doc["data"]["skipped"]
        known += [s for item in self.job.data.skipped if (s := vars(item)) not in known]
        if self.path is not None:
            doc = {**self.doc, "rows": [*self.doc["rows"], *self.before.values()]}
            schema.check(doc)
            write_whole(self.path, (json.dumps(doc, ensure_ascii=False) + "\n").encode())

    def _base_row(self, device: str) -> Row | None:
        found = (r for r in self.doc["rows"] if r["base"] and r["device"] == device)
        return next(found, None)


def _check(
    models: Mapping[str, Model],
    base: str | None,
    wanted: Sequence[str],
    job: Job,
    *,
    remote: bool,
) -> str:
    """Find mistakes before hours of work; returns the name of the base."""
    if not models:
        raise ConfigError("there is no model to measure.", expected='{"base": sam, "small": small}')
    for model in models.values():
        if not isinstance(model, (str, Path)):
            check_sam(model)
    base = next(iter(models)) if base is None else base
    if base not in models:
        raise ConfigError("the base is not among the models.", got=base, expected=", ".join(models))
    if not _listed("devices", wanted, '("cpu",)'):
        raise ConfigError("there is no device to measure on.", expected='devices=("cpu",)')
    for spec in wanted:
        unavailable(spec)
    if not job.prompts and not job.protocol.get("presets"):
        raise ConfigError("there is no prompt to ask with.", expected='prompts=("box", "point")')
    rules = {k: v for k, v in job.protocol.items() if k != "presets"}
    for prompt in job.prompts:
        Protocol(data=job.data.name, prompt=prompt, **rules)
    for name in job.protocol.get("presets", ()):
        preset_protocol(name, job.data.name)
    if job.everything is not None:
        generator(job.everything)
    if remote and isinstance(job.everything, Everything):
        raise ConfigError(
            "a generator of your own cannot be sent to another machine.",
            got=f"everything={job.everything!r}",
            expected="the points along each side of a grid",
        )
    return base


def _listed(what: str, names: Sequence[str], expected: str) -> list[str]:
    if isinstance(names, str):
        raise ConfigError(f"{what} is a list.", got=repr(names), expected=expected)
    return list(names)


def _document(job: Job, place: Here | There) -> Row:
    data, machine = job.data, place.environment
    return {
        "format": schema.FORMAT,
        "samcompress": machine["samcompress"],
        "environment": machine,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "licence": data.licence,
            "n_images": len(data),
            "n_instances": sum(_instances(sample) for sample in data),
            "note": data.note,
            "skipped": [vars(item) for item in data.skipped],
        },
        "settings": {**job.settings(), **place.settings},
        "rows": [],
    }


def _instances(sample: Sample) -> int:
    try:
        return len(sample.instances)
    except DataError:
        return 0  # damaged: it is named in `skipped` once it has been read


def _conditions(doc: Row) -> Row:
    """What must not differ between rows of one file."""
    machine, data = doc["environment"], doc["data"]
    return {
        "data": data["fingerprint"],
        "name of the data": data["name"],
        **{f"settings.{key}": value for key, value in doc["settings"].items()},
        "cpu": machine.get("cpu"),
        "gpus": [gpu.get("name") for gpu in machine.get("gpus", ())],
        "torch": machine.get("versions", {}).get("torch"),
        "samcompress": doc["samcompress"],
    }


def _file(out: Path) -> Path:
    return out if out.suffix == ".json" else out / "results.json"


def _read(path: Path) -> Row:
    try:
        doc: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(
            "the results so far cannot be read.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected="a file that benchmark wrote",
            fix="give another out=, or resume=False to start anew",
        ) from err
    schema.check(doc, where=str(path))
    return doc
