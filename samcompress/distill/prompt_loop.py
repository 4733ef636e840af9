"""Distillation with prompts in the loop: the student's masks learn to equal the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core._objective import Objective
from ..core.contract import device_of
from ..core.errors import ConfigError
from ..core.registry import register
from ..core.transform import Context, State
from ._clicks import Asked, Clicks, rounds
from ._decode import Decoded, check_decoder, decode
from ._guide import Guide, Guided, GuidedSamples, guided
from ._learner import Learner
from ._lora import attach, merge
from ._mask_losses import bce, dice
from ._samples import Augment

WEIGHT = 5.0  # of cross-entropy and of Dice
FEWEST = 10  # cells in which the masks must differ for another click


@register
@dataclass(frozen=True, kw_only=True)
class PromptLoop(Learner, family="distill", phase=40):
    """Train a compressed SAM until its masks equal the original's, click after click.

    Use it after `Encoder`: equal embeddings are a start, but what counts are masks, above all those
    after a second click. Both models answer the same boxes and points; where the student's mask
    differs from the teacher's, the next click is set, and both answer again. Annotated masks only
    say where prompts are; the loss never looks at them, so they may be rough. It is dearer than
    `Encoder`, as both decoders run for every prompt. From random weights, or with good masks of
    your own to learn from, take `Supervised`.

    The teacher is the model that entered the pipeline, or ``teacher=``; its input size, grid and
    width may differ.

    Args:
        rounds: answers of the decoder in a step, >= 1; each but the first is to one more click.
        prompts: most objects of an image in a step, >= 1.
        box_share: how often the first prompt is the object's box, 0 to 1; a point in it otherwise.
        target: ``hard``: the teacher's masks are cut at 0; ``soft``: they are probabilities.
        decoder: ``train`` trains all of it beside the encoder; ``freeze`` leaves it as it is, which
            in EdgeSAM was better on images as those of training, and worse elsewhere; ``lora``
            trains small updates of its queries and values, which are added to the weights at last.
        lora_rank: of those updates, >= 1.
        iou: weight of the squared distance of predicted IoUs to the teacher's, >= 0. EdgeSAM lost
            0.6 points of box mIoU by such a term. At 0 the scores still move, untaught.
        augment: large-scale jitter, mirroring, colours, copy-paste. None for none: then the
            teacher's embeddings are computed once only.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1. EdgeSAM has 16.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        lr: learning rate of AdamW at first, > 0, used as given; along a cosine it falls to a tenth.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images, of augmentation, prompts and updates.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if the teacher gives another number of masks, a decoder is not made of
            segment_anything's parts, or the weights are not float32.
        NoEffectError: if the student equals the teacher already.
        DataError: if the images have no usable masks, or one is damaged.
        CheckpointError: if a cache or checkpoint in ``workdir=`` is damaged or of another run.

    Effect: weights of image encoder and mask decoder change, no shape does; size and speed stay as
        they are. The prompt encoder is never trained. The state tells the loss before and after.

    Composes with: every step before it; reduce precision and export afterwards.

    Source: EdgeSAM, Zhou et al. 2023, arXiv 2312.06660 (S-Lab licence, non-commercial; nothing of
        it is used): second stage. Updates: LoRA, Hu et al. 2021, arXiv 2106.09685. We differ in
        the coin, which is tossed for every prompt, not for the batch; in prompts, of which none is
        drawn twice; in clicks, which are not 1.5 pixels off; and where the masks agree, where we
        ask no further instead of adding an empty token.

    Example:
        >>> import samcompress as sc
        >>> chain = sc.prune.Mlp(ratio=0.5, criterion="magnitude") | sc.distill.PromptLoop(steps=4)
        >>> small = chain(sc.load("tiny"), data=sc.shapes(8))
        >>> facts = sc.lineage(small)[-1].state
        >>> facts["loss_after"] < facts["loss_before"]
        True
    """

    needs_teacher: ClassVar[bool] = True
    warmup: ClassVar[float] = 0.0
    floor: ClassVar[float] = 0.1
    clip: ClassVar[float | None] = 0.01

    rounds: int = 2
    prompts: int = 16
    box_share: float = 0.5
    target: Literal["hard", "soft"] = "hard"
    decoder: Literal["train", "freeze", "lora"] = "train"
    lora_rank: int = 16
    iou: float = 0.0
    augment: Augment | None = None
    epochs: float = 5.0
    weight_decay: float = 0.05

    @property
    def parts(self) -> tuple[str, ...]:
        """The image encoder, and of the decoder what `decoder` says."""
        more = {"train": ("student.mask_decoder",), "freeze": (), "lora": ("updates",)}
        return ("student.image_encoder", *more[self.decoder])

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        self.between("box_share", 0, 1, closed=True)
        self.between("iou", 0, float("inf"), closed=True)
        for name in ("rounds", "prompts", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected=">= 1",
                )

    def check(self, model: nn.Module) -> None:
        """Check that prompts can be decoded, and that there are weights that can be trained."""
        check_decoder(self.label, model)
        super().check(model)

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The distance of the masks in all rounds."""
        source, guide = guided(
            self.label,
            model,
            ctx,
            batch_size=self.batch_size,
            prompts=self.prompts,
            augment=self.augment,
            seed=self.seed,
        )
        return Loop(model, source, guide, self)

    def finish(self, objective: Loop) -> State:
        """Add the updates in."""
        merge(objective.student.get_submodule("mask_decoder"))
        return {}


