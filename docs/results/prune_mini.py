"""What pruning costs `mini`: each criterion, before and after the same short recovery.

    python docs/results/prune_mini.py --data DATA --work WORK

DATA holds ``coco/train2017`` and ``coco/val2017`` with annotations. Heads and hidden units of the
image encoder are cut by `Budget`, an equal share of each; what is left learns by `Encoder` for a
few steps, the same for all. Masks are judged on images that neither `mini` nor the recovery has
seen. Criteria that draw numbers, and every recovery, run with several seeds. Each row is written to
WORK when it is measured, and an interrupted run goes on there. Writes ``prune_mini.md``, ``.json``
and, in ``docs/images``, ``prune_mini.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import samcompress as sc
from samcompress.core.files import write_whole

HERE = Path(__file__).with_suffix("")
FIGURE = HERE.parents[1] / "images" / "prune_mini.png"
CRITERIA = ("magnitude", "activation", "taylor", "disturbed_taylor", "random")
PROMPTS = ("box", "point")


def row(sam: Any, teacher: Any, data: Any, **what: Any) -> dict[str, Any]:
    """What a model is worth."""
    found: dict[str, Any] = {**what, "gmacs": sc.evaluate.macs(sam).encoder / 1e9}
    for prompt, result in zip(PROMPTS, sc.evaluate.accuracies(sam, data, PROMPTS), strict=True):
        pair = result.against(teacher[prompt])
        found[prompt] = {"miou": result.miou, "delta": pair.delta, "ci": list(pair.ci)}
    return found


def main() -> None:
    """Prune, recover, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.1, 0.3, 0.5, 0.7))
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=None, help="fewer images to judge on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    base = sc.load(args.model)
    photos = sc.data.open(f"{args.data}/coco@train2017")
    held_out = sc.data.open(f"{args.data}/coco@val2017")[: args.images]
    whole = dict(zip(PROMPTS, sc.evaluate.accuracies(base, held_out, PROMPTS), strict=True))
    rows = [row(base, whole, held_out, criterion="none", ratio=0.0, seed=0, steps=0)]
    for criterion in args.criteria:
        for ratio in args.ratios:
            for seed in range(args.seeds):
                place = args.work / f"{criterion}-{ratio}-{seed}-{args.steps}.json"
                if not place.exists():
                    found = measured(base, whole, photos, held_out, criterion, ratio, seed, args)
                    write_whole(place, json.dumps(found).encode())
                rows += json.loads(place.read_text())
    doc = {
        "model": args.model,
        "data": held_out.name,
        "images": len(held_out),
        "steps": args.steps,
        "environment": sc.evaluate.environment(),
        "rows": rows,
    }
    write_whole(HERE.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(HERE.with_suffix(".md"), page(doc).encode())
    draw(rows)
    print(page(doc))


def measured(
    base: Any,
    whole: dict[str, Any],
    photos: Any,
    held_out: Any,
    criterion: str,
    ratio: float,
    seed: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The row of a pruned model, and that of it recovered."""
    cut = sc.prune.Budget(
        budget=f"macs<={1 - ratio:.0%}",
        ratios="equal",
        max_ratio=0.95,
        round_to=8,
        criterion=criterion,
        seed=seed,
    )
    cut = cut(base, data=photos.subset(32, seed=seed), progress=False)
    learn = sc.distill.Encoder(steps=args.steps, batch_size=4, lr=5e-4, precision="bf16", seed=seed)
    again = learn(cut, teacher=base, data=photos, workdir=args.work, progress=False)
    what = {"criterion": criterion, "ratio": ratio, "seed": seed}
    return [
        row(cut, whole, held_out, **what, steps=0),
        row(again, whole, held_out, **what, steps=args.steps),
    ]


def cell(rows: list[dict[str, Any]], prompt: str) -> str:
    """Mean over seeds with the lowest and highest."""
    values = [row[prompt]["miou"] for row in rows]
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def page(doc: dict[str, Any]) -> str:
    """The table as Markdown."""
    base, *rest = doc["rows"]
    lines = [
        f"# Pruning `{doc['model']}` by criterion",
        "",
        "Heads and hidden units of the image encoder, by `prune.Budget`, an equal share of each.",
        f"mIoU with the annotated masks on {doc['images']} images of {doc['data']}; mean over",
        "seeds, lowest and highest in brackets. Recovery is the same for all:",
        f"{doc['steps']} steps of `distill.Encoder`. Whole:",
        f"box {base['box']['miou']:.3f}, point {base['point']['miou']:.3f}, "
        f"{base['gmacs']:.2f} GMAC.",
        "",
        "| criterion | cut | GMAC | box | point | box, recovered | point, recovered |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["criterion"], row["ratio"]) for row in rest):
        mine = [row for row in rest if (row["criterion"], row["ratio"]) == key]
        cut = [row for row in mine if not row["steps"]]
        again = [row for row in mine if row["steps"]]
        cells = [cell(rows, prompt) for rows in (cut, again) for prompt in PROMPTS]
        lines.append(
            f"| {key[0]} | {key[1]:.0%} | {cut[0]['gmacs']:.2f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> None:
    """Box mIoU against MACs, before and after recovery."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    base, *rest = rows
    for ax, recovered in zip(axes, (False, True), strict=True):
        for criterion in dict.fromkeys(row["criterion"] for row in rest):
            mine = [
                r for r in rest if r["criterion"] == criterion and bool(r["steps"]) == recovered
            ]
            ratios = sorted({r["ratio"] for r in mine})
            groups = [[r for r in mine if r["ratio"] == ratio] for ratio in ratios]
            x = [base["gmacs"], *(group[0]["gmacs"] for group in groups)]
            y = [[r["box"]["miou"] for r in group] for group in ([base], *groups)]
            ax.plot(x, [statistics.mean(v) for v in y], marker="o", ms=3, label=criterion)
            ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], alpha=0.2)
        ax.set(title="recovered" if recovered else "cut", xlabel="GMAC of the encoder")
    axes[0].set_ylabel("box mIoU")
    axes[0].legend()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


if __name__ == "__main__":
    main()
