"""Which modules a technique acts on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .errors import ConfigError, NoEffectError, closest


@dataclass(frozen=True)
class Where:
    """Wildcards on dotted module names; every pattern must match something.

    ``*`` stands for one component of a name or a part of one, ``**`` for any number of components.

    Args:
        include: patterns of modules to take.
        exclude: patterns of modules to leave out again.

    Example:
        >>> Where("image_encoder.blocks.*.mlp", exclude="image_encoder.blocks.0.mlp")
        Where(include=('image_encoder.blocks.*.mlp',), exclude=('image_encoder.blocks.0.mlp',))
    """

    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude"):
            value = getattr(self, field)
            value = (value,) if isinstance(value, str) else value
            given = isinstance(value, (tuple, list))
            if not given or not all(isinstance(p, str) and p for p in value):
                raise ConfigError(
                    f"Where.{field} takes patterns on module names.",
                    got=value,
                    expected='a string or several, e.g. "image_encoder.blocks.*"',
                )
            object.__setattr__(self, field, tuple(value))

    def select(
        self, model: nn.Module, kind: type | tuple[type, ...] = nn.Module, *, step: str = "Where"
    ) -> list[tuple[str, nn.Module]]:
        """The modules that match, in the model's own order.

        Args:
            model: the model searched.
            kind: keep only modules of these classes; patterns may still match others.
            step: who asks, for the error.

        Raises:
            NoEffectError: if a pattern matches no module, or none of the wanted kind is left.
        """
        modules: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if n}
        for pattern in self.include + self.exclude:
            rule = _rule(pattern)
            if not any(rule.fullmatch(name) for name in modules):
                raise NoEffectError(
                    f"{step} matched no module.",
                    where=repr(pattern),
                    got=f"nearest: {closest(pattern, modules) or 'none'}",
                    fix=f"a pattern such as {_example(modules)!r}",
                )
        taken = [_rule(p) for p in self.include]
        left = [_rule(p) for p in self.exclude]
        found = [
            (name, module)
            for name, module in modules.items()
            if isinstance(module, kind)
            and any(r.fullmatch(name) for r in taken)
            and not any(r.fullmatch(name) for r in left)
        ]
        if not found:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise NoEffectError(
                f"{step} matched no module it can act on.",
                where=repr(self),
                expected=" or ".join(k.__name__ for k in kinds),
                fix="widen include=, or leave out exclude=",
            )
        return found


def _rule(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*|\*)", pattern)
    wild = {"**": r".*", "*": r"[^.]*"}
    return re.compile("".join(wild.get(p, re.escape(p)) for p in pieces))


def _example(modules: dict[str, nn.Module]) -> str:
    name = next((n for n in modules if re.search(r"\.\d+\.", n)), next(iter(modules), "**"))
    return re.sub(r"\.\d+\.", ".*.", name, count=1)
