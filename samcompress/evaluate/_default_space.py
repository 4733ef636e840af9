"""The techniques a search begins with: those that need no training, and what they may be set to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..core._require import EXTRAS, require
from ..core.contract import check_sam
from ..core.errors import MissingDependencyError, SamCompressError
from ..core.registry import find, get, list_transforms
from ..core.transform import Transform
from ._domain import Choices, Range
from .space import Option, Slot

SHARES = Range(0.1, 0.5, 0.05)
SIZES = (0.5, 0.625, 0.75, 0.875)  # of the model's own input side

# Why a technique is not tried. What is in no list here, and not below, needs training.
REASONS = {
    "prune.budget": "it chooses ratios, as the search does by itself",
    "prune.filters": "it is for convolutional encoders, which are no drop-in for this search",
    "prune.sparse24": "its zeros save time on some GPUs only",
    "prune.unstructured": "its zeros save nothing where they are multiplied like other numbers",
    "quantize.smooth_quant": "it saves nothing by itself",
    "quantize.bimodal": "it saves nothing by itself",
    "quantize.mixed": "it chooses among numbers, as the search does by itself",
    "substitute.conventions": "it makes another model's conventions, and saves nothing",
    "substitute.hq": "it adds to a model",
}
SIMULATES = "it only simulates, so that its speed cannot be measured"
TRAINS = "it trains, or its result needs training"


def candidates(model: nn.Module, calibration: bool) -> tuple[tuple[str, tuple[Option, ...]], ...]:
    """Slots in the order they run, before anything is asked whether it fits."""
    encoder: Any = model.image_encoder
    side = encoder.img_size
    patch = (
        2 * getattr(getattr(encoder, "patch_embed", None), "proj", nn.Conv2d(1, 1, 16)).stride[0]
    )
    sizes = sorted({patch * round(share * side / patch) for share in SIZES} - {0, side})
    depth = len(getattr(encoder, "blocks", ()))
    # Without images only what the weights themselves tell can decide what goes.
    by = {} if calibration else {"criterion": "magnitude"}
    cut: dict[str, Any] = {"ratio": SHARES, **by}
    blocks = Choices(tuple(range(1, depth // 3 + 1)) or (1,))
    return (
        ("size", (Option("substitute.image_size", {"size": Choices(tuple(sizes))}),)),
        ("blocks", (Option("prune.blocks", {"count": blocks}),)),
        ("heads", (Option("prune.heads", cut), Option("prune.head_dims", cut))),
        ("mlp", (Option("prune.mlp", cut),)),
        ("channels", (Option("prune.channels", {**cut, "round_to": 8}),)),
        ("decoder", (Option("prune.decoder", cut),)),
        (
            "tokens",
            (
                Option("prune.merge_tokens", {"ratio": Choices((0.5, 0.75))}),
                Option("prune.cluster_tokens", {"ratio": Range(0.3, 0.6, 0.1)}),
            ),
        ),
        ("padding", (Option("prune.skip_padding", {"photo": Choices((False, True))}),)),
        (
            "attention",
            (
                Option("attention.windowed", {"keep": Choices((0, 1))}),
                Option("attention.pooled_kv", {"size": Choices((2, 4))}),
            ),
        ),
        ("kernel", (Option("attention.fused"),)),
        (
            "numbers",
            (
                Option("quantize.int8_weights"),
                Option("quantize.int4_weights"),
                Option("quantize.b_float16"),
                Option("quantize.int8_dynamic"),
                Option("quantize.int8_static"),
            ),
        ),
        (
            "runtime",
            (Option("compile.export", {"backend": Choices(("onnxruntime", "openvino"))}),),
        ),
    )


def default_slots(
    model: nn.Module, *, calibration: bool
) -> tuple[tuple[Slot, ...], dict[str, str]]:
    """The slots of `Space.default`, and of every technique that is not in them the reason."""
    check_sam(model)
    slots, left_out = [], {}
    known = list_transforms()
    for name, options in candidates(model, calibration):
        kept = []
        for option in options:
            if option.type not in known:
                continue
            fitting, reason = _fitting(option, model, calibration)
            if fitting is None:
                left_out[option.type] = reason
            else:
                kept.append(fitting)
        slots += [Slot(name, tuple(kept))] if kept else []
    inside = {option.type for slot in slots for option in slot.options}
    for name in known:
        if name not in inside:
            usual = SIMULATES if find(name).simulated else TRAINS
            left_out.setdefault(name, REASONS.get(name, usual))
    return tuple(slots), left_out


def _fitting(option: Option, model: nn.Module, calibration: bool) -> tuple[Option | None, str]:
    """The option with the choices that can be; None and the reason if there is none."""
    reason, params = "", dict(option.params)
    for name, domain in option.domains().items():
        others = {k: v.ends()[0] for k, v in option.domains().items() if k != name}
        fixed = {k: v for k, v in option.params.items() if k not in option.domains()}
        good = []
        for value in domain.ends():
            reason = _problem(option.type, {**fixed, **others, name: value}, model, calibration)
            good += [] if reason else [value]
        if not good:
            return None, reason or "there is nothing to choose from"
        if isinstance(domain, Choices):
            params[name] = Choices(tuple(good))
    if not option.domains():
        reason = _problem(option.type, params, model, calibration)
        if reason:
            return None, reason
    return replace(option, params=params), ""


def _problem(kind: str, params: dict[str, Any], model: nn.Module, calibration: bool) -> str:
    """Why a technique cannot be tried with these settings; empty if it can."""
    try:
        step = get(kind, **params)
        if step.needs_data and not calibration:
            return "it needs images, and none were given for it"
        for module, extra in _packages(step):
            require(module, extra=extra, purpose=step.label)
        step.check(model)
    except MissingDependencyError as err:
        return err.fix or err.what
    except SamCompressError as err:
        return err.what.removeprefix(f"{kind}: ")
    return ""


def _packages(step: Transform) -> Iterator[tuple[str, str]]:
    for extra in step.extras:
        for module in EXTRAS.get(extra, ()):
            yield module, extra
