"""Distillation at every stage: embedding, tokens and masks, with annotated masks beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core._draws import generator
from ..core._objective import Objective, Share
from ..core.contract import device_of
from ..core.errors import ConfigError
from ..core.registry import register
from ..core.transform import Context, State
from ._cache import evaluating
from ._clicks import Asked, Clicks
from ._decode import Decoded, check_decoder, decode
from ._guide import Guide, Guided, GuidedSamples, compared, guided
from ._learner import SAME, Learner
from ._losses import embedding_loss, to_grid, valid_cells
from ._mask_losses import Norm, hard_weights, iou, least, logit_l1, mask_loss, score_loss
from ._samples import Batch
from .supervised import chosen

MOST_CLICKS = 9  # after the first point
IMITATED = ("embedding", "tokens", "logits")


@register
@dataclass(frozen=True, kw_only=True)
class FullStage(Learner, family="distill", phase=40):
    """Train a compressed SAM on the original's answers at every stage and on annotated masks.

    Use it where masks are good: it looks at them, at the teacher's embeddings, at what its decoder
    makes of each prompt, and most at the masks that the teacher gets right and the student does
    not. Prompts are points alone, up to ten on an object, each set where the student's mask lacks
    something, so boxes are not practised. Without good masks take `PromptLoop`, without any
    `Encoder`.

    The teacher is the model that entered the pipeline, or ``teacher=``; its input size may differ.
    Its embeddings are computed once, and with ``workdir=`` kept on disk.

    Args:
        alpha: weight of the mean distance of embeddings, >= 0. None: so large that in the first
            batch the term is a third of what the annotated masks cost, or 1 if it is 0 there; the
            three distances are then equal. The state tells the weights.
        beta: weight of the mean distance of the decoder's output tokens, >= 0, or None.
        gamma: weight of the mean distance of logits, >= 0, or None.
        hmw_norm: how the weights of hard masks add up: ``mean`` is the mean of weight times
            distance over all masks; ``sum`` the sum of both, as published, so a batch of more
            prompts counts more; ``unit`` divides the sum by that of the weights. Only ``mean`` does
            not depend on how a batch is divided among micro-batches and processes.
        prompts: most objects of an image in a step, >= 1.
        decoder: ``freeze`` trains the image encoder alone, ``train`` the mask decoder too.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1.
        lr: highest learning rate of Adam, > 0.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images and of prompts.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if the teacher has another number of channels or masks, a decoder is not made of
            segment_anything's parts, or the weights are not float32.
        NoEffectError: if the student equals the teacher already.
        DataError: if the images have no usable masks, or one is damaged.
        CheckpointError: if a cache or checkpoint in ``workdir=`` is damaged or of another run.

    Effect: the image encoder's weights change, and the mask decoder's if asked; no shape does; size
        and speed stay as they are. The state tells the loss before and after, and the weights.

    Composes with: every step before it that keeps the channels of the embedding; reduce precision
        and export afterwards.

    Source: TinySAM, Shu et al. 2023, arXiv 2312.13789 (Apache-2.0, no training code): three
        distances, weights of hard masks, prompts where something is missed, Adam, 8 epochs. The
        weights of the terms, rate and decay are not published; ours are our own. We differ in the
        norm of the weights of hard masks, and in teaching for a single point the best of three
        masks, as SAM does.

    Example:
        >>> import samcompress as sc
        >>> chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.FullStage(steps=4)
        >>> small = chain(sc.load("tiny"), data=sc.shapes(8))
        >>> facts = sc.lineage(small)[-1].state
        >>> facts["loss_after"] < facts["loss_before"]
        True
    """

    needs_teacher: ClassVar[bool] = True
    optimizer: ClassVar[Literal["adamw", "adam"]] = "adam"

    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    hmw_norm: Norm = "mean"
    prompts: int = 8
    decoder: Literal["train", "freeze"] = "freeze"
    epochs: float = 8.0
    weight_decay: float = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        """The image encoder, the decoder if asked; and the weights, which checkpoints must hold."""
        decoder = ("student.mask_decoder",) if self.decoder == "train" else ()
        return ("student.image_encoder", *decoder, "balance")

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        for name in ("alpha", "beta", "gamma"):
            if getattr(self, name) is not None:
                self.between(name, 0, float("inf"), closed=True)
        if self.prompts < 1:
            raise ConfigError(
                f"{self.label}: prompts is out of range.", got=self.prompts, expected=">= 1"
            )

    def check(self, model: nn.Module) -> None:
        """Check that prompts can be decoded, and that there are weights that can be trained."""
        check_decoder(self.label, model)
        super().check(model)

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """All distances, weighted."""
        source, guide = guided(
            self.label,
            model,
            ctx,
            batch_size=self.batch_size,
            prompts=self.prompts,
            augment=None,
            seed=self.seed,
            channels=True,
        )
        stages = Stages(model, source, guide, self)
        stages.settle()
        return stages

    def finish(self, objective: Stages) -> State:
        """The weights of the three distances."""
        found = [float(f"{w:.4g}") for w in objective.balance.weights.tolist()]
        return dict(zip(("alpha", "beta", "gamma"), found, strict=True))


class Balance(nn.Module):
    """The weights of the three distances, where a checkpoint finds them."""

    weights: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(len(IMITATED), device=device))


class Stages(Objective):
    """Distances to a teacher at every stage, and to annotated masks."""

    source: GuidedSamples

    def __init__(
        self, student: nn.Module, source: GuidedSamples, guide: Guide, settings: FullStage
    ) -> None:
        super().__init__(student, source)
        self.guide, self.settings = guide, settings
        self.balance = Balance(device_of(student))
        self.channels, _ = compared(student, guide.teacher)

    def forward(self, drawn: Guided, step: int) -> Mapping[str, Tensor]:
        """Terms ``embedding``, ``tokens``, ``logits``; ``mask`` and ``iou`` of annotated masks."""
        terms = self.plain(drawn, step)
        weights = dict(zip(IMITATED, self.balance.weights, strict=True))
        return {name: weights.get(name, 1) * value for name, value in terms.items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Choose the weights that are not given, by the first batch and the student as it is."""
        s = self.settings
        with evaluating(self):
            terms = self.plain(self.source.draw(0, Share()), 0)
        third = float(terms["mask"] + terms["iou"]) / len(IMITATED)
        for place, given in enumerate((s.alpha, s.beta, s.gamma)):
            value = float(terms[IMITATED[place]])
            chosen_here = third / value if value > SAME else 1.0
            self.balance.weights[place] = chosen_here if given is None else given

    def plain(self, drawn: Guided, step: int) -> dict[str, Tensor]:
        """All terms, each with weight 1."""
        batch = drawn.batch.to(device_of(self.student))
        taught = self.guide.features(drawn)
        features = self.student.get_submodule("image_encoder")(batch.images)
        found: dict[str, list[Tensor]] = {}
        gains: list[Tensor] = []
        for asked, rows in self.asked(features.detach(), batch, step):
            owner, target = batch.owner[rows], batch.target[rows]
            mine = decode(self.student, features, owner, asked).at(self.source.grid)
            teacher = self.guide.decode(taught, owner, asked)
            valid = batch.valid[owner]
            actual = iou(mine.logits, target, valid)
            best = iou(teacher.logits, target, valid)
            gains.append(torch.stack([best, actual, logit_l1(mine.logits, teacher.logits, valid)]))
            for name, value in _terms(mine, teacher, asked, target, valid, actual).items():
                found.setdefault(name, []).append(value)
        best, actual, apart = torch.cat(gains, 1)
        means = {name: torch.cat(values).mean() for name, values in found.items()}
        return {
            "embedding": self._embedding(features, taught, batch),
            "tokens": means["tokens"],
            "logits": (hard_weights(best, actual, self.settings.hmw_norm) * apart).sum(),
            "mask": means["mask"],
            "iou": means["iou"],
        }

    @torch.no_grad()
    def asked(self, features: Tensor, batch: Batch, step: int) -> list[tuple[Asked, Tensor]]:
        """Prompts with all their clicks, those with equally many together; and which they are.

        A prompt whose mask lacks nothing gets no further click.
        """
        s = self.settings
        clicks = Clicks.of(batch, self.source.side, seed=s.seed, step=step)
        g = generator(s.seed, "clicks", step)
        count = int(torch.randint(MOST_CLICKS + 1, (), generator=g))
        rows = torch.arange(len(batch.owner), device=batch.owner.device)
        points = torch.zeros_like(rows, dtype=torch.bool)
        asked = Asked.begin(batch.boxes, *clicks.first(batch.target), points)
        groups = []
        for number in range(count):
            answer = decode(self.student, features, batch.owner[rows], asked)
            mask = chosen(answer.at(self.source.grid), asked)
            truth = batch.target[rows] >= 0.5
            more = asked.grown(
                *clicks.errors(mask > 0, truth, number, rows=rows, policy="fn_only", ignore_below=1)
            )
            going = more.going
            if not going.all():
                groups.append((asked.rows(~going), rows[~going]))
            asked, rows = more.rows(going), rows[going]
            if not len(rows):
                return groups
        return [*groups, (asked, rows)]

    def _embedding(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Mean over the prompts of their image's distance: as all terms, whatever the division."""
        height, width = student.shape[-2:]
        student, teacher = student[:, : self.channels], teacher[:, : self.channels]
        teacher = to_grid(teacher.float(), (height, width))
        valid = [
            valid_cells(size, self.source.side, (height, width)).to(student) for size in batch.sizes
        ]
        each = [
            embedding_loss(mine[None], other[None], cells[None], "l1")
            for mine, other, cells in zip(student.float(), teacher, valid, strict=True)
        ]
        return torch.stack(each)[batch.owner].mean()


def _terms(
    mine: Decoded, teacher: Decoded, asked: Asked, target: Tensor, valid: Tensor, actual: Tensor
) -> dict[str, Tensor]:
    """Terms that are one number for each prompt (P,)."""
    losses = mask_loss(mine.logits, target, valid)
    return {
        "tokens": (mine.tokens.float() - teacher.tokens.float()).abs().mean((1, 2)),
        "mask": torch.where(asked.ambiguous, least(losses)[0], losses[:, 0]),
        "iou": score_loss(mine.scores, actual, kind="l1"),
    }
