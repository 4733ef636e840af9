"""What a model loses when one of its layers alone loses units."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core._progress import Progress, ProgressLike
from ..core.contract import check_sam, device_of
from ..core.data import as_dataset
from ..core.display import Cell, Column, Table
from ..core.errors import ConfigError, DataError, NoEffectError
from ..core.figures import axes, plain
from ..core.predict import decode, encode, preprocess
from ..core.prompt import Prompt
from ..core.transform import Context, State
from ..core.where import Where
from ._budget import Layer, choices, smaller
from ._groups import Group, best
from ._importance import Criterion, _at_points
from ._slices import Cuts, check_blocks, readable
from .decoder import ATTENTION, HEADS, MLPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot
    from matplotlib.figure import Figure

By = Literal["embedding", "masks"]
RATIOS = (0.1, 0.3, 0.5, 0.7)
IMAGES = 2  # that a curve is measured on; an image has thousands of tokens
BLOCKS = "image_encoder.blocks.*"
AXES: dict[str, dict[str, Where]] = {
    "heads": {"heads": Where((f"{BLOCKS}.attn",))},
    "head_dims": {"head_dims": Where((f"{BLOCKS}.attn",))},
    "mlp": {"mlp": Where((f"{BLOCKS}.mlp",))},
    "channels": {"channels": Where(("image_encoder",))},
    "decoder": {"mlp": MLPS, "token_heads": ATTENTION, "head_units": HEADS},
}


class Axes(Cuts):
    """Several kinds of units at once. Not a dataclass: see `Cuts`."""

    axes: tuple[str, ...]

    @property
    def targets(self) -> Mapping[str, Where]:
        """What the axes stand for."""
        found: dict[str, Where] = {}
        for axis in self.axes:
            for kind, where in AXES[axis].items():
                earlier = found[kind].include if kind in found else ()
                found[kind] = Where((*earlier, *where.include))
        return found

    def validate(self) -> None:
        """Check that the axes are there, once each, and do not cut the same modules."""
        super().validate()
        odd = [axis for axis in self.axes if axis not in AXES]
        if odd or not self.axes or len(set(self.axes)) < len(self.axes):
            raise ConfigError(
                f"{self.label}: axes has a value it cannot take.",
                got=repr(self.axes),
                expected=f"some of {', '.join(map(repr, AXES))}, each once",
            )
        if {"heads", "head_dims"} <= set(self.axes):
            raise ConfigError(
                f"{self.label} cuts each attention in one way.",
                got=f"axes={self.axes!r}",
                fix='"heads" here, and sc.prune.HeadDims as a step of its own',
            )

    @property
    def most(self) -> float:
        """Share that a module may lose at most."""
        return 1.0

    def granularity(self, kind: str, groups: Sequence[Group]) -> int:
        """Heads are counted one by one."""
        one = kind in ("heads", "token_heads")
        return 1 if one else super().granularity(kind, groups)

    def check(self, model: nn.Module) -> None:
        """Check that there is something to cut."""
        if "channels" in self.axes:
            check_blocks(self.label, model)
        self.layers(model, self.most)

    def layers(self, model: nn.Module, most: float) -> list[Layer]:
        """All that can be cut, and how far, if none may lose more than a share.

        Raises:
            NoEffectError: if nothing can.
        """
        found = [
            Layer(kind, g, choices(g.units, self.granularity(kind, (g,)), most))
            for kind in self.targets
            for g in self.groups(model, kind)
        ]
        if all(len(layer.counts) == 1 for layer in found):
            raise NoEffectError(
                f"{self.label} finds no module that can lose anything.",
                got=f"at most {max(layer.group.units for layer in found)} units in each, "
                f"round_to={self.round_to!r}",
                fix="round_to=1, or other axes=",
            )
        return found


class Point(NamedTuple):
    """One measurement.

    Attributes:
        ratio: share that was to be removed.
        left: units left, by the rounding of the layer.
        error: see `Sensitivity`.
    """

    ratio: float
    left: int
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """What a model loses when one of its layers alone loses units; prints itself as a table.

    Attributes:
        by: what was measured. "embedding": change of the image embedding relative to its norm; for
            layers of the mask decoder that of logits and scores at drawn points, as the root of the
            sum of squares. "masks": fall of the mean IoU of masks.
        units: of each layer, before.
        curves: of each layer, by growing share removed.
    """

    by: By
    units: dict[str, int]
    curves: dict[str, tuple[Point, ...]]

    def table(self) -> Table:
        """One row a layer, one column a share."""
        ratios = sorted({point.ratio for curve in self.curves.values() for point in curve})
        what = "relative error" if self.by == "embedding" else "mean IoU lost"
        columns = (
            Column("layer", align="left"),
            Column("units"),
            *(Column(f"{100 * ratio:g} %", group=what) for ratio in ratios),
        )
        rows = []
        for name, curve in self.curves.items():
            errors = {point.ratio: point.error for point in curve}
            rows.append((name, self.units[name], *(Cell(errors.get(r)) for r in ratios)))
        return Table(columns, rows, title="Each layer alone, by the share of its units removed")

    def plot(self, ax: Plot | None = None) -> Figure:
        """The curves, one line a layer, later ones darker; drawn into `ax` if given."""
        from matplotlib import colormaps

        figure, ax = axes(ax, (7.2, 4.4))
        kinds = list(dict.fromkeys(_kind(name) for name in self.curves))
        for kind, colours in zip(
            kinds, ("Blues", "Oranges", "Greens", "Purples") * 4, strict=False
        ):
            names = [name for name in self.curves if _kind(name) == kind]
            for place, name in enumerate(names, 1):
                shares = [100 * (1 - p.left / self.units[name]) for p in self.curves[name]]
                errors = [point.error for point in self.curves[name]]
                colour = colormaps[colours](0.35 + 0.6 * place / len(names))
                label = kind if place == len(names) else None
                ax.plot(shares, errors, ".-", color=colour, label=label)
        ax.set_xlabel("units removed, %")
        ax.set_ylabel("relative error" if self.by == "embedding" else "mean IoU lost")
        plain(ax)
        ax.legend(frameon=False)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: for each layer, units left and error."""
        return {name: [[p.left, p.error] for p in curve] for name, curve in self.curves.items()}

    def damage(self) -> dict[str, dict[int, float]]:
        """What adds up over layers, by units left: squared errors, or IoU."""
        power = 2 if self.by == "embedding" else 1
        return {
            name: {p.left: max(p.error, 0.0) ** power for p in curve}
            for name, curve in self.curves.items()
        }

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table().html()


