"""Masked pretraining of an image encoder on a SAM's features."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import _fit
from ..core._draws import drawn as randomly
from ..core._draws import generator
from ..core._objective import Objective
from ..core.contract import device_of
from ..core.errors import ConfigError
from ..core.registry import register
from ..core.transform import Context, State
from ._learner import Learner
from ._taps import EMBEDDING, block, depth, need, widths
from ._views import Looking, Seen, apart

log = logging.getLogger("samcompress.distill")
WHOLE_BATCH = 4096  # images that the learning rate is for
HEAD = 32  # channels of an attention head of the decoder


@register
@dataclass(frozen=True, kw_only=True)
class Sami(Learner, family="distill", phase=40):
    """Pretrain a ViT encoder: guess the original's features where the image is hidden.

    Use it to start an encoder from random weights, with very many images and no masks. To mend
    a compressed one there is `Encoder`. What comes out cannot segment yet: the neck has not been
    trained, so let `Encoder`, `PromptLoop` or `Supervised` follow.

    Three quarters of the patches are hidden. The encoder's last tokens of the visible ones go
    straight to a linear map to the teacher's width; those of the hidden ones are thrown away and
    guessed by a decoder, whose queries are the hidden places and whose keys are visible and hidden
    ones. The error counts at all of them. Decoder and map are thrown away in the end.

    In the paper hidden tokens are dropped before a plain ViT. SAM's attends in windows with
    relative positions, which tokens without their grid do not have. Here one learnt vector stands
    in for the pixels of every hidden patch, so the encoder keeps its grid and its weights fit the
    whole image afterwards, but a step saves no time, and the stand-ins take part in attention.

    Args:
        hidden: share of the patches that is hidden, between 0 and 1.
        tap: what to guess of the teacher: ``tokens`` of its last block, or the embedding after its
            ``neck``. The teacher sees the whole image at its own size.
        decoder_depth: layers of the decoder, >= 1.
        decoder_width: its channels, a multiple of 32.
        epochs: how often each image is seen, > 0.
        steps: optimiser steps instead of epochs, >= 1; None for epochs.
        batch_size: images a step, >= 1.
        accumulate: micro-batches a step is computed in, to save memory, >= 1; same result.
        lr: highest learning rate of AdamW for batches of 4096, > 0. What is used is in proportion
            to `batch_size`; the log and the state tell it. Short runs need more than the default.
        weight_decay: of weights; biases and norms have none. >= 0.
        ema: decay of an average of the weights, which is then the result; None for none.
        precision: ``bf16`` computes most products in bfloat16.
        workers: processes that read images; 0 for none. Changes nothing but the time.
        seed: of the order of images, of what is hidden, and of the decoder's first weights.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if the student has no ViT blocks, the teacher none for ``tokens``, or the
            student is not float32.
        NoEffectError: if the student has nothing to train.
        DataError: if no image can be decoded.
        CheckpointError: if a checkpoint in ``workdir=`` is damaged.

    Effect: the encoder's weights before its neck change, nothing else does; size and speed stay as
        they are. The state tells the loss before and after, both with the decoder.

    Composes with: steps before it that leave the encoder's blocks; a step that trains the neck has
        to follow; then reduce precision and export.

    Source: EfficientSAM, Xiong et al. 2023, arXiv 2312.00863 (Apache-2.0, no training code):
        masking, decoder, loss and optimiser. We differ in the stand-ins, and use neither random
        crops nor mirroring.

    Example:
        >>> import samcompress as sc
        >>> pretrain = sc.distill.Sami(
        ...     steps=4, batch_size=2, lr=2.0, decoder_depth=1, decoder_width=32
        ... )
        >>> student = pretrain(sc.build("tiny"), data=sc.shapes(4), teacher=sc.load("tiny"))
        >>> facts = sc.lineage(student)[-1].state
        >>> facts["lr"], facts["loss_after"] < facts["loss_before"]
        (0.0009765625, True)
    """

    needs_teacher: ClassVar[bool] = True
    warmup: ClassVar[float] = 0.1

    hidden: float = 0.75
    tap: Literal["tokens", "neck"] = "tokens"
    decoder_depth: int = 8
    decoder_width: int = 512
    lr: float = 2.4e-3
    weight_decay: float = 0.05

    @property
    def parts(self) -> tuple[str, ...]:
        """The encoder, and what is thrown away."""
        return ("student.image_encoder", "decoder")

    @property
    def rate(self) -> float:
        """The highest learning rate that is used."""
        return self.lr * self.batch_size / WHOLE_BATCH

    def validate(self) -> None:
        """Check the fields."""
        super().validate()
        self.between("hidden", 0, 1)
        if self.decoder_depth < 1:
            raise ConfigError(
                f"{self.label}: decoder_depth is out of range.",
                got=self.decoder_depth,
                expected=">= 1",
            )
        if self.decoder_width < HEAD or self.decoder_width % HEAD:
            raise ConfigError(
                f"{self.label}: decoder_width does not divide into heads.",
                got=self.decoder_width,
                expected=f"a multiple of {HEAD}",
            )

    def check(self, model: nn.Module) -> None:
        """Check that the encoder has blocks, and weights that can be trained."""
        super().check(model)
        depth(model, "student")
        need(model, ["patch_embed"], "student")

    def plan(self, images: int) -> _fit.Plan:
        """AdamW as in the paper, its rate in proportion to the batch."""
        return dataclasses.replace(super().plan(images), lr=self.rate, betas=(0.9, 0.95))

    def objective(self, model: nn.Module, ctx: Context, steps: int) -> Objective:
        """The error of the guesses."""
        log.info(
            "%s: highest rate %.3g = %g x %d / %d",
            self.label,
            self.rate,
            self.lr,
            self.batch_size,
            WHOLE_BATCH,
        )
        return Guesses(model, ctx, self)

    def finish(self, objective: Any) -> State:
        """The learning rate."""
        return {"lr": self.rate}


class Guesses(Looking):
    """Error of what a student and a decoder make of an image that is mostly hidden."""

    def __init__(self, student: nn.Module, ctx: Context, settings: Sami) -> None:
        teacher, s = ctx.original, settings
        super().__init__(student, [teacher], ctx.data, batch_size=s.batch_size, seed=s.seed)
        self.settings = settings
        need(student, ["patch_embed"], "student")
        self.own = block(depth(student, "student") - 1)
        self.other = EMBEDDING if s.tap == "neck" else block(depth(teacher, "teacher") - 1)
        prompts: Any = student.get_submodule("prompt_encoder")
        self.grid: tuple[int, int] = tuple(prompts.get_dense_pe().shape[-2:])
        channels = widths(student, [self.own])[self.own], widths(teacher, [self.other])[self.other]
        with randomly(torch.device("cpu"), s.seed, "decoder"):
            made = Decoder(*channels, s.decoder_width, s.decoder_depth, self.grid)
        self.decoder = made.to(device_of(student))

    def forward(self, drawn: Seen, step: int) -> Mapping[str, Tensor]:
        """Term ``tokens``."""
        theirs = self.teach(drawn, [self.other])[self.other]
        order, visible = self._order(drawn, step)
        patches = self.student.get_submodule("image_encoder.patch_embed")
        with filled(patches, order[:, visible:], self.decoder.stand_in):
            mine = self.learn(drawn, [self.own])[self.own]
        guessed = self.decoder(mine.flatten(2).mT, order, visible)
        state = guessed.float().mT.unflatten(2, self.grid)
        return {"tokens": apart(drawn, self.own, state, theirs)}

    def _order(self, drawn: Seen, step: int) -> tuple[Tensor, int]:
        """(B, N) places of the patches, visible ones first, and how many those are."""
        count = self.grid[0] * self.grid[1]
        visible = min(max(1, round(count * (1 - self.settings.hidden))), count - 1)
        keys = [(self.settings.seed, "hidden", step, place) for place in drawn.places]
        rows = [torch.randperm(count, generator=generator(*key)) for key in keys]
        return torch.stack(rows).to(device_of(self.student)), visible


@contextmanager
def filled(patches: nn.Module, places: Tensor, value: Tensor) -> Iterator[None]:
    """Make patch tokens say nothing of the image.

    Args:
        patches: gives (B, h, w, C).
        places: (B, K) of the tokens, counted row by row.
        value: (C,) what they say instead.
    """

    def fill(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        hide = torch.zeros(output.shape[:3], dtype=torch.bool, device=output.device)
        hide = hide.flatten(1).scatter(1, places, True).view(output.shape[:3])
        return torch.where(hide[..., None], value.to(output.dtype), output)

    handle = patches.register_forward_hook(fill)
    try:
        yield
    finally:
        handle.remove()


class Decoder(nn.Module):
    """Guesses a teacher's tokens from those of a student that saw a part of the image.

    Args:
        width_in: channels of the student's tokens.
        width_out: channels of the teacher's.
        width: of the decoder.
        depth: layers.
        grid: rows and columns of the tokens.
    """

    positions: Tensor

    def __init__(
        self, width_in: int, width_out: int, width: int, depth: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.stand_in = nn.Parameter(0.02 * torch.randn(width_in))
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.embed = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(Cross(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width_out)
        self.register_buffer("positions", waves(width, grid))

    def forward(self, tokens: Tensor, order: Tensor, visible: int) -> Tensor:
        """Map tokens to guesses.

        Args:
            tokens: (B, N, C) of the student, in image order; those of hidden patches are not read.
            order: (B, N) places, visible ones first.
            visible: how many those are.

        Returns:
            (B, N, width_out), in image order.
        """
        seen, unseen = order[:, :visible], order[:, visible:]
        bypass = self.embed(tokens.take_along_dim(seen[..., None], 1))
        memory = bypass + self.positions[seen]
        guess = self.query + self.positions[unseen]
        for layer in self.blocks:
            guess = layer(guess, memory)
        both = torch.cat([bypass, guess], 1).take_along_dim(order.argsort(1)[..., None], 1)
        found: Tensor = self.head(self.norm(both))
        return found


class Cross(nn.Module):
    """A decoder layer: hidden places look at visible ones and at each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, guess: Tensor, memory: Tensor) -> Tensor:
        """Map guesses (B, K, C), given memory (B, V, C), to better ones (B, K, C)."""
        every = self.norm1(torch.cat([memory, guess], 1))
        asking = every[:, memory.shape[1] :]
        k, v = self.kv(every).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (self.q(asking), k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        guess = guess + self.proj(mixed)
        better: Tensor = guess + self.mlp(self.norm2(guess))
        return better


def waves(width: int, grid: tuple[int, int]) -> Tensor:
    """(h·w, width) positions: sine and cosine of row and column at falling frequencies."""
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = (torch.arange(n)[:, None] * frequencies for n in grid)
    y = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, grid[1], -1)
    x = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(grid[0], -1, -1)
    return torch.cat([y, x], 2).flatten(0, 1)
