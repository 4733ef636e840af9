"""SAM 2, SAM 2.1 and EdgeTAM on single images: their sizes, and how they are built."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import Sam, TwoWayTransformer

from ._require import require
from ._sam2_parts import PaddedPrompts, Sam2Decoder, Sam2Encoder, Smooth
from .build import SamConfig
from .framing import ATTRIBUTE

SECTIONS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


@dataclass(frozen=True)
class Sam2Config:
    """Sizes of a SAM 2 or EdgeTAM, in the words of transformers.

    Attributes:
        model_type: ``sam2`` or ``edgetam``.
        settings: configurations of image encoder, prompt encoder and mask decoder (`SECTIONS`), as
            plain JSON values; what is left out is what transformers takes for it.
        pixel_mean: mean subtracted from an RGB image in 0...255.
        pixel_std: standard deviation it is divided by.
    """

    model_type: str
    settings: dict[str, Any]
    pixel_mean: tuple[float, ...] = SamConfig.pixel_mean
    pixel_std: tuple[float, ...] = SamConfig.pixel_std

    def __post_init__(self) -> None:
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def image_size(self) -> int:
        """Side S of the input in pixels."""
        return int(self.settings.get("prompt_encoder_config", {}).get("image_size", 1024))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model_type": self.model_type,
            "settings": copy.deepcopy(self.settings),
            "pixel_mean": list(self.pixel_mean),
            "pixel_std": list(self.pixel_std),
        }

    def spelt_out(self) -> Sam2Config:
        """The same with every setting that shapes or rounds the model, none left to a default."""
        hf, whole = self._transformers()
        common = set(hf.PreTrainedConfig().to_dict()) - {"model_type"}

        def own(settings: dict[str, Any]) -> dict[str, Any]:
            return {
                name: own(value) if isinstance(value, dict) else value
                for name, value in settings.items()
                if name not in common
            }

        found = whole.to_dict()
        settings = json.loads(json.dumps({name: own(found[name]) for name in SECTIONS}))
        return Sam2Config(self.model_type, settings, self.pixel_mean, self.pixel_std)

    def build(self, *, empty: bool = False) -> Sam:
        """The model, in eval mode, on the CPU.

        Args:
            empty: leave all weights uninitialised, to be loaded; much faster for large models.

        Raises:
            MissingDependencyError: if transformers, or timm for EdgeTAM, is not installed.
        """
        if not empty:
            return self._assemble()
        with torch.device("meta"):
            sam = self._assemble()
        sam = sam.to_empty(device="cpu")
        # Sam keeps these two out of its state dict, so nothing else would fill them.
        sam.pixel_mean = torch.tensor(self.pixel_mean).view(-1, 1, 1)
        sam.pixel_std = torch.tensor(self.pixel_std).view(-1, 1, 1)
        return sam

    def _transformers(self) -> tuple[Any, Any]:
        """The package, and its configuration of the whole model."""
        hf = require("transformers", purpose="SAM 2 and EdgeTAM")
        if self.model_type == "edgetam":
            require("timm", extra="zoo", purpose="EdgeTAM")
        settings = copy.deepcopy(self.settings)
        for name in SECTIONS[1:]:
            # A video model's sections have other names and the same content.
            settings.get(name, {}).pop("model_type", None)
        return hf, hf.AutoConfig.for_model(self.model_type, **settings)

    def _assemble(self) -> Sam:
        hf, whole = self._transformers()
        prompts, decoder = whole.prompt_encoder_config, whole.mask_decoder_config
        size, width = prompts.image_size, prompts.hidden_size
        grid = size // prompts.patch_size
        stable = (
            (decoder.dynamic_multimask_stability_delta, decoder.dynamic_multimask_stability_thresh)
            if decoder.dynamic_multimask_via_stability
            else None
        )
        sam = Sam(
            image_encoder=Sam2Encoder(
                hf.AutoModel.from_config(whole.vision_config), size, prompts.patch_size, width
            ),
            prompt_encoder=PaddedPrompts(
                embed_dim=width,
                image_embedding_size=(grid, grid),
                input_image_size=(size, size),
                mask_in_chans=prompts.mask_input_channels,
            ),
            mask_decoder=Sam2Decoder(
                stable,
                transformer_dim=width,
                transformer=TwoWayTransformer(
                    depth=decoder.num_hidden_layers,
                    embedding_dim=width,
                    mlp_dim=decoder.mlp_dim,
                    num_heads=decoder.num_attention_heads,
                    attention_downsample_rate=decoder.attention_downsample_rate,
                ),
                num_multimask_outputs=decoder.num_multimask_outputs,
                iou_head_depth=decoder.iou_head_depth,
                iou_head_hidden_dim=decoder.iou_head_hidden_dim,
            ),
            pixel_mean=list(self.pixel_mean),
            pixel_std=list(self.pixel_std),
        )
        setattr(sam, ATTRIBUTE, Smooth(size, size))
        return sam.eval()


def _hiera(**backbone: Any) -> Sam2Config:
    widths = [backbone["hidden_size"] << stage for stage in range(4)]
    heads = [backbone["num_attention_heads"] << stage for stage in range(4)]
    return Sam2Config(
        "sam2",
        {
            "vision_config": {
                "model_type": "sam2_vision_model",
                "backbone_channel_list": widths[::-1],
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "embed_dim_per_stage": widths,
                    "num_attention_heads_per_stage": heads,
                    **backbone,
                },
            }
        },
    )


# The published models. SAM 2 and SAM 2.1 differ in weights and memory, not in these sizes.
CONFIGS: dict[str, Sam2Config] = {
    "tiny": _hiera(
        hidden_size=96,
        num_attention_heads=1,
        blocks_per_stage=[1, 2, 7, 2],
        global_attention_blocks=[5, 7, 9],
    ),
    "small": _hiera(
        hidden_size=96,
        num_attention_heads=1,
        blocks_per_stage=[1, 2, 11, 2],
        global_attention_blocks=[7, 10, 13],
    ),
    "base_plus": _hiera(
        hidden_size=112,
        num_attention_heads=2,
        blocks_per_stage=[2, 3, 16, 3],
        global_attention_blocks=[12, 16, 20],
        window_positional_embedding_background_size=[14, 14],
    ),
    "large": _hiera(
        hidden_size=144,
        num_attention_heads=2,
        blocks_per_stage=[2, 6, 36, 4],
        global_attention_blocks=[23, 33, 43],
        window_size_per_stage=[8, 4, 16, 8],
    ),
    "edgetam": Sam2Config(
        "edgetam",
        {
            "vision_config": {
                "model_type": "edgetam_vision_model",
                "backbone_config": {
                    "model_type": "timm_wrapper",
                    "architecture": "repvit_m1",
                    "model_args": {
                        "in_chans": 3,
                        "features_only": True,
                        "out_indices": [0, 1, 2, 3],
                    },
                    "num_classes": 0,
                    "label_names": [],
                },
            }
        },
    ),
}
