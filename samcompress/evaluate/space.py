"""What a search may try: techniques and ranges of their settings, in the order they run.

A space is data, so that it can be written down, sent, and searched again:

    {"format": 1, "slots": [
      {"name": "size", "options": [
        {"type": "substitute.image_size", "params": {"size": {"choices": [160, 192, 224]}}}]},
      {"name": "mlp", "options": [
        {"type": "prune.mlp", "params": {"ratio": {"low": 0.1, "high": 0.5, "step": 0.1}}}]},
      {"name": "numbers", "options": [
        {"type": "quantize.int8_weights"}, {"type": "quantize.b_float16"}]}]}

Of each slot one option is taken, or none where the slot is ``"optional"``, which it is unless it
says false. A setting is a range, choices, or one value.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, OrderError, SamCompressError
from ..core.files import write_whole
from ..core.pipeline import Pipeline
from ..core.registry import find, get, snake
from ._domain import Choices, Domain, Range, check_keys, check_list, middle
from ._domain import domain as domain_of

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
NONE = "none"
MANY = 100_000  # chains of a grid beyond which nobody wants all
Plan = list[tuple[str, dict[str, Any]]]


Decide = Callable[[str, Domain], Any]  # name of a decision and what it can be, to a value


@dataclass(frozen=True)
class Option:
    """A technique and its settings.

    Attributes:
        type: registered name.
        params: values, `Choices` and `Range`s by name; what is left out keeps its default.
    """

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def domains(self) -> dict[str, Domain]:
        """The settings that are searched."""
        return {k: v for k, v in self.params.items() if isinstance(v, (Choices, Range))}

    def check(self, slot: str) -> None:
        """Make the technique with every choice and both ends of every range.

        Raises:
            SamCompressError: what the technique says of a value it cannot take.
        """
        fixed = {k: v for k, v in self.params.items() if k not in self.domains()}
        first = {k: v.ends()[0] for k, v in self.domains().items()}
        trials = [{**first, k: v} for k, kind in self.domains().items() for v in kind.ends()]
        try:
            for values in trials or [{}]:
                get(self.type, **fixed, **values)
        except SamCompressError as err:
            err.where = err.where or f"space, slot {slot!r}"
            raise


@dataclass(frozen=True)
class Slot:
    """A place in the chain: one of the options, or none of them.

    Attributes:
        name: unique within the space.
        options: techniques of one phase.
        optional: whether the place may stay empty.
    """

    name: str
    options: tuple[Option, ...]
    optional: bool = True

    def names(self) -> list[str]:
        """The options by the names decisions have for them."""
        types = [option.type for option in self.options]
        numbered = (f"{t} ({types[: i + 1].count(t)})" for i, t in enumerate(types))
        return [k if types.count(t) > 1 else t for k, t in zip(numbered, types, strict=True)]


@dataclass(frozen=True)
class Space:
    """Slots in the order they run.

    Args:
        slots: see `Slot`.
        left_out: techniques that are not in a default space, and why; for people to read.

    Raises:
        ConfigError: if there is no slot, two have one name, or a setting cannot be.
        OrderError: if a technique comes after one that must come later.
        UnknownTransformError: if there is no such technique.

    Example:
        >>> space = Space.parse("prune.mlp(ratio={0.25, 0.5}) | quantize.int8_weights")
        >>> len(list(space.grid())), space.build(next(space.grid())).steps[1]
        (2, sc.quantize.Int8Weights())
    """

    slots: tuple[Slot, ...]
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = [slot.name for slot in self.slots]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names or twice is not None or not all(slot.options for slot in self.slots):
            raise ConfigError(
                "a space has slots of different names, each with a technique.",
                got="no slot" if not names else f"slots {', '.join(map(repr, names))}",
                expected='{"slots": [{"name": "mlp", "options": [{"type": "prune.mlp"}]}]}',
            )
        top: Option | None = None
        for slot in self.slots:
            for option in slot.options:
                option.check(slot.name)
                if top is not None and find(option.type).phase < find(top.type).phase:
                    raise OrderError(
                        f"{option.type} comes after {top.type}.",
                        where=f"space, slot {slot.name!r}",
                        got=f"phase {find(option.type).phase} after phase {find(top.type).phase}",
                        expected=f"the slot of {option.type} before that of {top.type}",
                    )
            top = max([*slot.options, *([top] if top else [])], key=lambda o: find(o.type).phase)

    # --- making chains ---

    def plan(self, decide: Decide) -> Plan:
        """The steps that decisions lead to; only decisions that matter are asked for."""
        steps = []
        for slot in self.slots:
            names = slot.names()
            open_to = (NONE, *names) if slot.optional else tuple(names)
            taken = decide(slot.name, Choices(open_to)) if len(open_to) > 1 else names[0]
            if taken == NONE:
                continue
            option = slot.options[names.index(taken)]
            searched = option.domains()
            params = {
                name: decide(f"{slot.name}/{taken}/{name}", value) if name in searched else value
                for name, value in option.params.items()
            }
            steps.append((option.type, params))
        return steps

    def build(self, decisions: Mapping[str, Any]) -> Pipeline:
        """The chain of decisions such as `grid` gives.

        Raises:
            SamCompressError: if techniques refuse to stand in one chain; an empty chain does too.
        """
        return build(self.plan(lambda name, _: decisions[name]))

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination, as decisions; the last one changes first.

        Raises:
            ConfigError: if a range has no steps, or there are more than anybody can measure.
        """
        path: list[tuple[str, tuple[Any, ...], int]] = []
        for _ in range(MANY):
            places = itertools.count()

            def decide(name: str, domain: Domain, places: Iterator[int] = places) -> Any:
                at = next(places)
                if at == len(path):
                    path.append((name, domain.grid(), 0))
                return path[at][1][path[at][2]]

            self.plan(decide)
            yield {name: values[k] for name, values, k in path}
            while path and path[-1][2] + 1 == len(path[-1][1]):
                path.pop()
            if not path:
                return
            name, values, k = path.pop()
            path.append((name, values, k + 1))
        raise ConfigError(
            "the grid is too large.",
            got=f"more than {MANY} chains",
            fix="fewer choices, or sc.evaluate.search",
        )

    def singles(self) -> Iterator[dict[str, Any]]:
        """Each option, in the middle of its ranges, alone where the other slots may be empty."""
        for slot in self.slots:
            for key in slot.names():
                wanted = {slot.name: key}
                found: dict[str, Any] = {}

                def decide(
                    name: str,
                    domain: Domain,
                    wanted: dict[str, Any] = wanted,
                    found: dict[str, Any] = found,
                ) -> Any:
                    empty = isinstance(domain, Choices) and NONE in domain.values
                    found[name] = wanted.get(name, NONE if empty else middle(domain))
                    return found[name]

                self.plan(decide)
                yield found

    def few(self, draw: random.Random) -> dict[str, Any]:
        """Decisions at random that fill two to four of the slots that may be empty."""
        free = [slot.name for slot in self.slots if slot.optional]
        filled = draw.sample(free, min(len(free), draw.randint(2, 4)))
        found: dict[str, Any] = {}

        def decide(name: str, domain: Domain) -> Any:
            if isinstance(domain, Range) and not domain.stepped:
                found[name] = draw.uniform(domain.low, domain.high)
            elif name in free:
                found[name] = draw.choice(domain.grid()[1:]) if name in filled else NONE
            else:
                found[name] = draw.choice(domain.grid())
            return found[name]

        self.plan(decide)
        return found

    @classmethod
    def default(cls, model: nn.Module, *, calibration: bool = False) -> Space:
        """The techniques that need no training and fit a model, with ranges that make sense.

        Args:
            model: a SAM; each technique's own `check` is asked.
            calibration: whether images will be there for techniques that look at some.

        Returns:
            The space; its `left_out` tells of every other technique why it is not in it.

        Raises:
            ModelError: if the model is no SAM.
            ConfigError: if nothing fits.
        """
        from ._default_space import default_slots

        return cls(*default_slots(model, calibration=calibration))

    # --- as data ---

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        slots = [
            {
                "name": slot.name,
                "optional": slot.optional,
                "options": [
                    {
                        "type": option.type,
                        "params": {
                            k: v.to_dict() if isinstance(v, (Choices, Range)) else v
                            for k, v in option.params.items()
                        },
                    }
                    for option in slot.options
                ],
            }
            for slot in self.slots
        ]
        found: dict[str, Any] = {"format": FORMAT, "slots": slots}
        return {**found, "left_out": dict(self.left_out)} if self.left_out else found

    @classmethod
    def from_dict(cls, space: Any, *, where: str = "space") -> Space:
        """The space of a dictionary as at the top of this module.

        Raises:
            ConfigError: if it is malformed; and as for a `Space`.
        """
        check_keys(space, ("slots",), ("format", "left_out"), where)
        if space.get("format", FORMAT) > FORMAT:
            raise ConfigError(
                "the space was written by a newer samcompress.",
                where=where,
                got=f"format {space['format']}",
                expected=f"format {FORMAT}",
                fix="pip install -U samcompress",
            )
        slots = []
        for entry in check_list(space["slots"], where):
            check_keys(entry, ("name", "options"), ("optional",), where)
            place = f"{where}, slot {entry['name']!r}"
            options = []
            for option in check_list(entry["options"], place):
                check_keys(option, ("type",), ("params",), place)
                given = option.get("params", {}).items()
                params = {k: domain_of(v, f"{place}, {k}") for k, v in given}
                options.append(Option(option["type"], params))
            slots.append(Slot(entry["name"], tuple(options), bool(entry.get("optional", True))))
        return cls(tuple(slots), dict(space.get("left_out", {})))

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            CheckpointError: if it cannot be written.
        """
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Space:
        """Read what `save` wrote.

        Raises:
            ConfigError: if there is no such file, or it holds no space.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ConfigError(
                "this is not a space.", where=str(path), got=f"{type(err).__name__}: {err}"
            ) from err
        return cls.from_dict(found, where=str(path))

    @classmethod
    def parse(cls, text: str) -> Space:
        """A chain in one line, with braces around values to choose from.

        Raises:
            ConfigError: if the text is not understood; and as for a `Space`.
        """
        slots: list[Slot] = []
        try:
            for node in _chained(ast.parse(text.strip(), mode="eval").body):
                call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
                *_, family, name = ast.unparse(call.func).split(".")
                if call.args:
                    raise ValueError("values need names, such as ratio={0.25, 0.5}")  # noqa: TRY301
                params = {str(k.arg): _values(k.value) for k in call.keywords}
                option = Option(f"{family}.{snake(name)}", params)
                known = sum(s.name.partition(" ")[0] == option.type for s in slots)
                label = f"{option.type} ({known + 1})" if known else option.type
                slots.append(Slot(label, (option,), optional=False))
        except (SyntaxError, ValueError) as err:
            if isinstance(err, SamCompressError):
                raise
            raise ConfigError(
                "this grid is not understood.",
                got=f"{text!r}: {err}",
                expected="'prune.mlp(ratio={0.25, 0.5}) | quantize.int8_weights'",
            ) from err
        return cls(tuple(slots))


def build(plan: Plan) -> Pipeline:
    """The chain of a plan; errors as for `Space.build`."""
    return Pipeline([get(kind, **params) for kind, params in plan])


def _chained(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _chained(node.left)
        yield from _chained(node.right)
    else:
        yield node


def _values(node: ast.expr) -> Any:
    if isinstance(node, ast.Set):  # in the order written, which a set would lose
        return Choices(tuple(ast.literal_eval(value) for value in node.elts))
    return ast.literal_eval(node)
