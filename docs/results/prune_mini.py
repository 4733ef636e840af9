"""What pruning costs `mini`: each criterion, before and after the same short recovery.

    python docs/results/prune_mini.py --data DATA --work WORK

DATA holds ``coco/train2017`` and ``coco/val2017`` with annotations. Heads and hidden units of the
image encoder are cut by `Budget`, an equal share of each; what is left learns by `Encoder` for a
few steps, the same for all. Masks are judged on images that neither `mini` nor the recovery has
seen. Criteria that draw numbers, and every recovery, run with several seeds. Each row is written to
WORK when it is measured, with an estimate of what is left; an interrupted run goes on there. Writes
``prune_MODEL.md`` and ``.json`` beside this script and ``prune_MODEL.png`` in ``docs/images``, or
all of them at ``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from _rows import Rows, accuracies, plain

import samcompress as sc
from samcompress.core.checkpoint import fingerprint
from samcompress.core.files import write_whole

HERE = Path(__file__).parent
CRITERIA = ("magnitude", "activation", "taylor", "disturbed_taylor", "random")
PROMPTS = ("box", "point")


def row(sam: Any, results: Any, whole: Any, **what: Any) -> dict[str, Any]:
    """What a model is worth by its results, and against those of the whole one."""
    found: dict[str, Any] = {**what, "gmacs": sc.evaluate.macs(sam).encoder / 1e9}
    for prompt, result, base in zip(PROMPTS, results, whole, strict=True):
        pair = result.against(base)
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
    parser.add_argument("--out", type=Path, help="path without ending")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = sc.load(args.model)
    photos = sc.data.open(f"{args.data}/coco@train2017")
    held_out = sc.data.open(f"{args.data}/coco@val2017")[: args.images]
    todo = {
        f"{criterion} {ratio} {seed}": (criterion, ratio, seed)
        for criterion, ratio, seed in itertools.product(
            args.criteria, args.ratios, range(args.seeds)
        )
    }
    kept = Rows(
        args.work,
        {"whole": "whole"} | {name: str(what[1]) for name, what in todo.items()},
        weights=fingerprint(base),
        judged=held_out.fingerprint,
        learned=photos.fingerprint,
        steps=args.steps,
    )
    found = kept.get("whole", lambda: plain(sc.evaluate.accuracies(base, held_out, PROMPTS)))
    whole = accuracies(found)
    rows = [row(base, whole, whole, criterion="none", ratio=0.0, seed=0, steps=0)]
    for name, what in todo.items():
        rows += kept.get(
            name, lambda what=what: measured(base, whole, photos, held_out, what, args)
        )
    doc = {
        "model": args.model,
        "data": held_out.name,
        "images": len(held_out),
        "steps": args.steps,
        "environment": sc.evaluate.environment(),
        "rows": rows,
    }
    out = args.out or HERE / f"prune_{args.model}"
    write_whole(out.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(out.with_suffix(".md"), page(doc).encode())
    draw(rows, args.out or HERE.parent / "images" / f"prune_{args.model}")
    print(page(doc))


def measured(
    base: Any,
    whole: Any,
    photos: Any,
    held_out: Any,
    what: tuple[str, float, int],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The row of a pruned model, and that of it recovered."""
    criterion, ratio, seed = what
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
    return [
        row(
            model,
            sc.evaluate.accuracies(model, held_out, PROMPTS),
            whole,
            criterion=criterion,
            ratio=ratio,
            seed=seed,
            steps=steps,
        )
        for model, steps in ((cut, 0), (again, args.steps))
    ]


def cell(rows: list[dict[str, Any]], prompt: str) -> str:
    """Mean over seeds with the lowest and highest."""
    values = [row[prompt]["miou"] for row in rows]
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def width(rows: list[dict[str, Any]], prompt: str) -> float:
    """Half of the widest interval of a difference to the whole model."""
    return max((row[prompt]["ci"][1] - row[prompt]["ci"][0]) / 2 for row in rows)


def page(doc: dict[str, Any]) -> str:
    """The table as Markdown."""
    base, *rest = doc["rows"]
    cut, again = ([row for row in rest if bool(row["steps"]) == told] for told in (False, True))
    sure = [f"±{width(rows, prompt):.3f}" for rows in (cut, again) for prompt in PROMPTS]
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
        "The 95 % interval of a model's difference to the whole, paired, by resampling images, is",
        f"at most {sure[0]} for boxes and {sure[1]} for points as cut, {sure[2]} and {sure[3]}",
        "when recovered: criteria that are nearer rank alike.",
        "",
        f"![mIoU against MACs](../images/prune_{doc['model']}.png)",
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


def draw(rows: list[dict[str, Any]], place: Path) -> None:
    """MIoU against MACs, before and after recovery: boxes above, points below."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        2, 2, figsize=(9, 6), sharex=True, sharey="row", layout="constrained"
    )
    base, *rest = rows
    for (row, prompt), (column, recovered) in itertools.product(
        enumerate(PROMPTS), enumerate((False, True))
    ):
        ax = grid[row, column]
        for criterion in dict.fromkeys(row["criterion"] for row in rest):
            mine = [
                r for r in rest if r["criterion"] == criterion and bool(r["steps"]) == recovered
            ]
            ratios = sorted({r["ratio"] for r in mine})
            groups = [[r for r in mine if r["ratio"] == ratio] for ratio in ratios]
            x = [base["gmacs"], *(group[0]["gmacs"] for group in groups)]
            y = [[r[prompt]["miou"] for r in group] for group in ([base], *groups)]
            ax.plot(x, [statistics.mean(v) for v in y], marker="o", ms=3, label=criterion)
            ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], alpha=0.2)
    for ax, title in zip(grid[0], ("cut", "recovered"), strict=True):
        ax.set_title(title)
    for ax in grid[1]:
        ax.set_xlabel("GMAC of the encoder")
    for ax, prompt in zip(grid[:, 0], PROMPTS, strict=True):
        ax.set_ylabel(f"{prompt} mIoU")
    grid[0, 0].legend()
    figure.savefig(place.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
