"""Foreign checkpoint files to a flat dict of tensors, without ever running what is in them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ._pickled import module_state
from .errors import CheckpointError

TensorDict = dict[str, Tensor]

# Where training scripts put the weights inside a larger file, and before their names.
WRAPPERS = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "sam.", "model.")
# How MobileSAMv2's file of two state dicts calls its parts; the first is spelled so there.
PARTS = {"PromtEncoder": "prompt_encoder", "MaskDecoder": "mask_decoder"}


def read_state(path: Path) -> TensorDict:
    """The tensors of a ``.safetensors`` file or of one made by ``torch.save``, on the CPU.

    Pickles are read with ``weights_only=True``: only tensors and plain values are made, and of a
    pickled module its tensors without its code. Wrappers such as ``{"model": ...}`` and prefixes
    such as ``module.`` are taken off; of several state dicts in one file each name begins with its
    part's.

    Raises:
        CheckpointError: if the file is empty, damaged, of another format, or holds code.
    """
    try:
        size = path.stat().st_size
        content = _read(path) if size else None
    except OSError as err:
        raise CheckpointError(
            "the checkpoint cannot be opened.", where=str(path), got=f"{type(err).__name__}: {err}"
        ) from err
    if not size:
        raise CheckpointError(
            "the checkpoint is empty.", where=str(path), got="0 bytes", fix="get the file again"
        )
    return plain_names(_unwrap(content, path))


def plain_names(state: TensorDict) -> TensorDict:
    """The same tensors without a prefix that all names have, e.g. from data-parallel training."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return plain_names({name.removeprefix(prefix): t for name, t in state.items()})
    return state


def namings(state: TensorDict) -> Iterator[TensorDict]:
    """The tensors as they are, then without what all names begin with, one component at a time."""
    yield state
    while len(roots := {name.split(".")[0] for name in state}) == 1:
        start = f"{roots.pop()}."
        if not all(name.startswith(start) for name in state):
            return
        state = {name.removeprefix(start): tensor for name, tensor in state.items()}
        yield state


def first_line(error: BaseException | str) -> str:
    """The beginning of a foreign error's text, for the `got` line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _read(path: Path) -> Any:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> TensorDict:
    try:
        return load_file(path)
    except SafetensorError as err:
        raise _damaged(path, err) from err


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        # torch.save writes the table of contents last: its absence means that the end is absent.
        raise _damaged(path, "the end of the file is missing")
    try:
        with warnings.catch_warnings():
            # Such files either load or are refused below; the warning asks for a bug report.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            # Mapped into memory where the format allows it: half the peak of reading it.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as err:
        found = re.search(r"GLOBAL (\S+)", str(err))
        if found is None:
            raise _other_format(path) from err
        return module_state(path, refused=found[1])
    except EOFError as err:
        raise _damaged(path, "unexpected end of file") from err
    except RuntimeError as err:
        if "TorchScript" in str(err):
            raise _other_format(path, "a TorchScript archive") from err
        if zipped and "PytorchStreamReader" not in str(err):
            other = "a zip archive that torch.save did not write"
            raise _other_format(path, other, fix="unpack it, and load the file inside") from err
        raise _damaged(path, err) from err
    except (OSError, MemoryError):
        raise
    except Exception as err:
        # Bytes that are no pickle make the unpickler stumble in any way.
        raise _other_format(path) from err


def _unwrap(content: Any, path: Path) -> TensorDict:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _unwrap(content[key], path)
    tensors = _tensors(content) or _parts(content)
    if not tensors:
        raise CheckpointError(
            "the file holds no tensors by name.",
            where=str(path),
            got=_outline(content),
            expected="a state dict, alone or under " + ", ".join(map(repr, WRAPPERS)),
        )
    return tensors


def _tensors(content: Any) -> TensorDict:
    items = content.items() if isinstance(content, Mapping) else ()
    return {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}


def _parts(content: Any) -> TensorDict:
    """State dicts side by side, their names behind that of the part; one alone as it is."""
    items = content.items() if isinstance(content, Mapping) else ()
    found = {
        PARTS.get(str(key), str(key)): part for key, value in items if (part := _tensors(value))
    }
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{part}.{name}": t for part, inner in found.items() for name, t in inner.items()}


def _outline(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(repr(k) for k in list(content)[:4])
        return f"a dict of {keys}" if keys else "an empty dict"
    return f"a {type(content).__name__}"


def _damaged(path: Path, why: BaseException | str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint is damaged or cut short.",
        where=str(path),
        got=f"{path.stat().st_size:,} bytes; {first_line(why)}",
        expected="a complete file",
        fix="get the file again and compare its size with the source's",
    )


def _other_format(path: Path, got: str | None = None, *, fix: str | None = None) -> CheckpointError:
    if got is None:
        with path.open("rb") as file:
            got = f"a file that begins with {file.read(16)!r}"
    return CheckpointError(
        "this is not a checkpoint.",
        where=str(path),
        got=got,
        expected="a .safetensors file, or one written by torch.save",
        fix=fix,
    )
