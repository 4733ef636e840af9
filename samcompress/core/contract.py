"""What counts as a SAM: three parts, and what they must answer."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import ModelError


@runtime_checkable
class ImageEncoder(Protocol):
    """``(B, 3, S, S)`` normalised, padded images to ``(B, C, h, w)`` embeddings."""

    img_size: int

    def __call__(self, x: Tensor) -> Tensor:
        """Encode images."""


@runtime_checkable
class PromptEncoder(Protocol):
    """Prompts in the padded frame to ``(P, N, C)`` sparse and ``(P, C, h, w)`` dense embeddings."""

    mask_input_size: tuple[int, int]

    def __call__(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode P prompts."""

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the grid, ``(1, C, h, w)``."""


@runtime_checkable
class MaskDecoder(Protocol):
    """Image and prompt embeddings to ``(P, M, 4h, 4w)`` logits and ``(P, M)`` scores."""

    def __call__(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Decode P prompts on one image."""


class SamLike(Protocol):
    """A model of three parts that `segment_anything.SamPredictor` can use."""

    image_encoder: Any
    prompt_encoder: Any
    mask_decoder: Any
    pixel_mean: Tensor
    pixel_std: Tensor


class Parts(NamedTuple):
    """The three parts of a SAM."""

    image_encoder: nn.Module
    prompt_encoder: nn.Module
    mask_decoder: nn.Module


def parts(model: nn.Module) -> Parts:
    """The three parts of a model.

    Raises:
        ModelError: if it is not a SAM.
    """
    check_sam(model)
    return Parts(*(getattr(model, name) for name in Parts._fields))


def embedding_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of what a SAM's image encoder gives.

    The grid and channels of the prompts, and behind them the `features` further channels that some
    decoders take.
    """
    channels, height, width = model.prompt_encoder.get_dense_pe().shape[1:]
    return channels + getattr(model.mask_decoder, "features", 0), height, width


def check_sam(model: object) -> None:
    """Check that a model has what every technique, predictor and export relies on.

    Raises:
        ModelError: naming what is absent.
    """
    if not isinstance(model, nn.Module):
        hint = "sc.load(path)" if isinstance(model, str) else "sc.load(...) or sc.build(...)"
        raise ModelError(
            "this is not a SAM.",
            got=f"{type(model).__module__}.{type(model).__qualname__}",
            expected="a torch module with image_encoder, prompt_encoder and mask_decoder",
            fix=f"make one with {hint}",
        )
    wanted = {
        "image_encoder": ("img_size",),
        "prompt_encoder": ("get_dense_pe", "mask_input_size"),
        "mask_decoder": (),
        "preprocess": (),
        "postprocess_masks": (),
        "pixel_mean": (),
    }
    absent = [name for name in wanted if not hasattr(model, name)]
    absent += [
        f"{name}.{attribute}"
        for name, attributes in wanted.items()
        if hasattr(model, name)
        for attribute in attributes
        if not hasattr(getattr(model, name), attribute)
    ]
    if absent:
        raise ModelError(
            "this is not a SAM.",
            got=f"{type(model).__module__}.{type(model).__qualname__} without {', '.join(absent)}",
            expected="a model that segment_anything.SamPredictor can use",
            fix="sc.load(model) converts a transformers SamModel",
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU if it holds no tensor."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Floating-point type a module computes in: that of its first float parameter or buffer."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def cast(x: Tensor, kind: torch.dtype) -> Tensor:
    """A batch in another type; what is expanded along the batch stays so, and is cast once."""
    return x[:1].to(kind).expand_as(x) if x.stride(0) == 0 else x.to(kind)
