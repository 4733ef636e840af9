"""The rules of published tables, by name: one and the same SAM scores 54 or 58 by "one point".

A preset is a `Protocol` without its data. Two presets of equal rules give equal protocol ids, and
so may stand in one table; where the rules were read is in `source`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ConfigError, closest
from .protocol import Protocol


@dataclass(frozen=True)
class Preset:
    """How one published table was made.

    Attributes:
        name: what `accuracy` takes.
        rules: fields of `Protocol`; those not named have its defaults.
        source: whose rules they are, and where they were read.
        note: what the table does that we do not, or was not to be found.
    """

    name: str
    rules: dict[str, Any] = field(hash=False)
    source: str
    note: str = ""


def preset_protocol(name: str, data: str, *, seed: int = 0) -> Protocol:
    """The protocol of a preset.

    Args:
        name: one of `PRESETS`.
        data: name of the data and number of images, as in a protocol id.
        seed: of drawn prompts.

    Raises:
        ConfigError: if there is no such preset, with the nearest names.

    Example:
        >>> print(preset_protocol("samfast", "coco@val2017#5000"))
        coco@val2017#5000/com/predicted/feedback=none/crowd=yes,min_area=0/instance
    """
    if name not in PRESETS:
        raise ConfigError(
            "unknown preset.",
            got=repr(name),
            expected=", ".join(PRESETS),
            fix=closest(str(name), tuple(PRESETS)),
        )
    return Protocol(data=data, seed=seed, **PRESETS[name].rules)


def _all() -> list[Preset]:
    single = {"choice": "single"}
    predicted = {"choice": "predicted"}
    return [
        *_sam(),
        *_efficientvit(),
        *_edgesam(),
        *_efficientsam(),
        Preset(
            "nanosam",
            {"prompt": "box", **predicted, "include_crowd": True},
            "NanoSAM, nanosam/tools/eval_coco.py",
        ),
        Preset(
            "slimsam",
            {"prompt": "annotated", **single, "average": "image"},
            "SlimSAM, arXiv 2312.05284, load_sam_json.py",
            "50 images of SA-1B, whose masks are SAM's own",
        ),
        Preset(
            "samfast",
            {"prompt": "com", **predicted, "include_crowd": True},
            "segment-anything-fast, experiments/eval_combo.py",
            "where the centre of mass lies outside the object, the way into it may differ",
        ),
        Preset("hq", {"prompt": "box", **single}, "HQ-SAM, arXiv 2306.01567"),
        Preset(
            "hq-boundary",
            {"prompt": "box", **single, "overlap": "boundary"},
            "HQ-SAM, arXiv 2306.01567: mBIoU",
        ),
    ]


def _sam() -> list[Preset]:
    source = "Segment Anything, arXiv 2304.02643, appendix D.1"
    rules = {"choice": "predicted", "feedback": "logits"}
    found = [
        Preset("sam-click", {"prompt": "center", **rules}, source),
        Preset(
            "sam-click-oracle",
            {"prompt": "center", "choice": "oracle"},
            source,
            "an upper bound, beside sam-click only",
        ),
    ]
    found += [
        Preset(f"sam-click-{k}", {"prompt": f"clicks-{k}-xor", **rules}, source)
        for k in (2, 3, 5, 9)
    ]
    return found


def _efficientvit() -> list[Preset]:
    source = "EfficientViT-SAM, arXiv 2402.05008, applications/efficientvit_sam/sam_eval_utils.py"
    rules = {"choice": "predicted", "include_crowd": True}
    note = "its IoU has 1e-7 in the denominator; an object is never empty, so nothing changes"
    return [
        Preset(name, {"prompt": prompt, **rules}, source, note)
        for name, prompt in (
            ("efficientvit-box", "box"),
            ("efficientvit-click", "center"),
            ("efficientvit-click-3", "clicks-3"),
            ("efficientvit-click-5", "clicks-5"),
        )
    ]


def _edgesam() -> list[Preset]:
    source = "EdgeSAM, arXiv 2312.06660, evaluation/eval_mIoU.py"
    note = "on SA-1B it draws 64 objects an image with replacement; here every object counts once"
    rules = {"choice": "single", "truth": "resampled"}
    return [
        Preset(name, {"prompt": prompt, **rules}, source, note)
        for name, prompt in (
            ("edgesam-box", "box"),
            ("edgesam-box+1", "box+1-random"),
            ("edgesam-box+2", "box+2-random"),
            ("edgesam-center", "center"),
            ("edgesam-center+1", "center+1-random"),
            ("edgesam-center+2", "center+2-random"),
        )
    ]


def _efficientsam() -> list[Preset]:
    source = "EfficientSAM, arXiv 2312.00863"
    note = "whether crowds were kept is not said; they are dropped here"
    return [
        Preset(name, {"prompt": prompt, "choice": "predicted"}, source, note)
        for name, prompt in (
            ("efficientsam-box", "box-tight"),
            ("efficientsam-point", "random-1"),
            ("efficientsam-point-3", "random-3"),
        )
    ]


PRESETS = {preset.name: preset for preset in _all()}
