"""Chains of one model, each measured once beside it, and kept so that nothing is measured twice.

The folder holds ``rows/``, a result file for every chain with the base's row in it. A file is whole
or not there; so a run killed at any moment goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..core._progress import ProgressLike
from ..core.data import Dataset, Sample, as_dataset
from ..core.display import number
from ..core.errors import CheckpointError, ModelError, SamCompressError, sentence
from ..core.files import write_whole
from ..core.history import step_dict
from ..core.pipeline import Pipeline
from ..core.transform import Transform
from .benchmark import benchmark
from .latency import Rounds
from .report import Report

log = logging.getLogger("samcompress.study")
Row = dict[str, Any]
BASE = "base"


@dataclass(frozen=True)
class Refused:
    """A chain that gave no row, or one that is not in the running.

    Attributes:
        name: the chain in short.
        steps: its steps, as in a recipe.
        outcome: ``refused`` by a technique, ``failed`` in another way, ``over budget``, or
            ``not measured`` where it was made but could not be judged.
        reason: one sentence.
    """

    name: str
    steps: tuple[Row, ...]
    outcome: str
    reason: str

    def to_dict(self) -> Row:
        """Plain JSON values."""
        return {**vars(self), "steps": list(self.steps)}


class RefusedError(Exception):
    """Carries why a chain gave no model."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


class Bench:
    """Measures chains of one model, each beside the same row of that model.

    Args:
        model: a SAM, the base of all.
        data: images with masks.
        calibration: images for techniques that look at some.
        folder: where rows are kept.
        base: what tables call the model.
        progress: as in `benchmark`.
        settings: other arguments of `benchmark`.

    Raises:
        ConfigError: if the folder holds rows of other conditions; and as for `benchmark`.
        ModelError: if the base cannot be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset | Sequence[Sample],
        *,
        calibration: Dataset | Sequence[Sample] | None,
        folder: Path,
        base: str,
        progress: ProgressLike,
        settings: dict[str, Any],
    ) -> None:
        self.model = model
        self.data = as_dataset(data)
        self.calibration = None if calibration is None else as_dataset(calibration)
        self.folder = folder
        self.name = base
        self.progress = progress
        self.settings = {**settings, "rounds": settings.get("rounds") or Rounds.quick()}
        self.names: dict[str, str] = {}  # what chains are called, to their keys
        self.doc = self._benchmark({base: model}, "base").doc
        self.base: Row = self.doc["rows"][0]
        if self.base["status"] != "measured":
            raise ModelError("the base could not be measured.", got=self.base["reason"])

    def key(self, chain: Pipeline | None) -> str:
        """Of all that decides what a chain gives; None stands for the base itself."""
        steps = [step_dict(step) for step in chain or ()]
        seen = self.calibration.fingerprint if self.calibration is not None else None
        text = json.dumps([steps, seen, self.base["identity"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def called(self, chain: Pipeline, wanted: str | None = None) -> str:
        """A name that no other chain has."""
        key, name = self.key(chain), wanted or label(chain)
        name = name if name != self.name else f"{name} (chain)"
        if self.names.setdefault(name, key) != key:
            name = f"{name} #{key[:4]}"
            self.names[name] = key
        return name

    def known(self, chain: Pipeline) -> Row | None:
        """The row of a chain, if it was measured before beside the same row of the base."""
        return kept_row(self.folder, self.key(chain), self.base)

    def make(self, chain: Pipeline) -> nn.Module:
        """The compressed model.

        Raises:
            RefusedError: if a technique refuses the model, or fails on it.
        """
        try:
            return chain(self.model, data=self.calibration, progress=False)
        except SamCompressError as err:
            raise RefusedError("refused", one_line(err)) from err
        except Exception as err:
            # A fault of one combination must not end a search of hours; it is shown at the end.
            log.warning("%r failed", chain, exc_info=True)
            raise RefusedError("failed", one_line(err)) from err

    def measure(self, chain: Pipeline, small: nn.Module, name: str) -> Row:
        """The row of a chain's model; written before it is returned."""
        key = self.key(chain)
        file = self._file(key)
        if not file.exists() or _rows(file)[0] != self.base:
            write_whole(file, json.dumps(self.doc, ensure_ascii=False).encode())
        report = self._benchmark({self.name: self.model, name: small}, key)
        return next(row for row in report.rows if not row["base"])

    def document(self, rows: Sequence[Row], study: Row) -> Row:
        """The result document of base and rows."""
        return {**self.doc, "rows": [self.base, *rows], "study": study}

    def about_calibration(self) -> Row | None:
        """What the images for calibration are."""
        data = self.calibration
        if data is None:
            return None
        return {"name": data.name, "fingerprint": data.fingerprint, "n_images": len(data)}

    def _benchmark(self, models: dict[str, nn.Module], key: str) -> Report:
        return benchmark(
            models, self.data, base=self.name, out=self._file(key), progress=False, **self.settings
        )

    def _file(self, key: str) -> Path:
        return self.folder / "rows" / f"{key}.json"


def kept_row(folder: Path, key: str, base: Row) -> Row | None:
    """The measured row in a folder's file, if it stands beside this very row of the base."""
    file = folder / "rows" / f"{key}.json"
    if not file.exists():
        return None
    first, *others = _rows(file)
    return others[0] if others and first == base and others[0]["status"] == "measured" else None


def label(chain: Pipeline) -> str:
    """A chain in short: ``image_size 192 + mlp 0.25 + int8_weights``.

    The first setting of a technique is named, and what differs from its default.
    """
    return " + ".join(_short(step) for step in chain)


def one_line(err: BaseException) -> str:
    """An error in one line, as rows give reasons."""
    return " ".join(sentence(err).split())


def file_name(name: str, key: str) -> str:
    """A name for files that every system takes."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    return plain if len(plain) <= 80 and "#" not in name else f"{plain[:73]}-{key[:6]}"


def plainly(value: Any) -> str:
    """A setting's value as names have it."""
    return f"{value:.3g}" if isinstance(value, float) else number(value)


def _short(step: Transform) -> str:
    words = [step.label.rpartition(".")[2]]
    defaults = {f.name: f.default for f in fields(step)}  # type: ignore[arg-type]
    for index, (name, default) in enumerate(defaults.items()):
        value = getattr(step, name)
        plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        first = index == 0 and not isinstance(value, str)
        if plain and (first or value != default or default is MISSING):
            words.append(plainly(value))
        elif isinstance(value, bool) and value != default:
            words.append(name if value else f"no {name}")
    return " ".join(words)


def _rows(file: Path) -> list[Row]:
    try:
        rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as err:
        raise CheckpointError(
            "a row of this study cannot be read.",
            where=str(file),
            got=f"{type(err).__name__}: {err}",
            fix="remove the file; the chain is measured again",
        ) from err
    return rows
