"""What quantization does to the masks of `mini`: integers that run, and widths only simulated.

    python docs/results/quantize_mini.py --data DATA --work WORK

DATA holds ``coco/train2017`` and ``coco/val2017`` with annotations. Steps look at images of the
former; masks are judged on the latter, which neither they nor `mini` have seen. Rows are real where
integers or bfloat16 are stored and run, and simulated where numbers are rounded and computed with
in floating point; only real rows have a size of their own. Simulated rows of 6 and 4 bits stand
twice, with and without `Reconstruct`, which drops nothing once it has learned. Intervals resample
images. Each row is written to WORK when it is measured, with an estimate of what is left; an
interrupted run goes on there. Writes ``quantize_MODEL.md`` and ``.json`` beside this script, or at
``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from _rows import Rows, accuracies, plain

import samcompress as sc
from samcompress.core.checkpoint import fingerprint
from samcompress.core.files import write_whole
from samcompress.core.pipeline import Pipeline

PROMPTS = ("box", "point", "clicks-3")
BASE, MASKS = "float32", "masks of float32"
BOTH = sc.Where(("image_encoder.**", "mask_decoder.transformer.**"))
MENDED = "Reconstruct"
TO_MEND = ("min-max", "Bimodal", "softmax: auto", "PTQ4SAM", "PQSAM", "TinySAM")


def real(images: int) -> dict[str, Pipeline]:
    """Rows whose numbers are stored, and whose products are computed, as the name says."""
    get = sc.get
    dynamic, half = get("quantize.int8_dynamic", force=True), get("quantize.b_float16")
    both = get("quantize.int8_dynamic", force=True, where=BOTH)
    static = get("quantize.int8_static", force=True, images=images)
    smooth = get("quantize.smooth_quant", images=images)
    return {
        "BFloat16": Pipeline([half]),
        "Int8Weights": Pipeline([get("quantize.int8_weights")]),
        "Int8Dynamic": Pipeline([dynamic]),
        "Int8Dynamic, decoder too": Pipeline([both]),
        "Int8Dynamic, BFloat16": dynamic | half,
        "Int8Static": Pipeline([static]),
        "SmoothQuant, Int8Static": smooth | static,
    }


def simulated(bits: int, images: int) -> dict[str, Pipeline]:
    """Rows of one width: plain, each part made for SAM alone, and together."""
    get = sc.get
    width = {"weight_bits": bits, "activation_bits": bits, "images": images}
    plain = {**width, "observer": "minmax"}
    fake = get("quantize.fake_quant", **plain)
    rows = {
        "min-max": Pipeline([fake]),
        "mean of ends": Pipeline([get("quantize.fake_quant", **width)]),
        "weight search": Pipeline([get("quantize.fake_quant", **plain, weight_search=True)]),
        "Bimodal": get("quantize.bimodal") | fake,
        "softmax: log": Pipeline([get("quantize.fake_quant", **plain, softmax="log")]),
        "softmax: auto": Pipeline([get("quantize.fake_quant", **plain, softmax="auto")]),
        "GELU: hybrid": Pipeline([get("quantize.fake_quant", **plain, gelu="hybrid")]),
        "Bimodal, softmax: auto": Pipeline(
            [get("quantize.ptq4_sam", **plain, weight_search=False)]
        ),
        "PTQ4SAM": Pipeline([get("quantize.ptq4_sam", **width)]),
        "PTQ4SAM, GELU: hybrid": Pipeline([get("quantize.ptq4_sam", **width, gelu="hybrid")]),
        "PQSAM": Pipeline([get("quantize.pqsam", **width)]),
        "TinySAM": Pipeline([get("quantize.tiny_sam", **{**width, "images": min(8, images)})]),
    }
    return {f"W{bits}A{bits} {name}": chain for name, chain in rows.items()}


def answers(model: Any, held_out: Any) -> Any:
    """A model's masks, one result a kind of prompt."""
    return sc.evaluate.accuracies(model, held_out, PROMPTS, feedback="logits", keep_masks=True)


def judged(results: Any, whole: Any, **what: Any) -> dict[str, Any]:
    """What masks are worth, and how far they are from those of the whole model."""
    found: dict[str, Any] = dict(what)
    for prompt, result, base in zip(PROMPTS, results, whole, strict=True):
        pair = result.against(base)
        found[prompt] = {
            "miou": result.miou,
            "ci": list(result.ci()),
            "delta": pair.delta,
            "delta_ci": list(pair.ci),
            "agreement": pair.agreement,
        }
    return found


