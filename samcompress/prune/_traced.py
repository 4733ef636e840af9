"""Which layers of an encoder share a width, found by torch-pruning's trace of it.

torch-pruning records how autograd goes through a model and joins layers to a graph. Its own walk
along that graph takes very long where linear layers work on maps, and cuts attention wrongly; so we
walk it ourselves, give up a width at anything that is not the same for each unit, and then cut a
copy and compare: only what makes no difference to a model in which nothing reads the units is used.

Source: G. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv 2301.12900. Own
code; torch-pruning (MIT) is called.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from ..core._require import require
from ..core.errors import ConfigError, ModelError
from ._filters import NORM, Part, Width, dense, depthwise, keep, silence, size

PACKAGE, EXTRA = "torch_pruning", "graph"
SMALLEST = 64  # pixels a side of the image that is traced; structure does not depend on it
TOLERANCE = 1e-6  # in float64, of the largest output


def widths(encoder: nn.Module, label: str) -> list[Width]:
    """Widths inside an encoder whose units could be cut, by the graph; see `faithful`.

    Args:
        encoder: an image encoder; a copy is traced.
        label: who asks, for the error.

    Raises:
        ModelError: if torch-pruning cannot trace it.
        MissingDependencyError: if torch-pruning is not installed.
    """
    tracer = require(PACKAGE, extra=EXTRA, purpose=label)
    twin = copy.deepcopy(encoder).float().cpu().eval().requires_grad_(True)
    graph, side = tracer.DependencyGraph(), _shrink(twin)

    def run(model: nn.Module, image: Tensor) -> Tensor:
        graph._2d_4d = False  # else reshapes between maps and tokens are taken to flatten maps
        out: Tensor = model(image)
        return out * 1  # so that the output is never that of a layer, which could be cut

    try:
        with torch.enable_grad():
            graph.build_dependency(
                twin, torch.zeros(1, 3, side, side), forward_fn=run, verbose=False
            )
    except Exception as err:
        raise ModelError(
            f"{label}: torch-pruning cannot trace this image encoder.",
            where="image_encoder",
            got=f"{type(encoder).__name__}: {type(err).__name__}: " + str(err).partition("\n")[0],
            expected="an encoder that torch-pruning's DependencyGraph can be built of",
            fix="sc.prune.Mlp, if it has MLPs of segment_anything's; or a smaller variant",
        ) from err
    names: dict[Any, str] = {module: name for name, module in twin.named_modules()}
    names |= {parameter: name for name, parameter in twin.named_parameters()}
    found: list[Width] = []
    seen: set[str] = set()
    for layer in graph.module2node:
        if isinstance(layer, nn.Module) and dense(layer) and names[layer] not in seen:
            width = _walk(graph, twin, layer, names)
            if width is not None:
                found.append(width)
                seen |= {part.name for part in width.parts if part.side == "out"}
    return found


def faithful(encoder: nn.Module, found: Sequence[Width]) -> list[Width]:
    """The widths whose units can be cut so that nothing else changes.

    On copies with random weights and statistics, for in real ones a zero may hide a mistake.
    """
    twin = copy.deepcopy(encoder).double().cpu().eval().requires_grad_(False)
    drawn = torch.Generator().manual_seed(0)
    side = _shrink(twin)
    _randomise(twin, drawn)
    image = torch.randn(1, 3, side, side, generator=drawn, dtype=torch.float64)
    kept = {
        w.name: sorted(torch.randperm(w.units, generator=drawn)[: (w.units + 1) // 2].tolist())
        for w in found
    }

    def right(part: Sequence[Width]) -> bool:
        chosen = {w.name: kept[w.name] for w in part}
        parts = {w.name: w.parts for w in part}
        whole, small = copy.deepcopy(twin), copy.deepcopy(twin)
        silence(whole, chosen, parts)
        try:
            keep(small, chosen, parts)
            expected, got = whole(image), small(image)
            return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())
        except Exception:  # a cut that does not fit fails in whatever way the module fails
            return False

    def search(part: Sequence[Width]) -> list[Width]:
        if not part or right(part):
            return list(part)
        half = len(part) // 2
        return search(part[:half]) + search(part[half:]) if half else []

    with torch.no_grad():
        return search(found)


def _walk(graph: Any, twin: nn.Module, layer: Any, names: dict[Any, str]) -> Width | None:
    """All that the units a layer makes run through; None where they are not cut one by one."""
    make = graph.get_pruner_of_module(layer).prune_out_channels
    name = names[layer]
    units = size(twin, Part(name, "out", 0))
    start: dict[tuple[Any, Any], int] = {(graph.module2node[layer], make): 0}
    stack = list(start)
    while stack:
        node, function = stack.pop()
        for link in node.dependencies:
            if not link.is_triggered_by(function):
                continue
            first = _mapped(link.index_mapping, start[node, function], units)
            key = (link.target, link.handler)
            if first is None or key in start:
                if first is not None and start[key] != first:
                    return None
                continue
            if first < 0 or not _each(graph, link.target):
                return None
            start[key] = first
            stack.append(key)
    parts = []
    for (node, function), first in start.items():
        if node.module not in names:
            continue
        part = _part(graph, node, function, names[node.module], first)
        owner = twin.get_submodule(part.name.rpartition(".")[0])
        # A norm over the units, which torch-pruning takes for two parameters of their own.
        if isinstance(owner, LayerNorm2d) or first + units > size(twin, part):
            return None
        parts.append(part)
    if not any(part.side == "in" for part in parts):
        return None
    return Width(name, units, tuple(parts))


def _mapped(mappings: Sequence[Any], start: int, units: int) -> int | None:
    """Where units are on the other side of a link: None for nowhere, -1 for not in one piece."""
    ends = [SimpleNamespace(idx=i, root_idx=i) for i in (start, start + units - 1)]
    for mapping in mappings:
        if mapping is not None:
            ends = mapping(ends)
    if not ends:
        return None
    whole = len(ends) == 2 and ends[1].idx - ends[0].idx == units - 1
    return int(ends[0].idx) if whole else -1


def _each(graph: Any, node: Any) -> bool:
    """Whether a node does the same with each unit, or reads or makes all of them."""
    kinds = graph.ops.OPTYPE
    if node.type in (kinds.CONV, kinds.DEPTHWISE_CONV, kinds.LINEAR, kinds.BN):
        return dense(node.module) or depthwise(node.module) or isinstance(node.module, NORM)
    return node.type in (
        kinds.PARAMETER, kinds.CONCAT, kinds.SPLIT, kinds.SLICE, kinds.RESHAPE, kinds.ELEMENTWISE,
    )  # fmt: skip


def _part(graph: Any, node: Any, function: Any, name: str, start: int) -> Part:
    if isinstance(node.module, nn.Parameter):
        return Part(name, node.pruning_dim, start)
    out = not dense(node.module) or graph.is_out_channel_pruning_fn(function)
    return Part(name, "out" if out else "in", start)


def _shrink(encoder: Any) -> int:
    """Let an encoder take small images where it can; the side it takes then."""
    step = getattr(encoder, "multiple", getattr(encoder, "stride", encoder.img_size))
    side = min(-(-SMALLEST // step) * step, encoder.img_size)
    try:
        encoder.resize(side)
    except (AttributeError, ConfigError):
        return int(encoder.img_size)
    return int(side)


def _randomise(encoder: nn.Module, drawn: torch.Generator) -> None:
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if name.endswith(("bias", "running_mean")):
            values = 0.2 * torch.randn(tensor.shape, generator=drawn)
        elif tensor.ndim < 2:
            values = 0.5 + torch.rand(tensor.shape, generator=drawn)
        else:
            values = torch.randn(tensor.shape, generator=drawn) * tensor[0].numel() ** -0.5
        tensor.data.copy_(values)


def renamed(width: Width, prefix: str) -> Width:
    """The same width with names in the model that the encoder is a part of."""
    parts = tuple(replace(part, name=prefix + part.name) for part in width.parts)
    return Width(prefix + width.name, width.units, parts)
