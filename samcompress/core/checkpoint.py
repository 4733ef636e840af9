"""Saving and loading any chain: safetensors and JSON, never a pickle.

A folder holds ``model.safetensors``, ``samcompress.json`` (base sizes, steps with their states,
hashes), a ``README.md`` card, and the files of an exported model under ``artifacts/``. Loading
builds the base, replays what each step did to the shapes, and then pours the weights in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._sam2 import Sam2Config
from .build import SamConfig
from .contract import check_sam
from .errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    SamCompressError,
    UnknownTransformError,
)
from .files import sha256, whole
from .history import Base, History, Step, history, lineage, remember, step_from
from .sizes import parameter_count

FORMAT = 1
WEIGHTS = "model.safetensors"
RECORD = "samcompress.json"
# What a chain may start from, by its name in the record.
BASES: dict[str, type[SamConfig] | type[Sam2Config]] = {"sam": SamConfig, "sam2": Sam2Config}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a model with its history to a folder; an older checkpoint there is replaced.

    Args:
        model: a SAM made by samcompress, or a plain segment_anything `Sam`.
        folder: where to write; must be new, empty, or hold a checkpoint.

    Raises:
        CheckpointError: if the folder holds something else, or cannot be written.
        ModelError: if the model was changed by hand, so that its shapes could not be made again.
    """
    check_sam(model)
    record = history(model)
    if record.base is None:
        raise ModelError(
            "this model cannot be saved: its shapes could not be made again.",
            got="a SAM with modules that no recorded step put there",
            expected="a plain SAM, or one changed by samcompress steps alone",
            fix="start from sc.build or sc.load; make a change of your own a Transform",
        )
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_ours(folder)):
        raise CheckpointError(
            "there is something else here already.",
            where=str(folder),
            expected="a new or empty folder, or an older checkpoint to replace",
            fix="choose another folder",
        )
    with whole(folder) as temporary:
        temporary.mkdir()
        _write_weights(model, temporary / WEIGHTS)
        files = {WEIGHTS: temporary / WEIGHTS}
        for name, source in _artifacts(model).items():
            target = temporary / "artifacts" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
            files[f"artifacts/{name}"] = target
        document = _document(model, record, files)
        (temporary / RECORD).write_text(json.dumps(document) + "\n")
        (temporary / "README.md").write_text(_card(model, record))


def load_folder(folder: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder that `save` wrote.

    Args:
        folder: the folder.
        device: where to put the model.

    Raises:
        CheckpointError: if a file is missing, damaged, changed, or of a newer format.
        UnknownTransformError: if a step's technique is not installed.
    """
    folder = Path(folder)
    document = read_record(folder)
    for name, facts in document["files"].items():
        _check_file(folder / name, facts)
    record = _record(document, folder)
    model: nn.Module = record.base.config.build(empty=True)  # type: ignore[union-attr]
    for step in record.steps:
        _replay(step, model, folder)
    for module in model.modules():
        if getattr(module, "artifacts", None):
            module.bind(folder / "artifacts")  # type: ignore[operator]
    pour(model, read_tensors(folder / WEIGHTS), where=str(folder))
    pixels = getattr(torch, document["pixel_dtype"])
    model.pixel_mean, model.pixel_std = model.pixel_mean.to(pixels), model.pixel_std.to(pixels)
    remember(model, record)
    return model.to(device).eval()


def is_ours(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of samcompress."""
    return (Path(folder) / RECORD).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """The ``samcompress.json`` of a folder.

    Raises:
        CheckpointError: if it is missing, not readable, or of a newer format.
    """
    path = Path(folder) / RECORD
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        newer = document["format"] > FORMAT
        document["base"], document["steps"], document["files"], document["pixel_dtype"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            "this is not a samcompress checkpoint.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected=f"a folder with {WEIGHTS} and {RECORD}, as sc.save writes",
        ) from err
    if newer:
        raise CheckpointError(
            "the checkpoint was written by a newer samcompress.",
            where=str(path),
            got=f"format {document['format']}",
            expected=f"format {FORMAT}",
            fix="pip install -U samcompress",
        )
    return document


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: if it is missing, truncated or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # Tensors in the file lie at odd addresses, where matrix products round differently.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            "the weights cannot be read.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected="a whole safetensors file",
            fix="copy or download it again",
        ) from err


