"""Zeros anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..core.registry import register
from ._sparse import Sparse
from ._sparse_choice import BLOCK, lowest, zeros
from ._sparse_layers import SparseLinear


@register
@dataclass(frozen=True, kw_only=True)
class Unstructured(Sparse, family="prune", phase=40):
    """Set a share of the weights to zero, wherever they are.

    Use it to see how many weights a SAM needs, or for a runtime of your own that skips zeros; a
    compressed archive gets smaller too. Do not use it for speed: PyTorch multiplies by zeros as by
    any number. `Mlp` and `Heads` cut units out, `Sparse24` sets zeros that GPUs have kernels for.

    Args:
        ratio: share of weights set to zero, between 0 and 1.
        criterion: see `Sparse24`.
        per: "row" takes `ratio` of the weights of each output, "layer" of each layer together, more
            of outputs whose weights matter less.
        where: Linears to thin out; by default those of the encoder's MLPs.
        images: at most so many images are looked at.
        seed: of the points in an image that a mask decoder is asked at, where it is thinned out.

    Raises:
        ConfigError: if `ratio` or `images` is out of range.
        NoEffectError: if `where` matches no `torch.nn.Linear`, or all have so many zeros already.
        ModelError: if a weight, or what a layer is fed, is not finite.
        DataError: if "wanda" or "sparsegpt" get no image.

    Effect:
        Mask only, on every device: parameters, multiply-accumulates, bytes and time stay as they
        are. Zeros stay zero in later training.

    Composes with:
        After pruning of units, `attention.Fused` and distillation; before more distillation, which
        wins accuracy back and keeps the zeros, and before quantisation and export. Can be repeated
        with a larger `ratio`.

    Source:
        Wanda: M. Sun et al., 2023, arXiv 2306.11695 (MIT); SparseGPT: E. Frantar, D. Alistarh,
        2023, arXiv 2301.00774 (Apache-2.0). The padding of windows has no say here. Own code.

    Example:
        >>> import samcompress as sc
        >>> sparse = sc.prune.Unstructured(ratio=0.25, criterion="wanda")(
        ...     sc.build("tiny"), data=sc.shapes(2)
        ... )
        >>> (sparse.image_encoder.blocks[0].mlp.lin1.weight == 0).sum(1)[:3]
        tensor([16, 16, 16])
    """

    span: ClassVar[int] = BLOCK

    ratio: float = 0.5
    per: Literal["row", "layer"] = "row"

    def validate(self) -> None:
        """Check ranges."""
        self.between("ratio", 0, 1)
        super().validate()

    def choose(self, scores: Tensor, start: int) -> Tensor:
        """So many of each row, or of all."""
        return lowest(scores, start, ratio=self.ratio, per=self.per)

    def done(self, layer: Any) -> bool:
        """Whether so many are zero."""
        found = (layer.weight == 0).flatten() if self.per == "layer" else layer.weight == 0
        return bool((found.sum(-1) >= zeros(found.shape[-1], self.ratio)).all())

    def twin(self, layer: nn.Linear) -> SparseLinear:
        """A layer that keeps its zeros."""
        return layer if isinstance(layer, SparseLinear) else SparseLinear(layer)
