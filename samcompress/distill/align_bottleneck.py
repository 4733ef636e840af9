"""Alignment of what is inside the blocks of a pruned image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core._objective import Objective
from ..core.errors import ModelError
from ..core.history import lineage
from ..core.registry import register
from ..core.transform import Context
from ._align import Align, Aligned
from ._taps import EMBEDDING, HIDDEN, QKV, block, need
from ._views import Seen, apart


@register
@dataclass(frozen=True, kw_only=True)
class AlignBottleneck(Align, family="distill", phase=40):
    """Train a pruned encoder: queries, keys, values, hidden units and embedding as before.

    SlimSAM's first alignment. Use it after a cut that left the inside of the blocks as wide as it
    was, or that says which units it kept: each unit then learns what it said before the cut. Where
    the blocks' insides were cut otherwise, use `AlignEmbedding`.

    The loss is ``alpha`` times the error of (q, k, v) and of the MLPs' hidden units after their
    activation, each a mean over the blocks, plus ``1 - alpha`` times that of the embedding. From
    epoch `feature_epochs` on only the embedding counts.

    Args:
        alpha: weight of the features in the first epochs, 0 to 1.
        feature_epochs: epochs in which they count, >= 0.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        lr: learning rate of Adam, > 0; halved whenever four epochs in a row lowered the training
            loss no further.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if student or teacher has no such blocks, they differ in number or in width and
            nothing tells what was kept, or the student is not float32.
        NoEffectError: if the student equals the teacher already, or has nothing to train.
        DataError: if no image can be decoded.
        CheckpointError: if a checkpoint in ``workdir=`` is damaged.

    Effect: the encoder's weights change, nothing else does; size and speed stay as they are. The
        state tells the loss before and after, both with the weights of the last epoch.

    Composes with: pruning before it, the next cut and `AlignEmbedding` after it, as SlimSAM does,
        or `PromptLoop`; then reduce precision and export.

    Source: SlimSAM, Chen et al. 2023, arXiv 2312.05284 (Apache-2.0), the paper's formula: its code
        compares q, k, v of the blocks with global attention to themselves, which is always 0. We
        leave out what is padding, and judge the plateau by the training loss, not by masks.

    Example:
        >>> import samcompress as sc
        >>> chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.AlignBottleneck(
        ...     steps=4, lr=1e-3
        ... )
        >>> small = chain(sc.load("tiny"), data=sc.shapes(4))
        >>> facts = sc.lineage(small)[-1].state
        >>> facts["loss_after"] < facts["loss_before"]
        True
    """

    alpha: float = 0.5

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        self.between("alpha", 0, 1, closed=True)

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The errors of features and embedding."""
        return Bottlenecks(model, ctx, self, steps)

    def share(self, epoch: int) -> float:
        """Weight of the features in an epoch, counted from 0.

        Example:
            >>> [AlignBottleneck().share(epoch) for epoch in (0, 9, 10)]
            [0.5, 0.5, 0.0]
        """
        return self.alpha if epoch < self.feature_epochs else 0.0


class Bottlenecks(Aligned):
    """Errors inside the blocks and of the embedding."""

    def __init__(
        self, student: nn.Module, ctx: Context, settings: AlignBottleneck, steps: int
    ) -> None:
        super().__init__(student, [ctx.original], ctx, settings, steps)
        self.qkv = [block(i, QKV) for i in range(self.blocks)]
        self.hidden = [block(i, HIDDEN) for i in range(self.blocks)]
        need(student, [*self.qkv, *self.hidden], "student")
        need(ctx.original, [*self.qkv, *self.hidden], "teacher")
        self.kept = {
            name: survivors(student, ctx.original, f"image_encoder.{name.rpartition('.')[0]}")
            for name in self.hidden
        }

    def forward(self, drawn: Seen, step: int) -> Mapping[str, Tensor]:
        """Terms ``qkv``, ``hidden`` and ``embedding``."""
        names = [*self.qkv, *self.hidden, EMBEDDING]
        mine, theirs = self.learn(drawn, names), self.teach(drawn, names)
        for name, kept in self.kept.items():
            # What does not fit is left as it is; its width is told.
            if kept is not None and kept[-1] < theirs[name].shape[1]:
                index = torch.tensor(kept, device=theirs[name].device)
                theirs[name] = theirs[name].index_select(1, index)
        alpha = self.alpha(step)
        error = apart(drawn, EMBEDDING, mine[EMBEDDING], theirs[EMBEDDING])
        return {
            "qkv": alpha * self.mean(drawn, self.qkv, mine, theirs),
            "hidden": alpha * self.mean(drawn, self.hidden, mine, theirs),
            "embedding": (1 - alpha) * error,
        }


def survivors(student: nn.Module, teacher: nn.Module, name: str) -> list[int] | None:
    """Which of a module's units in the teacher are left in the student, from their lineages.

    Returns:
        Ascending places among the teacher's units; None if nothing was cut between them.

    Raises:
        ModelError: if the student has units that the teacher lost.
    """
    mine, theirs = _kept(student, name), _kept(teacher, name)
    if mine is None or theirs is None or mine == theirs:
        return mine if theirs is None else None
    places = {unit: place for place, unit in enumerate(theirs)}
    lost = sorted(set(mine) - set(places))
    if lost:
        raise ModelError(
            "the student has units that the teacher lost.",
            where=name,
            got=f"{len(mine)} units in the student, {len(theirs)} in the teacher, "
            f"{len(lost)} of the student's not among them",
            expected="a teacher that has all units of the student",
            fix="as teacher= the model from before both were pruned",
        )
    return [places[unit] for unit in mine]


def _kept(model: nn.Module, name: str) -> list[int] | None:
    """The units that pruning left, in the numbers they had at first; None for all."""
    kept: list[int] | None = None
    for step in lineage(model):
        chosen = step.state.get("kept")
        if isinstance(chosen, Mapping) and name in chosen:
            found = chosen[name]
            kept = list(found) if kept is None else [kept[i] for i in found]
    return kept
