"""Two zeros in each four weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.errors import ShapeError
from ..core.registry import register
from ._sparse import Sparse
from ._sparse_choice import two_of_four
from ._sparse_layers import Sparse24Linear, has_zeros


@register
@dataclass(frozen=True, kw_only=True)
class Sparse24(Sparse, family="prune", phase=40):
    """Set two of each four weights of a row to zero, the pattern that GPUs have kernels for.

    Use it on a large SAM that runs in float16 or bfloat16 on an NVIDIA GPU from Ampere on. Do not
    expect much: the MLPs of a ViT-H gain a tenth of the time at best, those of a ViT-B nothing.
    Anywhere else it is a mask only, and cutting units out (`Mlp`, `Heads`) is what saves time.

    Args:
        criterion: what goes. "sparsegpt": weights whose loss those after them can make up for, and
            these are changed to do so; needs images. "wanda": small weights on small inputs; needs
            images. "magnitude": small weights; needs no data.
        where: Linears to thin out; by default those of the encoder's MLPs.
        images: at most so many images are looked at.
        seed: of the points in an image that a mask decoder is asked at, where it is thinned out.

    Raises:
        ConfigError: if `images` is less than 1.
        NoEffectError: if `where` matches no `torch.nn.Linear`, or all have the zeros already.
        ShapeError: if a Linear's inputs do not come in fours.
        ModelError: if a weight, or what a layer is fed, is not finite.
        DataError: if "wanda" or "sparsegpt" get no image.

    Effect:
        On a CPU, in float32, or on an older GPU: mask only. Parameters, multiply-accumulates, bytes
        and time stay as they are, and half of the thinned weights are zeros. On a GPU with
        cuSPARSELt, in float16 or bfloat16 and with widths that are multiples of 16, the zeros are
        not multiplied by; published for the MLPs of ViT-H on an A100: 1.10 times the images a
        second. The file is as large as before everywhere. Zeros stay zero in later training.

    Composes with:
        After pruning of units, `attention.Fused` and distillation; before more distillation, which
        wins accuracy back and keeps the zeros, and before quantisation and export, where they stay
        zeros in dense layers.

    Source:
        2:4 sparsity: A. Mishra et al., 2021, arXiv 2104.08378; Wanda: M. Sun et al., 2023, arXiv
        2306.11695 (MIT); SparseGPT: E. Frantar, D. Alistarh, 2023, arXiv 2301.00774 (Apache-2.0).
        The padding of windows has no say here. Kernels are PyTorch's; own code otherwise.

    Example:
        >>> import samcompress as sc
        >>> sparse = sc.prune.Sparse24(criterion="magnitude")(sc.build("tiny"))
        >>> (sparse.image_encoder.blocks[0].mlp.lin1.weight[0, :8] == 0).sum()
        tensor(4)
    """

    span: ClassVar[int] = 4

    def check(self, model: nn.Module) -> None:
        """Check that inputs come in fours, and that a layer is left to thin out."""
        for name, layer in self.layers(model).items():
            if layer.in_features % 4:
                raise ShapeError(
                    f"{self.label} takes the inputs of a layer in fours.",
                    where=name,
                    got=f"in_features={layer.in_features}",
                    expected="a multiple of 4; of 16 for the kernels of GPUs",
                    fix="leave the layer out: where=sc.Where(..., exclude=...)",
                )
        super().check(model)

    def choose(self, scores: Tensor, start: int) -> Tensor:
        """Two of each run of four."""
        return two_of_four(scores, start)

    def done(self, layer: Any) -> bool:
        """Whether it is a layer of this technique, and nothing has filled its zeros since."""
        return isinstance(layer, Sparse24Linear) and has_zeros(layer.weight)

    def twin(self, layer: nn.Linear) -> Sparse24Linear:
        """A layer that keeps its zeros and knows the kernels."""
        return Sparse24Linear(layer)
