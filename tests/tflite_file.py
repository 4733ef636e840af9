"""Writes .tflite files by hand, for tests of what reads them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samcompress.compile.edge_tpu import _rules

# Tensor: type, sizes, and its bytes where it is constant.
Tensors = Mapping[str, tuple[str, Sequence[int], bytes | None]]
# Operator: name, names of inputs (None where one is left out), of outputs, settings by field.
Operators = Sequence[tuple[str, Sequence[str | None], Sequence[str], Mapping[int, Any]]]


def ints(*values: int) -> bytes:
    """The bytes of an int32 constant."""
    return struct.pack(f"<{len(values)}i", *values)


def write_tflite(
    path: Path,
    tensors: Tensors,
    operators: Operators,
    *,
    branches: int = 0,
    free: str = "",
    behind: bool = False,
) -> Path:
    """Write a graph.

    Args:
        path: of the file.
        tensors: by name.
        operators: in the order in which they run.
        branches: so many empty graphs besides.
        free: a tensor whose first size is not fixed.
        behind: constants stand behind the tables, as in large files.
    """
    rules, places = _rules(), {name: i for i, name in enumerate(tensors)}
    names = list(dict.fromkeys(operator[0] for operator in operators))
    codes = []
    for name in names:
        known = rules["schema_operators"]
        number = known.index(name if name in known else "CUSTOM")
        codes.append({0: ("b", min(number, 127)), 1: name.encode(), 3: ("i", number)})
    found = [
        {
            0: [int(size) for size in sizes],
            1: ("b", rules["schema_types"].index(kind)),
            2: ("I", i + 1),
            3: name.encode(),
            4: {3: ("q", [0])},
            **({7: [-1, *sizes[1:]]} if name == free else {}),
        }
        for i, (name, (kind, sizes, _)) in enumerate(tensors.items())
    ]
    run = [
        {
            0: ("I", names.index(name)),
            1: [-1 if i is None else places[i] for i in inputs],
            2: [places[i] for i in outputs],
            **({4: settings} if settings else {}),
        }
        for name, inputs, outputs, settings in operators
    ]
    graphs = [{0: found, 3: run}, *({} for _ in range(branches))]
    constants = [data for _, _, data in tensors.values()]

    def written(start: int) -> bytearray:
        buffers: list[Any] = [{}]
        for data in constants:
            inside: dict[int, Any] = {} if data is None else {0: data}
            buffers.append({1: ("Q", start), 2: ("Q", len(data))} if behind and data else inside)
            start += len(data or b"")
        out = bytearray(b"\0\0\0\0TFL3")
        root = _put(out, {0: ("I", 3), 1: codes, 2: graphs, 4: buffers})
        out[:4] = struct.pack("<I", root)
        return out

    tables = written(len(written(0)))
    path.write_bytes(tables + b"".join(data or b"" for data in constants if behind))
    return path


def _put(out: bytearray, value: Any) -> int:
    """Append a table (dict), text or bytes, numbers, or a list of tables; say where it starts."""
    out += b"\0" * (-len(out) % 8)
    if isinstance(value, dict):
        return _put_table(out, value)
    start = len(out)
    if isinstance(value, bytes):
        out += struct.pack("<I", len(value)) + value
    elif isinstance(value, tuple):
        kind, numbers = value
        out += struct.pack(f"<I{len(numbers)}{kind}", len(numbers), *numbers)
    elif all(isinstance(number, int) for number in value):
        out += struct.pack(f"<I{len(value)}i", len(value), *value)
    else:
        out += struct.pack("<I", len(value)) + b"\0\0\0\0" * len(value)
        for i, table in enumerate(value):
            _point(out, start + 4 + 4 * i, _put(out, table))
    return start


def _put_table(out: bytearray, fields: Mapping[int, Any]) -> int:
    count = max(fields, default=-1) + 1
    offsets = [4 + 8 * i if i in fields else 0 for i in range(count)]
    table = len(out)
    out += struct.pack(f"<HH{count}H", 4 + 2 * count, 4 + 8 * count, *offsets)
    out += b"\0" * (-len(out) % 4)
    start = len(out)
    out += struct.pack("<i", start - table) + b"\0" * 8 * count
    for field, value in fields.items():
        slot = start + 4 + 8 * field
        # A single number lies in the table itself, everything else behind it.
        if isinstance(value, tuple) and not isinstance(value[1], list):
            out[slot : slot + struct.calcsize(value[0])] = struct.pack("<" + value[0], value[1])
        else:
            _point(out, slot, _put(out, value))
    return start


def _point(out: bytearray, slot: int, target: int) -> None:
    out[slot : slot + 4] = struct.pack("<I", target - slot)
