"""Alignment of what comes out of the blocks of a pruned image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..core._objective import Objective
from ..core.load import load
from ..core.registry import register
from ..core.transform import Context
from ._align import Align, Aligned
from ._taps import EMBEDDING, block
from ._views import Seen, apart


@register
@dataclass(frozen=True, kw_only=True)
class AlignEmbedding(Align, family="distill", phase=40):
    """Train a pruned encoder: block outputs and embedding as before.

    SlimSAM's second alignment. Use it after a cut inside the blocks (heads, hidden units), which
    leaves what they hand on as wide as it was. Where that was cut before, name the model in
    the middle, between the two cuts: block outputs are then compared with that one's.

    The loss is ``a`` times the errors of the block outputs, a mean over the blocks, and of the
    embedding, both beside the model in the middle, plus ``1 - a`` times the error of the embedding
    beside the original. ``a`` falls from ``(N - 1) / N`` in the first of ``N`` epochs to 0 in the
    last of them.

    Args:
        middle: folder or file of the model between two cuts, as `sc.load` takes it; None for the
            original itself, where there was but one.
        feature_epochs: N, >= 0.
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
        ModelError: if student or teacher has no blocks, they differ in number or width, or the
            student is not float32.
        NoEffectError: if the student equals the teacher already, or has nothing to train.
        DataError: if no image can be decoded.
        CheckpointError: if a checkpoint in ``workdir=`` is damaged, or `middle` cannot be read.

    Effect: the encoder's weights change, nothing else does; size and speed stay as they are. The
        state tells the loss before and after, both with the weights of the last epoch.

    Composes with: pruning, and `AlignBottleneck` between two cuts, before it; `PromptLoop` after
        it; then reduce precision and export.

    Source: SlimSAM, Chen et al. 2023, arXiv 2312.05284 (Apache-2.0): the paper's formula and its
        N = 10, where the code has 11. We leave out what is padding, and judge the plateau by the
        training loss, not by masks.

    Example:
        >>> import samcompress as sc
        >>> chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.AlignEmbedding(
        ...     steps=4, lr=1e-3
        ... )
        >>> small = chain(sc.load("tiny"), data=sc.shapes(4))
        >>> facts = sc.lineage(small)[-1].state
        >>> facts["loss_after"] < facts["loss_before"]
        True
    """

    middle: str | None = None

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The errors of block outputs and embedding."""
        return Outputs(model, ctx, self, steps)

    def share(self, epoch: int) -> float:
        """Weight of the model in the middle in an epoch, counted from 0.

        Example:
            >>> [AlignEmbedding().share(epoch) for epoch in (0, 5, 9, 10)]
            [0.9, 0.4, 0.0, 0.0]
        """
        count = self.feature_epochs
        return (count - epoch - 1) / count if epoch < count else 0.0


class Outputs(Aligned):
    """Errors of the blocks' outputs and of the embedding."""

    def __init__(
        self, student: nn.Module, ctx: Context, settings: AlignEmbedding, steps: int
    ) -> None:
        teachers = [ctx.original]
        if settings.middle is not None:
            teachers.append(load(settings.middle, ctx.device))
        super().__init__(student, teachers, ctx, settings, steps)
        self.outputs = [block(i) for i in range(self.blocks)]

    def forward(self, drawn: Seen, step: int) -> Mapping[str, Tensor]:
        """Terms ``blocks``, ``middle`` and ``embedding``."""
        names = [*self.outputs, EMBEDDING]
        mine = self.learn(drawn, names)
        if len(self._teachers) == 1:
            middle = original = self.teach(drawn, names)
        else:
            original, middle = self.teach(drawn, [EMBEDDING]), self.teach(drawn, names, 1)
        alpha = self.alpha(step)
        errors = [
            apart(drawn, EMBEDDING, mine[EMBEDDING], theirs[EMBEDDING])
            for theirs in (middle, original)
        ]
        return {
            "blocks": alpha * self.mean(drawn, self.outputs, mine, middle),
            "middle": alpha * errors[0],
            "embedding": (1 - alpha) * errors[1],
        }
