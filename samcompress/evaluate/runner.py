"""Answers one request of `bench --on` and ends: the same measurement, on another machine.

``python -m samcompress.evaluate.runner [REQUEST [REPLY]]``: reads a parcel from standard input, or
from a file, and writes JSON behind a header to standard output, or to a file. Errors go to standard
error with exit code 1. What it unpacks goes into a temporary folder and is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, SamCompressError
from ._parcel import Sent, header, unpack
from .detections import Boxes
from .devices import refusal, unavailable
from .environment import environment
from .row import Job, Row, Subject, absent_row, measure_row, plan_row

FORMAT = 1


def answer(folder: Path) -> dict[str, Any]:
    """The reply to an unpacked request.

    Raises:
        CheckpointError: if the request is of another version, or a model did not arrive as sent.
    """
    request = _read(folder / "request.json")
    if request.get("format") != FORMAT:
        raise CheckpointError(
            "this request is of another version of samcompress.",
            got=f"format {request.get('format')}",
            expected=f"format {FORMAT}, as of samcompress {environment()['samcompress']}",
            fix="install the same samcompress on both machines",
        )
    if request["kind"] == "look":
        reasons = {name: unavailable(name) for name in request["devices"]}
        return {"environment": environment(), "unavailable": reasons}
    return {"row": _row(request, folder)}


def _row(request: dict[str, Any], folder: Path) -> Row:
    name, device = request["name"], request["device"]
    settings, boxes = request["settings"], None
    if "detections" in settings:
        boxes = Boxes(tuple(_read(folder / "boxes.json")), settings["detections"]["sha256"])
    job = Job.of(settings, Sent(_read(folder / "data.json"), folder / "images"), boxes)
    subject = Subject.of(name, folder / "this", device)
    base = subject
    if (folder / "base").exists():
        base = Subject.of(request["base"], folder / "base", device)
    for model, wanted in ((subject, request["weights"]), (base, request["base_weights"])):
        if model.sha256 != wanted:
            raise CheckpointError(
                "a model is not the one that was sent.",
                where=model.name,
                got=f"weights {model.sha256[:12]}",
                expected=wanted[:12],
            )
    reason = refusal(subject.model, device)
    if reason is not None:
        return absent_row(name, device, base=subject is base, reason=reason)
    base_row = folder / "base_row.json"
    row = plan_row(subject, device, base)
    measure_row(row, subject, base, _read(base_row) if base_row.exists() else None, job)
    return row


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main(words: list[str]) -> int:
    """Answer one request; returns the exit code."""
    # Whatever a library prints goes to standard error, so that the reply stays readable.
    out = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_interop_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
            if words:
                with Path(words[0]).open("rb") as file:
                    unpack(file, Path(scratch))
            else:
                unpack(sys.stdin.buffer, Path(scratch))
            content = json.dumps(answer(Path(scratch))).encode()
    except SamCompressError as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
        return 1
    reply = header(len(content), hashlib.sha256(content).hexdigest()) + content
    if len(words) > 1:
        Path(words[1]).write_bytes(reply)
    else:
        with os.fdopen(out, "wb") as stream:
            stream.write(reply)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