class Loop(Objective):
    """The distance of a student's masks to its teacher's, over rounds of clicks on what differs."""

    source: GuidedSamples

    def __init__(
        self, student: nn.Module, source: GuidedSamples, guide: Guide, settings: PromptLoop
    ) -> None:
        super().__init__(student, source)
        self.guide, self.settings = guide, settings
        if settings.decoder == "lora":
            decoder = student.get_submodule("mask_decoder")
            self.updates = attach(decoder, settings.lora_rank, seed=settings.seed)

    def forward(self, drawn: Guided, step: int) -> Mapping[str, Tensor]:
        """Terms ``cross-entropy`` and ``dice``, and ``iou`` if it counts."""
        s = self.settings
        batch = drawn.batch.to(device_of(self.student))
        taught = self.guide.features(drawn)
        features = self.student.get_submodule("image_encoder")(batch.images)
        clicks = Clicks.of(batch, self.source.side, seed=s.seed, step=step)

        def respond(asked: Asked, rows: Tensor, number: int) -> tuple[dict[str, Tensor], Asked]:
            owner = batch.owner[rows]
            mine = decode(self.student, features, owner, asked).at(self.source.grid)
            teacher = self.guide.decode(taught, owner, asked)
            terms = self._terms(mine, teacher, _shares(asked, mine), batch.valid[owner])
            if number + 1 < s.rounds:
                answer, truth = (best(d.logits, teacher.scores, asked) > 0 for d in (mine, teacher))
                wrong = clicks.errors(answer, truth, number, rows=rows, ignore_below=FEWEST)
                asked = asked.grown(*wrong)
            return terms, asked

        boxed = clicks.numbers(1, "kind")[:, 0] < s.box_share
        first = Asked.begin(batch.boxes, *clicks.first(batch.target), boxed)
        return rounds(first, s.rounds, respond)

    def _terms(
        self, mine: Decoded, teacher: Decoded, shares: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        s = self.settings
        target = teacher.logits.sigmoid() if s.target == "soft" else (teacher.logits > 0).float()
        each = {
            "cross-entropy": WEIGHT * bce(mine.logits, target, valid),
            "dice": WEIGHT * dice(mine.logits, target, valid),
        }
        if s.iou:
            each["iou"] = s.iou * (mine.scores.float() - teacher.scores.float()).square()
        return {name: (shares * value).sum(1) for name, value in each.items()}


def _shares(asked: Asked, decoded: Decoded) -> Tensor:
    """(P, M) how much each mask counts: a box's single one alone, all alike for a point."""
    count = decoded.logits.shape[1]
    single = torch.zeros(count, device=asked.labels.device)
    single[0] = 1
    return torch.where(asked.boxed[:, None], single, torch.full_like(single, 1 / count))


def best(logits: Tensor, scores: Tensor, asked: Asked) -> Tensor:
    """(P, n, n) logits of a box's single mask, or of a point's best by the scores."""
    index = torch.where(asked.boxed, 0, scores.argmax(1))
    return logits.detach()[torch.arange(len(index)), index]
