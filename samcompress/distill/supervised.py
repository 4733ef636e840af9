"""SAM's own training: prompts on annotated masks, corrected click by click."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core._draws import generator
from ..core._objective import Objective
from ..core.contract import device_of
from ..core.errors import ConfigError
from ..core.registry import register
from ..core.transform import Context
from ._clicks import Asked, Clicks, rounds
from ._decode import Decoded, check_decoder, decode
from ._learner import Learner
from ._mask_losses import curriculum, iou, least, mask_loss, score_loss
from ._samples import Augment, Batch, Frame, Samples

JITTER = Augment()
IDLE_FROM = 11  # rounds from which on two bring no new click, as in SAM's training


@register
@dataclass(frozen=True, kw_only=True)
class Supervised(Learner, family="distill", phase=40):
    """Train all of a SAM on annotated masks, as SAM itself was trained.

    Use it to fine-tune on data of your own, to recover a compressed model where masks are at hand,
    or to train a small model from nothing. With masks of a teacher only, `PromptLoop` is the better
    choice; without any masks, `Encoder`. A short run at a low rate keeps what the model knows; a
    long one on narrow data makes it forget how to follow prompts elsewhere.

    A prompt is a point in the object or a jittered box. The decoder answers, a click is added where
    the mask is wrong, and so on for `rounds`. The single mask and the best of the three are taught
    their shape; all four are taught to predict their own IoU.

    Args:
        rounds: answers of the decoder in a step, >= 1. From 11 on, as in SAM's own training, one
            round and the last bring no new click, only the mask to improve.
        prompts: most objects of an image in a step, >= 1.
        box_share: how often the first prompt is a box, 0 to 1; a point otherwise.
        box_jitter: deviation of the noise of a box's corners over its sides, >= 0. Smaller where
            boxes will be exact.
        feed: how often the last mask is part of the next prompt, 0 to 1, drawn once a step.
        turn: None for SAM's loss, 20 focal + dice, all along. Otherwise two shares of the steps
            between which balanced cross-entropy + dice turns into it: from random weights that
            starts faster.
        augment: large-scale jitter, mirroring, colours, copy-paste; None for none.
        train_encoder: also train the image encoder; without it a step costs the decoder only, and
            no more than the decoder can be lost.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        lr: highest learning rate of AdamW, > 0: 8e-4 from nothing (SAM: with batches of 256), 1e-4
            for what is already trained.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images, of augmentation and prompts.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if the decoder is not made of segment_anything's parts, masks are fed to a
            prompt encoder that takes none, or the weights are not float32.
        DataError: if the images have no usable masks.
        CheckpointError: if a checkpoint in ``workdir=`` is damaged.

    Effect: all weights change, no shape does; size and speed stay as they are. The state tells the
        loss before and after; `sc.evaluate` tells what that means for masks.

    Composes with: every step before it; reduce precision and export afterwards.

    Source: Segment Anything, Kirillov et al. 2023, arXiv 2304.02643, appendix A (Apache-2.0, no
        training code): losses, prompts, rounds, rate. IoU loss on all masks: SAM 2, Ravi et al.
        2024, arXiv 2408.00714. Copy-paste and large-scale jitter: Ghiasi et al. 2020, arXiv
        2012.07177. We differ in teaching the single mask for one point too, in 3 rounds instead of
        11, and in what is said under `turn`.

    Example:
        >>> import samcompress as sc
        >>> tuned = sc.distill.Supervised(steps=2, batch_size=2)(sc.load("tiny"), data=sc.shapes(4))
        >>> sc.lineage(tuned)[-1].state["steps"]
        2
    """

    rounds: int = 3
    prompts: int = 8
    box_share: float = 0.5
    box_jitter: float = 0.1
    feed: float = 1.0
    turn: tuple[float, float] | None = None
    augment: Augment | None = JITTER
    train_encoder: bool = True
    lr: float = 1e-4
    weight_decay: float = 0.05

    @property
    def parts(self) -> tuple[str, ...]:
        """All of the model, or all but the image encoder."""
        encoder = ("student.image_encoder",) if self.train_encoder else ()
        return (*encoder, "student.prompt_encoder", "student.mask_decoder")

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        self.between("box_share", 0, 1, closed=True)
        self.between("box_jitter", 0, 1, closed=True)
        self.between("feed", 0, 1, closed=True)
        for name in ("rounds", "prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected=">= 1",
                )
        if self.turn is not None and not 0 <= self.turn[0] < self.turn[1] <= 1:
            raise ConfigError(
                f"{self.label}: turn is out of range.",
                got=self.turn,
                expected="two shares of the steps, 0 <= first < second <= 1",
            )

    def check(self, model: nn.Module) -> None:
        """Check that prompts can be decoded, and that there are weights that can be trained."""
        check_decoder(self.label, model, masks=self.feed > 0 or self.rounds >= IDLE_FROM)
        super().check(model)

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The losses of all rounds."""
        source = Samples(
            ctx.data,
            [Frame.of(model)],
            batch_size=self.batch_size,
            prompts=self.prompts,
            augment=self.augment,
            seed=self.seed,
        )
        return Rounds(model, source, self, steps)


