"""Measure on another machine: a command that reaches it, and what goes there and comes back.

The machine needs samcompress and nothing else. It gets one parcel a row on standard input: the
model, the base it is compared with, and the images; and gives the row back as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.checkpoint import save
from ..core.errors import BackendError, ConfigError
from ._parcel import HEADER, MAGIC, pack, read_header, write_data
from .memory import package_environment
from .row import Job, Row, Subject
from .runner import FORMAT

RUNNER = "-m samcompress.evaluate.runner"
TIMEOUT = 3600.0
_START = re.compile(rb"^%s \d{20} [0-9a-f]{64}\n" % MAGIC, re.MULTILINE)


@dataclass(frozen=True)
class Launcher:
    """A command that runs the runner somewhere.

    Args:
        spec: ``ssh:[USER@]HOST[:PYTHON]``, which calls ``ssh`` and there ``python3`` or PYTHON; or
            ``cmd:TEMPLATE``, any command, run without a shell. In it ``{python}`` is this
            interpreter and ``{runner}`` the arguments that start the runner. A command that cannot
            pass on its standard input and output may name ``{request}``, a file to send, and
            ``{reply}``, the file its answer is to be written to.
        timeout: seconds after which a row is given up.

    Raises:
        ConfigError: if the spec is of no known form.

    Example:
        >>> Launcher("ssh:pi").words[-2:]
        ('pi', 'python3 -m samcompress.evaluate.runner')
    """

    spec: str
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not self.words:
            raise _misread(self.spec, "there is no command in it")
        if not self.timeout > 0:
            raise ConfigError(
                "the timeout is out of range.", got=self.timeout, expected="above 0 s"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """The command."""
        kind, _, rest = self.spec.partition(":")
        if kind == "ssh":
            host, _, python = rest.partition(":")
            # A host that begins with a dash would be read as an option, which can run anything.
            if not re.fullmatch(r"([\w.][\w.+-]*@)?[\w.][\w.%-]*", host) or len(python.split()) > 1:
                raise _misread(self.spec, f"{host!r} is no host")
            asked = f"{python or 'python3'} {RUNNER}"
            return ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", host, asked)
        if kind == "cmd":
            here = shlex.quote(sys.executable)
            try:
                return tuple(
                    shlex.split(rest.replace("{python}", here).replace("{runner}", RUNNER))
                )
            except ValueError as err:
                raise _misread(self.spec, str(err)) from err
        raise _misread(self.spec, f"{kind!r} is no kind of launcher")

    def look(self, devices: Sequence[str]) -> dict[str, Any]:
        """The machine: ``environment``, and ``unavailable`` with a reason or None by device.

        Raises:
            BackendError: if the machine cannot be reached, or does not answer as it should.
        """
        request = {"format": FORMAT, "kind": "look", "devices": list(devices)}
        return self.ask({"request": request}, {}, keys=("environment", "unavailable"))

    def row(
        self, subject: Subject, device: str, base: Subject, base_row: Row | None, job: Job
    ) -> Row:
        """Measure one row there.

        Args:
            subject: the model, here.
            device: where it is to be measured, there.
            base: the model it is compared with; the same for the base's own row.
            base_row: the base's finished row.
            job: what to measure.

        Raises:
            ModelError: if the model cannot be saved.
            BackendError: as for `look`.
        """
        with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
            folders = {"this": _saved(subject, Path(scratch) / "this")}
            if subject is not base:
                folders["base"] = _saved(base, Path(scratch) / "base")
            folders["images"] = Path(scratch) / "images"
            texts: dict[str, Any] = {
                "request": {
                    "format": FORMAT,
                    "kind": "row",
                    "name": subject.name,
                    "base": base.name,
                    "device": device,
                    "weights": subject.sha256,
                    "base_weights": base.sha256,
                    "settings": job.settings(),
                },
                "data": write_data(job.data, folders["images"], first=not job.scores),
            }
            if job.detections is not None:
                texts["boxes"] = job.detections.items
            if base_row is not None:
                texts["base_row"] = base_row
            row: Row = self.ask(texts, folders, keys=("row",))["row"]
        return row

    def ask(
        self, texts: Mapping[str, Any], folders: Mapping[str, Path], *, keys: Sequence[str]
    ) -> dict[str, Any]:
        """Send a parcel, wait for the reply.

        Args:
            texts: JSON values by name.
            folders: folders by name.
            keys: what the reply must hold.

        Raises:
            BackendError: if it does not come, does not come whole, or is something else; with the
                last lines that the command wrote to standard error.
        """
        with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
            request, reply = Path(scratch) / "request", Path(scratch) / "reply"
            pack(request, texts, folders)
            files = {"{request}": str(request), "{reply}": str(reply)}
            words = [_filled(word, files) for word in self.words]
            out, err = self._run(words, None if "{request}" in self.spec else request)
            if "{reply}" in self.spec:
                out = reply.read_bytes() if reply.exists() else b""
        return self._read(out, err, keys)

    def _run(self, words: list[str], given: Path | None) -> tuple[bytes, bytes]:
        with (given or Path(os.devnull)).open("rb") as source:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=package_environment(),
                    start_new_session=True,
                )
            except OSError as err:
                raise BackendError(
                    "the launcher cannot be started.",
                    where=self.spec,
                    got=f"{words[0]}: {err.strerror}",
                    fix="install it, or give the path of the program",
                ) from err
            try:
                out, err_text = process.communicate(timeout=self.timeout)
            except subprocess.TimeoutExpired as err:
                raise BackendError(
                    "the machine took too long.",
                    where=self.spec,
                    got=f"more than {self.timeout:g} s",
                    fix="fewer rounds or images, or a larger timeout of Launcher",
                ) from err
            finally:
                _end(process)
        if process.returncode != 0:
            raise BackendError(
                "the machine did not measure.",
                where=self.spec,
                got=f"exit code {process.returncode}: {_tail(err_text)}",
            )
        return out, err_text

    def _read(self, out: bytes, err_text: bytes, keys: Sequence[str]) -> dict[str, Any]:
        """The reply, behind whatever greetings a login prints."""
        found = _START.search(out)
        if found is None:
            raise BackendError(
                "the machine gave no reply.",
                where=self.spec,
                got=_tail(out) or _tail(err_text),
                expected="that the command starts the runner, and passes on what it writes",
            )
        size, digest = read_header(out[found.start() : found.start() + HEADER])
        content = out[found.end() : found.end() + size]
        if len(content) < size or hashlib.sha256(content).hexdigest() != digest:
            raise BackendError(
                "the reply did not arrive whole.",
                where=self.spec,
                got=f"{len(content)} of {size} bytes",
                fix="run the same command again",
            )
        reply = json.loads(content)
        if not isinstance(reply, dict) or not all(isinstance(reply.get(k), dict) for k in keys):
            raise BackendError(
                "the reply is not what was asked for.", where=self.spec, expected=", ".join(keys)
            )
        return reply


def _saved(subject: Subject, folder: Path) -> Path:
    save(subject.model, folder)
    return folder


def _filled(word: str, files: Mapping[str, str]) -> str:
    for mark, path in files.items():
        word = word.replace(mark, path)
    return word


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.communicate()


def _tail(text: bytes, lines: int = 5) -> str:
    found = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(found[-lines:])[-800:] or "no output"


def _misread(spec: str, reason: str) -> ConfigError:
    return ConfigError(
        "this launcher is not understood.",
        got=f"{spec!r}: {reason}",
        expected="ssh:[USER@]HOST[:PYTHON] or cmd:COMMAND",
        fix="ssh:me@pi:~/venv/bin/python, or 'cmd:{python} {runner}' for this machine",
    )
