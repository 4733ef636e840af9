"""The parts of SAM 2: transformers' image encoder, segment_anything's prompt encoder and decoder.

The parts of segment_anything get what SAM 2 adds to them, so that techniques find in them what they
find in SAM. What the decoder needs of the finer feature levels travels behind the channels of the
embedding, as one tensor. The memory that links the frames of a video is left out.

Source: N. Ravi et al., "SAM 2", 2024, arXiv 2408.00714; C. Zhou et al., "EdgeTAM", 2025, arXiv
2501.07256. Official code and weights: Apache-2.0. Own code around transformers (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError
from .framing import Stretched


class Smooth(Stretched):
    """SAM 2's rule: both sides fill the square, nothing is padding, no aliasing."""

    def resized(self, image: np.ndarray) -> Tensor:
        """Bilinear, averaging where the image shrinks, in whole numbers."""
        pixels = torch.tensor(image).permute(2, 0, 1)[None]
        square = (self.size, self.size)
        return F.interpolate(pixels, square, mode="bilinear", antialias=True)[0].float()

    def full_size(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Bilinear, in one step."""
        return F.interpolate(low, size, mode="bilinear")


class Sam2Encoder(nn.Module):
    """transformers' image encoder, with all that the decoder needs in one tensor.

    Args:
        vision: a ``Sam2VisionModel`` or ``EdgeTamVisionModel``; it gets a `Pyramid` and `Patches`.
        image_size: side S of the image.
        stride: pixels of the image for each cell of the embedding.
        channels: channels C of the embedding, a multiple of 8.
    """

    def __init__(self, vision: Any, image_size: int, stride: int, channels: int) -> None:
        super().__init__()
        vision.neck = Pyramid(vision.neck)
        self.vision = vision
        self.conv_s0 = nn.Conv2d(channels, channels // 8, 1)
        self.conv_s1 = nn.Conv2d(channels, channels // 4, 1)
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, channels))
        # The coarsest level has half the grid.
        self.stride, self.multiple = stride, 2 * stride
        backbone = vision.backbone
        if hasattr(backbone, "pos_embed_window"):
            backbone.patch_embed = Patches(backbone.patch_embed)
            # Its table of positions is laid out in whole tiles.
            tile = backbone.pos_embed_window.shape[-1]
            patch = backbone.patch_embed.projection.stride[0]
            self.multiple = math.lcm(self.multiple, tile * patch)
        self.resize(image_size)

    def resize(self, size: int) -> None:
        """Take images of another size; positions are resized in every call."""
        if size < 1 or size % self.multiple:
            raise ConfigError(
                "the image size does not fit this encoder.",
                got=size,
                expected=f"a multiple of {self.multiple}",
            )
        self.img_size = size

    def forward(self, x: Tensor) -> Tensor:
        """Encode images.

        Args:
            x: (B, 3, S, S).

        Returns:
            (B, 4C, h, w): C channels of the embedding, C of the level twice as fine, and 2C of the
            level four times as fine, each cell's finer ones in the order of `pixel_unshuffle`.
        """
        finest, finer, embedding = self.vision(x).fpn_hidden_states
        embedding = embedding + self.no_memory_embedding.view(1, -1, 1, 1)
        fine = F.pixel_unshuffle(self.conv_s1(finer), 2)
        return torch.cat([embedding, fine, F.pixel_unshuffle(self.conv_s0(finest), 4)], 1)


class Patches(nn.Module):
    """transformers' embedding of patches, whatever its weights are stored as."""

    def __init__(self, patches: Any) -> None:
        super().__init__()
        self.projection = patches.projection

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, h, w, C)."""
        found: Tensor = self.projection(x)
        return found.permute(0, 2, 3, 1)


class Pyramid(nn.Module):
    """transformers' neck, whatever its weights are stored as, and without positions.

    Only the memory of a video reads the encoding of positions, which is sines and cosines of as
    many numbers as all levels have.
    """

    def __init__(self, neck: Any) -> None:
        super().__init__()
        self.convs = neck.convs
        self.top_down = tuple(neck.fpn_top_down_levels)

    def forward(self, levels: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(B, h, w, C) from fine to coarse, to (B, C, h, w) from coarse to fine."""
        found: list[Tensor] = []
        for index, conv in zip(reversed(range(len(levels))), self.convs, strict=True):
            level = conv(levels[index].permute(0, 3, 1, 2))
            if found and index in self.top_down:
                level = level + F.interpolate(found[-1], scale_factor=2.0, mode="nearest")
            found.append(level)
        return tuple(found), ()


