"""What of a .tflite file would run on an Edge TPU, by the rules of its maker; no device is needed.

The compiler for it is closed and comes from its maker only. The rules are data, `edge_tpu.json`.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.display import Cell, Column, Table
from ._tflite import Graph, Operator, Tensor, read

RULES = Path(__file__).with_name("edge_tpu.json")
INTEGERS = ("INT8", "UINT8")
# Of biases, axes and shapes.
CONSTANTS = (*INTEGERS, "INT32", "INT64")
MB = 1e6
COLUMNS = (
    Column("operator", align="left"),
    Column("in the file"),
    Column("allowed"),
    Column("on the Edge TPU"),
    Column("why not", align="left"),
)


@dataclass(frozen=True)
class Verdict:
    """One operator of a file.

    Attributes:
        name: in the words of TensorFlow Lite.
        output: the tensor it makes.
        reasons: why it cannot run on an Edge TPU; empty where it can.
    """

    name: str
    output: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class EdgeTpuReport:
    """What would run on an Edge TPU.

    Attributes:
        file: name of the file.
        operators: all of them, in the order in which they run.
        mapped: so many, from the first on, would run on the Edge TPU; the others on the CPU.
        weights: bytes of constants of those.
        memory: bytes that the Edge TPU has for constants and program.
        runtime: version of the Edge TPU's runtime that they need; None where any will do.
        notes: what else there is to know.
    """

    file: str
    operators: tuple[Verdict, ...]
    mapped: int
    weights: int
    memory: int
    runtime: int | None
    notes: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Whether all of it would run on the Edge TPU."""
        return self.mapped == len(self.operators) > 0

    @property
    def streamed(self) -> int:
        """Bytes of constants that are sent again for every image, at the least."""
        return max(0, self.weights - self.memory)

    @property
    def breaks(self) -> Verdict | None:
        """The operator from which on everything runs on the CPU."""
        return None if self.ready or not self.operators else self.operators[self.mapped]

    def table(self) -> Table:
        """One row a kind of operator."""
        kinds: dict[str, list[int]] = {}
        for i, operator in enumerate(self.operators):
            kinds.setdefault(operator.name, []).append(i)
        rows = []
        for name, places in kinds.items():
            found = [self.operators[i] for i in places]
            reasons = dict.fromkeys(reason for verdict in found for reason in verdict.reasons)
            allowed = sum(not verdict.reasons for verdict in found)
            on_it = sum(i < self.mapped for i in places)
            mark: Any = "" if allowed == len(found) else "red"
            why = "; ".join(reasons) or ("" if on_it == len(found) else "after the break")
            rows.append((Cell(name, mark=mark), len(found), allowed, on_it, why))
        return Table(COLUMNS, rows, title=self._title(), notes=(*self._memory(), *self.notes))

    def text(self, width: int = 100) -> str:
        """The table for a terminal."""
        return self.table().text(width)

    def markdown(self) -> str:
        """The table in Markdown."""
        return self.table().markdown()

    def html(self) -> str:
        """The table in HTML."""
        return self.table().html()

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.html()

    def _title(self) -> str:
        count = f"{self.file}: {self.mapped} of {len(self.operators)} operators"
        found = self.breaks
        if found is None:
            return f"{count} would run on the Edge TPU"
        return (
            f"{count} would run on the Edge TPU; from number {self.mapped + 1}, {found.name} "
            f"({found.reasons[0]}), on everything runs on the CPU"
        )

    def _memory(self) -> tuple[str, ...]:
        if not self.mapped:
            return ()
        kept = min(self.weights, self.memory)
        said = (
            f"weights: {self.weights / MB:.3g} MB, of which {kept / MB:.3g} fit into the "
            f"{self.memory / MB:.3g} MB on the chip, less what the program takes; "
            f"{self.streamed / MB:.3g} MB are sent for every image"
        )
        needs = f"needs runtime {self.runtime} of the Edge TPU or later"
        return (said, needs) if self.runtime else (said,)


