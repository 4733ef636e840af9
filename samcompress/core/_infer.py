"""From bare tensors to a SAM: sizes are read off names and shapes, then weights poured in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from segment_anything.modeling import Sam
from torch import Tensor, nn

from ._weights import TensorDict
from .build import ARCHITECTURES, SamConfig, _ratio
from .errors import CheckpointError, ConfigError, closest

# Tensors the sizes are read from, with their number of dimensions.
NEEDED = {
    "image_encoder.pos_embed": 4,
    "image_encoder.patch_embed.proj.weight": 4,
    "image_encoder.blocks.0.attn.rel_pos_h": 2,
    "image_encoder.blocks.0.mlp.lin1.weight": 2,
    "image_encoder.neck.0.weight": 4,
    "prompt_encoder.mask_downscaling.3.weight": 4,
    "mask_decoder.mask_tokens.weight": 2,
    "mask_decoder.transformer.layers.0.mlp.lin1.weight": 2,
    "mask_decoder.iou_prediction_head.layers.0.weight": 2,
}
# Width and hidden width of the known decoders, and the heads that go with them.
_HEADS = {(a.out_chans, a.decoder_mlp_dim): a.decoder_num_heads for a in ARCHITECTURES.values()}
# Sam does not save these two, but forks do.
STATISTICS = ("pixel_mean", "pixel_std")
# Slices that structured pruning cuts together; nothing else of a SAM may differ block by block.
_COUPLED = re.compile(r"\.(mlp|attn|self_attn|cross_attn_\w+|final_attn_\w+)\.")


def config_from_state(
    state: TensorDict, *, where: str = "state dict", decoder_num_heads: int | None = None
) -> SamConfig:
    """The sizes of the SAM that a state dict with segment_anything's names belongs to.

    Args:
        state: tensors by name; only shapes are read, so tensors on "meta" will do.
        where: what to call the source in an error.
        decoder_num_heads: the one size that no shape shows; by default that of the known
            architecture with a decoder of the same widths.

    Raises:
        CheckpointError: if tensors that every SAM has are absent, shapes contradict one another, or
            the decoder is of unknown widths and its number of heads was not given.
    """
    missing = [name for name in NEEDED if name not in state]
    if missing:
        raise CheckpointError(
            "this is not a SAM with a ViT encoder.",
            where=where,
            got=f"no {some(missing)}",
            expected="every tensor of segment_anything's Sam",
            fix="a checkpoint of another architecture needs its own loader",
        )
    flat = {name: tuple(state[name].shape) for name in NEEDED if state[name].ndim != NEEDED[name]}
    if flat:
        name, shape = next(iter(flat.items()))
        raise CheckpointError(
            "a tensor has the wrong shape.",
            where=f"{where}: {name}",
            got=shape,
            expected=f"{NEEDED[name]} dimensions",
        )
    decoder = (
        state["image_encoder.neck.0.weight"].shape[0],
        state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
    )
    heads = decoder_num_heads or _HEADS.get(decoder)
    if heads is None:
        raise CheckpointError(
            "the decoder's number of attention heads cannot be read off its tensors.",
            where=where,
            got=f"a decoder of width {decoder[0]} with {decoder[1]} hidden units",
            expected=" or ".join(f"{c} with {m}" for c, m in _HEADS),
            fix="say it: sc.load(path, decoder_num_heads=8); or keep models with sc.save",
        )
    try:
        return _read(state, heads)
    except (ConfigError, ZeroDivisionError) as err:
        raise CheckpointError(
            "the shapes of the tensors contradict one another.", where=where, got=err
        ) from err


def assemble(config: SamConfig, state: TensorDict, *, where: str = "state dict") -> Sam:
    """Build a SAM and fill it, strictly.

    Args:
        config: the sizes.
        state: tensors under segment_anything's names; copied, and converted to float32.
        where: what to call the source in an error.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape.
    """
    sam = config.build(empty=True)
    weights = {name: t for name, t in state.items() if name not in STATISTICS}
    fill(
        sam,
        weights,
        where=where,
        expected=f"a SAM with depth={config.depth}, embed_dim={config.embed_dim}, "
        f"image_size={config.image_size}",
    )
    return sam


def fill(
    model: nn.Module,
    weights: TensorDict,
    *,
    where: str,
    expected: str,
    said: Mapping[str, str] | None = None,
) -> None:
    """Copy weights into a model, strictly.

    Args:
        model: its tensors keep their dtypes.
        weights: tensors by the model's names.
        where: what to call the source in an error.
        expected: what to call the model in an error.
        said: what the source calls its tensors, where that differs.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    odd = [name for name in wanted if name in weights and not _alike(wanted[name], weights[name])]
    floats = all(weights[name].is_floating_point() for name in odd)
    if odd and floats and not missing and not unknown and all(map(_COUPLED.search, odd)):
        raise CheckpointError(
            "plain weights of a pruned model.",
            where=f"{where}: {some(odd)}",
            got="blocks of different widths, without the record of what was removed",
            expected="one width for all blocks, or a folder written by sc.save",
            fix="save the pruned model with sc.save(model, folder) and load that folder",
        )
    if missing or unknown or odd:
        names = said or {}
        shapes = [f"{names.get(n, n)} {_unlike(weights[n], wanted[n])}" for n in odd]
        near = closest(unknown[0], missing, n=1) if unknown else None
        unknown = [names.get(name, name) for name in unknown]
        parts = {"missing": missing, "unknown": unknown, "wrong": shapes}
        raise CheckpointError(
            "the tensors do not fit.",
            where=where,
            got="; ".join(f"{kind} {some(found)}" for kind, found in parts.items() if found),
            expected=expected,
            fix=f"rename {unknown[0]} to {near}" if near else None,
        )
    model.load_state_dict(weights, strict=True)


