"""What published light SAMs do differently around their image encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import nn

from ..core._draws import drawn as randomly
from ..core.contract import device_of, dtype_of, parts
from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.framing import ATTRIBUTE, Framing, Stretched, Truncated, framing_of
from ..core.registry import register
from ..core.transform import Context, State, Transform
from . import _efficientsam
from ._efficientvit import NORM_EPS, set_norm_eps
from ._one_mask import BestMask
from ._resnet import UnpaddedPrompts
from ._retyped import retyped
from ._stability import StabilityDecoder

SAMS = {"prompt_encoder": PromptEncoder, "mask_decoder": MaskDecoder}


@register
@dataclass(frozen=True, kw_only=True)
class Conventions(Transform, family="substitute", phase=10):
    """Do what a published light SAM does around its image encoder.

    Use it after the encoder of the same project, before official weights are loaded, so that they
    meet what they were trained with; `sc.load("tiny_sam")` and the like contain it. Not for weights
    trained with SAM's own conventions: they get worse.

    Args:
        of: whose conventions.
            ``tiny_sam``: the single mask is the best-scored one of the three, not one of its own.
            ``edge_sam``: masks are scored by their stability, with `stability`; else as in SAM.
            ``nano_sam``: images are resized bicubically and cut to whole pixels, prompts without a
            box get no padding point, masks are enlarged in one step.
            ``efficient_vit_sam``: the norms of the mask decoder have an eps of 1e-6, not 1e-5.
            ``efficient_sam``: images are stretched to the square; prompt encoder and mask decoder
            are of another kind, and new.
        stability: for ``edge_sam``: score masks by their stability, not by the predicted IoU.
        seed: for ``efficient_sam``: of the new parts' random weights.

    Raises:
        ConfigError: if `stability` is asked for and `of` is not ``edge_sam``.
        NoEffectError: if the model does so already; for ``edge_sam`` without `stability`.
        ModelError: if the model is no SAM, or the parts concerned are not segment_anything's.

    Effect: none on time and size, but for ``efficient_sam``: its prompt encoder has 1024 weights,
        SAM's 6220, and takes no mask; a prompt costs 1.85 GMAC, with SAM's decoder 1.81.

    Composes with: comes after the encoder's step and before all other families. Training follows
        the model's conventions, and a teacher sees images by the student's framing; `Supervised`
        needs ``feed=0`` for ``efficient_sam``, which `compile.export` refuses.

    Source: TinySAM, Shu et al. 2023, arXiv 2312.13789; EdgeSAM, Zhou et al. 2023, arXiv 2312.06660
        (S-Lab licence, non-commercial; nothing of its code is used); NanoSAM, NVIDIA 2023;
        EfficientViT-SAM, Zhang et al. 2024, arXiv 2402.05008; EfficientSAM, Xiong et al. 2023,
        arXiv 2312.00863; all but EdgeSAM Apache-2.0. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.ResNet() | Conventions(of="nano_sam")
        >>> small(sc.build("tiny")).framing
        Truncated(size=128, frame=128)
    """

    of: Literal["tiny_sam", "edge_sam", "nano_sam", "efficient_vit_sam", "efficient_sam"]
    stability: bool = False
    seed: int = 0

    def validate(self) -> None:
        """Check that the option belongs to the project."""
        if self.stability and self.of != "edge_sam":
            raise ConfigError(
                f"{self.label}: only EdgeSAM scores masks by their stability.",
                got=f"of={self.of!r}",
                expected="of='edge_sam'",
            )

    def check(self, model: nn.Module) -> None:
        """Check that the parts concerned are SAM's."""
        parts(model)
        rule = RULES[self.of]
        if self.of == "edge_sam" and not self.stability:
            raise NoEffectError(
                f"{self.label}: without the score, EdgeSAM's conventions are SAM's.",
                got="stability=False",
                fix="stability=True, or leave this step out",
            )
        for part, made in rule.makes.items():
            found = type(getattr(model, part))
            if found is made:
                raise self._done(part)
            if found is not SAMS[part]:
                raise ModelError(
                    f"{self.label} does not know this model's parts.",
                    where=part,
                    got=f"{found.__module__}.{found.__qualname__}",
                    expected="segment_anything's own",
                    fix="put this step right after the one that made the image encoder",
                )
        if self.of == "efficient_vit_sam" and not any(
            isinstance(m, nn.LayerNorm) and m.eps != NORM_EPS
            for m in parts(model).mask_decoder.modules()
        ):
            raise self._done("mask_decoder")

    def _done(self, part: str) -> NoEffectError:
        return NoEffectError(
            f"{self.label}: the model follows these conventions already.",
            where=part,
            got=f"of={self.of!r}",
            fix="leave this step out",
        )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Change what differs."""
        return self.rebuild(model, {"replaced": list(RULES[self.of].makes)})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same again."""
        with randomly(torch.device("cpu"), self.seed, self.label):
            RULES[self.of].change(model)
        return state


class Rule(NamedTuple):
    """One project's conventions.

    Attributes:
        change: puts them into a model.
        makes: parts that are then of another class, and which.
    """

    change: Callable[[Any], None]
    makes: dict[str, type[nn.Module]]


def _best_mask(sam: Any) -> None:
    sam.mask_decoder = BestMask(sam.mask_decoder)


def _stability(sam: Any) -> None:
    sam.mask_decoder = StabilityDecoder(sam.mask_decoder)


def _truncated(sam: Any) -> None:
    sam.prompt_encoder = retyped(sam.prompt_encoder, UnpaddedPrompts)
    _frame(sam, Truncated)


def _norms(sam: Any) -> None:
    set_norm_eps(sam.mask_decoder)


def _efficient_sam(sam: Any) -> None:
    old, decoder = sam.prompt_encoder, sam.mask_decoder
    layer = decoder.transformer.layers[0]
    prompts = _efficientsam.PromptEncoder(
        old.embed_dim, old.image_embedding_size, old.input_image_size
    )
    masks = _efficientsam.MaskDecoder(
        decoder.transformer_dim,
        depth=len(decoder.transformer.layers),
        mlp_dim=layer.mlp.lin1.out_features,
        num_heads=layer.self_attn.num_heads,
        iou_head_hidden_dim=decoder.iou_prediction_head.layers[0].out_features,
    )
    sam.prompt_encoder = prompts.to(device_of(old), dtype_of(old)).eval()
    sam.mask_decoder = masks.to(device_of(decoder), dtype_of(decoder)).eval()
    _frame(sam, Stretched)


def _frame(sam: Any, kind: type[Framing]) -> None:
    old = framing_of(sam)
    setattr(sam, ATTRIBUTE, kind(old.size, old.frame))


RULES = {
    "tiny_sam": Rule(_best_mask, {"mask_decoder": BestMask}),
    "edge_sam": Rule(_stability, {"mask_decoder": StabilityDecoder}),
    "nano_sam": Rule(_truncated, {"prompt_encoder": UnpaddedPrompts}),
    "efficient_vit_sam": Rule(_norms, {}),
    "efficient_sam": Rule(
        _efficient_sam,
        {
            "prompt_encoder": _efficientsam.PromptEncoder,
            "mask_decoder": _efficientsam.MaskDecoder,
        },
    ),
}
