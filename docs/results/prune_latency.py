"""Half the time: latency budgets met by pruning on this machine, and measured again afterwards.

    python docs/results/prune_latency.py
    python docs/results/prune_latency.py --size 256 --out elsewhere/prune_latency

The model is random, with its tables and biases random too: its times are those of any other, and
what is left of its accuracy means nothing. `Budget` takes heads and hidden units in equal shares by
magnitude, without images; `Supernet` looks for heads and hidden units of each block and for blocks
to leave out, here without training. Both time what they cut in turns with the base. The table comes
from a second, separate measurement, base and results in turns, by `sc.evaluate.latency_many`.
Writes ``prune_latency.md`` and ``.json`` beside this script, or at ``--out``, and fails if a result
is further than a tenth from what was asked. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _subject import subject

import samcompress as sc
from samcompress.core.budget import Limit
from samcompress.core.display import Column, Table
from samcompress.core.files import write_whole
from samcompress.evaluate.latency import Rounds, latency_many

NEAR = 0.1
BASE = "base"


def steps(budget: str) -> dict[str, Any]:
    """What is compared, by name; short searches, as the best subnet is not what is asked for."""
    search = {"criterion": "magnitude", "images": 2, "population": 8, "generations": 3}
    return {
        "Budget": sc.prune.Budget(budget=budget, criterion="magnitude", ratios="equal"),
        "Supernet": sc.prune.Supernet(budget=budget, steps=0, **search),
    }


def promised(model: Any) -> float:
    """Milliseconds that a search believes its result takes, as a share of the base."""
    state = sc.lineage(model)[-1].state
    cost = state.get("cost") or {"before": state["cost_before"], "after": state["cost_after"]}
    return float(cost["after"] / cost["before"])


def page(doc: dict[str, Any]) -> str:
    """The table as Markdown."""
    columns = (
        Column("model", align="left"),
        Column("parameters", "M"),
        Column("encoder", "GMAC"),
        Column("image and box", "ms"),
        Column("of the base"),
        Column("promised"),
    )
    rows = [
        (row["name"], row["parameters"] / 1e6, row["macs"] / 1e9, row["ms"], row["share"],
         row["promised"])
        for row in doc["rows"]
    ]  # fmt: skip
    environment = doc["environment"]
    lines = [
        "# Half the time by pruning",
        "",
        f"`{doc['budget']}` for a random `{doc['model']}` at {doc['size']} px, {doc['threads']} "
        f"thread(s) of {environment['cpu']}, torch {environment['versions']['torch']}: an image",
        "and one box. Promised is the share of the base that the search measured; the times are",
        f"of a second measurement, base and results in turns, {doc['calls']} calls each. Made by",
        "`docs/results/prune_latency.py`.",
        "",
        Table(columns, rows).markdown(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prune to the budget, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--size", type=int, default=512, help="side of the image")
    parser.add_argument("--budget", default="latency_ms<=50%")
    parser.add_argument("--calls", type=int, default=7, help="of each in the second measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = subject(args.model, args.size)
    scenes = sc.shapes(2, size=args.size, seed=0)
    models, shares = {BASE: base}, {BASE: 1.0}
    asked = steps(args.budget)
    for name, step in asked.items():
        models[name] = step(base, data=scenes)
        shares[name] = promised(models[name])
    times = latency_many(models, rounds=Rounds.exactly(args.calls))
    took = {name: time.end_to_end.median_ms for name, time in times.items()}
    rows = [
        {
            "name": name,
            "recipe": None if name == BASE else sc.Pipeline([asked[name]]).to_dict(),
            "parameters": sc.evaluate.parameters(model)["total"],
            "macs": sc.evaluate.macs(model).encoder,
            "ms": took[name],
            "share": took[name] / took[BASE],
            "promised": shares[name],
        }
        for name, model in models.items()
    ]
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    doc = {**settings, "environment": sc.evaluate.environment(), "rows": rows}
    write_whole(args.out.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(args.out.with_suffix(".md"), page(doc).encode())
    print(page(doc))
    bound = Limit.parse(args.budget).bound(took[BASE])
    off = [name for name in took if name != BASE and abs(took[name] / bound - 1) > NEAR]
    if off:
        raise SystemExit(f"not within {NEAR:.0%} of {args.budget}: {', '.join(off)}")


if __name__ == "__main__":
    main()
