"""Models that are measured: those with weights as they are, others random everywhere."""

from __future__ import annotations

from typing import Any

import torch

import samcompress as sc
from samcompress.core.build import ARCHITECTURES
from samcompress.core.zoo import published

BUNDLED = ("tiny", "mini")


def subject(name: str, size: int | None = None, **config: Any) -> Any:
    """A model at an input size; nothing is downloaded.

    Times and sizes of a random model are those of any other; its errors and masks are not. Tables
    of positions and biases, which begin as zeros, are random too, so that nothing is left out.

    Args:
        name: an architecture, a published model, or a file or folder with weights.
        size: side of the padded image; the model's own if left out.
        config: other fields of an architecture's config; its weights are random then.
    """
    known = name in ARCHITECTURES or name in published()
    if not known or (name in BUNDLED and not config):
        return _sized(sc.load(name), size).eval()
    if name in ARCHITECTURES and size is not None:
        config["image_size"] = size
    sam = _sized(sc.build(name, **config), size)
    drawn = torch.Generator().manual_seed(1)
    for parameter in sam.parameters():
        if not parameter.detach().any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=drawn))
    return sam.eval()


def _sized(sam: Any, size: int | None) -> Any:
    if size in (None, sam.image_encoder.img_size):
        return sam
    return sc.substitute.ImageSize(size=size)(sam, progress=False)
