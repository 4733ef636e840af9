"""What all techniques that cut units out of layers have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

from ..core.contract import device_of
from ..core.errors import ConfigError, DataError, ModelError, NoEffectError
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._groups import KINDS, Group, best, kept_count, share_out, step_of
from ._importance import WITHOUT_DATA, Criterion, element_scores

LAYERS = (nn.Linear, nn.Conv2d)


class Cuts(Transform):
    """Find units, score them, cut. Not a dataclass: a technique says which fields it has."""

    criterion: Criterion
    round_to: int | Literal["auto"]
    images: int
    seed: int

    @property
    @abstractmethod
    def targets(self) -> Mapping[str, Where]:
        """Kinds of units, as in `KINDS`, and the modules that lose some."""

    @property
    def needs_data(self) -> bool:
        """Whether the criterion looks at images."""
        return self.criterion not in WITHOUT_DATA

    def validate(self) -> None:
        """Check ranges."""
        kinds = {f.name: str(f.type) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name in ("round_to", "images"):
            value = getattr(self, name)
            if name == "round_to" and value == "auto":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=repr(value),
                    expected="at least 1" + ', or "auto"' * ("auto" in kinds[name]),
                )

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Cut the same units out again."""
        for name, kept in state["kept"].items():
            module = model.get_submodule(name.partition("@")[0])
            rules = (KINDS[kind] for kind in self.targets)
            next(r for r in rules if isinstance(module, r.owner)).cut(model, name, kept)
        return state

    def groups(self, model: nn.Module, kind: str) -> list[Group]:
        """What could be cut, module by module.

        Raises:
            NoEffectError: if no module has such units.
            ModelError: if the image encoder is no ViT of segment_anything, or a layer of a module
                was replaced.
        """
        rule, where = KINDS[kind], self.targets[kind]
        try:
            named = where.select(model, step=self.label)
        except NoEffectError:
            check_vit(self.label, model, where)
            raise
        owners = [(name, module) for name, module in named if isinstance(module, rule.owner)]
        if not owners:
            raise NoEffectError(
                f"{self.label} matched no module it can act on.",
                where=repr(where),
                got=", ".join(sorted({type(module).__name__ for _, module in named})[:3]),
                expected=f"{rule.owner.__name__} of segment_anything",
                fix="prune before modules are replaced; other encoders with sc.prune.Filters",
            )
        found = []
        for name, module in owners:
            for inner, found_layer in rule.layers(module).items():
                if type(found_layer) not in LAYERS:
                    raise ModelError(
                        f"{self.label} cannot cut a layer that was replaced.",
                        where=f"{name}.{inner}",
                        got=type(found_layer).__name__,
                        expected=" or ".join(f"torch.nn.{layer.__name__}" for layer in LAYERS),
                        fix="prune first, then quantize",
                    )
            found += rule.groups(model, name)
        return [replace(group, device=device_of(model).type) for group in found]

    def granularity(self, kind: str, groups: Sequence[Group]) -> int:
        """Units left of these groups are a multiple of this."""
        return step_of(kind, groups) if self.round_to == "auto" else self.round_to

    def scores(self, model: nn.Module, groups: Sequence[Group], ctx: Context) -> dict[str, Tensor]:
        """How much each unit matters, for each group.

        Raises:
            ModelError: if a score is not a finite number.
            DataError: if the criterion needs images, and none can be read.
        """
        names = list(dict.fromkeys(m.weight for group in groups for m in group.members))
        blind = self.criterion in WITHOUT_DATA
        samples = () if blind else readable(self.label, ctx, self.images)
        elements = element_scores(model, names, self.criterion, samples, seed=self.seed)
        found = {group.name: group.reduce(elements) for group in groups}
        check_finite(self.label, found)
        return found


