"""Outliers of tokens moved into weights, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._calibrate import check_images, encoded, evaluating, observe
from ._layers import is_linear
from ._observe import MinMax

LEAST, MOST = 1e-5, 1e5  # factors of a channel
EXACT = 1e-3  # the largest relative change of the embedding; folding in float32 gives about 1e-6


class Fold(NamedTuple):
    """A Linear whose input channels are divided, by the layer before it, and multiplied again.

    Attributes:
        name: of the Linear.
        before: the layer before it.
        first: where the channels begin among the outputs of that layer.
    """

    name: str
    before: Any
    first: int


@register
@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Transform, family="quantize", phase=50):
    """Move outliers of tokens into the weights of the next Linear; the function stays the same.

    Use it before `Int8Static`, `Int8Dynamic` or a simulated technique where few channels are much
    larger than the others, as they take the levels of all. Alone it changes nothing.

    Args:
        alpha: how much of the difficulty moves, 0 to 1: 0.5 shares it equally.
        where: transformer blocks of the image encoder.
        images: calibration images, the first of the data.

    Raises:
        ConfigError: if `alpha` or `images` is out of range.
        DataError: if there are no images, or a layer meets values that are not finite.
        NoEffectError: if a pattern matches no module.
        ModelError: if a match is in the mask decoder, no match is a pre-norm block with floating
            `norm1`, `attn.qkv`, `norm2`, `mlp.lin1`, or folding would change the embedding.

    Effect:
        Same size, speed and function: the embedding moves by less than 1e-5 of its length. Folded
        are `norm1` into `attn.qkv`, `norm2` into `mlp.lin1`, and the values of `attn.qkv` into
        `attn.proj`. Nothing can be folded exactly through GELU, nor in the decoder, whose norms
        feed residuals too.

    Composes with:
        Follows pruning, distillation and `Fused`; comes before everything that rounds.

    Source:
        G. Xiao et al.: SmoothQuant, ICML 2023, arXiv 2211.10438 (code MIT); own code.

    Example:
        >>> import samcompress as sc
        >>> smooth = sc.quantize.SmoothQuant(images=2)(sc.build("tiny"), data=sc.shapes(2))
        >>> len(sc.lineage(smooth)[-1].state["folded"])
        12
    """

    alpha: float = 0.5
    where: Where = Where(("image_encoder.blocks.*",))
    images: int = 32

    @property
    def needs_data(self) -> bool:
        """It looks at the sizes of tokens."""
        return True

    def validate(self) -> None:
        """Check `alpha` and `images`."""
        self.between("alpha", 0, 1, closed=True)
        check_images(self.label, self.images)

    def check(self, model: nn.Module) -> None:
        """Check that there is something to fold."""
        self._folds(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Find how large channels become, then fold; check that the embedding stays."""
        folds = self._folds(model)
        observers = {fold.name: MinMax(fold.name, axis=-1) for fold in folds}
        ranges = observe(model, observers, ctx, images=self.images)
        sample = next(ctx.data.readable())
        with torch.no_grad(), evaluating(model):
            before = encoded(model, sample).float()
            for fold in folds:
                low, high = ranges[fold.name]
                _fold(fold, model.get_submodule(fold.name), torch.maximum(-low, high), self.alpha)
            change = float((encoded(model, sample) - before).norm() / before.norm())
        limit = EXACT if next(model.parameters()).dtype == torch.float32 else 20 * EXACT
        if not change <= limit:
            raise ModelError(
                f"{self.label} would change what this model computes.",
                where=", ".join(self.where.include),
                got=f"an embedding that moves by {change:.2g}",
                expected="norms that feed the next Linear alone",
                fix="leave this step out for this encoder",
            )
        return {"folded": [fold.name for fold in folds]}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Nothing: no shape changed."""
        return state

    def _folds(self, model: nn.Module) -> list[Fold]:
        matched = self.where.select(model, step=self.label)
        decoder = [name for name, _ in matched if not name.startswith("image_encoder")]
        found = [fold for name, block in matched for fold in _folds_of(name, block)]
        if decoder or not found:
            raise ModelError(
                f"{self.label} finds nothing that it can fold exactly.",
                where=(decoder or [name for name, _ in matched])[0],
                got="a decoder, whose norms feed residuals and position codes too"
                if decoder
                else type(matched[0][1]).__name__,
                expected="pre-norm blocks of an image encoder with floating-point Linears",
                fix='where="image_encoder.blocks.*", before layers become integers',
            )
        return found


def _folds_of(name: str, block: Any) -> Iterator[Fold]:
    for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.lin1")):
        before, after = _find(block, norm), _find(block, linear)
        if type(before) is nn.LayerNorm and before.elementwise_affine and is_linear(after):
            yield Fold(f"{name}.{linear}", before, 0)
    qkv, proj = _find(block, "attn.qkv"), _find(block, "attn.proj")
    plain = is_linear(qkv) and is_linear(proj)
    # After pruning, keys may be narrower than values; the layout is then not known here.
    if plain and qkv.out_features == 3 * proj.in_features:
        yield Fold(f"{name}.attn.proj", qkv, 2 * proj.in_features)


def _find(block: nn.Module, path: str) -> Any:
    found: Any = block
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _fold(fold: Fold, linear: Any, largest: Tensor, alpha: float) -> None:
    """Divide what comes out before, multiply the columns."""
    columns = linear.weight.abs().amax(0).float()
    factor = largest.to(columns).pow(alpha) / columns.pow(1 - alpha)
    used = (largest.to(columns) > 0) & (columns > 0)
    factor = torch.where(used, factor.clamp(LEAST, MOST), torch.ones_like(factor))
    rows = slice(fold.first, fold.first + len(factor))
    for tensor in (fold.before.weight, fold.before.bias):
        if tensor is not None:
            shape = (-1, *[1] * (tensor.ndim - 1))
            tensor[rows] = (tensor[rows].float() / factor.view(shape)).to(tensor.dtype)
    linear.weight.copy_(linear.weight.float() * factor)
