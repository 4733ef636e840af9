"""Parts of a rounded model that are mended one after the other; what goes in and out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from ..core.transform import Context
from ._calibrate import Prompts, asked, decoded, encoded, evaluating, first_images
from ._fake import FakeDecoderAttention, FakeEncoderAttention, Rounded

WHOLE = (FakeEncoderAttention, FakeDecoderAttention, MLPBlock)
NECK = "image_encoder.neck"
Inputs = dict[str | int, Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a unit.

    Attributes:
        inputs: positional ones by place, others by name, in the rounded model;
        plain: the same in floating point.
        output: in floating point.
    """

    inputs: Inputs
    plain: Inputs
    output: Tensor


class _Reached(Exception):
    """No error: the unit has been reached."""


def units(model: nn.Module, ctx: Context, prompts: Prompts) -> list[str]:
    """Attentions, MLPs, the neck and whatever other rounded layer there is, in order of execution.

    Args:
        model: rounded.
        ctx: its first image is run.
        prompts: what is asked about it.
    """
    inside = {n: m for n, m in model.named_modules() if isinstance(m, WHOLE) or n == NECK}
    found = {
        name: module
        for name, module in inside.items()
        if any(isinstance(m, Rounded) for m in module.modules())
    }
    for name, module in model.named_modules():
        if isinstance(module, Rounded) and not any(name.startswith(f"{u}.") for u in found):
            found[name] = module
    order: dict[str, None] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs: order.setdefault(name)

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in found.items()]
    try:
        with torch.no_grad(), evaluating(model):
            sample = next(first_images(ctx, 1))
            _run(model, sample, asked(model, sample, 0, prompts), decode=True)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def calls(
    model: nn.Module,
    teacher: nn.Module,
    unit: str,
    ctx: Context,
    *,
    images: int,
    prompts: Prompts,
) -> list[Call]:
    """Every call of a unit in both models, image by image."""
    found: list[Call] = []
    decode = not unit.startswith("image_encoder.")
    with torch.no_grad(), evaluating(model), evaluating(teacher):
        for index, sample in enumerate(first_images(ctx, images)):
            question = asked(model, sample, index, prompts)
            pair = []
            for sam in (model, teacher):
                with _watching(sam.get_submodule(unit), stop=not decode) as seen:
                    _run(sam, sample, question, decode=decode)
                pair.append(seen)
            for (inputs, _), (plain, output) in zip(*pair, strict=True):
                found.append(Call(inputs, plain, output))
    return found


def channel_axis(unit: nn.Module) -> int:
    """The axis of channels in what a unit gives: 1 of maps, the last of tokens."""
    return 1 if isinstance(unit, (nn.Conv2d, nn.Sequential)) else -1


def run(unit: nn.Module, inputs: Inputs) -> Tensor:
    """A unit's output."""
    places = [value for key, value in inputs.items() if isinstance(key, int)]
    named = {key: value for key, value in inputs.items() if isinstance(key, str)}
    output: Tensor = unit(*places, **named)
    return output


def _run(model: nn.Module, sample: Any, question: Any, *, decode: bool) -> None:
    try:
        features = encoded(model, sample)
    except _Reached:
        return
    if decode:
        decoded(model, features, question, (False,))


@contextmanager
def _watching(unit: nn.Module, *, stop: bool) -> Iterator[list[tuple[Inputs, Tensor]]]:
    seen: list[tuple[Inputs, Tensor]] = []

    def hook(module: nn.Module, places: Any, named: Any, output: Tensor) -> None:
        inputs: Inputs = {**dict(enumerate(places)), **named}
        seen.append(({key: value.detach() for key, value in inputs.items()}, output.detach()))
        if stop:
            raise _Reached

    handle = unit.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
