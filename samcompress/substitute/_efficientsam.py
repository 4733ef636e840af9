"""EfficientSAM: a plain ViT, and a prompt encoder and mask decoder with conventions of their own.

After Y. Xiong et al., 2023, arXiv 2312.00863 (reference code Apache-2.0). The parts are made of
segment_anything's wherever those compute the same, and have their tensor names, so that techniques
find in them what they find in SAM; `convert` renames the official tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling.image_encoder import ImageEncoderViT
from segment_anything.modeling.mask_decoder import MaskDecoder as SamMaskDecoder
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError, ModelError

PATCH = 16
# Side of the grid of positions that the encoder was pre-trained with; resized as it runs.
POSITIONS = 14
ENCODER_EPS = 1e-6
# The decoder sees this many points, whatever the prompt has.
POINTS = 6
INVALID, INSIDE, TOP_LEFT, BOTTOM_RIGHT = -1, 1, 2, 3
# Official names, by how we call them.
NAMES = (
    (r"^(image_encoder\.blocks\.\d+\.mlp)\.fc([12])\.", r"\1.lin\2."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.fc\.", r"\1.lin2."),
    (r"^(mask_decoder\..*(?:mlps\.\d+|head)\.layers\.\d+)\.0\.", r"\1."),
    (r"^(mask_decoder\..*(?:mlps\.\d+|head))\.fc\.", r"\1.layers.2."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.", "mask_decoder.output_upscaling."),
    (r"^mask_decoder\.final_output_upscaling_layers\.1\.0\.", "mask_decoder.output_upscaling.3."),
)


@dataclass(frozen=True)
class EfficientSamConfig:
    """Sizes of EfficientSAM's encoder.

    Args:
        embed_dim: channels of a token.
        num_heads: heads of attention.
        depth: blocks, all with attention over the whole image.
        image_size: side of the image the published weights take.
    """

    embed_dim: int = 192
    num_heads: int = 3
    depth: int = 12
    image_size: int = 1024


CONFIGS: dict[str, EfficientSamConfig] = {
    "tiny": EfficientSamConfig(),
    "small": EfficientSamConfig(embed_dim=384, num_heads=6),
}


class PlainViT(ImageEncoderViT):  # type: ignore[misc]
    """segment_anything's ViT without windows and relative positions, and with a small table.

    Args:
        config: sizes.
        image_size: side S of the image, a multiple of 16.
        out_chans: channels C of the embedding.

    Raises:
        ConfigError: if the image size is not such a multiple.
    """

    stride = PATCH

    def __init__(self, config: EfficientSamConfig, image_size: int, out_chans: int = 256) -> None:
        super().__init__(
            patch_size=PATCH,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            out_chans=out_chans,
            norm_layer=partial(nn.LayerNorm, eps=ENCODER_EPS),
            use_abs_pos=False,
        )
        # The first row is the class token's, which has no part here; checkpoints have it.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + POSITIONS**2, config.embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.resize(image_size)

    def resize(self, size: int) -> None:
        """Take images of another size; the table of positions is resized in every call."""
        if size < 1 or size % PATCH:
            raise ConfigError(
                "the image size does not fit the patches of EfficientSAM.",
                got=size,
                expected=f"a multiple of {PATCH}",
            )
        self.img_size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, 3, S, S)`` to ``(B, C, S / 16, S / 16)``."""
        x = self.patch_embed(x)
        x = x + positions(self.pos_embed, x.shape[1], x.shape[2])
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return embedding


