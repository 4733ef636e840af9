"""transformers' SamModel in and out, SAM 2 and EdgeTAM in: the same tensors under other names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from segment_anything.modeling import Sam
from torch import nn

from ._infer import assemble, config_from_state, fill, statistics
from ._require import require
from ._sam2 import SECTIONS, Sam2Config
from ._weights import TensorDict, read_state
from .build import SamConfig, config_of
from .contract import device_of, dtype_of
from .errors import CheckpointError, ModelError
from .history import Base, History, remember

if TYPE_CHECKING:
    from transformers import SamModel

# (segment_anything, transformers): how a tensor's name begins, # any number. First match wins.
RULES: tuple[tuple[str, str], ...] = (
    ("image_encoder.patch_embed.proj", "vision_encoder.patch_embed.projection"),
    ("image_encoder.blocks.#.norm#", "vision_encoder.layers.#.layer_norm#"),
    ("image_encoder.blocks.#", "vision_encoder.layers.#"),
    ("image_encoder.neck.0", "vision_encoder.neck.conv1"),
    ("image_encoder.neck.1", "vision_encoder.neck.layer_norm1"),
    ("image_encoder.neck.2", "vision_encoder.neck.conv2"),
    ("image_encoder.neck.3", "vision_encoder.neck.layer_norm2"),
    ("image_encoder", "vision_encoder"),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings", "prompt_encoder.point_embed"),
    ("prompt_encoder.mask_downscaling.0", "prompt_encoder.mask_embed.conv1"),
    ("prompt_encoder.mask_downscaling.1", "prompt_encoder.mask_embed.layer_norm1"),
    ("prompt_encoder.mask_downscaling.3", "prompt_encoder.mask_embed.conv2"),
    ("prompt_encoder.mask_downscaling.4", "prompt_encoder.mask_embed.layer_norm2"),
    ("prompt_encoder.mask_downscaling.6", "prompt_encoder.mask_embed.conv3"),
    ("mask_decoder.transformer.layers.#.norm#", "mask_decoder.transformer.layers.#.layer_norm#"),
    ("mask_decoder.transformer.norm_final_attn", "mask_decoder.transformer.layer_norm_final_attn"),
    ("mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1"),
    ("mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm"),
    ("mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2"),
)
# transformers numbers only the inner layers of the decoder's heads.
HEADS = {
    "mask_decoder.output_hypernetworks_mlps.#": 3,
    "mask_decoder.iou_prediction_head": None,  # as deep as the model says
    "mask_decoder.pred_obj_score_head": 3,  # of SAM 2 alone
}
# The Fourier matrix has a second, tied name; a file may hold either or both.
SHARED = "shared_image_embedding.positional_embedding"
TIED = "prompt_encoder.shared_embedding.positional_embedding"
# What of SAM 2 and EdgeTAM is named otherwise.
SAM2_RULES: tuple[tuple[str, str], ...] = (
    ("image_encoder.vision", "vision_encoder"),
    ("image_encoder.conv_s#", "mask_decoder.conv_s#"),
    ("image_encoder.no_memory_embedding", "no_memory_embedding"),
    ("prompt_encoder.grid_layer.positional_encoding_gaussian_matrix", SHARED),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", TIED),
    (
        "mask_decoder.transformer.layers.#.mlp.lin1",
        "mask_decoder.transformer.layers.#.mlp.proj_in",
    ),
    (
        "mask_decoder.transformer.layers.#.mlp.lin2",
        "mask_decoder.transformer.layers.#.mlp.proj_out",
    ),
)
# How names of the memory begin, which only videos use. Published files hold it too.
MEMORY = (
    "memory_",
    "mask_downsample.",
    "object_pointer_proj.",
    "temporal_positional_encoding_projection_layer.",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
    "spatial_perceiver.",
)
# Model types of transformers, and their classes. Video models are those with a memory.
KINDS = {"sam": "SamModel", "sam2": "Sam2Model", "edgetam": "EdgeTamModel"}
# Where save_pretrained puts the weights, most wanted first.
FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)
# Where save_pretrained puts the settings of the image processor: alone, or as a part.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Settings that no shape shows, with the values for which the two implementations agree.
AGREES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("vision_config", "hidden_act"): ("gelu",),
    ("vision_config", "layer_norm_eps"): (1e-6,),
    ("prompt_encoder_config", "hidden_act"): ("gelu",),
    ("prompt_encoder_config", "layer_norm_eps"): (1e-6,),
    ("mask_decoder_config", "hidden_act"): ("relu",),
    ("mask_decoder_config", "layer_norm_eps"): (1e-5, 1e-6),
}
SAM2_AGREES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("vision_config", "num_feature_levels"): (3,),
    ("prompt_encoder_config", "hidden_act"): ("gelu",),
    ("prompt_encoder_config", "layer_norm_eps"): (1e-6,),
    # Of the transformer, and at once of each MLP in it.
    ("mask_decoder_config", "num_hidden_layers"): (2,),
}


def from_transformers(source: nn.Module | str | Path) -> Sam:
    """A SAM with the weights of a transformers SamModel, Sam2Model or EdgeTamModel.

    Masks of a SamModel agree to about 1e-5 of their range: transformers gives the decoder's norms
    an eps of 1e-6, segment_anything, with which the published weights were trained, 1e-5. With that
    value in the configuration, as `to_transformers` writes it, they agree to rounding. SAM 2 and
    EdgeTAM agree to rounding; of a video model only what it does to one image is taken.

    Args:
        source: such a model, or a folder with its ``config.json`` and weights; the package
            transformers is not needed to read a folder of a SamModel.

    Returns:
        The model in eval mode: on the device and in the dtype of a model, or on the CPU in float32
        from a folder.

    Raises:
        ModelError: if the model is of another class, or has settings that SAM does not.
        CheckpointError: if a folder lacks a file, or its tensors do not fit.
        MissingDependencyError: if transformers, or timm for EdgeTAM, is needed and not installed.
    """
    if isinstance(source, nn.Module):
        kind = kind_of(source)
        if kind is None:
            raise ModelError(
                "this is not a SAM of transformers.",
                got=f"{type(source).__module__}.{type(source).__qualname__}",
                expected=", ".join(f"transformers.{name}" for name in KINDS.values()),
            )
        settings = source.config.to_dict()  # type: ignore[operator, union-attr]
        sam = _convert(kind, dict(source.state_dict()), settings, type(source).__name__)
        return sam.to(device_of(source), dtype_of(source))
    folder = Path(source)
    settings = _json(folder / "config.json")
    kind = _kind(settings.get("model_type"))
    if kind is None:
        raise CheckpointError(
            "this transformers model is not a SAM that can be read.",
            where=str(folder / "config.json"),
            got=f"model_type {settings.get('model_type')!r}",
            expected=f"model_type {', '.join(map(repr, KINDS))}",
        )
    return _convert(kind, _folder_state(folder), settings, str(folder), _statistics(folder))


def kind_of(model: object) -> str | None:
    """Which SAM of transformers an object is, one of `KINDS`; None if it is none."""
    return _kind(getattr(getattr(model, "config", None), "model_type", None))


def to_transformers(sam: nn.Module) -> SamModel:
    """A transformers SamModel with the weights of a SAM, equal to it up to rounding.

    SamModel does no preprocessing: give it images scaled to 0...1 and normalised with
    ``sam.pixel_mean / 255`` and ``sam.pixel_std / 255``, as SamProcessor does by default.

    Args:
        sam: a SAM of any size whose blocks are alike; exact substitutes such as fused attention
            are undone, as they have the same tensors.

    Raises:
        ModelError: if a block is narrower than others or a module has no counterpart, naming it.
        MissingDependencyError: if transformers is not installed.

    Example:
        >>> import samcompress as sc
        >>> to_transformers(sc.build("tiny")).config.vision_config.num_hidden_layers
        4
    """
    config = _describable(sam)
    hf = require("transformers", purpose="to_transformers")
    model = hf.SamModel(_settings(hf, config))
    names = rules(config.iou_head_depth)
    state = {rename(name, names): tensor for name, tensor in sam.state_dict().items()}
    state[TIED] = state[SHARED]
    model.load_state_dict(state, strict=True)
    return cast("SamModel", model.to(device_of(sam), dtype_of(sam)).eval())


def state_from_transformers(state: TensorDict) -> TensorDict:
    """The tensors of a SamModel under segment_anything's names; unknown names stay as they are."""
    state = dict(state)
    tied = state.pop(TIED, None)
    if tied is not None:
        state.setdefault(SHARED, tied)
    names = _rules_for(state)
    return {rename(name, names, back=True): tensor for name, tensor in state.items()}


