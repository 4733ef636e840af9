"""One row a registered technique: how the generic tests make it, and what it must change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A technique on the small random SAM of conftest.

    Attributes:
        name: registered name.
        params: fields, small enough for a test of a second.
        shrinks: facts that must fall, of "parameters" and "bytes".
        exact: largest difference of the low-resolution logits from the input model's; None for any.
        tolerance: largest difference of two runs, or of a saved and loaded copy: 0 for torch.
        twice: error that applying the technique a second time raises; None where that makes sense.
        depth: blocks of that SAM's image encoder, of which the second is global.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    shrinks: tuple[str, ...] = ()
    exact: float | None = None
    tolerance: float = 0.0
    twice: str | None = None
    depth: int = 2


CASES = (
    Case(
        "substitute.image_size",
        {"size": 32},
        shrinks=("parameters", "bytes"),
        twice="NoEffectError",
    ),
    Case("substitute.tiny_vit"),
    Case("substitute.rep_vit", {"variant": "m1", "fuse": True}),
    Case("substitute.efficient_vit", {"variant": "l0"}),
    Case("substitute.vit", {"variant": "tiny"}),
    Case("substitute.res_net"),
    Case("substitute.efficient_former", {"variant": "s0", "fuse": True}),
    Case("substitute.lite_vit", {"fuse": True}),
    Case("substitute.u_net", {"fuse": True}),
    Case("substitute.rwkv", {"variant": "tiny", "fuse": True}),
    Case("substitute.conventions", {"of": "tiny_sam"}, twice="NoEffectError"),
    Case("substitute.hq", twice="NoEffectError"),
    Case("substitute.hiera", {"variant": "tiny"}),
    Case("substitute.timm", {"model": "test_efficientnet", "fuse": True}),
    Case(
        "substitute.light_decoder",
        {"mlp_dim": 24},
        shrinks=("parameters", "bytes"),
        twice="NoEffectError",
    ),
    Case("prune.mlp", {"ratio": 0.5}, shrinks=("parameters", "bytes")),
    Case("prune.heads", {"ratio": 0.5}, shrinks=("parameters", "bytes"), twice="ConfigError"),
    Case("prune.head_dims", {"ratio": 0.5}, shrinks=("parameters", "bytes"), twice="ConfigError"),
    Case("prune.channels", {"ratio": 0.5, "round_to": 8}, shrinks=("parameters", "bytes")),
    Case("prune.blocks", shrinks=("parameters", "bytes"), depth=4),
    Case(
        "prune.slim_sam",
        {"round_to": 8, "steps": 2, "batch_size": 2, "images": 2},
        shrinks=("parameters", "bytes"),
        twice="ModelError",
    ),
    Case("prune.decoder", {"ratio": 0.5}, shrinks=("parameters", "bytes")),
    Case("prune.merge_tokens", twice="NoEffectError"),
    Case("prune.cluster_tokens", twice="NoEffectError"),
    Case("prune.skip_padding", exact=1e-4, twice="NoEffectError"),
    Case("prune.sparse24", twice="NoEffectError"),
    Case("prune.unstructured", twice="NoEffectError"),
    Case("attention.fused", exact=1e-4, twice="NoEffectError"),
    Case("distill.encoder", {"steps": 3, "batch_size": 2}),
    Case("distill.prompt_loop", {"steps": 2, "batch_size": 2, "prompts": 2}),
    Case("distill.full_stage", {"steps": 2, "batch_size": 2, "prompts": 2}),
    Case("distill.layer_wise", {"steps": 2, "batch_size": 2}),
    Case("distill.sami", {"steps": 2, "batch_size": 2, "decoder_depth": 1, "decoder_width": 32}),
    Case("distill.align_bottleneck", {"steps": 2, "batch_size": 2}),
    Case("distill.align_embedding", {"steps": 2, "batch_size": 2}),
    Case("distill.supervised", {"steps": 2, "batch_size": 2, "prompts": 2, "rounds": 2}),
    Case("quantize.int8_weights", {"min_size": 0}, shrinks=("bytes",), twice="NoEffectError"),
    Case("compile.export", exact=1e-3, tolerance=1e-5, twice="OrderError"),
)
