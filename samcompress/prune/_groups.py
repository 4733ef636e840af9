"""Units of a SAM that can go, with all weights that go with them, and how many may stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import Attention
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import Attention as TokenAttention
from torch import Tensor, nn

from ..core.errors import ModelError
from . import _cut


@dataclass(frozen=True, eq=False)
class Member:
    """One weight of a group.

    Attributes:
        weight: name of the parameter in the model.
        axis: of the weight that runs over the units.
        unit: (n,) int64, which unit each place along the axis belongs to; -1 for none.
    """

    weight: str
    axis: int
    unit: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind in one module.

    Attributes:
        name: of the module, for `Kind.cut`; behind ``@`` the layer where a module has several.
        units: how many there are.
        members: all weights that go with a unit. Biases, norms and tables of positions go too, but
            say nothing about what matters.
        pool: groups whose units cost the same; only those are ranked together.
        device: kind of device the weights are on.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    pool: str = ""
    device: str = "cpu"

    def reduce(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(units,) from the scores of the weights' elements: sums, averaged over the members."""
        return torch.stack([self._member(m, scores[m.weight]) for m in self.members]).mean(0)

    def _member(self, member: Member, scores: Tensor) -> Tensor:
        others = [axis for axis in range(scores.ndim) if axis != member.axis]
        sums = scores.sum(others) if others else scores
        total = sums.new_zeros(self.units + 1)  # the last is for what belongs to none
        return total.index_add(0, member.unit.to(sums.device) % (self.units + 1), sums)[:-1]


@dataclass(frozen=True)
class Kind:
    """A sort of unit.

    Attributes:
        owner: class of the modules that have such units.
        groups: those of one module of a model, given its name.
        cut: keep some units of a module, given the name of their group.
        layers: linear layers and convolutions of a module that are cut.
    """

    owner: type[nn.Module]
    groups: Callable[[Any, str], list[Group]]
    cut: Callable[[nn.Module, str, Sequence[int]], None]
    layers: Callable[[Any], Mapping[str, nn.Module]]


def _mlp(model: Any, name: str) -> list[Group]:
    units = torch.arange(model.get_submodule(name).lin1.out_features)
    rows, columns = Member(f"{name}.lin1.weight", 0, units), Member(f"{name}.lin2.weight", 1, units)
    return [Group(name, len(units), (rows, columns), name.partition(".")[0])]


def _head_units(model: Any, name: str) -> list[Group]:
    found = []
    for index, layer in enumerate(model.get_submodule(name).layers[:-1]):
        units = torch.arange(layer.out_features)
        members = (
            Member(f"{name}.layers.{index}.weight", 0, units),
            Member(f"{name}.layers.{index + 1}.weight", 1, units),
        )
        found.append(Group(f"{name}@{index}", len(units), members, str(index)))
    return found


def _qkv(model: Any, name: str, unit: Tensor, count: int) -> Group:
    """A group of attention whose parts (I,) belong to units."""
    none = torch.full_like(unit, -1)
    members = [
        Member(f"{name}.qkv.weight", 0, torch.cat([unit if i == j else none for j in range(3)]))
        for i in range(3)
    ]
    members.append(Member(f"{name}.proj.weight", 1, unit))
    # Attention inside windows costs a fraction of what it costs over the whole map.
    block = model.get_submodule(name.rpartition(".")[0])
    return Group(name, count, tuple(members), str(getattr(block, "window_size", 0)))


def _width(name: str, parts: int, heads: int) -> int:
    """How many of the dimensions of attention a head has.

    Raises:
        ModelError: if they are not as many for each.
    """
    if parts % heads:
        raise ModelError(
            "the heads of an attention do not divide its width.",
            where=name,
            got=f"{parts} dimensions, {heads} heads",
            expected="as many dimensions for each head",
            fix="num_heads must be what the layers were made for",
        )
    return parts // heads


def _heads(model: Any, name: str) -> list[Group]:
    attn = model.get_submodule(name)
    parts = attn.qkv.out_features // 3
    unit = torch.arange(parts) // _width(name, parts, attn.num_heads)
    return [_qkv(model, name, unit, attn.num_heads)]


def _head_dims(model: Any, name: str) -> list[Group]:
    attn = model.get_submodule(name)
    parts = attn.qkv.out_features // 3
    width = _width(name, parts, attn.num_heads)
    return [_qkv(model, name, torch.arange(parts) % width, width)]


def _token_heads(model: Any, name: str) -> list[Group]:
    attn = model.get_submodule(name)
    width = _width(name, attn.internal_dim, attn.num_heads)
    unit = torch.arange(attn.internal_dim) // width
    members = [Member(f"{name}.{p}_proj.weight", 0, unit) for p in "qkv"]
    members.append(Member(f"{name}.out_proj.weight", 1, unit))
    return [Group(name, attn.num_heads, tuple(members), str(width))]


