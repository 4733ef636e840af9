"""A head that says where to ask, for segmenting everything with few prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core._draws import drawn as randomly
from ..core._objective import Objective
from ..core.contract import device_of, parts
from ..core.errors import ConfigError, NoEffectError
from ..core.everything.heat import HeatMap, losses, targets
from ..core.registry import register
from ..core.transform import Context, State
from ._learner import Learner
from ._samples import Batch, Frame, Samples

HEAD = "heat_head"
MASKS = 64  # most objects of an image


@register
@dataclass(frozen=True, kw_only=True)
class HeatHead(Learner, family="distill", phase=40):
    """Give a model a small head that predicts where objects are, and train it.

    Use it for segmenting everything with few prompts: `sc.samplers.Heat` asks at the peaks of its
    heat map instead of on a grid. It needs images with masks of all their objects. Nothing else of
    the model changes, so its answers to prompts stay as they are; a prompt that somebody gives
    becomes no faster.

    Args:
        width: channels inside the head, >= 1.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; hard cells are then
            looked for in each by itself.
        lr: highest learning rate of AdamW, > 0.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the first weights and of the order of images.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        NoEffectError: if the model has such a head already.
        DataError: if images without a usable mask follow one another.
        CheckpointError: if a checkpoint in ``workdir=`` is damaged.

    Effect: adds 0.15 million parameters for 256 channels, and 0.6 GMAC an image at SAM's grid; all
        else is equal. How many prompts it saves: docs/everything.md.

    Composes with: comes after all that changes the image encoder, whose embedding it reads; then
        reduce precision and export.

    Source: after Lite-SAM's AutoPPN, Fu et al. 2024, arXiv 2407.08965, and AoP-SAM, Chen et al.
        2025, arXiv 2505.11980. No code of either is public, and neither tells its losses; layers,
        targets and losses are our choice.

    Example:
        >>> import samcompress as sc
        >>> sam = sc.distill.HeatHead(steps=2)(sc.load("tiny"), data=sc.shapes(4))
        >>> sampler = sc.samplers.Heat(thresholds=(0.3,))
        >>> found = sc.Everything(sampler=sampler)(sam, sc.shapes(1)[0].image)
        >>> found.stats.prompts <= 256
        True
    """

    width: int = 64
    lr: float = 1e-3

    @property
    def parts(self) -> tuple[str, ...]:
        """The head."""
        return (f"student.{HEAD}",)

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        if self.width < 1:
            raise ConfigError(
                f"{self.label}: width is out of range.", got=self.width, expected=">= 1"
            )

    def check(self, model: nn.Module) -> None:
        """Check that there is no head yet."""
        parts(model)
        if hasattr(model, HEAD):
            raise NoEffectError(
                f"{self.label}: the model has a head for a heat map.",
                where=HEAD,
                fix="leave out the second sc.distill.HeatHead()",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Make the head, and train it."""
        prompt_encoder: Any = parts(model).prompt_encoder
        channels = int(prompt_encoder.get_dense_pe().shape[1])
        with randomly(torch.device("cpu"), self.seed, self.label):
            self.rebuild(model, {"channels": channels})
        return {**super().apply(model, ctx), "channels": channels}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Make the head."""
        head = HeatMap(state["channels"], self.width).to(device_of(model)).eval()
        model.add_module(HEAD, head)
        return state

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The error of heat and boxes."""
        source = Samples(
            ctx.data,
            [Frame.of(model)],
            batch_size=self.batch_size,
            prompts=MASKS,
            augment=None,
            seed=self.seed,
        )
        return Heated(model, source)


class Heated(Objective):
    """Errors of the head, with targets made of the masks."""

    def forward(self, drawn: Any, step: int) -> Mapping[str, Tensor]:
        """Terms ``heat`` and ``boxes``."""
        student: Any = self.student
        batch: Batch = drawn.to(device_of(student))
        with torch.no_grad():
            features = student.image_encoder(batch.images)
        heat, sides = student.heat_head(features.float())
        grid = (heat.shape[2], heat.shape[3])
        made = [targets(batch.target[batch.owner == i], grid) for i in range(len(features))]
        wanted, reach = (torch.stack(column) for column in zip(*made, strict=True))
        valid = F.adaptive_avg_pool2d(batch.valid[:, None], grid)[:, 0] > 0.5
        return losses(heat[:, 0].float(), sides.float(), wanted, reach, valid)
