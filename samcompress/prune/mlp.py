"""Hidden units of MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError, ModelError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._groups import best, keep_hidden, kept_count, share_out
from ._importance import disturbed_taylor, magnitude


@register
@dataclass(frozen=True, kw_only=True)
class Mlp(Transform, family="prune", phase=20):
    """Remove the hidden units of least importance from SAM's MLPs.

    Two thirds of a ViT encoder's weights are in its MLPs, and their units hang together with
    nothing else. Use it for a moderate cut that changes no other shape. Do not expect much from it
    at large images, where attention takes the time, and plan on distillation after more than about
    a fifth.

    Args:
        ratio: share of hidden units removed, between 0 and 1.
        criterion: what is thought unimportant. "taylor": what the embedding (or, in the decoder,
            the masks) is least sensitive to; needs images, no labels. "magnitude": small weights.
            "random": drawn by `seed`; the control that a criterion has to beat.
        where: MLPs to prune; those of the decoder are
            ``where="mask_decoder.transformer.layers.*.mlp"``.
        scope: "local" takes `ratio` of each MLP; "global" takes it of all together, more where more
            units are unimportant.
        round_to: kept units are a multiple of this, rounded down; kernels like multiples of 8.
        images: at most so many images for "taylor".
        seed: of the noise of "taylor" and of "random".

    Raises:
        ConfigError: if a field is out of range, or `ratio` would empty an MLP.
        NoEffectError: if `where` matches no MLP of segment_anything's kind.
        ModelError: if an MLP is of other layers than `torch.nn.Linear`, e.g. quantised already, or
            a weight is not finite.
        DataError: if "taylor" gets no image.

    Effect:
        Parameters, multiply-accumulates, bytes and time fall; ``ratio=0.5`` on ``vit_b`` removes
        28.3 of 93.7 million parameters and 116 of 486 GMAC (29 of 114 at 512 pixels, where CPU time
        falls by 19 %). "taylor" takes about four times as long as encoding its images.

    Composes with:
        After `ImageSize`, whose input size the scores are then for; before distillation, which wins
        accuracy back, and before quantisation and export. Can be repeated.

    Source:
        Taylor scores: P. Molchanov et al., 2019, arXiv 1906.10771; disturbed target and no labels:
        Z. Chen et al. (SlimSAM), 2023, arXiv 2312.05284. We sum squared gradients over images where
        SlimSAM sums the gradients themselves, whose noise does not fall with more images, and take
        ``MLPBlock`` apart directly instead of tracing. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.prune.Mlp(ratio=0.5, criterion="magnitude")(sc.build("tiny"))
        >>> small.image_encoder.blocks[0].mlp.lin1
        Linear(in_features=64, out_features=96, bias=True)
    """

    ratio: float = 0.25
    criterion: Literal["taylor", "magnitude", "random"] = "taylor"
    where: Where = Where(("image_encoder.blocks.*.mlp",))
    scope: Literal["local", "global"] = "local"
    round_to: int = 8
    images: int = 16
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Only "taylor" reads images."""
        return self.criterion == "taylor"

    def validate(self) -> None:
        """Check ranges."""
        self.between("ratio", 0, 1)
        for name in ("round_to", "images"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected="at least 1",
                )

    def check(self, model: nn.Module) -> None:
        """Check that there are MLPs to prune and that something of each will be left."""
        self._blocks(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Score, choose, cut."""
        blocks = self._blocks(model)
        scores = self._scores(model, blocks, ctx)
        for name, values in scores.items():
            if not torch.isfinite(values).all():
                raise ModelError(
                    f"{self.label}: the importance of units is not a finite number.",
                    where=name,
                    got=f"{int((~torch.isfinite(values)).sum())} of {len(values)} scores",
                    expected="a model with finite weights and outputs",
                )
        counts = {n: kept_count(len(s), self.ratio, self.round_to) for n, s in scores.items()}
        if self.scope == "global":
            counts = share_out(scores, sum(counts.values()), self.round_to)
        kept = {name: best(values, counts[name]) for name, values in scores.items()}
        return self.rebuild(model, {"kept": kept})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Cut the same units out again."""
        for name, kept in state["kept"].items():
            keep_hidden(model.get_submodule(name), kept)
        return state

    def _scores(
        self, model: nn.Module, blocks: dict[str, MLPBlock], ctx: Context
    ) -> dict[str, Tensor]:
        if self.criterion == "magnitude":
            return {name: magnitude(block) for name, block in blocks.items()}
        if self.criterion == "random":
            drawn = torch.Generator().manual_seed(self.seed)
            return {
                name: torch.rand(block.lin1.out_features, generator=drawn)
                for name, block in blocks.items()
            }
        return disturbed_taylor(model, blocks, self._samples(ctx), seed=self.seed)

    def _samples(self, ctx: Context) -> Iterator[Any]:
        count = 0
        wanted = islice(ctx.data.readable(), self.images)
        for sample in ctx.progress.track(
            wanted, label="images", total=min(self.images, len(ctx.data))
        ):
            count += 1
            yield sample
        if not count:
            raise DataError(
                f"{self.label} could read none of its images.",
                where=ctx.data.name,
                got="; ".join(map(str, ctx.data.skipped[:3])),
                fix='mend the data, or use criterion="magnitude"',
            )

    def _blocks(self, model: nn.Module) -> dict[str, MLPBlock]:
        blocks: dict[str, Any] = dict(self.where.select(model, MLPBlock, step=self.label))
        for name, block in blocks.items():
            for layer in ("lin1", "lin2"):
                if type(getattr(block, layer)) is not nn.Linear:
                    raise ModelError(
                        f"{self.label} cannot cut a layer that was replaced.",
                        where=f"{name}.{layer}",
                        got=type(getattr(block, layer)).__name__,
                        expected="torch.nn.Linear",
                        fix="prune first, e.g. sc.prune.Mlp() | sc.quantize.Int8Weights()",
                    )
            units = block.lin1.out_features
            if not kept_count(units, self.ratio, self.round_to):
                raise ConfigError(
                    f"{self.label}: nothing of an MLP would be left.",
                    where=f"{name} with {units} hidden units",
                    got=f"ratio={self.ratio}, round_to={self.round_to}",
                    expected=f"at least {self.round_to} units left",
                    fix="a smaller ratio=" + (", or round_to=1" if self.round_to > 1 else ""),
                )
        return blocks