def rules(iou_head_depth: int) -> tuple[tuple[str, str], ...]:
    """All rules for a model whose IoU head has so many layers."""
    heads = []
    for head, depth in HEADS.items():
        last = (depth or iou_head_depth) - 1
        heads += [
            (f"{head}.layers.0", f"{head}.proj_in"),
            (f"{head}.layers.{last}", f"{head}.proj_out"),
        ]
        heads += [(f"{head}.layers.{i}", f"{head}.layers.{i - 1}") for i in range(1, last)]
    return (*heads, *RULES)


def _rules_for(state: TensorDict) -> tuple[tuple[str, str], ...]:
    """Those for the tensors of a model of transformers."""
    layers = "mask_decoder.iou_prediction_head.layers."
    return rules(len({name.split(".")[3] for name in state if name.startswith(layers)}) + 2)


def rename(name: str, names: tuple[tuple[str, str], ...], *, back: bool = False) -> str:
    """A tensor's name in transformers; with `back`, that in segment_anything."""
    for ours, theirs in names:
        old, new = (theirs, ours) if back else (ours, theirs)
        found = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)", name)
        if found:
            for number in found.groups():
                new = new.replace("#", number, 1)
            return new + name[found.end() :]
    return name


def state_from_sam2(state: TensorDict) -> TensorDict:
    """The tensors of a Sam2Model or EdgeTamModel under our names; unknown names stay as they are.

    Those of the memory, which only videos use, are left out.
    """
    state = {name: t for name, t in state.items() if not name.startswith(MEMORY)}
    for name, twin in ((SHARED, TIED), (TIED, SHARED)):
        if twin in state:
            state.setdefault(name, state[twin])
    names = (*SAM2_RULES, *_rules_for(state))
    found: TensorDict = {}
    for name, tensor in state.items():
        if name == "prompt_encoder.point_embed.weight":
            for index, row in enumerate(tensor):
                found[f"prompt_encoder.point_embeddings.{index}.weight"] = row[None]
        else:
            ours = rename(name, names, back=True)
            if ours.startswith("mask_decoder."):
                ours = ours.replace(".o_proj.", ".out_proj.")
            found[ours] = tensor
    return found


