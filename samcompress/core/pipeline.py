"""Chains of techniques: checked as a whole, then run on one private copy."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import time
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._progress import Progress, ProgressLike
from ._require import EXTRAS, require
from .contract import check_sam, device_of
from .errors import ConfigError, DataError, OrderError, SamCompressError, closest
from .files import write_whole
from .history import History, Step, history, lineage, remember, step_dict, step_from
from .sizes import parameter_count, tensor_bytes
from .transform import Context, Transform

log = logging.getLogger("samcompress.pipeline")
FORMAT = 1


class Pipeline:
    """Techniques in the order they run: ``a | b | c`` or ``Pipeline([a, b, c])``.

    Args:
        steps: techniques, or pipelines to be joined.
        any_order: allow a step before one of a lower phase; for research.

    Raises:
        OrderError: if a step comes after one that must come later.
        ConfigError: if something is not a technique.

    Example:
        >>> import samcompress as sc
        >>> sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.quantize.Int8Weights()
        sc.prune.Mlp(ratio=0.5, criterion='magnitude') | sc.quantize.Int8Weights()
    """

    def __init__(self, steps: Iterable[Transform | Pipeline], *, any_order: bool = False) -> None:
        flat: list[Transform] = []
        for step in steps:
            if isinstance(step, Pipeline):
                flat += step.steps
            elif isinstance(step, Transform):
                flat.append(step)
            else:
                made = isinstance(step, type) and issubclass(step, Transform)
                raise ConfigError(
                    "a step of a pipeline is not a technique.",
                    got=repr(step),
                    expected="a technique such as sc.quantize.Int8Weights()",
                    fix=f"{step.__name__}()" if made else None,
                )
        if not flat:
            raise ConfigError("a pipeline has no step.", fix="sc.list_transforms() names them all")
        self.steps: tuple[Transform, ...] = tuple(flat)
        self.any_order = any_order
        self._check_order(())

    def __or__(self, other: Transform | Pipeline) -> Pipeline:
        if not isinstance(other, (Transform, Pipeline)):
            return NotImplemented
        return Pipeline([self, other], any_order=self.any_order)

    def __call__(
        self,
        model: nn.Module,
        *,
        data: Any = None,
        teacher: nn.Module | None = None,
        device: str | torch.device | None = None,
        progress: ProgressLike = True,
        consume: bool = False,
        workdir: str | Path | None = None,
    ) -> nn.Module:
        """Run every step on a copy of the model.

        Args:
            model: a SAM; not changed unless `consume`.
            data: samples for the steps that calibrate or train: a `Dataset` or a list of `Sample`.
            teacher: the model to imitate; by default the one that came in.
            device: where to work; by default where the model is.
            progress: True for bars on a terminal or notebook, False for silence, or a callable.
            consume: reuse the caller's model instead of copying it, to save memory.
            workdir: folder for caches, checkpoints of training (resumed from) and exported files.

        Returns:
            A model of the same class; `lineage` tells what was done.

        Raises:
            SamCompressError: what the first step that cannot run says, before any step has run.
        """
        target = device_of(model) if device is None and isinstance(model, nn.Module) else device
        dataset = self.check(model, data=data, teacher=teacher, consume=consume)
        record = history(model)
        small = model if consume else copy.deepcopy(model)
        small.to(target)
        original = teacher if teacher is not None or consume else model
        for step in self.steps:
            context = Context(
                step=step.label,
                teacher=original,
                dataset=dataset,
                device=torch.device(target),
                progress=Progress(progress, step.label),
                workdir=None if workdir is None else Path(workdir),
            )
            done = _run(step, small, context)
            record = History(record.base, (*record.steps, done))
            remember(small, record)
        return small

    def check(
        self,
        model: nn.Module,
        *,
        data: Any = None,
        teacher: nn.Module | None = None,
        consume: bool = False,
    ) -> Any:
        """Check order, data, packages and fit of every step, without changing anything.

        Returns:
            The data as a `Dataset`, or None.

        Raises:
            SamCompressError: what the first step that cannot run says.
        """
        check_sam(model)
        self._check_order(lineage(model))
        dataset = None
        if data is not None:
            from .data import as_dataset

            dataset = as_dataset(data)
        for step in self.steps:
            if step.needs_data and dataset is None:
                raise DataError(
                    f"{step.label} needs images.",
                    got="no data",
                    fix="pass data=, e.g. pipe(sam, data=sc.shapes(32))",
                )
            if step.needs_teacher and consume and teacher is None:
                raise ConfigError(
                    f"{step.label} needs the original model, which consume=True gives up.",
                    fix="pass teacher=, or leave out consume=True",
                )
            for extra in step.extras:
                for module in EXTRAS[extra]:
                    require(module, extra=extra, purpose=step.label)
            step.check(model)
        return dataset

    def _check_order(self, before: tuple[Step, ...]) -> None:
        chain = [entry.transform for entry in before] + list(self.steps)
        for index, (first, second) in enumerate(itertools.pairwise(chain)):
            place = f"step {index + 1} and step {index + 2}"
            if before:
                place += ", counting the steps the model already went through"
            if first.terminal:
                raise OrderError(
                    f"{second.label} cannot follow {first.label}.",
                    where=place,
                    expected=f"{first.label} last: it leaves no weights to change",
                    fix=f"run {second.label} on the model from before {first.label}",
                )
            if second.phase < first.phase and not self.any_order:
                raise OrderError(
                    f"{second.label} comes after {first.label}.",
                    where=place,
                    got=f"phase {second.phase} after phase {first.phase}",
                    expected=f"{second.label} before {first.label}",
                    fix=f"{second.label} | {first.label}, or Pipeline([...], any_order=True)",
                )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        from .. import __version__

        recipe: dict[str, Any] = {"format": FORMAT, "samcompress": __version__}
        if self.any_order:
            recipe["any_order"] = True
        return {**recipe, "steps": [step_dict(step) for step in self.steps]}

    def to_json(self) -> str:
        """The recipe as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the recipe to a JSON file.

        Raises:
            CheckpointError: if it cannot be written.
        """
        write_whole(Path(path), self.to_json().encode())

    @classmethod
    def from_dict(cls, recipe: Any, *, where: str = "recipe") -> Pipeline:
        """The pipeline of a recipe: a dict with ``steps``, or the list of steps alone.

        Raises:
            ConfigError: if the recipe is malformed or from a newer samcompress.
            UnknownTransformError: if it names a technique that is not installed.
        """
        recipe = {"steps": recipe} if isinstance(recipe, list) else recipe
        if not isinstance(recipe, dict) or not isinstance(recipe.get("steps"), list):
            raise ConfigError(
                "this is not a recipe.",
                where=where,
                got=str(recipe)[:80],
                expected='{"format": 1, "steps": [{"type": "family.name", "params": {}}]}',
            )
        if recipe.get("format", FORMAT) > FORMAT:
            raise ConfigError(
                "the recipe was written by a newer samcompress.",
                where=where,
                got=f"format {recipe['format']}",
                expected=f"format {FORMAT}",
                fix="pip install -U samcompress",
            )
        known = {"format", "samcompress", "any_order", "description", "steps"}
        for key in recipe:
            if key not in known:
                raise ConfigError(
                    f"a recipe has no key {key!r}.", where=where, expected=", ".join(sorted(known))
                )
        steps = [step_from(s, where=f"{where}, step {i}") for i, s in enumerate(recipe["steps"], 1)]
        return cls(steps, any_order=bool(recipe.get("any_order", False)))

    @classmethod
    def from_json(cls, text: str, *, where: str = "recipe") -> Pipeline:
        """The pipeline of a JSON recipe.

        Raises:
            ConfigError: if the text is not JSON or not a recipe.
        """
        try:
            recipe = json.loads(text)
        except json.JSONDecodeError as err:
            raise ConfigError("the recipe is not JSON.", where=where, got=str(err)) from err
        return cls.from_dict(recipe, where=where)

    @classmethod
    def load(cls, recipe: str | Path) -> Pipeline:
        """Read a recipe from a ``.json`` or ``.yaml`` file, or a shipped one by name.

        Raises:
            ConfigError: if there is no such file or recipe, or it is malformed.
        """
        text, where = read_recipe(recipe)
        if where.endswith((".yaml", ".yml")):
            yaml = require("yaml", purpose="YAML recipes")
            try:
                return cls.from_dict(yaml.safe_load(text), where=where)
            except yaml.YAMLError as err:
                raise ConfigError("the recipe is not YAML.", where=where, got=str(err)) from err
        return cls.from_json(text, where=where)

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __repr__(self) -> str:
        chain = " | ".join(map(repr, self.steps))
        if self.any_order:
            return f"sc.Pipeline([{', '.join(map(repr, self.steps))}], any_order=True)"
        return chain if len(self) > 1 else f"sc.Pipeline([{chain}])"

    def _repr_html_(self) -> str:
        from .display import pipeline_card

        return pipeline_card(self)


def list_recipes() -> dict[str, str]:
    """Recipes shipped with the package: name to description."""
    folder = resources.files("samcompress") / "recipes"
    found = sorted(p.name for p in folder.iterdir() if p.name.endswith(".json"))
    return {n: json.loads((folder / n).read_text()).get("description", "") for n in found}


def read_recipe(recipe: str | Path) -> tuple[str, str]:
    """Text of a recipe file or shipped recipe, and where it was found.

    Raises:
        ConfigError: if there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path.read_text(), str(path)
    shipped = list_recipes()
    name = path.name if path.suffix else f"{path.name}.json"
    if str(path.parent) == "." and name in shipped:
        return (resources.files("samcompress") / "recipes" / name).read_text(), name
    raise ConfigError(
        "there is no such recipe.",
        got=str(recipe),
        expected=f"a .json or .yaml file, or one of {', '.join(shipped)}",
        fix=closest(path.name, shipped),
    )