class Rounds(Objective):
    """Losses of the answers to a prompt and to the clicks that correct them."""

    source: Samples

    def __init__(
        self, student: nn.Module, source: Samples, settings: Supervised, steps: int
    ) -> None:
        super().__init__(student, source)
        self.settings, self.steps = settings, steps

    def forward(self, drawn: Batch, step: int) -> Mapping[str, Tensor]:
        """Terms ``single``, ``best of three`` and ``score``."""
        s = self.settings
        drawn = drawn.to(device_of(self.student))
        features = self.features(drawn)
        clicks = Clicks.of(drawn, self.source.frames[0].size, seed=s.seed, step=step)
        idle = self._idle(step)
        fed = float(torch.rand((), generator=generator(s.seed, "feed", step))) < s.feed

        def answer(asked: Asked, rows: Tensor, number: int) -> tuple[dict[str, Tensor], Asked]:
            target, owner = drawn.target[rows], drawn.owner[rows]
            decoded = decode(self.student, features, owner, asked)
            shown = decoded.at(self.source.frames[0].grid)
            terms = self._terms(shown, target, drawn.valid[owner], step)
            mask = chosen(decoded, asked)[:, None] if fed or idle else None
            if number + 1 not in idle:
                answer, truth = chosen(shown, asked) > 0, target >= 0.5
                asked = asked.grown(
                    *clicks.errors(answer, truth, number, rows=rows, ignore_below=1)
                )
            return terms, replace(asked, masks=mask)

        first = clicks.begin(drawn.boxes, drawn.target, box_share=s.box_share, jitter=s.box_jitter)
        return rounds(first, s.rounds, answer)

    def features(self, drawn: Batch) -> Tensor:
        """(B, C, h, w) embeddings of the images."""
        found: Tensor = self.student.get_submodule("image_encoder")(drawn.images)
        return found

    def _terms(
        self, decoded: Decoded, target: Tensor, valid: Tensor, step: int
    ) -> dict[str, Tensor]:
        turn = self.settings.turn
        focus = 1.0
        if turn is not None:
            done = max(step, 0) / self.steps
            focus = min(max((done - turn[0]) / (turn[1] - turn[0]), 0.0), 1.0)
        losses = mask_loss(decoded.logits, target, valid, **curriculum(focus))
        return {
            "single": losses[:, 0],
            "best of three": least(losses)[0],
            "score": score_loss(decoded.scores, iou(decoded.logits, target, valid)),
        }

    def _idle(self, step: int) -> tuple[int, ...]:
        """Rounds without a new click."""
        last = self.settings.rounds - 1
        if self.settings.rounds < IDLE_FROM:
            return ()
        g = generator(self.settings.seed, "idle", step)
        return int(torch.randint(1, last, (), generator=g)), last


def chosen(decoded: Decoded, asked: Asked) -> Tensor:
    """(P, h, w) logits a user would go on with: one point's best by score, else the single."""
    index = decoded.scores[:, 1:].argmax(1) + 1
    index = torch.where(asked.ambiguous, index, 0)
    return decoded.logits.detach()[torch.arange(len(index)), index].float()
