"""A share for every layer, so that the whole costs no more than it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..core.budget import Limit
from ..core.devices import device
from ..core.errors import ConfigError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State
from ._budget import (
    Counter,
    Layer,
    Meter,
    Plan,
    Stopwatch,
    after,
    by_damage,
    by_scores,
    by_share,
    fewest,
    nearest,
    smallest,
    whole,
)
from ._groups import best
from ._importance import WITHOUT_DATA, Criterion
from ._sensitivity import RATIOS, Axes, Sensitivity, measured

MEASURED = ("embedding", "masks")


@register
@dataclass(frozen=True, kw_only=True)
class Budget(Axes, family="prune", phase=20):
    """Prune until a model has so few parameters or multiply-accumulates, or is so fast.

    It finds how much each layer is to lose, so use it where the goal is a size or a time rather
    than a `ratio`. Time is measured on the device at hand while it searches: a head and a hidden
    unit save differently on each. Distil afterwards.

    Args:
        budget: ``"parameters<=30M"`` of the whole model; ``"macs<=200G"`` of encoding an image and
            decoding a box; ``"latency_ms<=50 on cpu"``, the time of the same, batch 1, without
            ``on`` where the model is. ``%`` means of the model as it comes to this step:
            ``"latency_ms<=50%"`` halves its time.
        axes: what may be cut: "heads" or "head_dims", "mlp" and "channels" of the image encoder,
            and "decoder", all that `Decoder` cuts.
        criterion: which units of a layer go first; see `Mlp`.
        ratios: how much each layer loses. "embedding" measures a curve first, how far the embedding
            changes when the layer alone loses 10 to 75 %, and takes whatever does least damage for
            what it saves; "masks" does so by the IoU of annotated objects; see `sensitivity`.
            "scores" takes the same share of all layers alike in kind and cost, more of those with
            more unimportant units; "equal" the same share of every layer.
        max_ratio: largest share a layer may lose, between 0 and 1.
        round_to: hidden units, channels and dimensions of heads left are a multiple of this; "auto"
            is what suits the device the model is on: 64 on CUDA, 32 elsewhere, for dimensions 8,
            less for narrow layers. Heads are counted one by one.
        images: at most so many images are looked at for `criterion`, and two for the curve.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range, the device of `budget` is not there, or not even
            the smallest model that may be made meets it.
        NoEffectError: if the model meets it already, or has no such units.
        ModelError: if a layer was replaced, e.g. quantised already, a weight is not finite, or
            "channels" meets an encoder without ViT blocks.
        DataError: if there is no image to look at, or for "masks" or "taylor" no annotated object.

    Effect:
        Parameters and multiply-accumulates are counted exactly: one cut fewer would be too much. A
        time is the median of seven calls or more, three of a slow model, in turn with the model as
        it came; it ends below its budget and within 5 %, as far as the machine is quiet. The curve
        takes four encodings of two images for each layer. The state tells each layer's share, the
        cost before and after, and the curve.

    Composes with:
        After `ImageSize` and `Blocks`; before distillation, `attention.Fused`, quantisation and
        export. Time is that of the model as it is at this step.

    Source:
        Ratios by measured sensitivity: H. Li et al., 2017, arXiv 1608.08710; time measured on the
        device: NetAdapt, T.-J. Yang et al., 2018, arXiv 1804.03230. We measure once and order all
        cuts by damage for saving, where NetAdapt measures and trains at every step. Own code.

    Example:
        >>> import samcompress as sc
        >>> halve = sc.prune.Budget(budget="macs<=50%", criterion="magnitude", ratios="equal")
        >>> small = halve(sc.build("tiny"))
        >>> cost = sc.lineage(small)[-1].state["cost"]
        >>> small.image_encoder.blocks[0].attn.num_heads, cost["after"] <= cost["before"] / 2
        (1, True)
    """

    budget: str = "macs<=50%"
    axes: tuple[str, ...] = ("heads", "mlp")
    criterion: Criterion = "disturbed_taylor"
    ratios: Literal["embedding", "masks", "scores", "equal"] = "embedding"
    max_ratio: float = 0.75
    round_to: int | Literal["auto"] = "auto"
    images: int = 16
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Whether images are looked at, for scores or for the curve."""
        return self.criterion not in WITHOUT_DATA or self.ratios in MEASURED

    def validate(self) -> None:
        """Check the budget and ranges."""
        Limit.parse(self.budget)
        self.between("max_ratio", 0, 1)
        super().validate()

    @property
    def most(self) -> float:
        """`max_ratio`."""
        return self.max_ratio

    def check(self, model: nn.Module) -> None:
        """Check that there is something to cut, and the device to time it on."""
        super().check(model)
        limit = Limit.parse(self.budget)
        if limit.quantity == "latency_ms":
            device(limit.place(model))

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """See what can be reached, score, order all cuts, search how many, cut."""
        limit = Limit.parse(self.budget)
        layers = self.layers(model, self.most)
        maker = Stopwatch if limit.quantity == "latency_ms" else Counter
        meter: Meter = maker(model, layers, limit)
        least, prices = self._probe(meter, layers)
        bound = limit.bound(meter.base)
        self._refuse(limit, meter.base, bound, least)
        scores = self.scores(model, [layer.group for layer in layers], ctx)
        cuts, curve = self._cuts(model, layers, scores, prices, ctx)
        plan, cost = self._search(meter, layers, cuts, bound, least)
        lost = [layer for layer in layers if plan[layer.name] < layer.group.units]
        kept = {layer.name: best(scores[layer.name], plan[layer.name]) for layer in lost}
        state: State = {
            "kept": kept,
            "ratios": {layer.name: round(layer.gone(plan[layer.name]), 4) for layer in layers},
            "cost": {
                "unit": limit.quantity,
                "before": meter.base,
                "limit": bound,
                "after": cost,
                "smallest": least,
            },
        }
        if isinstance(meter, Stopwatch):
            state["cost"]["device"] = meter.device
        if curve is not None:
            state["curve"] = curve.to_dict()
        return self.rebuild(model, state)

    def _probe(
        self, meter: Meter, layers: Sequence[Layer]
    ) -> tuple[float, dict[tuple[str, str], float]]:
        """What the smallest model costs, and what a unit of each pool does."""
        full, floor = whole(layers), smallest(layers)
        pools: dict[tuple[str, str], Plan] = {}
        gone: dict[tuple[str, str], int] = {}
        for layer in layers:
            lost = layer.group.units - floor[layer.name]
            if lost and self.ratios in MEASURED:
                earlier = pools.get(layer.pool, full)
                pools[layer.pool] = {**earlier, layer.name: floor[layer.name]}
                gone[layer.pool] = gone.get(layer.pool, 0) + lost
        least, *costs = meter.costs(floor, *pools.values())
        prices = {
            pool: (meter.base - cost) / gone[pool] for pool, cost in zip(pools, costs, strict=True)
        }
        return least, prices

    def _refuse(self, limit: Limit, base: float, bound: float, least: float) -> None:
        if base <= bound:
            raise NoEffectError(
                f"{self.label}: the model meets its budget already.",
                got=limit.shown(base),
                expected=f"more than {limit.shown(bound)}",
                fix=f'budget="{limit.quantity}<=50%"',
            )
        if least > bound:
            raise ConfigError(
                f"{self.label} cannot make the model so small.",
                where=f"budget={self.budget!r} of {limit.shown(base)}",
                got=f"at most {limit.shown(bound)}",
                expected=f"at least {limit.shown(least)}, with axes={self.axes!r} and "
                f"max_ratio={self.max_ratio:g}",
                fix="a larger budget=, more axes=, or a larger max_ratio=",
            )

    def _cuts(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        scores: Mapping[str, Tensor],
        prices: Mapping[tuple[str, str], float],
        ctx: Context,
    ) -> tuple[list[Plan], Sensitivity | None]:
        """All cuts in their order, and the curve it was made from."""
        if self.ratios == "equal":
            return by_share(layers), None
        if self.ratios == "scores":
            return by_scores(layers, scores), None
        free = [layer for layer in layers if len(layer.counts) > 1]
        # What is left at most is measured too, so nothing close to that.
        ratios = [ratio for ratio in RATIOS if ratio + 0.1 < self.max_ratio]
        curve = measured(model, free, scores, ratios, self.ratios, ctx, self.seed)
        return by_damage(free, curve.damage(), prices), curve

    def _search(
        self,
        meter: Meter,
        layers: Sequence[Layer],
        cuts: Sequence[Plan],
        bound: float,
        least: float,
    ) -> tuple[dict[str, int], float]:
        """As few of the cuts as do, and what the model then costs."""
        found: dict[int, float] = {0: meter.base, len(cuts): least}

        def plan(count: int) -> dict[str, int]:
            return after(whole(layers), cuts[:count])

        def cost(count: int) -> float:
            found[count] = meter.costs(plan(count))[0]
            return found[count]

        if isinstance(meter, Stopwatch):
            count = nearest(len(cuts), bound, cost, meter.base, least)
        else:
            count = fewest(len(cuts), bound, cost)
        return plan(count), found[count]
