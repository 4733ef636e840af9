"""Linears with zeros that stay zero, in ordinary tensors under the usual names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 16  # of rows and columns, in both types


class SparseLinear(nn.Linear):
    """`nn.Linear` whose zeros stay zero in training: they get no gradient.

    No mask is stored. The weight itself says where its zeros are, so the state is that of an
    `nn.Linear`, and averages and weight decay leave zeros alone as well.

    Args:
        layer: the Linear whose weight and bias are taken over.
    """

    # For steps that store a weight in another way and take known classes only.
    computes_as: ClassVar[type[nn.Linear]] = nn.Linear

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight: Tensor = self.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            weight = weight * (weight != 0)  # the same numbers, bit for bit
        return F.linear(x, weight, self.bias)


class Sparse24Linear(SparseLinear):
    """A `SparseLinear` with two zeros in each four weights of a row, multiplied by a fast kernel.

    Where the device has semi-structured kernels, and no gradient is asked for, a compressed copy of
    the weight is multiplied by. It is made at the first call, again when the weight has changed,
    and never saved.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._compressed: tuple[Tensor, int, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if _recorded() or torch.is_grad_enabled() or x.dtype not in TYPES or why_dense(self.weight):
            return super().forward(x)
        compressed = self.compressed()
        if compressed is None:
            return super().forward(x)
        return F.linear(x.contiguous(), compressed, self.bias)

    def compressed(self) -> Tensor | None:
        """The weight as semi-structured kernels take it; None if it no longer has the zeros."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        held = self._compressed
        if held is None or held[0] is not weight or held[1] != version:
            made = _compress(weight.detach()) if has_zeros(weight) else None
            self._compressed = held = (weight, version, made)
        return held[2]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        reason = why_dense(self.weight)
        how = f"2:4, mask only ({reason})" if reason else "2:4"
        return f"{super().extra_repr()}, {how}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._compressed = None  # a move gives the same parameter other numbers
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compressed": None}  # a copy makes its own


def has_zeros(weight: Tensor) -> bool:
    """Whether at least two in each run of four weights of a row are zero."""
    return bool(((weight == 0).reshape(len(weight), -1, 4).sum(-1) >= 2).all())


def why_dense(weight: Tensor) -> str | None:
    """Why no semi-structured kernel can multiply by a weight; None if one can.

    Args:
        weight: (rows, columns).
    """
    kind = str(weight.dtype).removeprefix("torch.")
    if weight.device.type != "cuda":
        return f"no kernel on {weight.device.type}"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "no kernel on GPUs before Ampere"
    if weight.dtype not in TYPES:
        return f"no kernel for {kind}, only for float16 and bfloat16"
    odd = [side for side in weight.shape if side % MULTIPLE]
    return f"width {odd[0]} is no multiple of {MULTIPLE}" if odd else None


def _recorded() -> bool:
    """Whether a graph is being made, which should have ordinary operators."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or tracing


def _compress(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructured")
        return torch.sparse.to_sparse_semi_structured(weight.contiguous())