def pour(model: nn.Module, tensors: dict[str, Tensor], *, where: str) -> None:
    """Load weights strictly.

    Raises:
        CheckpointError: naming the tensors that are missing, left over or of another shape.
    """
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in tensors]
    extra = [k for k in tensors if k not in wanted]
    other = [
        f"{k}: {tuple(tensors[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k].shape
    ]
    if missing or extra or other:
        raise CheckpointError(
            "the weights do not fit the model.",
            where=where,
            got="; ".join(
                f"{title} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for title, names in (
                    ("missing:", missing),
                    ("left over:", extra),
                    ("other shape:", other),
                )
                if names
            ),
            expected="exactly the tensors of the model",
        )
    model.load_state_dict(tensors, strict=True, assign=True)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights, buffers and exported files, in hex: equal models, equal hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for name, path in sorted(_artifacts(model).items()):
        digest.update(f"{name} {sha256(path)}".encode())
    return digest.hexdigest()


def identity(model: nn.Module) -> str:
    """SHA-256 of the weights and of the steps behind them: what results are kept under.

    Two attentions may have equal weights and look at other tokens, so `fingerprint` is not enough.
    """
    steps = [[step.transform.label, step.transform.params()] for step in lineage(model)]
    text = f"{fingerprint(model)} {json.dumps(steps, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _artifacts(model: nn.Module) -> dict[str, Path]:
    return {
        name: path
        for module in model.modules()
        for name, path in getattr(module, "artifacts", {}).items()
    }


def _write_weights(model: nn.Module, path: Path) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    # safetensors refuses tensors that share memory, which tied weights do.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    try:
        save_file(tensors, str(path))
    except SafetensorError as err:
        # It wraps the reason of a full disk in an exception of its own.
        raise OSError(str(err)) from err


def _document(model: Any, record: History, files: dict[str, Path]) -> dict[str, Any]:
    from .. import __version__

    base = record.base
    assert base is not None
    return {
        "format": FORMAT,
        "samcompress": __version__,
        "torch": torch.__version__,
        "base": {
            "architecture": next(n for n, kind in BASES.items() if type(base.config) is kind),
            "config": base.config.to_dict(),
            "source": base.source,
            "licence": base.licence,
        },
        "pixel_dtype": str(model.pixel_mean.dtype).removeprefix("torch."),
        "steps": [step.to_dict() for step in record.steps],
        "files": {
            name: {"sha256": sha256(path), "bytes": path.stat().st_size}
            for name, path in files.items()
        },
    }


def _record(document: dict[str, Any], folder: Path) -> History:
    place = str(folder / RECORD)
    try:
        base = Base(
            BASES[document["base"]["architecture"]](**document["base"]["config"]),
            document["base"].get("source"),
            document["base"].get("licence"),
        )
        steps = tuple(
            Step(step_from(s, where=place), s["state"], s.get("facts", {}))
            for s in document["steps"]
        )
    except UnknownTransformError:
        raise
    except (KeyError, TypeError, ConfigError) as err:
        raise CheckpointError(
            "the record of a checkpoint is damaged.",
            where=place,
            got=f"{type(err).__name__}: {err}",
            expected="what sc.save wrote",
        ) from err
    return History(base, steps)


def _replay(step: Step, model: nn.Module, folder: Path) -> None:
    try:
        step.transform.rebuild(model, step.state)
    except SamCompressError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as err:
        raise CheckpointError(
            f"step {step.transform.label} could not be replayed.",
            where=str(folder / RECORD),
            got=f"{type(err).__name__}: {err}",
            expected="the state that this step wrote",
        ) from err


def _check_file(path: Path, facts: dict[str, Any]) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != facts["bytes"]:
        raise CheckpointError(
            "a file of the checkpoint is missing or cut short.",
            where=str(path),
            got="no file" if found is None else f"{found} bytes",
            expected=f"{facts['bytes']} bytes",
            fix="copy the whole folder again",
        )
    if sha256(path) != facts["sha256"]:
        raise CheckpointError(
            "a file of the checkpoint was changed after it was saved.",
            where=str(path),
            got="another SHA-256",
            expected=facts["sha256"],
            fix="copy the whole folder again",
        )


def _card(model: nn.Module, record: History) -> str:
    base = record.base
    assert base is not None
    steps = "".join(
        f"| `{s.transform!r}` | {s.facts['before']['parameters']:,} | "
        f"{s.facts['after']['parameters']:,} | {s.facts['after']['bytes'] / 1e6:.3g} |\n"
        for s in record.steps
        if s.facts
    )
    table = (
        f"| step | parameters before | after | MB after |\n|---|---|---|---|\n{steps}"
        if steps
        else "No step: the weights are those of the base.\n"
    )
    return (
        "# A Segment Anything Model, made with samcompress\n\n"
        f"- image size {base.config.image_size}, base weights: {base.source or 'not recorded'}\n"
        f"- licence of the base weights: {base.licence or 'not recorded'}\n"
        f"- {parameter_count(model):,} parameters\n\n{table}\n"
        '```python\nimport samcompress as sc\n\nsam = sc.load("this folder")\n```\n'
    )
