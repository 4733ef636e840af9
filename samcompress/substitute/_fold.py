"""Batch norms folded into the convolution or linear layer before them.

In eval mode a batch norm multiplies each channel by a constant and adds another. A convolution or
linear layer whose output nothing but that norm reads can do both itself: same function, fewer
passes over memory, fewer parameters.

Which layers feed which norm is seen in a run of the module without storage, not guessed from names
or positions. Weights, and with them the tensors' names, stay where they are: ``conv.weight`` is
scaled, ``conv.bias`` is made where there was none, and the norm becomes an identity.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core._meta import without_storage

# A subclass may do more to its weight than multiply by it (standardise it, say), so it is left
# alone.
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Pair(NamedTuple):
    """Names of a layer and of the batch norm that reads its output."""

    layer: str
    norm: str


def batch_norm_pairs(module: nn.Module, *example: Tensor) -> list[Pair]:
    """The batch norms that can be folded away, in the order in which they run.

    Args:
        module: any module; a copy without storage is run, it is not touched itself.
        example: arguments of one call; only their shapes and types matter.

    Returns:
        Pairs of a layer and a norm, each called once, where nothing else reads the layer's output.
    """
    twin = without_storage(module).eval()
    made, read = _Calls(), _Calls()
    for name, part in twin.named_modules():
        if type(part) in LAYERS:
            part.register_forward_hook(partial(made.output, name))
        elif isinstance(part, NORMS) and _foldable(part):
            part.register_forward_pre_hook(partial(read.input, name))
    reads = _Reads()
    with torch.no_grad(), reads:
        result = twin(*(x.to("meta") for x in example))
    reads.keep(result)
    return [
        Pair(made.names[tensor], norm)
        for tensor, norm in read.names.items()
        if tensor in made.names
        and reads.count[tensor] == 1
        and made.times[made.names[tensor]] == 1
        and read.times[norm] == 1
    ]


def fold_batch_norms(module: nn.Module, pairs: list[Pair]) -> None:
    """Fold batch norms in place.

    The result computes what `module` computes in eval mode, to rounding.

    Args:
        module: where the pairs were found, or one with the same structure and other weights.
        pairs: from `batch_norm_pairs`.
    """
    for layer, norm in pairs:
        batch_norm: Any = module.get_submodule(norm)
        fold(module.get_submodule(layer), batch_norm)
        module.set_submodule(norm, _rest(batch_norm).train(batch_norm.training))


@torch.no_grad()
def fold(layer: Any, norm: Any) -> None:
    """Give a convolution or linear layer the scale and shift of the batch norm behind it.

    Args:
        layer: one of `LAYERS`; changed in place.
        norm: a batch norm with running statistics.
    """
    kind = layer.weight.dtype
    wide = torch.promote_types(kind, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    shift = -norm.running_mean.to(wide) * scale
    if norm.affine:
        scale = scale * norm.weight.to(wide)
        shift = shift * norm.weight.to(wide) + norm.bias.to(wide)
    weight = layer.weight.to(wide)
    if getattr(layer, "transposed", False):  # (in, out / groups, ...), the groups along `in`
        groups = weight.unflatten(0, (layer.groups, -1))
        ones = (1,) * (weight.ndim - 2)
        weight = (groups * scale.reshape(layer.groups, 1, -1, *ones)).flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    if layer.bias is not None:
        shift = shift + layer.bias.to(wide) * scale
    trained = layer.weight.requires_grad
    # New parameters, not new values: another layer may share the old ones.
    layer.weight = nn.Parameter(weight.to(kind), requires_grad=trained)
    layer.bias = nn.Parameter(shift.to(kind), requires_grad=trained)


def _foldable(norm: Any) -> bool:
    known = type(norm) in NORMS or (hasattr(norm, "drop") and hasattr(norm, "act"))
    return known and norm.running_mean is not None


def _rest(norm: Any) -> nn.Module:
    """What a norm does besides: timm's activate in the same module."""
    if hasattr(norm, "act"):
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


class _Calls:
    """Which module made, or took, a tensor; and how often each was called."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.times: Counter[str] = Counter()

    def output(self, name: str, module: Any, inputs: Any, output: Tensor) -> None:
        """A call of a layer. A norm's channels are in dimension 1; a layer's may be elsewhere."""
        if output.ndim == module.weight.ndim:
            self.names[id(output)] = name
        self.times[name] += 1

    def input(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A call of a norm."""
        self.names[id(inputs[0])] = name
        self.times[name] += 1


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How often operators read each tensor; holds all of them, so that no id is used twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[int] = Counter()
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.keep((args, kwargs))
        self.alive.append(output)
        return output

    def keep(self, read: Any) -> None:
        """Count the tensors in a tree as read once more."""
        for leaf in tree_leaves(read):
            if isinstance(leaf, Tensor):
                self.count[id(leaf)] += 1
                self.alive.append(leaf)