def _kind(model_type: object) -> str | None:
    kind = str(model_type).removesuffix("_video")
    return kind if kind in KINDS else None


def _convert(
    kind: str,
    state: TensorDict,
    settings: dict[str, Any],
    where: str,
    pixels: TensorDict | None = None,
) -> Sam:
    for (part, key), values in (AGREES if kind == "sam" else SAM2_AGREES).items():
        found = settings.get(part, {}).get(key, values[0])
        if found not in values:
            raise ModelError(
                "this model computes something else than SAM.",
                where=f"{where}: {part}.{key}",
                got=found,
                expected=" or ".join(map(str, values)),
            )
    if kind == "sam":
        heads = settings.get("mask_decoder_config", {}).get("num_attention_heads")
        named = {**state_from_transformers(state), **(pixels or {})}
        config = config_from_state(named, where=where, decoder_num_heads=heads)
        return assemble(config, named, where=where)
    sections = {name: settings.get(name, {}) for name in SECTIONS}
    sam2 = Sam2Config(kind, sections, **statistics(pixels or {})).spelt_out()
    sam = sam2.build(empty=True)
    expected = f"a model of type {kind!r} with the sizes in its configuration"
    fill(sam, state_from_sam2(state), where=where, expected=expected)
    remember(sam, History(Base(sam2)))
    return sam


