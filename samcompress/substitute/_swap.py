"""What all techniques that put another image encoder in have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core._draws import drawn as randomly
from ..core.contract import device_of, dtype_of, parts
from ..core.errors import ConfigError, ModelError
from ..core.framing import ATTRIBUTE, framing_of
from ..core.transform import Context, State, Transform


@dataclass(frozen=True, kw_only=True)
class Swap(Transform):
    """Another image encoder, with random weights, that fits the decoder that is there.

    Its channels follow from the prompt encoder, its image side from the frame in which prompts are
    given. Where its grid is another than the decoder's, the embedding is resized.
    """

    seed: int = 0

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels of the image for each cell of the embedding."""

    @property
    def multiple(self) -> int:
        """What the image side must be a multiple of."""
        return self.stride

    @abstractmethod
    def encoder(self, size: int, channels: int) -> nn.Module:
        """The module, for images of side `size`."""

    def side(self, frame: int) -> int:
        """Image side for a frame: as large, unless the encoder takes smaller images."""
        return frame

    def check(self, model: nn.Module) -> None:
        """Check that the model is a SAM, and that its frame suits the encoder."""
        takes_embedding(self.label, model)
        size = self.side(framing_of(model).frame)
        if size < self.multiple or size % self.multiple:
            raise ConfigError(
                f"{self.label}: the image side does not fit this encoder.",
                where="image_encoder.img_size",
                got=size,
                expected=f"a multiple of {self.multiple}",
                fix="sc.substitute.ImageSize(size=...) before it",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Put the encoder in."""
        sam: Any = model
        frame = framing_of(model).frame
        size, grid = self.side(frame), sam.prompt_encoder.image_embedding_size[0]
        own = size // self.stride
        return self.rebuild(
            model,
            {
                "image_size": size,
                "frame": frame,
                "channels": sam.prompt_encoder.embed_dim,
                "grid": grid,
                "adapter": None if own == grid else f"bilinear, {own}x{own} -> {grid}x{grid}",
            },
        )

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same module again."""
        size = state["image_size"]
        with randomly(torch.device("cpu"), self.seed, self.label):
            made = self.encoder(size, state["channels"])
        if state["adapter"] is not None:
            made = OnGrid(made, state["grid"])
        place(model, made, size, state["frame"])
        return state


def takes_embedding(label: str, model: nn.Module) -> None:
    """Check that a model is a SAM whose decoder needs nothing but an embedding.

    Raises:
        ModelError: if it is no SAM, or its decoder takes further channels.
    """
    decoder: Any = parts(model).mask_decoder
    if getattr(decoder, "features", 0):
        raise ModelError(
            f"{label}: this mask decoder reads more than an embedding.",
            where="mask_decoder",
            got=f"{type(decoder).__name__}, which takes {decoder.features} further channels",
            expected="a decoder that takes the embedding alone, as SAM's",
            fix="train the image encoder that is there, or start from another SAM",
        )


def place(model: nn.Module, encoder: nn.Module, size: int, frame: int) -> None:
    """Put an image encoder into a SAM.

    Args:
        model: the SAM; the rule by which images get into its square stays.
        encoder: goes where the old one was, in its dtype.
        size: side S of the image that it takes.
        frame: side of the square in which prompts are placed.
    """
    sam: Any = model
    old = sam.image_encoder
    sam.image_encoder = encoder.to(device_of(old), dtype_of(old)).eval()
    # Where the encoder takes smaller images than its frame, the predictor of segment_anything
    # gives prompts in the smaller square; so that is what the prompt encoder must be told.
    sam.prompt_encoder.input_image_size = (size, size)
    setattr(model, ATTRIBUTE, replace(framing_of(model), size=size, frame=frame))


class OnGrid(nn.Module):
    """An image encoder whose embedding is resized to the grid of the decoder.

    Args:
        encoder: the encoder.
        grid: cells a side.
    """

    def __init__(self, encoder: nn.Module, grid: int) -> None:
        super().__init__()
        self.encoder, self.grid = encoder, grid

    @property
    def img_size(self) -> int:
        """Side S of the image."""
        side: Any = self.encoder.img_size
        return int(side)

    @property
    def stride(self) -> int:
        """Pixels of the image for each cell that the decoder sees."""
        return self.img_size // self.grid

    @property
    def multiple(self) -> int:
        """What S must be a multiple of."""
        encoder: Any = self.encoder
        return int(getattr(encoder, "multiple", encoder.stride))

    def resize(self, size: int) -> None:
        """Take images of another size; the grid keeps its proportion."""
        encoder: Any = self.encoder
        self.grid = self.grid * size // self.img_size
        encoder.resize(size)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        embedding: Tensor = self.encoder(x)
        return F.interpolate(embedding, (self.grid, self.grid), mode="bilinear")