def _run(step: Transform, model: nn.Module, context: Context) -> Step:
    flags = _Flags(model)
    before = {"parameters": parameter_count(model), "bytes": tensor_bytes(model)}
    step.check(model)
    start = time.perf_counter()
    try:
        state = step.apply(model, context)
    except (SamCompressError, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as err:
        raise SamCompressError(
            f"{step.label} ran out of memory.",
            got=str(err).splitlines()[0],
            fix="a smaller image size or batch, another device=, or consume=True",
        ) from err
    seconds = time.perf_counter() - start
    flags.restore(model)
    after = {"parameters": parameter_count(model), "bytes": tensor_bytes(model)}
    log.info("%s: %s -> %s in %.1f s", step.label, before, after, seconds)
    return Step(step, state, {"before": before, "after": after, "seconds": round(seconds, 3)})


class _Flags:
    """Which modules are in training and which parameters learn, kept over a step.

    A module is known by itself, as removing a block renames those after it; one that took
    another's place, by its name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = dict(model.named_modules())  # references: an id must not be given out again
        self.training = {id(m): m.training for m in self.names.values()}
        self.learns = {
            (id(m), local): p.requires_grad
            for m in self.names.values()
            for local, p in m.named_parameters(recurse=False)
        }

    def restore(self, model: nn.Module) -> None:
        """Set them as they were; new modules are as the model, new parameters as they came."""
        for name, module in model.named_modules():
            known = module if id(module) in self.training else self.names.get(name, model)
            module.training = self.training[id(known)]
            for local, p in module.named_parameters(recurse=False):
                p.requires_grad_(self.learns.get((id(known), local), p.requires_grad))
