"""A supernet: all smaller encoders in one set of weights, and the search for the best of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core import _fit
from ..core._engine import engine_for
from ..core.budget import Limit
from ..core.contract import device_of, embedding_shape
from ..core.devices import device
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.registry import get, register
from ..core.transform import Context, State
from ..core.where import Where
from ._cut import keep_blocks
from ._elastic import MODULES, Sandwich, Space, Subnet, cut, narrowed, options, sort_units
from ._importance import Criterion
from ._search import Costs, costs_of, evolve
from ._slices import Cuts, check_blocks, readable
from ._slim import decided
from .blocks import BLOCKS, Blocks, influence

LEARNER = "distill.encoder"
# Settings that it has by the same names.
SAME = ("batch_size", "accumulate", "lr", "weight_decay", "precision", "workers", "seed")
# Settings that say in what order units and blocks come.
ORDER = ("criterion", "images", "seed")


@register
@dataclass(frozen=True, kw_only=True)
class Supernet(Cuts, family="prune", phase=20):
    """Train all smaller encoders at once, then cut out the best of those that are cheap enough.

    A smaller encoder has fewer heads and hidden units, its own number of each in every block, and
    lacks some blocks. All share the weights of the whole one, so one training serves every budget,
    and a search finds out where to cut. Use it where several sizes are wanted, or where equal
    ratios in all blocks are too crude. For one moderate cut `Heads` and `Mlp` with distillation
    are simpler; the embedding stays as wide as it was, so for a tenth of the size take `SlimSAM`.

    Args:
        budget: what the result may cost, in numbers or as a share of what the model costs:
            ``"macs<=50%"``, ``"parameters<=30M"``, ``"latency_ms<=50 on cpu"``, added up from
            blocks timed by themselves.
        heads: shares of an attention's heads that a subnet may lack, each between 0 and 1; those
            that would leave none are left out.
        hidden: the same of an MLP's hidden units.
        blocks: at most this share of the blocks is left out, >= 0 and < 1; never the first, nor the
            last with global attention.
        criterion: what is thought unimportant, see `Mlp`; subnets lack what is least important.
        round_to: hidden units left are a multiple of this; "auto" for what suits the device.
        images: at most so many are looked at for the order of units, and for a subnet's error.
        epochs: how often each image is seen in training, >= 0; 0 searches without.
        steps: optimiser steps instead of epochs, >= 0; None for epochs.
        subnets: drawn ones that learn in each step beside the largest and the smallest, >= 0.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        lr: highest learning rate of AdamW, > 0.
        weight_decay: of weights; biases and norms have none. >= 0.
        precision: of training; ``bf16`` computes most products in bfloat16.
        workers: processes that read images for training. Changes nothing but the time.
        population: subnets tried in each generation of the search, >= 2.
        generations: after the first, >= 0.
        seed: of scores, of the order of images, of subnets in training, and of the search.

    Raises:
        ConfigError: if a field is out of range, no subnet is as cheap as that, or training
            diverges.
        NoEffectError: if the model costs no more than `budget` as it is.
        ModelError: if the image encoder is not segment_anything's ViT, a layer was replaced, a
            weight is not finite, the decoder reads the tokens too, as in SAM-HQ, or the teacher's
            embeddings have another number of channels.
        DataError: if an image is damaged, or "taylor" finds no annotated object.
        CheckpointError: if a file in ``workdir=`` is damaged.

    Effect:
        An ordinary SAM that costs at most what was asked for, and mostly within a percent of it; a
        time is within a tenth of that, as blocks take a little more or less inside a model.
        By the defaults subnets of ``vit_b`` have 29.9 to 93.7 million parameters, and 121 to 488
        GMAC. A step of training takes about four times as long as one of `distill.Encoder`.

    Composes with:
        After `ImageSize`; before distillation, which the result should get for itself, then
        `attention.Fused`, quantisation and export. With ``workdir=`` a run that was stopped goes on
        where it was, and training is done once for all budgets.

    Source:
        SuperSAM, W. Abebe et al., 2025, arXiv 2501.08504: elastic depth and MLPs of a SAM, the
        sandwich rule, a search. We also make heads elastic, let embeddings learn from the teacher's
        instead of masks from labels, judge subnets by that too, and search by evolution. Sandwich
        rule: J. Yu and T. Huang, 2019, arXiv 1903.05134. Own code.

    Example:
        >>> import samcompress as sc
        >>> budget, quick = "macs<=60%", {"images": 2, "population": 4, "generations": 1}
        >>> find = sc.prune.Supernet(budget=budget, steps=0, **quick)
        >>> small = find(sc.load("tiny"), data=sc.shapes(2))
        >>> facts = sc.lineage(small)[-1].state
        >>> 0.5 < facts["cost_after"] / facts["cost_before"] <= 0.6
        True
    """

    budget: str = "macs<=50%"
    criterion: Criterion = "disturbed_taylor"
    round_to: int | Literal["auto"] = 8
    images: int = 16
    seed: int = 0
    heads: tuple[float, ...] = (0.25, 0.5)
    hidden: tuple[float, ...] = (0.25, 0.5, 0.75)
    blocks: float = 0.25
    epochs: float = 5.0
    steps: int | None = None
    subnets: int = 2
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.01
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = 0
    population: int = 16
    generations: int = 8

    needs_teacher: ClassVar[bool] = True

    @property
    def needs_data(self) -> bool:
        """Always: subnets are compared by what they make of images."""
        return True

    @property
    def targets(self) -> Mapping[str, Where]:
        """Heads and hidden units of the image encoder."""
        return {kind: Where((f"{BLOCKS}.*.{name}",)) for kind, name in MODULES.items()}

    @property
    def trains(self) -> bool:
        """Whether there is training before the search."""
        return self.epochs > 0 if self.steps is None else self.steps > 0

    def validate(self) -> None:
        """Check the fields; those of training as `distill.Encoder` does."""
        super().validate()
        Limit.parse(self.budget)
        self.between("epochs", 0, math.inf, closed=True)
        lowest = {"steps": 0, "subnets": 0, "population": 2, "generations": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.", got=value, expected=f">= {low}"
                )
        shares = {"heads": self.heads, "hidden": self.hidden}
        odd = next(((k, v) for k, found in shares.items() for v in found if not 0 < v < 1), None)
        if odd is None and not 0 <= self.blocks < 1:
            odd = ("blocks", self.blocks)
        if odd is not None:
            raise ConfigError(
                f"{self.label}: {odd[0]} is out of range.",
                got=odd[1],
                expected="shares of what is there, between 0 and 1",
            )
        self._learner()

    def check(self, model: nn.Module) -> None:
        """Check that there is something to leave out, and enough of it."""
        check_blocks(self.label, model)
        for kind in self.targets:
            self.groups(model, kind)
        if self.trains:
            self._learner().check(model)
        limit = Limit.parse(self.budget)
        if limit.quantity == "latency_ms":
            device(limit.place(model))
        # What is asked for in numbers may come true by a step before this one.
        elif limit.relative:
            space = self._space(model)
            self._bound(limit, costs_of(model, space, limit), space)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Sort units, train, search, cut."""
        self._check_teacher(model, ctx)
        space = self._space(model)
        limit = Limit.parse(self.budget)
        costs = costs_of(model, space, limit)
        most = self._bound(limit, costs, space)
        identity = {"step": self.label} | {k: v for k, v in self.params().items() if k in ORDER}
        order = decided(lambda: self._order(model, ctx), model, ctx, identity)
        units = {kind: order[kind] for kind in MODULES}
        sort_units(model, units)
        space = self._space(model, order["blocks"])
        facts = self._train(model, ctx, space) if self.trains else {}
        error = self._error(model, ctx, space)
        count = self.population * (self.generations + 1)
        found = evolve(
            error,
            space,
            costs,
            most,
            population=self.population,
            generations=self.generations,
            seed=self.seed,
            track=lambda subnets: ctx.progress.track(subnets, label="subnets", total=count),
        )
        chosen = min(found, key=found.__getitem__)
        ends = {"error_largest": error(space.largest), "error_smallest": error(space.smallest)}
        return {
            "kept": cut(model, chosen, units),
            "cost_before": costs.of(space.largest),
            "cost_after": costs.of(chosen),
            "tried": len(found),
            "error": found[chosen],
            **ends,
            **facts,
        }

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Cut the same units and blocks out again."""
        sam: Any = model
        units = dict(state["kept"])
        if BLOCKS in units:
            keep_blocks(sam.image_encoder, units.pop(BLOCKS))
        super().rebuild(model, {"kept": units})
        return state

    def _space(self, model: Any, free: Sequence[int] | None = None) -> Space:
        """All subnets of a model, whose blocks that may be left out are given in order."""
        blocks = model.image_encoder.blocks
        step = self.granularity("mlp", self.groups(model, "mlp"))
        may = Blocks()._free(blocks) if free is None else free
        return Space(
            heads=tuple(options(b.attn.num_heads, self.heads, 1) for b in blocks),
            hidden=tuple(options(b.mlp.lin1.out_features, self.hidden, step) for b in blocks),
            free=tuple(may),
            most=min(int(self.blocks * len(blocks)), len(may)),
        )

    def _bound(self, limit: Limit, costs: Costs, space: Space) -> float:
        """The most that the result may cost."""
        whole, least = costs.of(space.largest), costs.of(costs.cheapest(space))
        most = limit.bound(whole)
        if most >= whole:
            raise NoEffectError(
                f"{self.label}: the model costs no more than it may.",
                got=f"{limit.shown(whole)}, budget={self.budget!r}",
                expected="a budget below what the model costs",
            )
        if most < least:
            raise ConfigError(
                f"{self.label}: no subnet is as cheap as that.",
                got=f"budget={self.budget!r} of {limit.shown(whole)}",
                expected=f"at least {limit.shown(least)}, {100 * least / whole:.3g}% of the whole",
                fix="larger shares in heads=, hidden= and blocks=, or a larger budget=",
            )
        return most

    def _order(self, model: nn.Module, ctx: Context) -> State:
        """Units of each block, the most important first; blocks, those that do least first."""
        groups = {kind: self.groups(model, kind) for kind in MODULES}
        scores = self.scores(model, [g for found in groups.values() for g in found], ctx)
        ranks = {
            name: torch.sort(values.cpu(), descending=True, stable=True).indices.tolist()
            for name, values in scores.items()
        }
        sam: Any = model
        done = influence(sam, readable(self.label, ctx, self.images))
        free = sorted(Blocks()._free(sam.image_encoder.blocks), key=done.__getitem__)
        units = {kind: [ranks[group.name] for group in found] for kind, found in groups.items()}
        return {**units, "blocks": free}

    def _learner(self) -> Any:
        """What teaches one encoder, with our settings."""
        length = {"steps": self.steps} if self.steps else {"epochs": self.epochs or 1.0}
        return get(LEARNER, **{name: getattr(self, name) for name in SAME}, **length)

    def _train(self, model: nn.Module, ctx: Context, space: Space) -> State:
        """Teach all subnets, those at the ends in each step."""
        learner, images = self._learner(), len(ctx.data)
        plan = learner.plan(images)
        # Before the teacher runs: several processes then share its work.
        engine = engine_for(device_of(model))
        identity = learner.identity(model, ctx) | {
            "step": self.label,
            "steps": plan.steps,
            "subnets": self.subnets,
            "space": dataclasses.asdict(space),
        }
        sandwich = Sandwich(
            _objective(learner, model, ctx, space), space, count=self.subnets, seed=self.seed
        )
        run = _fit.fit(
            sandwich,
            plan,
            parts=("student.image_encoder",),
            checkpoint=_place(self.label, ctx.workdir, identity),
            identity=identity,
            progress=ctx.progress,
            workers=self.workers,
            engine=engine,
        )
        told = {"images": images, "steps": run.step, "skipped": run.skipped, "curve": run.curve()}
        # Nothing teaches the decoder how good its masks are.
        return told | {"iou_trained": False}

    def _error(self, model: Any, ctx: Context, space: Space) -> Callable[[Subnet], float]:
        """How far a subnet's embeddings are from the teacher's, for a few of the images."""
        learner, count = self._learner(), min(self.images, len(ctx.data))
        # A folder holds the teacher's embeddings of one data set alone.
        few = dataclasses.replace(ctx, dataset=ctx.data.subset(count, seed=self.seed), workdir=None)
        objective = _objective(learner, model, few, space)

        def error(subnet: Subnet) -> float:
            with narrowed(model.image_encoder, subnet):
                return float(learner.judge(objective))

        return error

    def _check_teacher(self, model: nn.Module, ctx: Context) -> None:
        mine, theirs = (embedding_shape(sam)[0] for sam in (model, ctx.original))
        if mine != theirs:
            raise ModelError(
                f"{self.label}: subnets are judged by the teacher's embeddings.",
                got=f"student {mine} channels, teacher {theirs}",
                expected="the same number; sizes of images and grids may differ",
                fix="as teacher= the model from before this step",
            )


def _objective(learner: Any, model: Any, ctx: Context, space: Space) -> Any:
    """What the encoder is taught by; the whole one may have nothing to learn."""
    with narrowed(model.image_encoder, space.smallest):
        return learner.objective(model, ctx, 1)


def _place(label: str, workdir: Path | None, identity: Mapping[str, Any]) -> Path | None:
    """A checkpoint file of this training alone, so that others can share the folder."""
    if workdir is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return workdir / f"{label.replace('.', '-')}-{digest[:12]}.safetensors"
