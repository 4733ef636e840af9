"""Tensors of files that hold a pickled module, without the module's code.

``torch.save(model, path)`` writes which classes to call, not only tensors. torch's restricted
unpickler refuses all classes it does not know; here it is given a dummy in the place of each. A
dummy keeps what the file says about an object and does nothing. No class of the file is imported,
none of its methods is run; tensors are then found in the dictionaries that every `torch.nn.Module`
keeps them in.

A dummy would be harmless under any name. Only classes that modules of published files consist of
get one, so that a file with anything else in it is refused as before, and its owner warned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .errors import CheckpointError

# Libraries of modules, and names with a capital: those of functions are written without.
KNOWN = re.compile(
    r"(torch\.nn\.(modules|parallel)|ultralytics|segment_anything\w*)(\.\w+)*\.\w*[A-Z]\w*"
)
# Where training scripts put a module in a larger file. If there are averaged weights, they count.
PLACES = ("ema", "model")
# Wrappers call what is in them "module", which is no part of a model's own names.
WRAPPER = "DataParallel"
# No model has so many modules: one that has is inside itself.
MOST = 5_000


class Dummy:
    """In the place of an object of some class: keeps its state, does nothing.

    Attributes:
        state: what the file says about it.
        stands_for: the class; each has a subclass of this one.
    """

    __slots__ = ("state",)
    state: Any
    stands_for = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Dummy:
        """Drop whatever the file would call the class with."""
        self = super().__new__(cls)
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def module_state(path: Path, refused: str) -> dict[str, Tensor]:
    """The tensors of a pickled module by name, as its ``state_dict()`` would have them.

    The module is alone or, in a dict, at one of `PLACES`. Names are without the component that
    data-parallel wrappers add, also where such a wrapper is inside the module. Types are those of
    the file, often float16.

    Args:
        path: a file of ``torch.save`` that a read of tensors alone refused.
        refused: the class or function it was refused for.

    Raises:
        CheckpointError: if there is anything else in it; nothing of it was run.
    """
    reason = None
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        foreign = [name for name in names if not KNOWN.fullmatch(name)]
        if not foreign:
            return dict(_tensors(_find(_read(path, names))))
    except (OSError, MemoryError):
        raise
    except Exception as err:
        # A file of the format before zip archives, which keeps modules in another way; or one whose
        # objects do what modules do not.
        foreign, reason = [refused], err
    raise CheckpointError(
        "the file holds code, not only tensors; it was refused and nothing of it was run.",
        where=str(path),
        got=f"a pickled {foreign[0]}",
        expected="tensors by name, as torch.save(model.state_dict(), path) writes them",
        fix="if you trust the file: load it where its code is and save the state dict alone",
    ) from reason


def _read(path: Path, names: list[str]) -> Any:
    dummies: list[Any] = [
        (type("Dummy", (Dummy,), {"__slots__": (), "stands_for": name}), name) for name in names
    ]
    with safe_globals(dummies):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)


def _find(content: Any) -> Any:
    if isinstance(content, Mapping):
        return next(content[key] for key in PLACES if content.get(key) is not None)
    return content


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, in the order of a state dict."""
    waiting = [("", module)]
    for _ in range(MOST):
        if not waiting:
            return
        prefix, module = waiting.pop()
        # A class that the user told torch to trust is not replaced.
        state = vars(module) if isinstance(module, nn.Module) else module.state
        passing = state.get("_non_persistent_buffers_set", ())
        for name, tensor in [*state["_parameters"].items(), *state["_buffers"].items()]:
            if tensor is not None and name not in passing:
                yield prefix + name, _tensor(tensor)
        wrapped = getattr(module, "stands_for", "").endswith(WRAPPER)
        for name, inner in reversed(state["_modules"].items()):
            if inner is not None:
                waiting.append((prefix if wrapped else f"{prefix}{name}.", inner))
    raise RecursionError


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(type(value))
    return value