def statistics(state: TensorDict) -> dict[str, Any]:
    """Mean and deviation of pixels as fields of `SamConfig`, where the file has them."""
    return {
        name: tuple(float(f"{v:.7g}") for v in state[name].flatten().tolist())
        for name in STATISTICS
        if name in state and not state[name].is_meta
    }


def _read(state: TensorDict, decoder_num_heads: int) -> SamConfig:
    shape = {name: tuple(state[name].shape) for name in NEEDED}
    _, grid, _, width = shape["image_encoder.pos_embed"]
    patch = shape["image_encoder.patch_embed.proj.weight"][-1]
    depth = _count(state, r"image_encoder\.blocks\.(\d+)\.")
    rows = {
        i: t.shape[0]
        for i in range(depth)
        if (t := state.get(f"image_encoder.blocks.{i}.attn.rel_pos_h")) is not None
    }
    # A table has 2 n - 1 rows for n tokens a side: the whole grid where attention is global.
    local = Counter((n + 1) // 2 for n in rows.values() if n != 2 * grid - 1)
    return SamConfig(
        image_size=grid * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // shape["image_encoder.blocks.0.attn.rel_pos_h"][1],
        mlp_ratio=_ratio(shape["image_encoder.blocks.0.mlp.lin1.weight"][0], width),
        window_size=local.most_common(1)[0][0] if local else 0,
        global_attn_indexes=tuple(i for i, n in rows.items() if n == 2 * grid - 1),
        out_chans=shape["image_encoder.neck.0.weight"][0],
        mask_in_chans=shape["prompt_encoder.mask_downscaling.3.weight"][0],
        decoder_depth=_count(state, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        decoder_mlp_dim=shape["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
        decoder_num_heads=decoder_num_heads,
        num_multimask_outputs=shape["mask_decoder.mask_tokens.weight"][0] - 1,
        iou_head_depth=_count(state, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        iou_head_hidden_dim=shape["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        **statistics(state),
    )


def _count(state: TensorDict, pattern: str) -> int:
    return len({m[1] for name in state if (m := re.match(pattern, name))})


def _alike(wanted: Tensor, found: Tensor) -> bool:
    return wanted.shape == found.shape and wanted.is_floating_point() == found.is_floating_point()


def _unlike(found: Tensor, wanted: Tensor) -> str:
    return f"{_kind(found)} instead of {_kind(wanted)}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}")


def some(names: list[str], n: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + rest
