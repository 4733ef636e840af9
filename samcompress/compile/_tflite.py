"""What is in a .tflite file: operators and tensors, read without any package.

The file is a flatbuffer. Numbers of fields are those of TensorFlow Lite's public schema.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..core.errors import CheckpointError

MAGIC = b"TFL3"
CUSTOM = "CUSTOM"
# In the type of the numbers; other types are not read.
READ = {"INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "FLOAT32": "float32"}


@dataclass(frozen=True)
class Record:
    """One table of a flatbuffer: fields by number.

    Attributes:
        data: the whole file.
        at: where the table starts.
    """

    data: bytes
    at: int

    def _place(self, field: int) -> int | None:
        table = self.at - self._read("i", self.at)
        entry = 4 + 2 * field
        offset = self._read("H", table + entry) if entry < self._read("H", table) else 0
        return self.at + offset if offset else None

    def _read(self, kind: str, at: int) -> int:
        number: int = struct.unpack_from("<" + kind, self.data, at)[0]
        return number

    def _behind(self, field: int) -> int | None:
        place = self._place(field)
        return None if place is None else place + self._read("I", place)

    def number(self, field: int, kind: str = "i", default: int = 0) -> int:
        """A whole number of the `struct` type `kind`."""
        place = self._place(field)
        return default if place is None else self._read(kind, place)

    def record(self, field: int) -> Record | None:
        """Another table."""
        place = self._behind(field)
        return None if place is None else Record(self.data, place)

    def records(self, field: int) -> list[Record]:
        """A list of tables."""
        place = self._behind(field)
        if place is None:
            return []
        starts = range(place + 4, place + 4 + 4 * self._read("I", place), 4)
        return [Record(self.data, at + self._read("I", at)) for at in starts]

    def numbers(self, field: int, kind: str = "i4") -> tuple[int, ...] | None:
        """A list of numbers of the numpy type `kind`; None where there is none."""
        raw = self.raw(field, np.dtype(kind).itemsize)
        return None if raw is None else tuple(np.frombuffer(raw, "<" + kind).tolist())

    def raw(self, field: int, size: int = 1) -> bytes | None:
        """The bytes of a list of numbers, each of `size` bytes."""
        place = self._behind(field)
        if place is None:
            return None
        end = place + 4 + size * self._read("I", place)
        if end > len(self.data):
            raise IndexError("the file ends early")
        return self.data[place + 4 : end]


@dataclass(frozen=True)
class Tensor:
    """One tensor.

    Attributes:
        name: as in the file.
        kind: its type in the schema's words, such as ``INT8``.
        shape: sizes.
        free: whether a size is only known at run time.
        data: its bytes where it is constant.
        zero: the integer that stands for zero.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    free: bool
    data: bytes | None
    zero: int

    @property
    def constant(self) -> bool:
        """Whether it is known when the file is compiled."""
        return self.data is not None

    @property
    def rows(self) -> int:
        """How many rows of the innermost axis there are."""
        return prod(self.shape[:-1])

    def values(self) -> list[int]:
        """The numbers of a constant, flat."""
        found: list[int] = np.frombuffer(self.data or b"", READ[self.kind]).tolist()
        return found


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: in the schema's words, such as ``CONV_2D``; of a custom one its own.
        inputs: its tensors; None for an optional one that is left out.
        outputs: what it makes.
        options: its settings; None where all have their defaults.
    """

    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Record | None


@dataclass(frozen=True)
class Graph:
    """The main graph of a file.

    Attributes:
        operators: in the order in which they run.
        branches: how many other graphs there are, of conditions and loops.
    """

    operators: tuple[Operator, ...]
    branches: int


def read(path: Path, names: Sequence[str], kinds: Sequence[str]) -> Graph:
    """Read a file.

    Args:
        path: of the file.
        names: operators by their number in the schema.
        kinds: types of tensors by their number.

    Raises:
        CheckpointError: if it cannot be read, or is no .tflite.
    """
    try:
        return _graph(_root(Path(path).read_bytes()), names, kinds)
    except (OSError, ValueError, IndexError, struct.error) as err:
        raise CheckpointError(
            "a file cannot be read as .tflite.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected="a whole file that litert-torch or TensorFlow Lite wrote",
        ) from err


def _root(data: bytes) -> Record:
    if data[4:8] != MAGIC:
        raise ValueError(f"it starts with {data[:8]!r}")
    return Record(data, struct.unpack_from("<I", data)[0])


def _graph(model: Record, names: Sequence[str], kinds: Sequence[str]) -> Graph:
    buffers = [_content(buffer) for buffer in model.records(4)]
    codes = [_name(code, names) for code in model.records(1)]
    main, *branches = model.records(2)
    tensors = [_tensor(tensor, buffers, kinds) for tensor in main.records(0)]
    operators = tuple(
        Operator(
            codes[found.number(0, "I")],
            tuple(None if i < 0 else tensors[i] for i in found.numbers(1) or ()),
            tuple(tensors[i] for i in found.numbers(2) or ()),
            found.record(4),
        )
        for found in main.records(3)
    )
    return Graph(operators, len(branches))


def _content(buffer: Record) -> bytes | None:
    """The bytes of a constant; large files have them behind the tables, and say where."""
    start, size = buffer.number(1, "Q"), buffer.number(2, "Q")
    if not start:
        return buffer.raw(0)
    if start + size > len(buffer.data):
        raise IndexError("the file ends early")
    return buffer.data[start : start + size]


def _name(code: Record, names: Sequence[str]) -> str:
    # Old files have room for 127 operators only, in the first field.
    number = max(code.number(0, "b"), code.number(3))
    name = names[number] if number < len(names) else f"operator {number}"
    return (code.raw(1) or b"").decode() if name == CUSTOM else name


def _tensor(tensor: Record, buffers: Sequence[bytes | None], kinds: Sequence[str]) -> Tensor:
    rounding = tensor.record(4)
    zero = (rounding.numbers(3, "i8") if rounding else None) or (0,)
    signature = tensor.numbers(7)
    kind = tensor.number(1, "b")
    return Tensor(
        (tensor.raw(3) or b"").decode(),
        kinds[kind] if kind < len(kinds) else f"type {kind}",
        tensor.numbers(0) or (),
        signature is not None and min(signature, default=0) < 0,
        buffers[tensor.number(2, "I")] or None,
        zero[0],
    )
