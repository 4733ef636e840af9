"""EdgeSAM's choices behind the mask decoder: how many masks, and which score.

The decoder itself is SAM's, with its tensors.

Source: C. Zhou et al., "EdgeSAM", 2023, arXiv 2312.06660 (reference code and weights: S-Lab License
1.0, non-commercial). Own code, from the paper and measured outputs.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ._one_mask import TakenOver

TOKENS = {1: slice(0, 1), 3: slice(1, 4), 4: slice(0, 4)}


def choose(masks: Tensor, scores: Tensor, count: Literal[1, 3, 4]) -> tuple[Tensor, Tensor]:
    """One mask, the three of an ambiguous prompt, or all.

    Args:
        masks: (P, 4, 4h, 4w), from the decoder's ``predict_masks``.
        scores: (P, 4).
        count: 1 for token 0, 3 for tokens 1 to 3, 4 for all.
    """
    tokens = TOKENS[count]
    return masks[:, tokens], scores[:, tokens]


def stability_score(logits: Tensor, offset: float = 1.0, threshold: float = 0.0) -> Tensor:
    """IoU of a mask cut above its threshold with the same mask cut below it.

    Args:
        logits: (..., H, W).
        offset: how far above and below, in logits.
        threshold: of the mask.

    Returns:
        (...) float32 in [0, 1]; 0 where even the lower cut is empty.
    """
    high = (logits > threshold + offset).sum((-2, -1))
    low = (logits > threshold - offset).sum((-2, -1))
    return high.float() / low.clamp(min=1).float()


class StabilityDecoder(TakenOver):
    """SAM's decoder, scoring masks by their stability instead of the predicted IoU."""

    def predict_masks(self, **embeddings: Any) -> tuple[Tensor, Tensor]:
        """(P, 4, 4h, 4w) logits and (P, 4) scores."""
        masks, scores = super().predict_masks(**embeddings)
        return masks, stability_score(masks).to(scores.dtype)