@dataclass(frozen=True, kw_only=True)
class Slices(Cuts):
    """A share of the units of each module."""

    ratio: float = 0.25
    criterion: Criterion = "disturbed_taylor"
    round_to: int | Literal["auto"] = 8
    images: int = 16
    seed: int = 0

    def validate(self) -> None:
        """Check ranges."""
        self.between("ratio", 0, 1)
        super().validate()

    def check(self, model: nn.Module) -> None:
        """Check that there are units to cut and that something of each module will be left."""
        for kind in self.targets:
            for group in self.groups(model, kind):
                self._check_group(group, kind)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Score, choose, cut."""
        groups = {kind: self.groups(model, kind) for kind in self.targets}
        scores = self.scores(model, [g for found in groups.values() for g in found], ctx)
        kept: dict[str, list[int]] = {}
        for kind, found in groups.items():
            part = {group.name: scores[group.name] for group in found}
            counts = self.counts(part, found, self.granularity(kind, found))
            kept |= {name: best(values, counts[name]) for name, values in part.items()}
        return self.rebuild(model, {"kept": kept})

    def _check_group(self, group: Group, kind: str) -> None:
        step = self.granularity(kind, (group,))
        if not kept_count(group.units, self.ratio, step):
            raise ConfigError(
                f"{self.label}: nothing of a module would be left.",
                where=f"{group.name} with {group.units} units",
                got=f"ratio={self.ratio}, round_to={step}",
                expected=f"at least {step} units left",
                fix="a smaller ratio=" + (", or round_to=1" if step > 1 else ""),
            )

    def counts(
        self, scores: Mapping[str, Tensor], groups: Sequence[Group], step: int
    ) -> dict[str, int]:
        """How many units each group keeps."""
        return {name: kept_count(len(s), self.ratio, step) for name, s in scores.items()}


@dataclass(frozen=True, kw_only=True)
class Ranked(Slices):
    """Slices of many modules, which may be ranked together."""

    scope: Literal["local", "global"] = "local"

    def counts(
        self, scores: Mapping[str, Tensor], groups: Sequence[Group], step: int
    ) -> dict[str, int]:
        """How many units each group keeps; if ranked together, more where more matter."""
        found = super().counts(scores, groups, step)
        if self.scope == "global":
            for pool in dict.fromkeys(group.pool for group in groups):
                part = {g.name: scores[g.name] for g in groups if g.pool == pool}
                found |= share_out(part, sum(found[name] for name in part), step)
        return found


def readable(label: str, ctx: Context, most: int) -> Iterator[Any]:
    """The first images that can be read.

    Raises:
        DataError: after the last, if there was none.
    """
    count = 0
    wanted = islice(ctx.data.readable(), most)
    for sample in ctx.progress.track(wanted, label="images", total=min(most, len(ctx.data))):
        count += 1
        yield sample
    if not count:
        raise DataError(
            f"{label} could read none of its images.",
            where=ctx.data.name,
            got="; ".join(map(str, ctx.data.skipped[:3])),
            fix="mend the data, or use a criterion that needs none",
        )


def check_finite(label: str, scores: Mapping[str, Tensor]) -> None:
    """Check that units can be ranked.

    Raises:
        ModelError: if a score is not a finite number.
    """
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise ModelError(
                f"{label}: the importance of units is not a finite number.",
                where=name,
                got=f"{int((~torch.isfinite(values)).sum())} of {len(values)} scores",
                expected="a model with finite weights and outputs",
            )


def check_vit(label: str, model: nn.Module, where: Where) -> None:
    """Check that an image encoder that nothing matches in is a ViT of segment_anything's.

    Raises:
        ModelError: if it is another one.
    """
    encoder: Any = model.get_submodule("image_encoder")
    inside = all(pattern.startswith("image_encoder.") for pattern in where.include)
    if inside and not any(isinstance(part, ImageEncoderViT) for part in encoder.modules()):
        raise ModelError(
            f"{label} finds no ViT of segment_anything in the image encoder.",
            where="image_encoder",
            got=type(getattr(encoder, "encoder", encoder)).__name__,
            expected="ImageEncoderViT, or where= with names that this encoder has",
            fix="sc.prune.Filters, which cuts other encoders",
        )


def check_blocks(label: str, model: nn.Module) -> None:
    """Check that the image encoder is a ViT of SAM's, and that only its blocks read its tokens.

    Raises:
        ModelError: if one of the two is not so.
    """
    sam: Any = model
    blocks = list(getattr(sam.image_encoder, "blocks", ()))
    odd = [type(block).__name__ for block in blocks if type(block) is not Block]
    if not blocks or odd:
        raise ModelError(
            f"{label} finds no ViT blocks of segment_anything.",
            where="image_encoder",
            got=", ".join([type(sam.image_encoder).__name__, *odd[:1]]),
            expected="an encoder made of segment_anything.modeling.image_encoder.Block",
            fix="prune before modules are replaced; other encoders with sc.prune.Filters",
        )
    if getattr(sam.mask_decoder, "features", 0):
        raise ModelError(
            f"{label} cannot change tokens that the mask decoder reads too.",
            where="mask_decoder",
            got=type(sam.mask_decoder).__name__,
            expected="a decoder that reads the embedding alone",
            fix="sc.prune.Mlp, sc.prune.Heads or sc.prune.HeadDims",
        )
