"""Any of timm's feature extractors in place of the image encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..core._draws import drawn as randomly
from ..core.errors import ConfigError
from ..core.framing import framing_of
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._swap import place, takes_embedding
from ._timm import Plan, TimmEncoder, planned, renormalising


@register
@dataclass(frozen=True, kw_only=True)
class Timm(Transform, family="substitute", phase=10, extras=("zoo",)):
    """Put any of timm's models that gives features in place of the image encoder.

    Use it to try an encoder nobody has built a SAM on, or one that a chip is known to run well.
    Neck, stride and channels follow from the decoder that is there: the level of features with
    cells as large as the decoder's, all coarser ones added to it. Where there is none as fine, the
    nearest is resampled, which the state names. Train it with `distill.Encoder`.

    Args:
        model: timm's name, e.g. ``mobilenetv4_conv_small`` or, with the tag of certain weights,
            ``mobilenetv4_conv_small.e2400_r224_in1k``.
        pretrained: start from timm's weights for ImageNet, which it downloads from the Hub, instead
            of random ones. Pixels are then rescaled to those the weights expect.
        fuse: make branches one convolution where timm can, and fold batch norms.
        seed: of the random weights.

    Raises:
        ConfigError: if the model's image side does not fit the encoder's cells, or timm's model
            does not take images of this side.
        ModelError: if the model is no SAM, or timm has no model of this name that gives features.
        CheckpointError: if `pretrained` and timm cannot get the weights.
        MissingDependencyError: if timm is not installed.

    Effect: at 1024 pixels with 256 channels encoders of 2.2 million parameters and 6.9 GMAC
        (``mobilenetv4_conv_small``), 4.0 and 14.0 (``fastvit_t8``), 6.9 and 102
        (``vit_tiny_patch16_224``); ``vit_b`` has 89.7 and 486. The decoder stays.

    Composes with: comes before everything else; `distill.Encoder` after it, then `PromptLoop`.
        `ImageSize` after it works on models of convolutions, and where timm can resize the model.

    Source: timm, R. Wightman, https://github.com/huggingface/pytorch-image-models (Apache-2.0;
        weights have licences of their own). The sum of levels is that of feature pyramids, Lin et
        al. 2016, arXiv 1612.03144; the neck is SAM's.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.Timm(model="mobilenetv4_conv_small")(sc.build("tiny"))
        >>> sc.lineage(small)[0].state["features"]["strides"]
        [8, 16, 32]
    """

    model: str = "mobilenetv4_conv_small"
    pretrained: bool = False
    fuse: bool = False
    seed: int = 0

    def check(self, model: nn.Module) -> None:
        """Check that the model is a SAM, and that timm's model fits its image."""
        takes_embedding(self.label, model)
        size, grid = _square(model)
        multiple = planned(self.model, size, size // grid).multiple(size // grid)
        if size % multiple:
            raise ConfigError(
                f"{self.label}: the image side does not fit this encoder.",
                where="image_encoder.img_size",
                got=size,
                expected=f"a multiple of {multiple}",
                fix="sc.substitute.ImageSize(size=...) before it",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Put the encoder in."""
        sam: Any = model
        size, grid = _square(model)
        plan = planned(self.model, size, size // grid)
        own = size // plan.strides[0]
        pixels = renormalising(self.model, sam.pixel_mean, sam.pixel_std)
        state = {
            "image_size": size,
            "channels": sam.prompt_encoder.embed_dim,
            "grid": grid,
            "features": {name: list(values) for name, values in asdict(plan).items()},
            "adapter": None if own == grid else f"bilinear, {own}x{own} -> {grid}x{grid}",
            "pixels": pixels if self.pretrained else None,
        }
        return self._put(model, state, pretrained=self.pretrained)

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same module again, without a download: saved weights follow."""
        return self._put(model, state, pretrained=False)

    def _put(self, model: nn.Module, state: State, *, pretrained: bool) -> State:
        size = state["image_size"]
        with randomly(torch.device("cpu"), self.seed, self.label):
            made = TimmEncoder(
                self.model,
                size,
                state["grid"],
                state["channels"],
                Plan(**{name: tuple(values) for name, values in state["features"].items()}),
                pixels=state["pixels"],
                pretrained=pretrained,
            ).eval()
        if self.fuse:
            made.fuse()
        place(model, made, size, size)
        return state


def _square(model: nn.Module) -> tuple[int, int]:
    """Side of the image, which is that of the frame, and cells a side of the decoder's grid."""
    sam: Any = model
    return framing_of(model).frame, sam.prompt_encoder.image_embedding_size[0]
