"""How much a model holds in memory and on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from ..core.checkpoint import save
from ..core.contract import parts
from ..core.sizes import parameter_count
from .macs import before_export


def parameters(model: nn.Module) -> dict[str, int]:
    """Number of weights, each tensor once, tied ones too.

    Args:
        model: a SAM; of an exported one, the torch model it was made from is counted.

    Returns:
        ``total``, ``encoder``, ``prompt_encoder``, ``mask_decoder``, and apart from these
        ``buffers``: floating-point numbers that are not trained. The integers of a quantised layer
        are weights, its scales are buffers.

    Example:
        >>> from samcompress.core.build import build
        >>> parameters(build("tiny"))["total"] > 200_000
        True
    """
    model = before_export(model)
    encoder, prompt_encoder, mask_decoder = parts(model)
    floats = {id(b): b.numel() for b in model.buffers() if b.is_floating_point()}
    return {
        "total": parameter_count(model),
        "encoder": parameter_count(encoder),
        "prompt_encoder": parameter_count(prompt_encoder),
        "mask_decoder": parameter_count(mask_decoder),
        "buffers": sum(floats.values()),
    }


def bytes_on_disk(source: nn.Module | str | Path) -> int:
    """Bytes of the folder that `sc.save` writes: weights, record, card and exported files.

    Args:
        source: a model, which is saved to a temporary folder, or a folder.

    Raises:
        ModelError: if the model cannot be saved.
    """
    if isinstance(source, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            save(source, folder)
            return bytes_on_disk(folder)
    return sum(f.stat().st_size for f in Path(source).rglob("*") if f.is_file())
