"""Half the time: a latency budget met by pruning on this machine, and measured again afterwards.

    python docs/results/prune_latency.py --model vit_b --size 1024 --budget "latency_ms<=50%"
    python docs/results/prune_latency.py --quick

The model is random, with its tables and biases random too: its times are those of any other. Heads
and hidden units go in equal shares, by magnitude, so no images are needed. The search times models
in turn with the base; the table below it comes from a second, separate measurement, base and result
in turn, by `sc.evaluate.latency_many`. It fails if the two are further than a tenth apart from what
was asked. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _subject import subject

import samcompress as sc
from samcompress.core.budget import Limit
from samcompress.core.display import Column, Table
from samcompress.evaluate.latency import Rounds, latency_many

NEAR = 0.1


def main() -> None:
    """Prune to the budget, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--size", type=int, help="side of the image; the model's own if left out")
    parser.add_argument("--budget", default="latency_ms<=50%")
    parser.add_argument("--ratios", default="equal", choices=("equal", "scores"))
    parser.add_argument("--axes", nargs="+", default=["heads", "mlp"])
    parser.add_argument("--max-ratio", type=float, default=0.75)
    parser.add_argument("--calls", type=int, default=5, help="of each in the second measurement")
    parser.add_argument("--quick", action="store_true", help="vit_b at 256 pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of all that was found")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = subject(args.model, 256 if args.quick else args.size)
    step = sc.get(
        "prune.budget",
        budget=args.budget,
        axes=tuple(args.axes),
        criterion="magnitude",
        ratios=args.ratios,
        max_ratio=args.max_ratio,
    )
    small = step(base)
    cost = sc.lineage(small)[-1].state["cost"]
    times = latency_many({"base": base, "pruned": small}, rounds=Rounds.exactly(args.calls))
    before, after = (times[name].end_to_end.median_ms for name in ("base", "pruned"))
    rows = [
        (name, sc.evaluate.parameters(sam)["total"], sc.evaluate.macs(sam).encoder / 1e9, ms, share)
        for name, sam, ms, share in (
            ("base", base, before, 1.0),
            ("pruned", small, after, after / before),
        )
    ]
    columns = (
        Column("model", align="left"),
        Column("parameters"),
        Column("encoder", "GMAC"),
        Column("image and box", "ms"),
        Column("of the base"),
    )
    print(f"{step!r}\nin the search: {json.dumps(cost)}\n")
    print(Table(columns, rows).markdown())
    limit = Limit.parse(args.budget)
    ratio = after / limit.bound(before)
    print(f"\n{ratio:.3f} of the budget, measured again")
    if args.out:
        found = {"step": step.params(), "search": cost, "base_ms": before, "pruned_ms": after}
        args.out.write_text(json.dumps({**found, "of_budget": ratio}, indent=1) + "\n")
    if abs(ratio - 1) > NEAR:
        raise SystemExit(f"not within {NEAR:.0%} of {args.budget}")


if __name__ == "__main__":
    main()