def _kind(name: str) -> str:
    """Last part of a module's name that is a word."""
    return [part for part in name.partition("@")[0].split(".") if not part.isdigit()][-1]


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    axes: Sequence[str] = ("heads", "mlp"),
    by: By = "embedding",
    ratios: Sequence[float] = RATIOS,
    criterion: Criterion = "disturbed_taylor",
    round_to: int | Literal["auto"] = "auto",
    images: int = 16,
    seed: int = 0,
    progress: ProgressLike = True,
) -> Sensitivity:
    """Measure what a SAM loses when one of its layers alone loses units.

    Use it to see which layers bear a cut before choosing `where` and `ratio` of a technique;
    `Budget` does both by itself. Each layer costs as many encodings of two images as there are
    `ratios`.

    Args:
        model: a SAM; not changed.
        data: samples; only the first `images` are looked at, and the first two for the curve.
        axes: as in `Budget`.
        by: "embedding", or "masks": fall of the mean IoU with the annotated objects of `data`,
            asked for by their boxes.
        ratios: shares to remove, each between 0 and 1.
        criterion: which units go first; see `Mlp`.
        round_to: as in `Budget`.
        images: at most so many images for the criterion.
        seed: of what is drawn for it.
        progress: as in `Pipeline.__call__`.

    Raises:
        ConfigError: if an argument is out of range.
        NoEffectError: if the model has no such units.
        ModelError: if a layer was replaced, e.g. quantised already, or a weight is not finite.
        DataError: if there is no image, or for "masks" or "taylor" no annotated object.

    Example:
        >>> import samcompress as sc
        >>> found = sensitivity(sc.build("tiny"), sc.shapes(1), axes=["mlp"], criterion="random")
        >>> len(found.curves), [point.left for point in found.curves["image_encoder.blocks.0.mlp"]]
        (4, [176, 128, 96, 64])
    """
    check_sam(model)
    if not ratios:
        raise ConfigError(f"{_Curve.name}: ratios is empty.", expected="at least one share")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ConfigError(
                f"{_Curve.name}: ratios is out of range.", got=ratio, expected="0 < ratio < 1"
            )
    curve = _Curve(
        axes=tuple(axes), criterion=criterion, round_to=round_to, images=images, seed=seed, by=by
    )
    curve.check(model)
    ctx = Context(
        step=_Curve.name,
        dataset=as_dataset(data),
        device=device_of(model),
        progress=Progress(progress, _Curve.name),
    )
    layers = [layer for layer in curve.layers(model, max(ratios)) if len(layer.counts) > 1]
    scores = curve.scores(model, [layer.group for layer in layers], ctx)
    return measured(model, layers, scores, ratios, by, ctx, seed)


