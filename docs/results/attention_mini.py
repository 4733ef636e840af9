"""Approximate attentions of `mini`: work, time, and mIoU before and after the same distillation.

    python docs/results/attention_mini.py --data DATA --work WORK
    python docs/results/attention_mini.py --model tiny --steps 60 --images 12 --work WORK

DATA holds ``coco/train2017`` and ``coco/val2017`` with annotations, and ``sa1b_train``; without it
scenes are drawn, for trying the script and for models that know no photographs. Every technique
starts from the same weights, learns by `Encoder` for as many steps on the same images, and is
judged on images that none has seen; the model it came from is its teacher. Encoders take turns when
they are timed, and all of them are fused, but for the first row. Each row is written to WORK when
it is measured, with an estimate of what is left; an interrupted run goes on there. Writes
``attention_MODEL.md`` and ``.json`` beside this script, or at ``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _rows import Rows, accuracies, plain

import samcompress as sc
from samcompress.core.checkpoint import fingerprint
from samcompress.core.files import write_whole
from samcompress.core.predict import preprocess
from samcompress.evaluate.devices import device
from samcompress.evaluate.latency import Rounds, time_many
from samcompress.evaluate.stats import pareto

PROMPTS = ("box", "point")
EAGER, FUSED = "segment_anything", "fused"
BOTH = ("image_encoder.**", "mask_decoder.**")


def steps(grid: int) -> dict[str, sc.Pipeline]:
    """Rows by name, for a map of so many tokens a side."""
    get = sc.get
    rows = {
        "windowed, last one kept": get("attention.windowed"),
        "windowed": get("attention.windowed", keep=0),
        "windowed, shifted": get("attention.windowed", keep=0, shift=True),
        "dilated 2": get("attention.dilated"),
        "dilated 4": get("attention.dilated", rate=4),
        "dilated 2, a map a head": get("attention.dilated", offsets="per_head"),
        "pooled 2": get("attention.pooled_kv"),
        "pooled 4": get("attention.pooled_kv", size=4),
        "pooled 2, decoder too": get("attention.pooled_kv", where=sc.Where(BOTH)),
        "linear": get("attention.linear"),
        "linear, one scale": get("attention.linear", scales=()),
        "rwkv": get("attention.rwkv"),
        "neighborhood": get("attention.neighborhood", size=min(13, grid // 2 - 1)),
    }
    return {name: sc.Pipeline([step]) for name, step in rows.items()}


def images(args: argparse.Namespace) -> tuple[Any, Any]:
    """What is learned from, and what is judged on."""
    if args.data is None:
        return sc.shapes(256, seed=1), sc.shapes(args.images or 40, seed=2)
    photos = sc.data.join(
        sc.data.open(f"{args.data}/coco@train2017"),
        sc.data.open(args.data / "sa1b_train"),
        name="photos",
    )
    return photos, sc.data.open(f"{args.data}/coco@val2017")[: args.images]


def judged(results: Any, whole: Any) -> dict[str, Any]:
    """MIoU for each kind of prompt, against that of the base."""
    found: dict[str, Any] = {}
    for prompt, result, base in zip(PROMPTS, results, whole, strict=True):
        pair = result.against(base)
        found[prompt] = {"miou": result.miou, "delta": pair.delta, "ci": list(pair.ci)}
    return found


def change(model: Any, base: Any, held_out: Any) -> float:
    """Relative L2 between embeddings of a few images."""
    with torch.inference_mode():
        batch = torch.stack([preprocess(base, sample.image)[0] for sample in held_out[:4]])
        found, expected = model.image_encoder(batch), base.image_encoder(batch)
    return float((found - expected).norm() / expected.norm())


def encoding(model: Any) -> Callable[[], Any]:
    """A call that encodes another image each time."""
    side, turn = model.image_encoder.img_size, itertools.count(1)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def call() -> Any:
        pixels[0, 0, 0, 0] = next(turn) % 256 / 256
        return model.image_encoder(pixels)

    return call


def measured(base: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows but their times."""
    photos, held_out = images(args)
    techniques = steps(grid_of(base))
    kept = Rows(
        args.work,
        {EAGER: "base"} | dict.fromkeys(techniques, "technique"),
        weights=fingerprint(base),
        judged=held_out.fingerprint,
        learned=photos.fingerprint,
        steps=args.steps,
        lr=args.lr,
    )
    whole = accuracies(
        kept.get(EAGER, lambda: plain(sc.evaluate.accuracies(base, held_out, PROMPTS)))
    )
    same = judged(whole, whole)
    same = {"macs": sc.evaluate.macs(base).to_dict(), "change": 0.0, "before": same, "after": same}
    rows = [{"name": EAGER, "recipe": None, **same}]
    fused = sc.attention.Fused()
    macs = sc.evaluate.macs(fused(base, progress=False)).to_dict()
    rows.append({"name": FUSED, "recipe": sc.Pipeline([fused]).to_dict(), **same, "macs": macs})
    learn = sc.distill.Encoder(steps=args.steps, batch_size=4, lr=args.lr)

    def row(name: str, step: sc.Pipeline) -> dict[str, Any]:
        small = step(base, progress=False)
        taught = learn(small, teacher=base, data=photos, workdir=args.work, progress=False)
        before, after = (
            judged(sc.evaluate.accuracies(model, held_out, PROMPTS), whole)
            for model in (small, taught)
        )
        return {
            "name": name,
            "recipe": step.to_dict(),
            "macs": sc.evaluate.macs(shipped(base, step)).to_dict(),
            "change": change(small, base, held_out),
            "before": before,
            "after": after,
        }

    for name, step in techniques.items():
        rows.append(kept.get(name, lambda name=name, step=step: row(name, step)))
    return rows


