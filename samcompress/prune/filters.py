"""Filters of convolutional image encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from ..core._require import require
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._filters import Part, Width, axes, dense, keep, size
from ._groups import Group, Member, best, kept_count, share_out
from ._importance import WITHOUT_DATA, Criterion, element_scores
from ._slices import check_finite, readable
from ._traced import EXTRA, PACKAGE, faithful, renamed, widths

ENCODER = "image_encoder"


@register
@dataclass(frozen=True, kw_only=True)
class Filters(Transform, family="prune", phase=20):
    """Remove the filters of least importance from a convolutional image encoder.

    For encoders that are no ViT of SAM's: TinyViT, RepViT, EfficientViT, ResNet and the others of
    `substitute`. torch-pruning traces the encoder; channels that run through it together are
    removed from all its convolutions, batch norms, squeeze-and-excitation and linear layers. What
    goes in and comes out of the encoder stays. Attention's widths and those that a layer norm runs
    over stay too, so do not expect much where these are most of the encoder.

    Args:
        ratio: share of each width removed, between 0 and 1.
        criterion: see `Mlp`. "magnitude" does not see that a batch norm may scale what it finds
            small.
        scope: "local" takes `ratio` of each width; "global" takes as many units of all together,
            more where more are unimportant.
        round_to: kept units are a multiple of this, rounded down. Each width keeps at least so
            many, and one that has no more stays whole.
        where: layers whose outputs may be removed. Channels that several layers add up to go only
            if all of these match.
        images: at most so many images are looked at.
        seed: of what is drawn for a criterion.

    Raises:
        ConfigError: if a field is out of range.
        NoEffectError: if `where` matches nothing that can be cut, or each width would stay whole.
        ModelError: if the image encoder is a ViT of SAM's, cannot be traced, or nothing of it can
            be cut; if a weight is not finite.
        DataError: if a criterion gets no image, or "taylor" no annotated object.
        MissingDependencyError: if torch-pruning is not installed. Loading does not need it.

    Effect:
        Parameters, multiply-accumulates, bytes and time fall. At 1024 pixels ``ratio=0.5`` leaves
        1.9 of RepViT-M1's 5.5 million parameters and 6.9 of 20 GMAC, but 4.0 of TinyViT's 5.7
        million and 25 of 39 GMAC. The card has all encoders.

    Composes with:
        After `substitute`, and after its training; before distillation, which wins accuracy back,
        and before quantisation and export. Can be repeated.

    Source:
        Dependency graph: G. Fang et al. (DepGraph), 2023, arXiv 2301.12900, by the torch-pruning
        package (MIT). We walk its graph ourselves and use only what a trial cut of a copy confirms.
        Scores: see `Mlp`, P. Molchanov et al., 2019, arXiv 1906.10771.

    Example:
        >>> import samcompress as sc
        >>> sam = sc.substitute.LiteViT()(sc.build("tiny"))
        >>> small = sc.prune.Filters(ratio=0.5, criterion="magnitude")(sam)
        >>> small.image_encoder.encoder.stages[1][1].mlp[0][0]
        Conv2d(64, 128, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    ratio: float = 0.25
    criterion: Criterion = "disturbed_taylor"
    scope: Literal["local", "global"] = "local"
    round_to: int = 8
    where: Where = Where((f"{ENCODER}.**",))
    images: int = 16
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at images."""
        return self.criterion not in WITHOUT_DATA

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
        """Check that torch-pruning is there; the encoder may yet be put in by an earlier step."""
        require(PACKAGE, extra=EXTRA, purpose=self.label)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Trace, score, choose, cut."""
        found = {width.name: width for width in self._widths(model)}
        groups = [_group(model, width) for width in found.values()]
        weights = dict.fromkeys(member.weight for group in groups for member in group.members)
        samples = readable(self.label, ctx, self.images) if self.needs_data else ()
        elements = element_scores(model, list(weights), self.criterion, samples, seed=self.seed)
        scores = {group.name: group.reduce(elements) for group in groups}
        check_finite(self.label, scores)
        counts = self._counts(scores)
        kept = {n: best(s, counts[n]) for n, s in scores.items() if counts[n] < found[n].units}
        if not kept:
            raise NoEffectError(
                f"{self.label}: each width would stay whole.",
                got=f"ratio={self.ratio}, round_to={self.round_to}, "
                f"at most {max(width.units for width in found.values())} units in a width",
                fix="a larger ratio=, or a smaller round_to=",
            )
        parts = {name: [part.plain() for part in found[name].parts] for name in kept}
        return self.rebuild(model, {"kept": kept, "parts": parts})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Cut the same units out again; nothing is traced."""
        parts = {name: [Part(*p) for p in found] for name, found in state["parts"].items()}
        keep(model, state["kept"], parts)
        return state

    def _counts(self, scores: dict[str, Tensor]) -> dict[str, int]:
        """How many units each width keeps."""
        step = self.round_to
        found = {
            name: max(kept_count(len(s), self.ratio, step), min(step, len(s)))
            for name, s in scores.items()
        }
        return share_out(scores, sum(found.values()), step) if self.scope == "global" else found

    def _widths(self, model: nn.Module) -> list[Width]:
        """Those that can be cut and are asked for."""
        encoder = model.get_submodule(ENCODER)
        if any(isinstance(module, ImageEncoderViT) for module in encoder.modules()):
            raise ModelError(
                f"{self.label} does not cut a ViT of segment_anything, whose tokens a norm runs "
                "over and whose heads share tables of positions.",
                where=ENCODER,
                got=type(encoder).__name__,
                expected="an encoder with convolutions, such as those of sc.substitute",
                fix="sc.prune.Heads, sc.prune.Mlp or sc.prune.Channels",
            )
        names = {name for name, _ in self.where.select(model, step=self.label)}
        traced = widths(encoder, self.label)
        asked = [w for w in traced if names.issuperset(_makers(encoder, w))]
        if traced and not asked:
            fewest = min((_makers(encoder, width) for width in traced), key=len)
            raise NoEffectError(
                f"{self.label} matched no layer it can act on.",
                where=repr(self.where),
                expected=f"all layers that make the same channels, e.g. {', '.join(fewest)}",
                fix="widen include=, or leave out exclude=",
            )
        found = [renamed(width, f"{ENCODER}.") for width in faithful(encoder, asked)]
        if not found:
            raise ModelError(
                f"{self.label} finds no filters in this image encoder that could be cut.",
                where=ENCODER,
                got=type(encoder).__name__,
                expected="channels between torch.nn layers that no norm runs over",
                fix="prune before layers are replaced, e.g. quantised",
            )
        return found


def _makers(encoder: nn.Module, width: Width) -> list[str]:
    """Names in the model of the convolutions and linear layers that give a width."""
    outputs = [part.name for part in width.parts if part.side == "out"]
    return [f"{ENCODER}.{name}" for name in outputs if dense(encoder.get_submodule(name))]


def _group(model: nn.Module, width: Width) -> Group:
    """The weights that say how much each unit matters: those of layers that mix units."""
    members = []
    for part in width.parts:
        if isinstance(part.side, int):
            continue
        layer: Any = model.get_submodule(part.name)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and dense(layer):
            unit = torch.full((size(model, part),), -1)
            unit[part.start : part.start + width.units] = torch.arange(width.units)
            axis = axes(layer, part.side)["weight"]
            members.append(Member(f"{part.name}.weight", axis, unit))
    return Group(width.name, width.units, tuple(members))