def megabytes(model: Any) -> float:
    """Of all tensors, as they are stored."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6


def main() -> None:
    """Quantize, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--bits", type=int, nargs="+", default=(8, 6, 4))
    parser.add_argument("--calibration", type=int, default=32, help="images that steps look at")
    parser.add_argument("--steps", type=int, default=200, help="of Reconstruct for each unit")
    parser.add_argument("--only", nargs="+", help="rows with one of these in their names")
    parser.add_argument("--images", type=int, help="fewer images to judge on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="path without ending")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sam = sc.load(args.model)
    photos = sc.data.open(f"{args.data}/coco@train2017").subset(args.calibration, seed=0)
    held_out = sc.data.open(f"{args.data}/coco@val2017")[: args.images]
    rows = measured(sam, photos, held_out, args)
    doc = {
        "model": args.model,
        "data": held_out.name,
        "images": len(held_out),
        "calibration": args.calibration,
        "steps": args.steps,
        "environment": sc.evaluate.environment(),
        "rows": rows,
    }
    out = args.out or Path(__file__).with_name(f"quantize_{args.model}")
    write_whole(out.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(out.with_suffix(".md"), page(doc).encode())
    print(page(doc))


def measured(sam: Any, photos: Any, held_out: Any, args: argparse.Namespace) -> list[Any]:
    """All rows, those of earlier runs from their files."""
    chains = real(args.calibration)
    for bits in args.bits:
        chains |= simulated(bits, args.calibration)
    if args.only:
        chains = {n: c for n, c in chains.items() if any(part in n for part in args.only)}
    kinds = {MASKS: "base", BASE: "base"}
    for name, chain in chains.items():
        sort = chain.steps[-1].label if chain.steps[-1].simulated else "real"
        kinds[name] = sort
        if sort != "real" and name.split(" ", 1)[1] in TO_MEND and not name.startswith("W8"):
            kinds[f"{name}, {MENDED}"] = f"{sort}, {MENDED}"
    rows = Rows(
        args.work,
        kinds,
        {
            name: chains[name.removesuffix(f", {MENDED}")].to_dict()
            for name in kinds
            if name in chains or name.endswith(MENDED)
        },
        weights=fingerprint(sam),
        judged=held_out.fingerprint,
        calibration=photos.fingerprint,
        steps=args.steps,
    )
    whole = accuracies(rows.get(MASKS, lambda: plain(answers(sam, held_out))))
    mend = sc.get("quantize.reconstruct", steps=args.steps, images=args.calibration)

    def row(name: str) -> dict[str, Any]:
        if name == BASE:
            return judged(whole, whole, name=BASE, kind="real", megabytes=megabytes(sam))
        first = chains[name.removesuffix(f", {MENDED}")]
        model = first(sam, data=photos, progress=False)
        what: dict[str, Any] = {"name": name, "kind": "simulated", "recipe": first.to_dict()}
        if kinds[name] == "real":
            what |= {"kind": "real", "megabytes": megabytes(model)}
        elif name.endswith(MENDED):
            model = mend(model, teacher=sam, data=photos, progress=False)
            units = sc.lineage(model)[-1].state["units"].values()
            better = sum(after < before for before, after in units)
            what |= {"recipe": (first | mend).to_dict(), "mended": [better, len(units)]}
        return judged(answers(model, held_out), whole, **what)

    return [rows.get(name, lambda name=name: row(name)) for name in kinds if name != MASKS]


def page(doc: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        f"# Quantization of `{doc['model']}`",
        "",
        f"mIoU with the annotated masks on {doc['images']} images of {doc['data']}; in brackets",
        f"the difference to {BASE}, paired, its 95 % interval by resampling images; then mean IoU",
        f"with the masks of {BASE}. The last mask is fed back with each click. Steps look at",
        f"{doc['calibration']} images of train2017.",
    ]
    notes = {
        "real": "Stored and computed as named; MB of all tensors. `Int8Weights` computes in float.",
        "simulated": "Rounded and computed in floating point: neither smaller nor faster. "
        f"`{MENDED}`: {doc['steps']} steps for each unit, nothing dropped afterwards.",
    }
    for kind, rows in itertools.groupby(doc["rows"], key=lambda row: row["kind"]):
        sizes = kind == "real"
        lines += ["", f"## {kind.capitalize()}", "", notes[kind], ""]
        heads = ["model", *(["MB"] if sizes else []), *PROMPTS]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row in rows:
            cells = [row["name"], *([f"{row['megabytes']:.1f}"] if sizes else [])]
            for prompt in PROMPTS:
                cell = row[prompt]
                low, high = cell["delta_ci"]
                cells.append(
                    f"{cell['miou']:.3f} ({cell['delta']:+.3f}, {low:+.3f} to {high:+.3f}); "
                    f"{cell['agreement']:.3f}"
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