def grid_of(model: Any) -> int:
    """Tokens along a side."""
    found: int = model.prompt_encoder.image_embedding_size[0]
    return found


def shipped(base: Any, step: sc.Pipeline) -> Any:
    """The model as it would be used: what is still SAM's attention is fused."""
    return (step | sc.attention.Fused())(base, progress=False)


def main() -> None:
    """Convert, distil, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--images", type=int, help="fewer images to judge on")
    parser.add_argument("--calls", type=int, default=15, help="timed calls of each encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="path without ending")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = sc.load(args.model)
    rows = measured(base, args)
    models = {EAGER: base, FUSED: sc.attention.Fused()(base, progress=False)}
    models |= {name: shipped(base, step) for name, step in steps(grid_of(base)).items()}
    with torch.inference_mode():
        calls = {name: encoding(model) for name, model in models.items()}
        times = time_many(calls, device("cpu"), Rounds.exactly(args.calls))
    for row in rows:
        row["encoder"] = times[row["name"]].to_dict()
    front = pareto(
        [row["encoder"]["median_ms"] for row in rows],
        [row["after"]["box"]["miou"] for row in rows],
    )
    for row, best in zip(rows, front, strict=True):
        row["pareto"] = bool(best)
    _, held_out = images(args)
    doc = {
        "model": args.model,
        "data": held_out.name,
        "images": len(held_out),
        "steps": args.steps,
        "lr": args.lr,
        "environment": sc.evaluate.environment(),
        "rows": rows,
    }
    out = args.out or Path(__file__).with_name(f"attention_{args.model}")
    write_whole(out.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(out.with_suffix(".md"), page(doc).encode())
    print(page(doc))


def page(doc: dict[str, Any]) -> str:
    """The table as Markdown."""
    fused = next(row["encoder"]["median_ms"] for row in doc["rows"] if row["name"] == FUSED)
    lines = [
        f"# Approximate attentions of `{doc['model']}`",
        "",
        f"{doc['steps']} steps of `distill.encoder`, the same for all. mIoU with the annotated",
        f"masks on {doc['images']} images of {doc['data']}; in brackets the difference to the",
        "original, paired, with its 95 % interval. Change: relative L2 of the embedding before",
        "distillation. Times are medians of the encoder's calls in turns, one image; every row but",
        "the first is fused. Bold: no other row is faster and better with boxes, after it.",
        "",
        "| attention | encoder, GMAC | decoder, GMAC | ms | over fused | change "
        "| box before | box after | point before | point after |",
        "|---" * 10 + "|",
    ]
    for row in doc["rows"]:
        time = row["encoder"]["median_ms"]
        cells = [
            f"**{row['name']}**" if row["pareto"] else row["name"],
            f"{row['macs']['encoder'] / 1e9:.3g}",
            f"{row['macs']['decoder_per_prompt'] / 1e9:.3g}",
            f"{time:.3g}",
            f"{time / fused:.2f}",
            f"{row['change']:.2g}",
        ]
        for prompt in PROMPTS:
            for when in ("before", "after"):
                cell = row[when][prompt]
                low, high = cell["ci"]
                cells.append(
                    f"{cell['miou']:.3f} ({cell['delta']:+.3f}, {low:+.3f} to {high:+.3f})"
                )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
