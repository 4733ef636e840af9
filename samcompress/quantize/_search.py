"""Scales of the two factors of a product, by what their rounding does to the masks.

The importance of an output is the square of what the loss of masks and scores changes with it. At
the floating-point model that loss is least and all of them would be 0, so they are taken in the
model as it is rounded at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.transform import Context
from ._calibrate import Answer, Prompts, answer, asked, evaluating, first_images
from ._fake import FakeLinear, Product
from ._quantizers import Quantizer

ROWS = 32  # of a product's outputs, kept from each call
MAPS = 4  # of attention, evenly spaced over heads and windows, kept from each call
EPS = 1e-4  # scores are taken between this and 1 - this


@dataclass
class Kept:
    """Some rows of a module's products: both factors and the importance of what they gave.

    Attributes:
        left: (..., n, m) each, not rounded.
        right: (..., m, k) each, not rounded; empty where the right factor is a weight.
        importance: (..., n, k) each.
    """

    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    importance: list[Tensor] = field(default_factory=list)


def gather(
    model: nn.Module, teacher: nn.Module, ctx: Context, *, images: int, prompts: Prompts
) -> dict[str, Kept]:
    """Rows of every product of a rounded model, by the module's name.

    Args:
        model: rounded; left as it was.
        teacher: what it should say.
        ctx: data and progress.
        images: at most so many, the first.
        prompts: what is asked.
    """
    products = {n: m for n, m in model.named_modules() if isinstance(m, (FakeLinear, Product))}
    kept = {name: Kept() for name in products}
    samples = first_images(ctx, images)
    total = min(images, len(ctx.data))
    grads = [(p, p.requires_grad) for p in model.parameters()]
    with torch.enable_grad(), evaluating(model), evaluating(teacher), _frugal(model):
        # Gradients have to reach every product, but no weight.
        model.requires_grad_(False)
        for i, sample in enumerate(ctx.progress.track(samples, label="importance", total=total)):
            question = asked(model, sample, i, prompts)
            with torch.no_grad():
                wanted = answer(teacher, sample, question)
            with _recording(products, kept):
                torch.autograd.backward(difference(answer(model, sample, question), wanted))
        for parameter, flag in grads:
            parameter.requires_grad_(flag)
    return kept


def difference(found: Answer, wanted: Answer) -> Tensor:
    """Divergence of masks, a mean over pixels, and of scores, a mean over masks."""
    masks = _divergence(wanted.logits.sigmoid(), found.logits.sigmoid())
    return masks + _divergence(wanted.scores, found.scores)


def search(
    layer: FakeLinear | Product, kept: Kept, true: nn.Module | None, *, candidates: int, rounds: int
) -> None:
    """Choose the scales of both factors in turn; those that there are belong to the candidates.

    Args:
        layer: changed.
        kept: rows of its product.
        true: for a layer, what it was in floating point.
        candidates: scales tried for a factor.
        rounds: times that each factor has its turn.
    """
    if not kept.importance:
        return
    shares = [1.0, *torch.linspace(0.01, 1.2, candidates).tolist()]
    if isinstance(layer, FakeLinear):
        assert isinstance(true, nn.Linear)
        left = layer.input
        a, b = [torch.cat(kept.left)], [true.weight.detach().float().T]
        importance = [torch.cat(kept.importance)]
    else:
        # Calls of boxes and of points have not the same tokens.
        left, a, b, importance = layer.left, kept.left, kept.right, kept.importance
    targets = [x @ y for x, y in zip(a, b, strict=True)]

    def errors(x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
        calls = zip(x, y, targets, importance, strict=True)
        return [(p @ q - wanted).square() * share for p, q, wanted, share in calls]

    def total(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return torch.stack([error.sum() for error in errors(x, y)]).sum()

    def weight(scale: Tensor) -> list[Tensor]:
        assert isinstance(layer, FakeLinear)
        return [layer.grid.fake(b[0], scale, layer.weight_zero)]

    def tried(factor: Quantizer, x: list[Tensor], scale: Tensor) -> list[Tensor]:
        factor.scale = scale
        return [factor(call) for call in x]

    def choose_left(y: list[Tensor]) -> list[Tensor]:
        if isinstance(left, Quantizer):
            left.scale = best(left.scale, shares, lambda s: total(tried(left, a, s), y))
        return [left(call) for call in a]

    def choose_right(x: list[Tensor]) -> None:
        if isinstance(layer, FakeLinear):
            now = layer.weight_scale
            layer.weight_scale = best(now, shares, lambda s: errors(x, weight(s))[0].sum(0))
        elif isinstance(right := layer.right, Quantizer):
            right.scale = best(right.scale, shares, lambda s: total(x, tried(right, b, s)))

    for _ in range(rounds):
        if isinstance(layer, FakeLinear):
            y = weight(layer.weight_scale)
        else:
            y = [layer.right(call) for call in b]
        choose_right(choose_left(y))
    if isinstance(layer, FakeLinear):
        with torch.no_grad():
            layer.weight.copy_(b[0].T)
        layer.settle()


@torch.no_grad()
def best(start: Tensor, shares: Sequence[float], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The multiple of a scale with the least loss; of equals the first.

    Args:
        start: () or (C,) scales.
        shares: factors that are tried.
        loss: of scales, of the same shape.
    """
    found, least = start, torch.full_like(start, torch.inf)
    for share in shares:
        value = loss(share * start)
        better = value < least
        found = torch.where(better, share * start, found)
        least = torch.where(better, value, least)
    return found


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Kullback and Leibler's, of Bernoulli variables, a mean."""
    p, q = (x.float().clamp(EPS, 1 - EPS) for x in (wanted, found))
    return (F.binary_cross_entropy(q, p) - F.binary_cross_entropy(p, p)).mean()


@contextmanager
def _recording(products: dict[str, Any], kept: dict[str, Kept]) -> Iterator[None]:
    """Keep rows of every product that a gradient reaches."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            factors, rows = _rows(inputs, isinstance(module, Product))

            def arrived(gradient: Tensor) -> None:
                kept[name].left.append(factors[0])
                kept[name].right.extend(factors[1:])
                kept[name].importance.append(rows(gradient).square())

            output.register_hook(arrived)  # type: ignore[no-untyped-call]

        return hook

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The first ones get what depends on nothing that has a gradient.
        first = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        return (first, *inputs[1:])

    handles = [module.register_forward_hook(watch(name)) for name, module in products.items()]
    handles += [module.register_forward_pre_hook(begin) for module in products.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(inputs: tuple[Tensor, ...], product: bool) -> tuple[list[Tensor], Any]:
    """Some rows of the left factor, all of the right; and what takes those rows of the output."""

    def maps(x: Tensor) -> Tensor:
        x = x.detach().float()
        if not product:
            return x.flatten(0, -2)
        every = x.flatten(0, -3)
        some = min(len(every), MAPS)
        return every[torch.arange(some, device=x.device) * len(every) // some]

    left = maps(inputs[0])
    count = left.shape[-2]
    kept = torch.arange(min(count, ROWS), device=left.device) * count // min(count, ROWS)

    def rows(x: Tensor) -> Tensor:
        return maps(x)[..., kept, :].clone()

    return [rows(inputs[0]), *(maps(x).clone() for x in inputs[1:])], rows


@contextmanager
def _frugal(model: Any) -> Iterator[None]:
    """Recompute the encoder's blocks going back: the maps of all at once would fill the memory."""
    blocks = list(getattr(model.image_encoder, "blocks", ()))
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