@dataclass(frozen=True, kw_only=True)
class _Curve(Axes, family="prune", phase=20):
    """What `sensitivity` was asked for."""

    name: ClassVar[str] = "prune.sensitivity"

    axes: tuple[str, ...]
    criterion: Criterion
    round_to: int | Literal["auto"]
    images: int
    seed: int
    by: By

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Nothing."""
        return {}


def measured(
    model: nn.Module,
    layers: Sequence[Layer],
    scores: Mapping[str, Tensor],
    ratios: Iterable[float],
    by: By,
    ctx: Context,
    seed: int,
) -> Sensitivity:
    """Cut each layer alone, its least important units first, and see what it does.

    Args:
        model: a SAM; a float32 copy is worked on.
        layers: those to be cut; the smallest of their counts is always measured.
        scores: of their units.
        ratios: shares to remove; what a layer's rounding makes equal is measured once.
        by: see `Sensitivity`.
        ctx: for the images, and to show how far it is.
        seed: of the points that the mask decoder is asked at.
    """
    twin = copy.deepcopy(model).float().eval()
    judge = _Judge(twin, list(readable(ctx.step, ctx, IMAGES)), by, ctx.step, seed)
    curves = {}
    for layer in ctx.progress.track(layers, label="layers"):
        wanted: dict[int, float] = {}
        for ratio in sorted(ratios):
            left = min(layer.counts, key=lambda count: abs(layer.gone(count) - ratio))
            wanted.setdefault(left, ratio)
        wanted.setdefault(layer.counts[-1], round(layer.gone(layer.counts[-1]), 3))
        wanted.pop(layer.group.units, None)
        points = []
        for left, ratio in wanted.items():
            kept = {layer.name: best(scores[layer.name], left)}
            small = smaller(twin, [layer], kept)
            points.append(Point(ratio, left, judge(small, layer.name)))
        curves[layer.name] = tuple(points)
    return Sensitivity(by, {layer.name: layer.group.units for layer in layers}, curves)


class _Judge:
    """Compares a cut model's answers with those of the whole one, or with what is annotated."""

    def __init__(
        self, model: nn.Module, samples: Sequence[Any], by: By, label: str, seed: int
    ) -> None:
        self.model, self.samples, self.by, self.seed = model, samples, by, seed
        if by == "masks":
            self.objects = [
                [o for o in s.instances if not o.crowd and o.mask.any()] for s in samples
            ]
            if not any(self.objects):
                raise DataError(
                    f"{label} needs annotated objects to compare masks with.",
                    got="images without any",
                    expected="data with masks",
                    fix='"embedding" instead of "masks" needs images only',
                )
            self.embeddings = encode(model, [s.image for s in samples])
            self.base = self._iou(model, self.embeddings)
        else:
            self.features = [self._encode(model, s) for s in samples]
            self.answers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, small: nn.Module, name: str) -> float:
        """The error of a model in which the module `name` was cut."""
        inside = name.startswith("image_encoder")
        if self.by == "masks":
            same = self.embeddings
            seen = encode(small, [s.image for s in self.samples]) if inside else same
            return self.base - self._iou(small, seen)
        if inside:
            return _apart([self._encode(small, s) for s in self.samples], self.features)
        if not self.answers:
            self.answers = self._decode(self.model)
        pairs = zip(
            zip(*self._decode(small), strict=True), zip(*self.answers, strict=True), strict=True
        )
        return math.hypot(*(_apart(found, wanted) for found, wanted in pairs))

    @torch.no_grad()
    def _encode(self, model: Any, sample: Any) -> Tensor:
        features: Tensor = model.image_encoder(preprocess(model, sample.image)[0][None])
        return features

    @torch.no_grad()
    def _decode(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Logits and scores at points drawn in each image, on the whole model's embeddings."""
        found = []
        for features, sample in zip(self.features, self.samples, strict=True):
            drawn = torch.Generator().manual_seed(self.seed)
            found.append(_at_points(model, features, sample.size, drawn))
        return found

    def _iou(self, model: nn.Module, embeddings: Sequence[Any]) -> float:
        """Mean over the objects, asked for by their boxes."""
        values = []
        for embedding, objects in zip(embeddings, self.objects, strict=True):
            prompts = [Prompt(box=o.box) for o in objects]
            masks = decode(model, embedding, prompts).masks
            for found, one in zip(masks if masks is not None else (), objects, strict=True):
                mask = torch.from_numpy(one.mask)
                both, either = found[0].cpu() & mask, found[0].cpu() | mask
                values.append(float(both.sum() / either.sum()))
        return sum(values) / len(values)


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean distance, relative to the norm."""
    ratios = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return sum(ratios) / len(ratios)
