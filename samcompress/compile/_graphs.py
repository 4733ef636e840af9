"""The graphs that a SAM is cut into: image encoder, and prompt encoder with mask decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ShapeError
from .backends import Options, Sample

# Names of files without suffix; a decoder of one size has its size behind it.
ENCODER, DECODER = "encoder", "prompt_decoder"
IMAGE = Options(inputs=("image",), outputs=("image_embeddings",))
PROMPTS = Options(
    inputs=("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"),
    outputs=("masks", "iou"),
    dynamic={
        "point_coords": {0: "prompts", 1: "points"},
        "point_labels": {0: "prompts", 1: "points"},
        "mask_input": {0: "prompts"},
    },
)
NO_POINT = -1.0
TOP_LEFT, BOTTOM_RIGHT = 2.0, 3.0
# A label of no meaning: the point gets its position and nothing else.
PLAIN = 4.0
# Where tokens are rounded to integers, numbers that differ in their last bit may become neighbours.
ROUNDED = 1e-2


@dataclass(frozen=True)
class Buckets:
    """Sizes of the decoder's graphs, for runtimes that fix them.

    Attributes:
        prompts: prompts at a time, rising; more are cut, fewer filled up, which changes nothing.
        points: points of a prompt, padding and corners of a box included, rising. Fewer are filled
            up with points of no meaning: further tokens, which do change masks a little.
    """

    prompts: tuple[int, ...]
    points: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.product(self.prompts, self.points)

    def stem(self, prompts: int, points: int) -> str:
        """Name of the file of a size, without suffix."""
        return f"{DECODER}_{prompts}x{points}"

    def fit(self, prompts: int, points: int) -> tuple[int, int]:
        """The smallest size for so many.

        Raises:
            ShapeError: if there is none.
        """
        for name, got, sizes in (
            ("prompts", prompts, self.prompts),
            ("points", points, self.points),
        ):
            if got > sizes[-1]:
                raise ShapeError(
                    f"there are more {name} than the exported graphs take.",
                    got=f"{got}, padding and corners of boxes included",
                    expected=f"at most {sizes[-1]}",
                    fix=f"sc.compile.Export({name}=(..., {got}))",
                )
        return tuple(  # type: ignore[return-value]
            next(size for size in sizes if size >= got)
            for got, sizes in ((prompts, self.prompts), (points, self.points))
        )


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What one file computes.

    Attributes:
        stem: name of the file without suffix.
        module: computes it in torch.
        example: inputs.
        options: their names, and which sizes are free.
    """

    stem: str
    module: nn.Module
    example: Sample
    options: Options


def graphs(eager: Any, buckets: Buckets | None) -> list[Graph]:
    """The encoder, and the decoder of any size or of each size; `eager` are the parts."""
    encoder, prompts, decoder = eager
    side, (h, w) = encoder.img_size, prompts.image_embedding_size
    channels = prompts.embed_dim + getattr(decoder, "features", 0)
    module = PromptDecoder(prompts, decoder).eval()
    # Where sizes are free, two prompts of three points: sizes of 1 would be taken as fixed.
    sizes = (
        {DECODER: (2, 3)} if buckets is None else {buckets.stem(*size): size for size in buckets}
    )
    fixed = Options(inputs=PROMPTS.inputs, outputs=PROMPTS.outputs)
    return [
        Graph(
            stem=ENCODER, module=encoder, example=(torch.zeros(1, 3, side, side),), options=IMAGE
        ),
        *(
            Graph(
                stem=stem,
                module=module,
                example=(
                    torch.zeros(1, channels, h, w),
                    torch.zeros(count, n, 2),
                    torch.ones(count, n),
                    torch.zeros(count, 1, 4 * h, 4 * w),
                    torch.zeros(1),
                ),
                options=PROMPTS if buckets is None else fixed,
            )
            for stem, (count, n) in sizes.items()
        ),
    ]


class PromptDecoder(nn.Module):
    """Points and masks to logits, in tensors only: nothing depends on values or on what is absent.

    A box is two points labelled 2 and 3. What segment_anything adds by itself, the padding point
    (0, 0) labelled -1 of a prompt without box, must be among the points. All masks are returned.

    Args:
        prompt_encoder: a segment_anything `PromptEncoder`.
        mask_decoder: a segment_anything `MaskDecoder`.
    """

    image_pe: Tensor
    labels: Tensor
    no_mask: Tensor
    extent: Tensor

    def __init__(self, prompt_encoder: Any, mask_decoder: Any) -> None:
        super().__init__()
        self.pe_layer = prompt_encoder.pe_layer
        self.mask_downscaling = prompt_encoder.mask_downscaling
        self.mask_decoder = mask_decoder
        height, width = prompt_encoder.input_image_size
        embeddings = (prompt_encoder.not_a_point_embed, *prompt_encoder.point_embeddings)
        # Some runtimes misread buffers with strides, and this one is a permuted view.
        self.register_buffer("image_pe", prompt_encoder.get_dense_pe().contiguous())
        self.register_buffer("extent", self.image_pe.new_tensor([width, height]))
        self.register_buffer("labels", torch.cat([e.weight.detach() for e in embeddings]))
        self.register_buffer(
            "no_mask", prompt_encoder.no_mask_embed.weight.detach().view(1, -1, 1, 1)
        )

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompts of N points on one image.

        Args:
            image_embeddings: (1, C, h, w).
            point_coords: (P, N, 2) x, y in the padded frame.
            point_labels: (P, N) -1 no point, 0 outside, 1 inside, 2 and 3 corners of a box.
            mask_input: (P, 1, 4h, 4w) logits; any finite numbers where there is no mask.
            has_mask_input: (1,) 1 to use the masks, 0 not to.

        Returns:
            (P, M, 4h, 4w) logits and (P, M) scores, M counting the single mask first.
        """
        sparse = self._placed(point_coords + 0.5)
        label = point_labels[..., None]
        sparse = torch.where(label == NO_POINT, 0.0, sparse)
        for index, embedding in enumerate(self.labels):
            sparse = sparse + torch.where(label == index - 1, embedding, 0.0)
        dense = torch.where(
            has_mask_input.view(1, 1, 1, 1) > 0.5,
            self.mask_downscaling(mask_input),
            self.no_mask,
        )
        masks, scores = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        return masks, scores

    def _placed(self, coords: Tensor) -> Tensor:
        """`PositionEmbeddingRandom` without a matrix product, which may be computed in few bits."""
        x, y = (2 * coords / self.extent - 1).unsqueeze(-1).unbind(-2)
        across, down = self.pe_layer.positional_encoding_gaussian_matrix
        phase = 2 * math.pi * (x * across + y * down)
        return torch.cat([phase.sin(), phase.cos()], -1)


def rounding(modules: Iterable[nn.Module]) -> str | None:
    """Kind of the first layer that rounds what it is given to integers; None if there is none."""
    every = (layer for module in modules for layer in module.modules())
    return next((type(m).__name__ for m in every if getattr(m, "rounds_tokens", False)), None)


def allowed(modules: Iterable[nn.Module], usual: float) -> float:
    """How far a runtime may be from torch.

    Args:
        modules: what was exported.
        usual: where no layer rounds tokens.
    """
    return max(usual, ROUNDED) if rounding(modules) else usual
