"""What a model is made of, in one table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.contract import Parts, parts
from ..core.display import Column, Table
from ..core.errors import ModelError
from ..core.history import lineage
from ..core.sizes import tensor_bytes
from .macs import macs
from .size import parameters


@dataclass(frozen=True)
class Part:
    """One of the three parts, or all of them.

    Attributes:
        name: ``image_encoder``, ``prompt_encoder``, ``mask_decoder`` or ``total``.
        parameters: weights, each tensor once.
        bytes: of weights and buffers in memory, or of the files of an exported part.
        macs: multiply-accumulates for one image (encoder) or one prompt (prompt encoder and decoder
            together, in the decoder's row); None where they cannot be counted.
        dtypes: element types, the one with most weights first.
    """

    name: str
    parameters: int
    bytes: int
    macs: int | None
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Parts of a model; prints itself as a table.

    Attributes:
        parts: three parts and the total.
        image_size: padded side S in pixels.
        steps: techniques the model went through, those that only simulate marked so.
    """

    parts: tuple[Part, ...]
    image_size: int
    steps: tuple[str, ...]

    def __getitem__(self, name: str) -> Part:
        """The part of this name."""
        return {part.name: part for part in self.parts}[name]

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        return self["total"].parameters

    def table(self) -> Table:
        """The table that is printed."""
        rows = [
            (
                part.name,
                part.parameters,
                part.bytes / 1e6,
                None if part.macs is None else part.macs / 1e9,
                ", ".join(part.dtypes),
            )
            for part in self.parts
        ]
        chain = " | ".join(self.steps) or "no step yet"
        return Table(
            (
                Column("part", align="left"),
                Column("parameters"),
                Column("size", "MB"),
                Column("MACs", "G"),
                Column("dtype", align="left"),
            ),
            rows,
            title=f"SAM, {self.image_size} px: {chain}",
            notes=("MACs: encoder for one image, decoder for one prompt",),
        )

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def summary(model: nn.Module) -> Summary:
    """Parameters, bytes, MACs and types of a SAM's parts.

    Args:
        model: a SAM, compressed or not; it is not changed.

    Raises:
        ModelError: if it is not a SAM.

    Example:
        >>> from samcompress.core.build import build
        >>> summary(build("tiny")).image_size
        128
    """
    three = parts(model)
    side: Any = three.image_encoder.img_size
    counts = parameters(model)
    encoder: int | None
    decoder: int | None
    try:
        work = macs(model)
        encoder, decoder = work.encoder, work.decoder_per_prompt
    except ModelError:
        encoder = decoder = None
    known = {"image_encoder": encoder, "mask_decoder": decoder}
    rows = [
        Part(
            name,
            counts["encoder" if name == "image_encoder" else name],
            tensor_bytes(part),
            known.get(name),
            _dtypes(part),
        )
        for name, part in zip(Parts._fields, three, strict=True)
    ]
    rows.append(Part("total", counts["total"], tensor_bytes(model), None, _dtypes(model)))
    steps = tuple(
        f"{step.transform.label} (simulated)" if step.simulated else step.transform.label
        for step in lineage(model)
    )
    return Summary(tuple(rows), side, steps)


def _dtypes(module: nn.Module) -> tuple[str, ...]:
    weights: Counter[str] = Counter()
    for tensor in (*module.parameters(), *module.buffers()):
        weights[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return tuple(name for name, _ in weights.most_common())
