"""SlimSAM: channels first, then what is inside the blocks, with training after each cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..core._progress import Progress
from ..core.errors import ConfigError, ModelError
from ..core.history import Step, history
from ..core.registry import get, register
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._groups import KINDS, Group, best, kept_count, share_out
from ._importance import WITHOUT_DATA, element_scores
from ._slices import Slices, check_blocks, check_finite, readable
from ._slim import decided, fewest_heads, of_heads, places, same_insides, saved, tied

FIRST, SECOND = "distill.align_bottleneck", "distill.align_embedding"
# Settings that the alignments have by the same names, and all that say how to train, not what to
# cut.
SAME = ("feature_epochs", "batch_size", "lr", "precision", "workers")
TRAINING = {*SAME, "align", "epochs", "steps", "micro_batches"}


@register
@dataclass(frozen=True, kw_only=True)
class SlimSAM(Slices, family="prune", phase=20):
    """Slim a SAM's image encoder in two cuts, and train it after each by what the other left whole.

    First the channels of the tokens go; what is inside the blocks is as wide as before and learns
    to say what it said. Then heads and hidden units go, and what the blocks hand on, which is as
    wide as after the first cut, learns the same. Use it to take half or more of an encoder. It
    needs thousands of images and days of a GPU for ``vit_b``; for a small cut `Mlp` or `Heads` will
    do. The defaults are our own; `published` gives the settings of the released models.

    Args:
        ratio: share of channels, of attention's width and of hidden units removed, between 0 and 1.
        criterion: see `Mlp`. In the second cut it is asked of the result of the first.
        scope: "local" takes `ratio` of each block; "global" takes it of the attention of all blocks
            together, and of all MLPs together, more where more is unimportant.
        attention: "both" keeps few heads, as wide as fit, and takes dimensions of them only where
            whole heads would not give the width; "heads" takes heads alone, and "head_dims" makes
            all heads narrower, which leaves attention nearly as slow as it was.
        tie: "none" takes each channel by itself; "heads" takes together those at the same place in
            each head's share of them, as the released code does, though channels have no heads.
        accumulate: how Taylor scores are made of gradients of many images. "rms" adds up squares,
            "sum" the gradients themselves, of random sign.
        rel_pos: "keep" keeps the tables of relative positions, in the dimensions that stay; "zero"
            empties them, after each cut.
        scale: of attention whose heads get narrower. "keep" leaves it as it was, so a dimension
            that goes is as one set to zero; "reset" makes it that of the new width.
        round_to: channels, hidden units and attention's width left are a multiple of this, the
            width as far as whole heads allow.
        images: at most so many images are looked at for each of the two scores.
        align: False cuts without training, as ``epochs=0`` does.
        epochs: how often each image is seen in each of the two trainings, >= 0.
        steps: optimiser steps of each instead of epochs, >= 1; None for epochs.
        feature_epochs: epochs of each in which features count beside the embedding, >= 0.
        batch_size: images a step, >= 1.
        micro_batches: parts a step is computed in, to save memory, >= 1; same result.
        lr: learning rate of Adam, > 0.
        precision: of training; ``bf16`` computes most products in bfloat16.
        workers: processes that read images for training. Changes nothing but the time.
        seed: of what is drawn for a criterion, and of the order of images.

    Raises:
        ConfigError: if a field is out of range, or `ratio` would leave nothing of a module.
        ModelError: if the image encoder is not segment_anything's ViT, a layer was replaced, a
            weight is not finite, the decoder reads the tokens too, as in SAM-HQ, or the teacher is
            not the model from before this step.
        DataError: if there is no image to look at, or for "taylor" no annotated object.
        CheckpointError: if a file in ``workdir=`` is damaged.

    Effect:
        Of ``vit_b``, ``ratio=0.77`` leaves 9.5 of 93.7 million parameters, 44 of 486 GMAC and 0.14
        of the encoder's time on a CPU; 0.5 leaves 28.0 million, 153 GMAC and 0.22. With published
        settings it is 9.7 million, 47 and 0.51, or 28.0 million, 153 and 0.67. The state tells what
        was kept and, under ``aligned``, the losses of both trainings.

    Composes with:
        After `ImageSize`; before further distillation, `attention.Fused`, quantisation and export.
        Other pruning best comes after it. With ``workdir=`` a run that was stopped goes on where it
        was, and the model between the cuts stays there.

    Source:
        SlimSAM, Z. Chen et al., 2023, arXiv 2312.05284 (Apache-2.0). Own are ``attention="both"``,
        free channels, squared gradients, kept positions and scale; what `AlignBottleneck` and
        `AlignEmbedding` do differently is told there. Own code.

    Example:
        >>> import samcompress as sc
        >>> cut = sc.prune.SlimSAM(ratio=0.5, criterion="magnitude", align=False)
        >>> small = cut(sc.load("tiny"))
        >>> small.image_encoder.pos_embed.shape, small.image_encoder.blocks[0].attn.num_heads
        (torch.Size([1, 16, 16, 32]), 2)
    """

    ratio: float = 0.5
    scope: Literal["local", "global"] = "local"
    attention: Literal["both", "heads", "head_dims"] = "both"
    tie: Literal["none", "heads"] = "none"
    accumulate: Literal["rms", "sum"] = "rms"
    rel_pos: Literal["keep", "zero"] = "keep"
    scale: Literal["keep", "reset"] = "keep"
    round_to: int = 32
    images: int = 64
    align: bool = True
    epochs: float = 20.0
    steps: int | None = None
    feature_epochs: int = 10
    batch_size: int = 4
    micro_batches: int = 1
    lr: float = 1e-4
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = 0

    @classmethod
    def published(cls, percent: int, **fields: Any) -> SlimSAM:
        """The settings of the released SlimSAM-50 and SlimSAM-77.

        On ``vit_b`` they give models of 27 961 776 and 9 723 528 parameters. Upstream prunes
        ``vit_b`` alone; widths are multiples of its 12 heads, so give ``round_to=16`` for others.

        Args:
            percent: 50 or 77.
            fields: settings to change, e.g. ``scope="global"``.

        Raises:
            ConfigError: if there is no such model, or a field is out of range.

        Example:
            >>> SlimSAM.published(50).attention
            'head_dims'
        """
        epochs = {50: 20.0, 77: 40.0}
        if percent not in epochs:
            raise ConfigError(
                "there is no such SlimSAM.",
                got=percent,
                expected="50 or 77",
                fix=f"sc.prune.SlimSAM.published(50, ratio={percent / 100})",
            )
        settings: dict[str, Any] = {
            "ratio": percent / 100,
            "attention": "head_dims",
            "tie": "heads",
            "accumulate": "sum",
            "rel_pos": "zero",
            "scale": "reset",
            "round_to": 12,
            "images": 1000,
            "epochs": epochs[percent],
        }
        return cls(**{**settings, **fields})

    @property
    def targets(self) -> Mapping[str, Where]:
        """Channels, heads and hidden units of the image encoder."""
        blocks = "image_encoder.blocks.*"
        return {
            "channels": Where(("image_encoder",)),
            "heads": Where((f"{blocks}.attn",)),
            "mlp": Where((f"{blocks}.mlp",)),
        }

    @property
    def trains(self) -> bool:
        """Whether there is training after the cuts."""
        return self.align and (self.steps is not None or self.epochs > 0)

    @property
    def needs_data(self) -> bool:
        """Whether images are looked at, for scores or for training."""
        return super().needs_data or self.trains

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether there is training."""
        return self.trains

    def validate(self) -> None:
        """Check the fields; those of training as the alignments do."""
        super().validate()
        self.between("epochs", 0, math.inf, closed=True)
        if self.trains:
            self._learner(FIRST)

    def check(self, model: nn.Module) -> None:
        """Check that something of each module will be left, and that training will be possible."""
        check_blocks(self.label, model)
        super().check(model)
        if not self.trains:
            return
        self._learner(FIRST).check(model)
        if history(model).base is None:
            raise ModelError(
                f"{self.label} keeps the model between its cuts, and this one cannot be saved.",
                got="a SAM with modules that no recorded step put there",
                expected="a plain SAM, or one changed by samcompress steps alone",
                fix="start from sc.build or sc.load, or align=False",
            )

    def groups(self, model: nn.Module, kind: str) -> list[Group]:
        """What could be cut, module by module."""
        found = super().groups(model, kind)
        if kind == "channels" and self.tie == "heads":
            sam: Any = model
            heads = sam.image_encoder.blocks[0].attn.num_heads
            return [tied(self.label, group, heads) for group in found]
        return found

    def _check_group(self, group: Group, kind: str) -> None:
        if not all(self._left(group, kind)):
            raise ConfigError(
                f"{self.label}: nothing of a module would be left.",
                where=f"{group.name} with {group.units} {kind if kind == 'heads' else 'units'}",
                got=f"ratio={self.ratio}, round_to={self.round_to}",
                fix="a smaller ratio=" + (", or a smaller round_to=" if self.round_to > 1 else ""),
            )

    def _left(self, group: Group, kind: str) -> tuple[int, ...]:
        """How many units of a module stay; of attention, heads and dimensions of each."""
        together = len(group.members[-1].unit) // group.units
        if kind != "heads":
            return (kept_count(group.units, self.ratio, self._multiple(together)),)
        if self.attention == "heads":
            return kept_count(group.units, self.ratio, 1), together
        if self.attention == "head_dims":
            return group.units, kept_count(together, self.ratio, self._multiple(group.units))
        width = kept_count(group.units * together, self.ratio, self.round_to)
        return fewest_heads(group.units, together, width, self.round_to) or (0, 0)

    def _multiple(self, together: int) -> int:
        """What the number of units must be a multiple of, if each is so many places wide."""
        return self.round_to // math.gcd(self.round_to, together)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Cut, train, cut, train."""
        if self.trains:
            same_insides(self.label, model, ctx.original)
        record = history(model)
        first = self._decide(self._channels, model, ctx)
        self.rebuild(model, first)
        if not self.trains:
            return joined(first, self.rebuild(model, self._decide(self._inside, model, ctx)))
        aligned = [self._train(FIRST, model, ctx)]
        second = self._decide(self._inside, model, ctx)
        between = dataclasses.replace(record, steps=(*record.steps, Step(self, first)))
        with saved(model, between, ctx.workdir) as middle:
            self.rebuild(model, second)
            aligned.append(self._train(SECOND, model, ctx, middle=middle))
        # Neither training teaches the decoder how good its masks are.
        return joined(first, second) | {"aligned": aligned, "iou_trained": False}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Cut the same units out again."""
        super().rebuild(model, state)
        for kind in ("heads", "head_dims"):
            for name, kept in state[kind].items():
                attn: Any = model.get_submodule(name)
                if kind == "head_dims" and self.scale == "reset":
                    attn.scale = len(kept) ** -0.5
                KINDS[kind].cut(model, name, kept)
        if self.rel_pos == "zero":
            sam: Any = model
            for block in sam.image_encoder.blocks:
                if block.attn.use_rel_pos:
                    nn.init.zeros_(block.attn.rel_pos_h)
                    nn.init.zeros_(block.attn.rel_pos_w)
        return state

    def _decide(
        self, choose: Callable[[nn.Module, Context], State], model: nn.Module, ctx: Context
    ) -> State:
        settings = {k: v for k, v in self.params().items() if k not in TRAINING}
        identity = {"step": self.label, "cut": choose.__name__, **settings}
        return decided(lambda: choose(model, ctx), model, ctx, identity)

    def _channels(self, model: nn.Module, ctx: Context) -> State:
        """Which channels stay."""
        (group,) = self.groups(model, "channels")
        counts = {group.name: self._left(group, "channels")[0]}
        kept = self._best([group], counts, self._elements(model, [group], ctx))[group.name]
        return {"kept": {group.name: places(group, kept)}, "heads": {}, "head_dims": {}}

    def _inside(self, model: nn.Module, ctx: Context) -> State:
        """Which heads, dimensions of heads and hidden units stay."""
        attention, mlps = self.groups(model, "heads"), self.groups(model, "mlp")
        elements = self._elements(model, [*attention, *mlps], ctx)
        left = {group.name: self._left(group, "heads") for group in attention}
        counts, dims = ({name: both[i] for name, both in left.items()} for i in (0, 1))
        hidden = {group.name: self._left(group, "mlp")[0] for group in mlps}
        whole = self.attention != "head_dims"
        heads = self._best(attention, counts, elements, shared=1 if whole else None)
        each = [
            of_heads(inner, heads[outer.name])
            for outer in attention
            for inner in KINDS["head_dims"].groups(model, outer.name)
        ]
        shared = None if whole else self._multiple(attention[0].units)
        parts = self._best(each, dims, elements, shared=shared)
        return {
            "kept": self._best(mlps, hidden, elements, shared=self.round_to),
            "heads": {g.name: heads[g.name] for g in attention if len(heads[g.name]) < g.units},
            "head_dims": {g.name: parts[g.name] for g in each if len(parts[g.name]) < g.units},
        }

    def _elements(
        self, model: nn.Module, groups: Sequence[Group], ctx: Context
    ) -> dict[str, Tensor]:
        """What each element of the groups' weights matters."""
        weights = {member.weight for group in groups for member in group.members}
        names = [name for name, _ in model.named_parameters() if name in weights]
        blind = self.criterion in WITHOUT_DATA
        samples = () if blind else readable(self.label, ctx, self.images)
        return element_scores(
            model, names, self.criterion, samples, seed=self.seed, accumulate=self.accumulate
        )

    def _best(
        self,
        groups: Sequence[Group],
        counts: Mapping[str, int],
        elements: Mapping[str, Tensor],
        *,
        shared: int | None = None,
    ) -> dict[str, list[int]]:
        """The units of most importance; in portions of `shared` where all groups share a total."""
        scores = {group.name: group.reduce(elements) for group in groups}
        check_finite(self.label, scores)
        if self.scope == "global" and shared is not None:
            counts = share_out(scores, sum(counts.values()), shared)
        return {name: best(values, counts[name]) for name, values in scores.items()}

    def _learner(self, technique: str, **more: Any) -> Transform:
        """An alignment with our settings."""
        length = {"epochs": self.epochs} if self.steps is None else {"steps": self.steps}
        settings = {name: getattr(self, name) for name in (*SAME, "seed")}
        return get(technique, **settings, **length, accumulate=self.micro_batches, **more)

    def _train(self, technique: str, model: nn.Module, ctx: Context, **more: Any) -> State:
        learner = self._learner(technique, **more)
        progress = Progress(ctx.progress.mode, learner.label)
        return learner.apply(model, dataclasses.replace(ctx, step=learner.label, progress=progress))


def joined(first: State, second: State) -> State:
    """What both cuts decided."""
    return {key: {**first[key], **second[key]} for key in first}
