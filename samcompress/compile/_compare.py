"""Whether a runtime computes what torch does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import BackendError
from ._graphs import NO_POINT, Buckets

# Furthest from torch. Of float32 the largest difference, over the largest number of torch's output
# where that is above 1; of the others the length of the difference over that of the output.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 0.2}
SEED = 0


class Asked(NamedTuple):
    """Prompts to compare: how many, points of each, and whether with box and mask."""

    prompts: int
    points: int
    box: bool = False
    mask: bool = False


ASKED = (Asked(1, 1), Asked(5, 3), Asked(3, 0, box=True), Asked(2, 2, box=True, mask=True))


def compare(
    eager: Any,
    exported: Any,
    embeddings: tuple[Tensor, Tensor],
    *,
    backend: str,
    encoder: tuple[str, float],
    decoder: tuple[str, float],
) -> dict[str, float]:
    """Largest differences from torch, by output.

    Args:
        eager: the parts of the model in torch, float32.
        exported: the parts over files.
        embeddings: of one image by both.
        backend: its name.
        encoder: what it computes in, and the tolerance.
        decoder: what it computes in, and the tolerance.

    Raises:
        BackendError: if a difference is above its tolerance, or not a number.
    """
    errors: dict[str, float] = {}
    outputs = _outputs(eager, exported, embeddings[0])
    for name, expected, found in (("embedding", *embeddings), *outputs):
        precision, tolerance = encoder if name == "embedding" else decoder
        error = difference(found, expected, precision)
        # A NaN is not below any tolerance.
        if not error <= tolerance:
            raise BackendError(
                f"{backend} gives another {name} than torch.",
                where="comparison after export",
                got=f"a difference of {error:.3g}",
                expected=f"at most {tolerance:g}, relative to "
                + ("the largest number" if precision == "float32" else "the whole"),
                fix="check that torch's own outputs are finite; report this with the versions",
            )
        kind = name.split(" of ")[0]
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors


def difference(found: Tensor, expected: Tensor, precision: str) -> float:
    """How far two outputs are apart, in the measure of `TOLERANCE`."""
    apart = found - expected
    if precision == "float32":
        return float(apart.abs().max() / expected.abs().max().clamp_min(1))
    return float(apart.norm() / expected.norm().clamp_min(1e-12))


def _asked(sizes: Buckets | None) -> list[Asked]:
    """Prompts for every graph there is; one of them is padding."""
    if sizes is None:
        return list(ASKED)
    fitting = [a for a in ASKED if a.points + 1 + 2 * a.box <= sizes.points[-1]]
    return [*(Asked(count, max(n - 1, 1)) for count, n in sizes), *fitting]


def _outputs(eager: Any, exported: Any, embedding: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, torch's tensor and the runtime's, for seeded prompts."""
    generator = torch.Generator().manual_seed(SEED)
    side, (h, w) = eager.image_encoder.img_size, eager.prompt_encoder.mask_input_size
    sizes = exported.mask_decoder.sizes
    for asked in _asked(sizes):
        count, n = asked.prompts, asked.points
        points = boxes = masks = None
        if n:
            labels = torch.randint(0, 2, (count, n), generator=generator)
            points = side * torch.rand(count, n, 2, generator=generator), labels
        if asked.box:
            boxes = side * torch.rand(count, 4, generator=generator)
        if asked.mask:
            masks = 8 * torch.randn(count, 1, h, w, generator=generator)
        given = {"points": points, "boxes": boxes, "masks": masks}
        ours = _decoded(exported, embedding, exported.prompt_encoder(**given))
        if sizes is not None:
            given["points"] = _padded(points, exported.prompt_encoder(**given)[0], sizes)
        expected = _decoded(eager, embedding, eager.prompt_encoder(**given))
        what = f"{count} x {n} points{', box' * asked.box}{', mask' * asked.mask}"
        for kind, theirs, found in zip(("logits", "scores"), expected, ours, strict=True):
            yield f"{kind} of {what}", theirs, found


def _padded(points: Any, packed: Tensor, sizes: Buckets) -> Any:
    """Points with as many of no meaning behind them as the graphs of fixed sizes add."""
    count, n = packed.shape[:2]
    added = sizes.fit(1, n)[1] - n
    if not added:
        return points
    coords, labels = points or (torch.zeros(count, 0, 2), torch.zeros(count, 0))
    return (
        torch.cat([coords, torch.zeros(count, added, 2)], 1),
        torch.cat([labels, torch.full((count, added), NO_POINT)], 1),
    )


def _decoded(parts: Any, embedding: Tensor, prompts: tuple[Tensor, Tensor]) -> list[Tensor]:
    """All logits and scores, those of the single mask first."""
    both = [
        parts.mask_decoder(
            image_embeddings=embedding,
            image_pe=parts.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=prompts[0],
            dense_prompt_embeddings=prompts[1],
            multimask_output=multimask,
        )
        for multimask in (False, True)
    ]
    return [torch.cat(pair, 1) for pair in zip(*both, strict=True)]