class PaddedPrompts(PromptEncoder):  # type: ignore[misc]
    """SAM's prompt encoder, which pads every prompt with a point that is none, boxes too.

    A mask alone counts as a prompt of one such point, so it has two, as in transformers; SAM 2's
    own predictor gives it none. Grid and prompts have an encoding of positions each, equal in all
    published weights.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.grid_layer = PositionEmbeddingRandom(self.embed_dim // 2)

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the grid, (1, C, h, w)."""
        encoding: Tensor = self.grid_layer(self.image_embedding_size)
        return encoding[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode P prompts; the same as SAM's for points alone."""
        weight = self.not_a_point_embed.weight
        if points is None and boxes is None:
            count = 1 if masks is None else len(masks)
            points = weight.new_zeros(count, 1, 2), -weight.new_ones(count, 1)
        sparse, dense = super().forward(points=points, boxes=boxes, masks=masks)
        if boxes is not None:
            sparse = torch.cat([sparse, weight.expand(len(boxes), 1, -1)], 1)
        return sparse, dense


class Sam2Decoder(MaskDecoder):  # type: ignore[misc]
    """SAM's mask decoder with finer features, scores in [0, 1] and a token that tells absence.

    Whether there is an object at all (`objects`) does not change masks and scores of an image: it
    matters in videos, where SAM 2 hides the masks of an object that left.

    Args:
        stable: outside training, the single mask gives way to the best of the others if cutting it
            at plus and minus the first number gives masks with an IoU below the second; None for
            never.
        decoder: what `segment_anything.modeling.MaskDecoder` takes.

    Attributes:
        features: channels that follow the C of the embedding in what the encoder gives.
        score_token: place of the score's token among those of the transformer.
    """

    score_token = 1

    def __init__(self, stable: tuple[float, float] | None, **decoder: Any) -> None:
        super().__init__(**decoder)
        width = self.transformer_dim
        self.stable, self.features = stable, 3 * width
        self.iou_prediction_head.sigmoid_output = True
        self.obj_score_token = nn.Embedding(1, width)
        self.pred_obj_score_head = MLP(width, width, 1, 3)

    def predict_masks(self, **embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 4, 4h, 4w) logits and (P, 4) scores, the single mask first."""
        masks, scores, _ = self.predict_all(**embeddings)
        if self.stable is None or self.training:
            return masks, scores
        return settle(masks, scores, *self.stable)

    def predict_all(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode P prompts on one image.

        Args:
            image_embeddings: (1, 4C, h, w), from `Sam2Encoder`.
            image_pe: (1, C, h, w).
            sparse_prompt_embeddings: (P, N, C).
            dense_prompt_embeddings: (P, C, h, w).

        Returns:
            (P, 4, 4h, 4w) logits, (P, 4) scores, and (P, 1) logits of whether the object is there.
        """
        # Not len(), which would become a constant in an exported graph.
        width, count = self.transformer_dim, sparse_prompt_embeddings.shape[0]
        embedding, fine, finest = torch.split(image_embeddings, [width, width, 2 * width], 1)
        own = [self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight]
        tokens = torch.cat(own).expand(count, -1, -1)
        tokens = torch.cat([tokens, sparse_prompt_embeddings], 1)
        source = embedding.expand(count, -1, -1, -1) + dense_prompt_embeddings
        hidden, keys = self.transformer(source, image_pe.expand(count, -1, -1, -1), tokens)
        first, norm, gelu, second, _ = self.output_upscaling
        found = first(keys.transpose(1, 2).reshape(source.shape)) + F.pixel_shuffle(fine, 2)
        found = gelu(second(gelu(norm(found))) + F.pixel_shuffle(finest, 4))
        heads = enumerate(self.output_hypernetworks_mlps, 2)
        weights = torch.stack([head(hidden[:, index]) for index, head in heads], 1)
        masks = (weights @ found.flatten(2)).unflatten(2, found.shape[-2:])
        return masks, self.iou_prediction_head(hidden[:, 1]), self.pred_obj_score_head(hidden[:, 0])


def settle(masks: Tensor, scores: Tensor, delta: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Put the best-scored of masks 1, 2, ... in the place of mask 0 where that is not stable.

    Args:
        masks: (P, M, h, w) logits.
        scores: (P, M).
        delta: how far above and below 0 mask 0 is cut.
        threshold: smallest IoU of the two cuts of a stable mask; an empty one is stable.
    """
    high, low = ((masks[:, :1] > cut).sum((-2, -1)).float() for cut in (delta, -delta))
    stable = torch.where(low > 0, high / low.clamp(min=1), 1.0) >= threshold
    best, index = scores[:, 1:].max(1, keepdim=True)
    rows = (1 + index)[..., None, None].expand(-1, -1, *masks.shape[2:])
    single = torch.where(stable[..., None, None], masks[:, :1], masks.gather(1, rows))
    score = torch.where(stable, scores[:, :1], best)
    return torch.cat([single, masks[:, 1:]], 1), torch.cat([score, scores[:, 1:]], 1)