def _channels(model: Any, name: str) -> list[Group]:
    encoder = model.get_submodule(name)
    units = torch.arange(encoder.patch_embed.proj.out_channels)
    members = [Member(f"{name}.patch_embed.proj.weight", 0, units)]
    for index in range(len(encoder.blocks)):
        block = f"{name}.blocks.{index}"
        for weight, axis in (("attn.qkv", 1), ("attn.proj", 0), ("mlp.lin1", 1), ("mlp.lin2", 0)):
            members.append(Member(f"{block}.{weight}.weight", axis, units))
    members.append(Member(f"{name}.neck.0.weight", 1, units))
    return [Group(name, len(units), tuple(members))]


def _stream(encoder: Any) -> dict[str, nn.Module]:
    """The layers that write and read the tokens of an image encoder."""
    found = {"patch_embed.proj": encoder.patch_embed.proj, "neck.0": encoder.neck[0]}
    for index, block in enumerate(encoder.blocks):
        for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
            found[f"blocks.{index}.{name}"] = block.get_submodule(name)
    return found


def _named(*names: str) -> Callable[[Any], dict[str, nn.Module]]:
    return lambda module: {name: module.get_submodule(name) for name in names}


def _whole(cut: Callable[[Any, Sequence[int]], None]) -> Callable[..., None]:
    """`cut` for the module of a group that has one layer of units."""
    return lambda model, name, kept: cut(model.get_submodule(name), kept)


def _cut_head_units(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    module, _, layer = name.partition("@")
    _cut.keep_head_units(model.get_submodule(module), int(layer), kept)


KINDS: dict[str, Kind] = {
    "mlp": Kind(MLPBlock, _mlp, _whole(_cut.keep_hidden), _named("lin1", "lin2")),
    "heads": Kind(Attention, _heads, _whole(_cut.keep_heads), _named("qkv", "proj")),
    "head_dims": Kind(Attention, _head_dims, _whole(_cut.keep_head_dims), _named("qkv", "proj")),
    "channels": Kind(ImageEncoderViT, _channels, _whole(_cut.keep_channels), _stream),
    "token_heads": Kind(
        TokenAttention,
        _token_heads,
        _whole(_cut.keep_token_heads),
        _named("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "head_units": Kind(
        MLP,
        _head_units,
        _cut_head_units,
        lambda mlp: {f"layers.{i}": layer for i, layer in enumerate(mlp.layers)},
    ),
}


def kept_count(units: int, ratio: float, round_to: int) -> int:
    """How many of `units` stay: ``units x (1 - ratio)``, down to a multiple of `round_to`.

    Example:
        >>> kept_count(3072, 0.25, 8), kept_count(100, 0.5, 8), kept_count(10, 0.9, 1)
        (2304, 48, 1)
    """
    # Rounded first, for 10 x (1 - 0.9) is a hair below 1 in binary.
    return math.floor(round(units * (1 - ratio), 6)) // round_to * round_to


def step_of(kind: str, groups: Sequence[Group]) -> int:
    """What the kept units of a kind are best a multiple of, on the device where they are.

    Of hidden units and channels 32, on CUDA 64, as matrix kernels come in such tiles; of a head's
    dimensions 8. A narrow layer gets a finer step, so that it has eight portions. Heads are counted
    one by one.

    Example:
        >>> wide, narrow = Group("", 3072, ()), Group("", 192, ())
        >>> step_of("mlp", [wide]), step_of("mlp", [narrow]), step_of("heads", [wide])
        (32, 16, 1)
    """
    if kind in ("heads", "token_heads"):
        return 1
    tile = 64 if any(group.device == "cuda" for group in groups) else 32
    tile = 8 if kind == "head_dims" else tile
    portion = max(1, min(group.units for group in groups) // 8)
    return min(tile, 1 << (portion.bit_length() - 1))


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest of scores (n,), in ascending order; of equals the first."""
    order = torch.sort(scores.float().cpu(), descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def share_out(scores: Mapping[str, Tensor], total: int, round_to: int) -> dict[str, int]:
    """Divide `total` units among layers by their scores.

    Scores of a layer, (n,), are first brought to mean 0 and deviation 1. Units come in portions of
    `round_to`, best first; each layer keeps its best portion, the others go to whoever has the
    portion of the highest mean, until `total` is reached.

    Args:
        scores: for each layer, higher is more important.
        total: units to keep in all layers together.
        round_to: units of a portion.

    Returns:
        Units to keep in each layer; their sum is at most `total`, unless each keeps one portion.
    """
    counts, queue = {}, []
    for name, values in scores.items():
        values = values.float().cpu()
        values = (values - values.mean()) / (values.std(correction=0) + 1e-8)
        portions = torch.split(values.sort(descending=True).values, round_to)
        counts[name] = len(portions[0])
        queue += [(float(p.mean()), name, len(p)) for p in portions[1:]]
    # The sort is stable and a layer's portions are in falling order, so each layer gives its best.
    left = total - sum(counts.values())
    for _, name, size in sorted(queue, key=lambda portion: -portion[0]):
        if size > left:
            break
        counts[name] += size
        left -= size
    return counts