def edge_tpu_check(tflite: str | Path) -> EdgeTpuReport:
    """Say what of a .tflite file would run on an Edge TPU, and from where on the CPU takes over.

    The Edge TPU's compiler stops at the first operator that it cannot map; the rest of the file
    runs on the CPU, whatever it is. Nothing is run or compiled here: the file's operators, types
    and sizes are held against the published rules.

    Args:
        tflite: the file, of `Export(backend="litert", precision="int8")` or any other.

    Returns:
        A report that prints itself as text, Markdown and HTML.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    rules = _rules()
    graph = read(Path(tflite), rules["schema_operators"], rules["schema_types"])
    verdicts = tuple(_judge(operator, rules) for operator in graph.operators)
    mapped = sum(1 for _ in itertools.takewhile(lambda verdict: not verdict.reasons, verdicts))
    if graph.branches:
        mapped = 0
    on_it = graph.operators[:mapped]
    constants = {id(t): t for found in on_it for t in found.inputs if t is not None and t.constant}
    versions = [rules["operators"][found.name].get("runtime", 0) for found in on_it]
    return EdgeTpuReport(
        file=Path(tflite).name,
        operators=verdicts,
        mapped=mapped,
        weights=sum(len(tensor.data or b"") for tensor in constants.values()),
        memory=rules["memory_bytes"],
        runtime=max(versions, default=0) or None,
        notes=_notes(graph, mapped, rules),
    )


@functools.cache
def _rules() -> Any:
    return json.loads(RULES.read_text(encoding="utf-8"))


def _judge(operator: Operator, rules: Mapping[str, Any]) -> Verdict:
    rule = rules["operators"].get(operator.name)
    if rule is None:
        reasons = ["not an operator of the Edge TPU"]
    else:
        reasons = [LIMITS[name][1] for name in rule.get("limits", ()) if LIMITS[name][0](operator)]
    made = [*operator.inputs, *operator.outputs]
    found = [why for tensor in made if tensor is not None for why in _unfit(tensor)]
    output = operator.outputs[0].name if operator.outputs else ""
    return Verdict(operator.name, output, tuple(dict.fromkeys([*reasons, *found])))


def _unfit(tensor: Tensor) -> list[str]:
    """Why no operator may have such a tensor."""
    reasons = []
    if tensor.kind not in (CONSTANTS if tensor.constant else INTEGERS):
        reasons.append(f"a tensor of {tensor.kind}, not int8 or uint8")
    if tensor.free:
        reasons.append("a size that is not fixed")
    if not tensor.constant and any(size != 1 for size in tensor.shape[:-3]):
        reasons.append("sizes other than 1 outside the three innermost")
    return reasons


def _notes(graph: Graph, mapped: int, rules: Mapping[str, Any]) -> tuple[str, ...]:
    notes, known = [], rules["operators"]
    if graph.branches:
        notes.append("conditions or loops: the compiler refuses the file")
    on_it = sorted({found.name for found in graph.operators[:mapped]})
    notes += [f"{name}: {known[name]['note']}" for name in on_it if "note" in known[name]]
    if mapped < len(graph.operators):
        notes.append(
            "attention, GELU and norms over channels do not map: only an encoder of convolutions "
            "with ReLU, for one image of integers, can run there; SAM's decoder stays on the CPU"
        )
    doubtful = [name for name in on_it if known[name].get("unconfirmed")]
    if doubtful:
        notes.append(f"rules not compared with the maker's page again: {', '.join(doubtful)}")
    notes.append(f"rules version {rules['version']}: {rules['source']}")
    return tuple(notes)


# --- limits of operators: whether one is overstepped; fields by their number in the schema ---


def _option(operator: Operator, field: int, kind: str = "b", default: int = 0) -> int:
    return operator.options.number(field, kind, default) if operator.options else default


def _input(operator: Operator, index: int) -> Tensor | None:
    return operator.inputs[index] if index < len(operator.inputs) else None


def _given(operator: Operator, index: int) -> list[int] | None:
    """The numbers of a constant input; None where it is not known before run time."""
    tensor = _input(operator, index)
    return tensor.values() if tensor is not None and tensor.constant else None


def _axes(operator: Operator, index: int) -> set[int]:
    """Axes in an input, counted from the innermost, which is -1; all where they are unknown."""
    rank, given = len(_first(operator).shape), _given(operator, index)
    axes = range(rank) if given is None else given
    return {axis % rank - rank for axis in axes}


def _any_batch(axes: Iterable[int]) -> bool:
    """Whether one is outside the three innermost, which are height, width and channels."""
    return any(axis < -3 for axis in axes)


def _first(operator: Operator) -> Tensor:
    return next(tensor for tensor in operator.inputs if tensor is not None and not tensor.constant)


def _fused(operator: Operator) -> bool:
    return _option(operator, 1 if operator.name == "CONCATENATION" else 5) != 0


def _other_constants(operator: Operator) -> bool:
    fixed = [tensor for tensor in operator.inputs if tensor is not None and tensor.constant]
    zeros = all(value == tensor.zero for tensor in fixed for value in tensor.values())
    return bool(fixed) and not (zeros and len(operator.inputs) == 2)


def _changing_weights(operator: Operator) -> bool:
    used = operator.inputs[:2] if operator.name == "TRANSPOSE_CONV" else operator.inputs[1:]
    return not all(tensor is None or tensor.constant for tensor in used)


def _uneven_dilation(operator: Operator) -> bool:
    field = 4 if operator.name == "CONV_2D" else 5
    across, down = (_option(operator, field + i, "i", 1) for i in range(2))
    return across != down


def _shallow(operator: Operator) -> bool:
    return -1 in _axes(operator, 1) and _first(operator).shape[-1] % 4 != 0


def _stacked_batch(operator: Operator) -> bool:
    # Of tensors that are stacked or taken apart, the whole has the axis.
    whole = operator.outputs[0] if operator.name == "PACK" else _first(operator)
    rank = len(whole.shape)
    return _any_batch([_option(operator, 1, "i") % rank - rank])


def _padded_batch(operator: Operator) -> bool:
    sizes, rank = _given(operator, 1), len(_first(operator).shape)
    return sizes is None or _any_batch(i // 2 - rank for i, size in enumerate(sizes) if size)


def _strides(operator: Operator) -> bool:
    steps = _given(operator, 3)
    masks = _option(operator, 2, "i") or _option(operator, 3, "i")
    return steps is None or any(step != 1 for step in steps) or bool(masks)


def _alpha(operator: Operator) -> bool:
    tensor = _input(operator, 1)
    return tensor is None or tensor.rows != 1


LIMITS: dict[str, tuple[Callable[[Operator], bool], str]] = {
    "alpha_of_one_row": (_alpha, "slopes of more than one axis"),
    "at_most_16000": (lambda found: _first(found).shape[-1] > 16_000, "more than 16000 numbers"),
    "constant_weights": (_changing_weights, "weights made at run time"),
    "constants_are_zero": (_other_constants, "joined to a constant that is not zero"),
    "default_weights": (lambda found: _option(found, 1) != 0, "weights in another order"),
    "depth_by_four": (_shallow, "a mean over channels whose number is no multiple of 4"),
    "equal_dilation": (_uneven_dilation, "another dilation across than down"),
    "no_fused_activation": (_fused, "an activation built in"),
    "no_padded_batch": (_padded_batch, "padding of the batch axis"),
    "not_along_batch": (lambda found: _any_batch(_axes(found, 1)), "reduces the batch axis"),
    "axis_not_batch": (_stacked_batch, "stacks along the batch axis"),
    "one_row_in": (lambda found: _first(found).rows != 1, "more than one row"),
    "one_row_out": (lambda found: found.outputs[0].rows != 1, "more than one row"),
    "split_not_batch": (lambda found: _any_batch(_axes(found, 0)), "splits the batch axis"),
    "strides_of_one": (_strides, "a stride other than 1, or axes left out or added"),
}
