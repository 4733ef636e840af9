"""What lies beside exported graphs, for a process that has the runtime and NumPy alone.

``manifest.json`` says what the graphs take and give, how images are made ready, what the runtime
granted, and the hash of every file. ``reference.npz`` holds a drawn image with a prompt, and what
torch made of them, thinned out: enough to see on any machine that the files still do the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.data import shapes
from ..core.files import sha256
from ..core.framing import framing_of
from ..core.predict import preprocess
from ._graphs import DECODER, ENCODER, NO_POINT, Graph
from .backends._base import sizes_of

MANIFEST, REFERENCE = "manifest.json", "reference.npz"
FORMAT = 1
# What the manifest takes from the state of the step as it is.
STATED = ("backend", "versions", "granted", "errors", "tolerance", "unchecked")
EVERY = 4  # of so many rows and columns one is kept


class Drawn:
    """An image that nobody took: (S, S, 3) uint8, and as the encoder takes it."""

    def __init__(self, model: Any) -> None:
        side = model.image_encoder.img_size
        # Of coarse pixels, which take little room in a file.
        coarse = shapes(1, seed=0, size=-(-side // EVERY))[0].image
        self.pixels = coarse.repeat(EVERY, 0).repeat(EVERY, 1)[:side, :side]
        self.image = preprocess(model, self.pixels)[0][None].float().cpu()


def write_reference(
    path: Path, drawn: Drawn, embeddings: tuple[Tensor, Tensor | None], exported: Any, graph: Graph
) -> dict[str, float]:
    """Write torch's answers for points of a drawn image.

    Args:
        path: the file.
        drawn: the image.
        embeddings: of it, by torch and by the runtime; None where that cannot run here.
        exported: the parts over files.
        graph: a decoder's, of the size that is asked.

    Returns:
        How far the runtime is off when its encoder's results go through its decoder: the length of
        the difference over that of torch's output, by output.
    """
    example = dict(zip(graph.options.inputs, graph.example, strict=True))
    coords, labels = torch.zeros_like(example["point_coords"]), example["point_labels"] * NO_POINT
    # The middle; of further prompts a third of the side, a quarter, and so on.
    coords[:, 0] = (drawn.image.shape[-1] / (2 + torch.arange(len(coords)))).view(-1, 1)
    labels[:, 0] = 1
    rest = coords, labels, example["mask_input"], example["has_mask_input"]
    masks, scores = graph.module(embeddings[0], *rest)
    kept = {
        "image_embeddings": embeddings[0][..., ::EVERY, ::EVERY],
        "masks": masks[..., ::EVERY, ::EVERY],
        "iou": scores,
    }
    np.savez_compressed(
        path,
        pixels=drawn.pixels,
        point_coords=coords.numpy(),
        point_labels=labels.numpy(),
        **{name: t.numpy() for name, t in kept.items()},
    )
    if embeddings[1] is None:
        return {}
    found = embeddings[1], *exported.mask_decoder.graph(graph.stem)(embeddings[1], *rest)
    return {
        name: float((ours - torchs).norm() / torchs.norm().clamp_min(1e-12))
        for name, ours, torchs in zip(kept, found, (embeddings[0], masks, scores), strict=True)
    }


def write_manifest(
    folder: Path, model: nn.Module, state: dict[str, Any], graphs: Sequence[Graph]
) -> None:
    """Write what is known of the files in a folder."""
    from .. import __version__

    sam: Any = model
    names = [name for half in (ENCODER, DECODER) for name in state["files"][half]]
    about = {
        "format": FORMAT,
        "samcompress": __version__,
        **{key: state[key] for key in STATED},
        "precision": {ENCODER: state["precision"], DECODER: state["decoder"]},
        "image": {
            "size": state["image_size"],
            "mean": sam.pixel_mean.flatten().tolist(),
            "std": sam.pixel_std.flatten().tolist(),
            "framing": type(framing_of(model)).__name__.replace("Framing", "Longest").lower(),
        },
        "padding": state["padding"],
        "graphs": {
            graph.stem: {
                "files": [name for name in names if name.partition(".")[0] == graph.stem],
                "inputs": sizes_of(graph.example, graph.options),
                "outputs": list(graph.options.outputs),
            }
            for graph in graphs
        },
        "files": {
            name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
            for name in (*names, REFERENCE)
        },
        "reference": {"every": EVERY, "errors": state["reference"]},
    }
    (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
