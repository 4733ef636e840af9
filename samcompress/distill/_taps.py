"""What an encoder says on the way: the outputs of its layers, caught by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from segment_anything.modeling.image_encoder import window_unpartition
from torch import Tensor, nn

from ..core.contract import device_of
from ..core.errors import ModelError
from ._cache import evaluating

EMBEDDING = ""  # the encoder itself
QKV, HIDDEN = "attn.qkv", "mlp.act"


def block(index: int, layer: str = "") -> str:
    """Name of a ViT block, counted from 0, or of a layer in it."""
    return f"blocks.{index}.{layer}".removesuffix(".")


def depth(model: nn.Module, who: str) -> int:
    """How many ViT blocks the image encoder of a SAM has.

    Args:
        model: the SAM.
        who: what to call it in an error.

    Raises:
        ModelError: if it has none.
    """
    need(model, ["blocks"], who)
    blocks: Any = model.get_submodule("image_encoder.blocks")
    return len(blocks)


def need(model: nn.Module, names: Sequence[str], who: str) -> None:
    """Check that the image encoder of a SAM has the layers that are tapped.

    Raises:
        ModelError: naming the first that is absent.
    """
    encoder = model.get_submodule("image_encoder")
    present = dict(encoder.named_modules())
    absent = next((name for name in names if name not in present), None)
    if absent is None:
        return
    # What is there instead, where the path ends.
    reached = absent
    while reached not in present:
        reached = reached.rpartition(".")[0]
    owner = present[reached]
    children = ", ".join(name for name, _ in owner.named_children())
    raise ModelError(
        f"the {who} lacks a layer that is tapped.",
        where=f"the {who}'s image_encoder.{absent}",
        got=f"{type(owner).__name__} with {children or 'no parts'}",
        expected="ViT blocks with attn.qkv and mlp.act, as segment_anything builds them",
        fix=f"a {who} with a ViT encoder, or sc.distill.Encoder(), which compares embeddings only",
    )


@contextmanager
def tapped(encoder: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Catch the outputs of submodules; the hooks are gone afterwards.

    Args:
        encoder: the module that runs inside.
        names: of its submodules.

    Yields:
        A dict that each run fills: the last output by name.
    """
    found: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    handles = [encoder.get_submodule(n).register_forward_hook(catch(n)) for n in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def states(encoder: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Run an image encoder and keep what some of its layers say.

    Args:
        encoder: a ViT of segment_anything, re-attended or not.
        images: (B, 3, S, S).
        names: of layers; `EMBEDDING` for the result.

    Returns:
        (B, C, h, w) float32 of each. What was computed in windows is put together again, without
        the tokens that only fill up windows.

    Raises:
        ModelError: if a layer gives no map of tokens.
    """
    owners = {name.removesuffix(f".{QKV}") for name in names}
    with tapped(encoder, sorted({*names, *owners})) as found:
        encoder(images)
    maps = {}
    for name in names:
        value = found[name]
        if value.ndim != 4:
            raise ModelError(
                "a tapped layer gives no map of tokens.",
                where=f"image_encoder.{name}",
                got=f"{type(encoder).__name__} with an output of {tuple(value.shape)}",
                expected="(B, h, w, C), as the ViT blocks of segment_anything give",
                fix="sc.distill.Encoder(), which compares embeddings only",
            )
        if name == EMBEDDING:
            maps[name] = value.float()
            continue
        size = tuple(found[name.removesuffix(f".{QKV}")].shape[1:3])
        maps[name] = _whole(value, len(images), size).permute(0, 3, 1, 2).float()
    return maps


@torch.no_grad()
def widths(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """How many channels layers of a SAM's image encoder have: what they give for a blank image."""
    encoder: Any = model.get_submodule("image_encoder")
    blank = torch.zeros(1, 3, encoder.img_size, encoder.img_size, device=device_of(encoder))
    with evaluating(encoder):
        return {name: state.shape[1] for name, state in states(encoder, blank, names).items()}


def _whole(value: Tensor, count: int, size: tuple[int, ...]) -> Tensor:
    """(B, h, w, C) of tokens that may come as windows, (B·n, s, s, C)."""
    if len(value) == count:
        return value[:, : size[0], : size[1]]
    side = value.shape[1]
    padded = tuple(-(-length // side) * side for length in size)
    whole: Tensor = window_unpartition(value, side, padded, size)
    return whole
