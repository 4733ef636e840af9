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
        after: technique that makes the input of that SAM, by its own row; None for the SAM itself.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    shrinks: tuple[str, ...] = ()
    exact: float | None = None
    tolerance: float = 0.0
    twice: str | None = None
    depth: int = 2
    after: str | None = None


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
    Case(
        "prune.supernet",
        {
            "budget": "macs<=75%",
            "images": 2,
            "steps": 2,
            "batch_size": 2,
            "population": 2,
            "generations": 1,
        },
        shrinks=("parameters", "bytes"),
        twice="ConfigError",
    ),
    Case(
        "prune.budget",
        {"budget": "macs<=80%", "images": 2},
        shrinks=("parameters", "bytes"),
        twice="ConfigError",
    ),
    Case(
        "prune.filters",
        {"ratio": 0.5},
        shrinks=("parameters", "bytes"),
        after="substitute.lite_vit",
    ),
    Case("attention.fused", exact=1e-4, twice="NoEffectError"),
    Case("attention.windowed", {"keep": 0}, twice="NoEffectError"),
    Case("attention.dilated", twice="NoEffectError"),
    Case("attention.pooled_kv", {"pool": "conv"}, twice="NoEffectError"),
    Case("attention.neighborhood", {"size": 3}, twice="NoEffectError"),
    Case("attention.linear", twice="NoEffectError"),
    Case("attention.rwkv", twice="NoEffectError"),
    Case("distill.encoder", {"steps": 3, "batch_size": 2}),
    Case("distill.prompt_loop", {"steps": 2, "batch_size": 2, "prompts": 2}),
    Case("distill.full_stage", {"steps": 2, "batch_size": 2, "prompts": 2}),
    Case("distill.layer_wise", {"steps": 2, "batch_size": 2}),
    Case("distill.sami", {"steps": 2, "batch_size": 2, "decoder_depth": 1, "decoder_width": 32}),
    Case("distill.align_bottleneck", {"steps": 2, "batch_size": 2}),
    Case("distill.align_embedding", {"steps": 2, "batch_size": 2}),
    Case("distill.supervised", {"steps": 2, "batch_size": 2, "prompts": 2, "rounds": 2}),
    Case("distill.heat_head", {"steps": 2, "batch_size": 2}, twice="NoEffectError"),
    Case("quantize.int8_weights", {"min_size": 0}, shrinks=("bytes",), twice="NoEffectError"),
    Case(
        "quantize.int4_weights",
        {"min_size": 0, "group_size": 16},
        shrinks=("bytes",),
        twice="ModelError",
    ),
    Case("quantize.int8_dynamic", {"force": True}, shrinks=("bytes",), twice="ModelError"),
    Case(
        "quantize.int8_static", {"images": 2, "force": True}, shrinks=("bytes",), twice="ModelError"
    ),
    Case(
        "quantize.mixed",
        {"error": 0.5, "images": 1, "force": True},
        shrinks=("bytes",),
        twice="ModelError",
    ),
    Case("quantize.b_float16", shrinks=("bytes",), twice="NoEffectError"),
    Case("quantize.smooth_quant", {"images": 2}, exact=1e-4),
    Case("quantize.bimodal", exact=1e-5),
    Case("quantize.fake_quant", {"images": 2}, twice="ModelError"),
    Case("quantize.ptq4_sam", {"images": 1}, twice="ModelError"),
    Case("quantize.pqsam", {"images": 1, "steps": 1}, twice="ModelError"),
    Case("quantize.tiny_sam", {"images": 1, "candidates": 2, "rounds": 1}, twice="ModelError"),
    Case("quantize.reconstruct", {"steps": 2, "images": 1}, after="quantize.fake_quant"),
    Case("quantize.qat", {"steps": 2, "batch_size": 2}, after="quantize.fake_quant"),
    Case("quantize.float8_dynamic", {"force": True}, shrinks=("bytes",), twice="ModelError"),
    Case("compile.export", exact=1e-3, tolerance=1e-5, twice="OrderError"),
    Case("compile.torch", exact=1e-4, tolerance=1e-5, twice="OrderError"),
)
