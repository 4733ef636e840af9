"""Recipes in any form, and what they would do to a model before they do it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..core.display import Cell, Column, Table, needs
from ..core.errors import ConfigError, SamCompressError
from ..core.pipeline import Pipeline
from ..core.registry import get, list_transforms, snake
from ..core.sizes import tensor_bytes
from ..core.transform import Transform

SIZE = "substitute.image_size"


def recipe(source: str | Path, *, image_size: int | None = None) -> Pipeline:
    """The pipeline of a recipe in any form.

    Args:
        source: a ``.json`` or ``.yaml`` file, the name of a shipped recipe, or a chain in one line
            such as ``"prune.mlp(ratio=0.5) | quantize.int8_weights"``.
        image_size: padded side S of the model's input: replaces the one the recipe sets, or becomes
            its first step.

    Raises:
        ConfigError: if there is no such recipe, or it is malformed.
        UnknownTransformError: if it names a technique that is not there.

    Example:
        >>> recipe("quantize.int8_weights", image_size=64)
        sc.substitute.ImageSize(size=64) | sc.quantize.Int8Weights()
    """
    text = str(source)
    inline = not Path(text).is_file() and ("|" in text or "(" in text or text in list_transforms())
    pipeline = Pipeline(list(_chain(text))) if inline else Pipeline.load(source)
    if image_size is None:
        return pipeline
    others = [step for step in pipeline if step.label != SIZE]
    return Pipeline([get(SIZE, size=image_size), *others], any_order=pipeline.any_order)


def _chain(text: str) -> Iterator[Transform]:
    """The steps of a chain in one line; read, never run, as Python."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            yield from _chain(ast.unparse(node.left))
            node = node.right
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        params = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        *_, family, name = ast.unparse(call.func).split(".")
        if call.args:
            raise ValueError("values need names, such as ratio=0.5")  # noqa: TRY301
    except (SyntaxError, ValueError) as err:
        raise ConfigError(
            "this chain is not understood.",
            got=f"{text!r}: {err}",
            expected="'prune.mlp(ratio=0.5) | quantize.int8_weights'",
        ) from err
    yield get(f"{family}.{snake(name)}", **params)


def preflight(pipeline: Pipeline, model: nn.Module, *, data: Any = None) -> Table:
    """What a pipeline would do to a model: every step checked, none run.

    Args:
        pipeline: the steps.
        model: a SAM; it is not changed.
        data: samples, for the steps that need them.

    Returns:
        One row a step, with the modules its patterns match, what it needs, and whether it is ready;
        notes on the memory foreseen.

    Raises:
        ModelError: if the model is no SAM.

    Example:
        >>> import samcompress as sc
        >>> table = preflight(recipe("prune.mlp"), sc.build("tiny"))
        >>> table.records()[0]["ready"]
        'no: needs images.'
    """
    rows = []
    for number, step in enumerate(pipeline, 1):
        problem = _problem(step, model, data)
        ready = Cell("yes") if problem is None else Cell(problem, mark="red")
        wanted = ", ".join(needs(step)) or "nothing"
        rows.append((number, step.label, step.phase, _matched(step, model), wanted, ready))
    columns = (
        Column("step"),
        Column("technique", align="left"),
        Column("phase"),
        Column("modules matched", align="left"),
        Column("needs", align="left"),
        Column("ready", align="left"),
    )
    own = tensor_bytes(model) / 1e6
    side = model.image_encoder.img_size  # type: ignore[union-attr]
    notes = (
        "Steps are checked against the model as it is now, each by itself.",
        f"Memory foreseen: {2 * own:.3g} MB of weights (the model and its copy), beside what one "
        f"{side} x {side} image takes in the encoder; see `samcompress bench` for the latter.",
    )
    return Table(columns, rows, title=repr(pipeline), notes=notes)


def _problem(step: Transform, model: nn.Module, data: Any) -> str | None:
    """The first sentence of the error that the step would raise."""
    try:
        Pipeline([step]).check(model, data=data)
    except SamCompressError as err:
        return f"no: {err.what.removeprefix(step.label).lstrip(': ')}"
    return None


def _matched(step: Transform, model: nn.Module) -> str:
    where = getattr(step, "where", None)
    if where is None:
        return "all"
    try:
        found = where.select(model, step=step.label)
    except SamCompressError:
        return "none"
    return f"{len(found)} by {', '.join(where.include)}"