def positions(table: Tensor, height: int, width: int) -> Tensor:
    """Bicubic positions of a grid.

    Args:
        table: (1, 1 + n * n, C), the class token's first.
        height: h, in cells.
        width: w, in cells.

    Returns:
        (1, h, w, C).
    """
    side = round((table.shape[1] - 1) ** 0.5)
    image = table[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    resized = F.interpolate(image, (height, width), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


class PromptEncoder(nn.Module):
    """Points and boxes to six sparse embeddings, as EfficientSAM has them.

    A box is two points and comes first; empty places are filled with a point of its own kind, and
    points beyond the sixth are not seen. A negative point is its position and nothing else.

    Args:
        embed_dim: channels C.
        image_embedding_size: h and w of the embedding.
        input_image_size: height and width of the frame that coordinates are given in.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.invalid_points = nn.Embedding(1, embed_dim)
        self.point_embeddings = nn.Embedding(1, embed_dim)
        self.bbox_top_left_embeddings = nn.Embedding(1, embed_dim)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the grid, ``(1, C, h, w)``."""
        encoding: Tensor = self.pe_layer(self.image_embedding_size)
        return encoding.unsqueeze(0)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Encode P prompts.

        Args:
            points: (P, N, 2) x, y and (P, N) labels: 1 inside, 0 outside, -1 none.
            boxes: (P, 4) x0, y0, x1, y1.
            masks: must be None.

        Returns:
            (P, 6, C) sparse and (P, C, h, w) dense embeddings, the latter zero.

        Raises:
            ModelError: if there is a mask.
        """
        if masks is not None:
            raise ModelError(
                "EfficientSAM takes no mask as a prompt.",
                where="prompt_encoder",
                got=f"masks of shape {tuple(masks.shape)}",
                expected="points and boxes",
                fix="leave out the mask",
            )
        weight = self.point_embeddings.weight
        coords, labels = [], []
        if boxes is not None:
            coords.append(boxes.reshape(-1, 2, 2))
            corners = weight.new_tensor([[TOP_LEFT, BOTTOM_RIGHT]])
            labels.append(corners.expand(len(boxes), 2))
        if points is not None:
            coords.append(points[0])
            labels.append(points[1])
        prompts = coords[0].shape[0] if coords else 1
        coords.append(weight.new_full((1, 1, 1), INVALID).expand(prompts, POINTS, 2))
        labels.append(weight.new_full((1, 1), INVALID).expand(prompts, POINTS))
        sparse = self._embed(torch.cat(coords, 1)[:, :POINTS], torch.cat(labels, 1)[:, :POINTS])
        dense = sparse.new_zeros(1, 1, 1, 1)
        return sparse, dense.expand(prompts, self.embed_dim, *self.image_embedding_size)

    def _embed(self, coords: Tensor, labels: Tensor) -> Tensor:
        # An empty place keeps the encoding of its coordinates, unlike SAM's.
        sparse: Tensor = self.pe_layer.forward_with_coords(coords + 0.5, self.input_image_size)
        for label, kind in (
            (INVALID, self.invalid_points),
            (INSIDE, self.point_embeddings),
            (TOP_LEFT, self.bbox_top_left_embeddings),
            (BOTTOM_RIGHT, self.bbox_bottom_right_embeddings),
        ):
            sparse = sparse + (labels == label).unsqueeze(-1) * kind.weight
        return sparse


class MaskDecoder(SamMaskDecoder):  # type: ignore[misc]
    """SAM's mask decoder with GELU, a group norm, and another two-way transformer.

    Args:
        embed_dim: channels C of embedding and tokens.
        depth: blocks of the transformer.
        mlp_dim: their hidden units.
        num_heads: their heads of attention.
        iou_head_hidden_dim: hidden units of the head that scores masks.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        depth: int = 2,
        mlp_dim: int = 2048,
        num_heads: int = 8,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        transformer = TwoWayTransformer(depth, embed_dim, num_heads, mlp_dim, nn.GELU)
        transformer.layers = nn.ModuleList(
            TwoWayBlock(embed_dim, num_heads, mlp_dim, nn.GELU, skip_first_layer_pe=index == 0)
            for index in range(depth)
        )
        super().__init__(transformer_dim=embed_dim, transformer=transformer)
        self.output_upscaling[1] = nn.GroupNorm(1, embed_dim // 4)
        self.output_hypernetworks_mlps = nn.ModuleList(
            Head(embed_dim, embed_dim, embed_dim // 8) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = Head(embed_dim, iou_head_hidden_dim, self.num_mask_tokens)


class TwoWayBlock(TwoWayAttentionBlock):  # type: ignore[misc]
    """SAM's two-way block, but for the attention of the tokens to themselves."""

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update (P, N, C) tokens and (P, h·w, C) image by each other."""
        # Unlike in SAM, positions stay in the tokens, and the first block adds to its input too.
        if not self.skip_first_layer_pe:
            queries = queries + query_pe
        queries = self.norm1(queries + self.self_attn(q=queries, k=queries, v=queries))
        placed = keys + key_pe
        asked = self.cross_attn_token_to_image(q=queries + query_pe, k=placed, v=keys)
        queries = self.norm2(queries + asked)
        queries = self.norm3(queries + self.mlp(queries))
        told = self.cross_attn_image_to_token(q=placed, k=queries + query_pe, v=queries)
        return queries, self.norm4(keys + told)


class Head(nn.Module):
    """Three linear layers with GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (P, inputs) to (P, outputs)."""
        first, second, last = self.layers
        out: Tensor = last(F.gelu(second(F.gelu(first(x)))))
        return out


def build(config: EfficientSamConfig, image_size: int, out_chans: int = 256) -> PlainViT:
    """An encoder with random weights, in eval mode."""
    encoder: PlainViT = PlainViT(config, image_size, out_chans).eval()
    return encoder


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official checkpoint's tensors, image encoder to mask decoder, under our names."""
    return {_rename(name): tensor for name, tensor in state.items()}


def _rename(name: str) -> str:
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name