def _describable(sam: nn.Module) -> SamConfig:
    odd = [name for name, module in sam.named_modules() if getattr(module, "approximates", False)]
    if odd:  # the names of its tensors are SAM's, so nothing else would tell
        raise ModelError(
            "a transformers SamModel cannot hold this model.",
            where=", ".join(odd[:3]) + (" ..." if len(odd) > 3 else ""),
            got=type(sam.get_submodule(odd[0])).__name__,
            expected="SAM's own modules, or exact substitutes",
            fix="save it with sc.save, or convert it before the step that made the difference",
        )
    try:
        config = config_of(sam)
    except ModelError as err:
        raise ModelError(
            "a transformers SamModel cannot hold this model.",
            where=err.where,
            got=err.got or "a module or width that differs from the other blocks'",
            expected="SAM's own modules, every block with the same widths",
            fix="save it with sc.save, or convert it before the step that made the difference",
        ) from err
    if config.iou_head_depth < 2 or config.mask_in_chans % 4:
        raise ModelError(
            "a transformers SamModel cannot hold this model.",
            where="mask_decoder.iou_prediction_head, prompt_encoder.mask_downscaling",
            got=f"iou_head_depth={config.iou_head_depth}, mask_in_chans={config.mask_in_chans}",
            expected="an IoU head of two layers or more, mask_in_chans a multiple of 4",
        )
    return config


def _settings(hf: Any, c: SamConfig) -> Any:
    return hf.SamConfig(
        vision_config=hf.SamVisionConfig(
            image_size=c.image_size,
            patch_size=c.patch_size,
            hidden_size=c.embed_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            mlp_dim=int(c.embed_dim * c.mlp_ratio),
            window_size=c.window_size,
            global_attn_indexes=list(c.global_attn_indexes),
            output_channels=c.out_chans,
            num_pos_feats=c.out_chans // 2,
        ),
        prompt_encoder_config=hf.SamPromptEncoderConfig(
            image_size=c.image_size,
            patch_size=c.patch_size,
            hidden_size=c.out_chans,
            mask_input_channels=c.mask_in_chans,
        ),
        mask_decoder_config=hf.SamMaskDecoderConfig(
            hidden_size=c.out_chans,
            num_hidden_layers=c.decoder_depth,
            mlp_dim=c.decoder_mlp_dim,
            num_attention_heads=c.decoder_num_heads,
            num_multimask_outputs=c.num_multimask_outputs,
            iou_head_depth=c.iou_head_depth,
            iou_head_hidden_dim=c.iou_head_hidden_dim,
            layer_norm_eps=1e-5,  # segment_anything's; the default of transformers is 1e-6
        ),
    )


def _folder_state(folder: Path) -> TensorDict:
    for pattern in FILES:
        shards = sorted(folder.glob(pattern))
        if shards:
            return {name: t for shard in shards for name, t in read_state(shard).items()}
    raise CheckpointError(
        "the folder has a configuration but no weights.",
        where=str(folder),
        expected=" or ".join(FILES),
        fix="copy the whole folder, or save the model again with save_pretrained",
    )


def _statistics(folder: Path) -> TensorDict:
    """What the image processor subtracts and divides by, in units of 0...255."""
    found = [path for name in PROCESSORS if (path := folder / name).is_file()]
    if not found:
        return {}
    settings = _json(found[0])
    settings = settings.get("image_processor", settings)
    scale = settings.get("rescale_factor", 1 / 255)
    keys = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    return {
        ours: torch.tensor(settings[theirs]) / scale
        for ours, theirs in keys.items()
        if theirs in settings
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(
            "a configuration file cannot be read.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected="JSON, as save_pretrained writes it",
        ) from err
    return content if isinstance(content, dict) else {}
