"""The file that a training run is resumed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError
from .files import whole


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the file whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    ready = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with whole(path) as temporary:
        try:
            save_file(ready, temporary, metadata={"samcompress": json.dumps(facts)})
        except SafetensorError as err:
            raise OSError(str(err)) from err


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` was given.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["samcompress"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as err:
        raise CheckpointError(
            "the training checkpoint cannot be read.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected="a file written by samcompress while training",
            fix="delete the file to begin anew",
        ) from err
    return tensors, facts


def trained(checkpoint: Path) -> dict[str, Tensor]:
    """The weights a run has reached, averaged ones where it keeps an average.

    Names are relative to the objective: ``student.image_encoder...``.

    Raises:
        CheckpointError: if the file is damaged.
    """
    tensors, _ = read(checkpoint)
    found = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    found |= {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    return found
