"""SAM-HQ: a fifth mask token that also sees early features of the image encoder.

The encoders append the features to the embedding as further channels, and the decoder takes them
off again, so that what lies between them handles one tensor as for any SAM.

Source: L. Ke et al., "Segment Anything in High Quality", 2023, arXiv 2306.01567. Official weights:
Apache-2.0. Own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from ..core.build import ARCHITECTURES, SamConfig
from . import _tiny_vit
from ._one_mask import TakenOver
from ._tiny_vit import TinyViT, TinyViTConfig

# The stage of TinyViT whose output goes to the decoder; the first on the grid of the embedding.
LEVEL = 1


@dataclass(frozen=True)
class HqConfig:
    """Sizes of a SAM-HQ's image encoder.

    Attributes:
        encoder: sizes of the encoder it is built on; of a `SamConfig` only those of its encoder.
    """

    encoder: SamConfig | TinyViTConfig

    @property
    def features(self) -> int:
        """Channels appended to the embedding."""
        if isinstance(self.encoder, TinyViTConfig):
            return self.encoder.embed_dims[LEVEL + 1]
        return self.encoder.embed_dim


CONFIGS: dict[str, HqConfig] = {
    "vit_tiny": HqConfig(_tiny_vit.CONFIGS["5m"]),
    **{name: HqConfig(ARCHITECTURES[name]) for name in ("vit_b", "vit_l", "vit_h")},
}


def build(config: HqConfig, image_size: int = 1024, out_chans: int = 256) -> HqViT | HqTinyViT:
    """An image encoder with random weights that appends `HqConfig.features` channels.

    Args:
        config: its sizes.
        image_size: side S of the input in pixels, a multiple of the patch size or of 16.
        out_chans: channels C of the embedding itself.

    Raises:
        ConfigError: if TinyViT does not work at this size.
        MissingDependencyError: if timm is not installed and the encoder is a TinyViT.
    """
    if isinstance(config.encoder, TinyViTConfig):
        return HqTinyViT(config.encoder, image_size, out_chans)
    return HqViT(config.encoder, image_size, out_chans)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a whole SAM-HQ to ours: TinyViT's are changed, all others are the same."""
    return _tiny_vit.convert(state)


class HqViT(ImageEncoderViT):  # type: ignore[misc]
    """SAM's ViT, which appends the output of its first block with global attention.

    Args:
        config: sizes of the encoder.
        image_size: side S of the input in pixels, a multiple of the patch size.
        out_chans: channels C of the embedding; the output has C + `config.embed_dim`.
    """

    def __init__(self, config: SamConfig, image_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=out_chans,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        )
        self.tap = min(config.global_attn_indexes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, C + width, h, w)."""
        x = self.patch_embed(x) + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.tap:
                features = x.permute(0, 3, 1, 2)
        return torch.cat([self.neck(x.permute(0, 3, 1, 2)), features], 1)


class HqTinyViT(TinyViT):
    """TinyViT, which appends the output of its second stage: (B, C + 160, S/16, S/16)."""

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        levels = self.levels(x)
        return torch.cat([self.neck(levels[-1]), levels[LEVEL]], 1)


class HqMaskDecoder(TakenOver):
    """SAM's decoder with a token for fine masks, which are added to each of its own.

    As in SAM, M is 1 or the three masks of an ambiguous prompt. Upstream returns of the three only
    the one with the best score, which is one of ours.

    Args:
        decoder: a SAM's mask decoder, whose parts move over.
        features: channels that follow the C of the embedding in what the encoder gives.
        hq_token_only: give the fine mask alone, in the place of each.
    """

    def __init__(self, decoder: Any, features: int, *, hq_token_only: bool = False) -> None:
        super().__init__(decoder)
        width = self.transformer_dim
        self.features, self.hq_token_only = features, hq_token_only
        self.hf_token = nn.Embedding(1, width)
        self.hf_mlp = MLP(width, width, width // 8, 3)
        self.compress_vit_feat = _upscaling(features, width, width // 8)
        self.embedding_encoder = _upscaling(width, width // 4, width // 8)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(width // 8, width // 4, 3, padding=1),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 8, 3, padding=1),
        )
        # The new parts go where the others are.
        self.to(self.iou_token.weight).train(self.training)

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Decode P prompts on one image.

        Args:
            image_embeddings: (1, C + features, h, w).
            image_pe: (1, C, h, w).
            sparse_prompt_embeddings: (P, N, C).
            dense_prompt_embeddings: (P, C, h, w).

        Returns:
            (P, 4, 4h, 4w) logits and (P, 4) scores, the single mask first.
        """
        embedding, early = torch.split(image_embeddings, [self.transformer_dim, self.features], 1)
        detail = self.embedding_encoder(embedding) + self.compress_vit_feat(early)
        # Not len(), which would become a constant in an exported graph.
        count = sparse_prompt_embeddings.shape[0]
        own = [self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight]
        tokens = torch.cat(own).expand(count, -1, -1)
        tokens = torch.cat([tokens, sparse_prompt_embeddings], 1)
        source = embedding + dense_prompt_embeddings
        hidden, keys = self.transformer(source, image_pe.expand(count, -1, -1, -1), tokens)
        coarse = self.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
        heads = enumerate(self.output_hypernetworks_mlps, 1)
        weights = torch.stack([head(hidden[:, index]) for index, head in heads], 1)
        fine_weights = self.hf_mlp(hidden[:, 1 + self.num_mask_tokens])[:, None]
        fine = fine_weights @ (self.embedding_maskfeature(coarse) + detail).flatten(2)
        if self.hq_token_only:
            masks = fine.expand(-1, self.num_mask_tokens, -1)
        else:
            masks = weights @ coarse.flatten(2) + fine
        scores: Tensor = self.iou_prediction_head(hidden[:, 0])
        return masks.unflatten(2, coarse.shape[-2:]), scores


def _upscaling(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Four times the height and width."""
    return nn.Sequential(
        nn.ConvTranspose2d(dim, hidden, 2, 2),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.ConvTranspose2d(hidden, out, 2, 2),
    )
