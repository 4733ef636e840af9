"""Time, memory and work of published models at their own input size, beside published ratios.

    python docs/results/zoo_bench.py --threads 1 --calls 5

Weights are random: times do not depend on them. Each model takes turns with the first, SAM's ViT-B
as segment_anything computes it, call by call; so the ratio holds on a machine whose speed changes.
Finished rows are kept in the JSON file, and the same command goes on after an interruption. Nothing
is downloaded. `NAME+fused` is a model after `sc.attention.Fused()`. For a first look at the script:

    python docs/results/zoo_bench.py --models tiny,tiny+fused --calls 2 --out /tmp/bench
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import samcompress as sc
from samcompress.core.display import Column, Table
from samcompress.core.zoo import published

MODELS = (
    "sam_vit_b", "sam_vit_b+fused", "mobile_sam", "edge_sam", "repvit_sam", "efficient_sam_ti",
    "efficient_sam_ti+fused", "efficient_vit_sam_l0", "nano_sam", "sam_hq_vit_tiny", "slim_sam_77",
    "slim_sam_77+fused",
)  # fmt: skip
FUSED = "+fused"
# What is compared: one image and one box, on a processor.
LATENCY, WHERE = "latency, ms", "encoder and one box, CPU"


def made(name: str) -> Any:
    """The model with random weights."""
    sam = sc.build(name.removesuffix(FUSED))
    return sc.attention.Fused()(sam, progress=False) if name.endswith(FUSED) else sam


def told(name: str) -> tuple[float, str] | None:
    """Published milliseconds for an image and a box, and setting with source."""
    entry = published().get(name)
    for figure in entry.figures if entry else ():
        if figure.metric == LATENCY and figure.setting.startswith(WHERE):
            return figure.value, f"{figure.setting}; {figure.source}"
    return None


def milliseconds(row: dict[str, Any], part: str) -> float:
    """Median of a part, with the machine's speed at the time taken out."""
    latency = row["latency"]
    return float(latency[part]["median_ms"] * latency.get("scale", {}).get(part, 1.0))


def table(document: dict[str, Any]) -> Table:
    """All rows beside what is published."""
    columns = (
        Column("model", align="left"),
        Column("parameters", "M"),
        Column("encoder", "GMAC"),
        Column("a prompt", "GMAC"),
        Column("input", "px"),
        Column("encoder", "s"),
        Column("a prompt", "ms"),
        Column("peak memory", "MB"),
        Column("encoder, time a MAC", "ns"),
        Column("image and box, times as fast"),
        Column("the same, published"),
    )
    measured = [row for row in document["rows"] if row["status"] == "measured"]
    base = told(measured[0]["name"])
    rows: list[tuple[Any, ...]] = []
    for row in measured:
        encoder, macs = milliseconds(row, "encoder"), row["macs"]
        theirs, memory = told(row["name"]), row["memory"]
        rows.append(
            (
                row["name"],
                row["params"]["total"] / 1e6,
                macs["encoder"] / 1e9,
                macs["decoder_per_prompt"] / 1e9,
                row["image_size"],
                encoder / 1e3,
                milliseconds(row, "prompt"),
                memory and memory["peak_mb"] - memory["baseline_mb"],
                1e6 * encoder / macs["encoder"],
                row["latency"].get("vs_base", {}).get("end_to_end", 1.0),
                base[0] / theirs[0] if base and theirs else None,
            )
        )
    return Table(columns, rows)


def page(document: dict[str, Any]) -> str:
    """The table, how it was measured, and what is slowest for its work."""
    shown = table(document)
    names, cost = ([row[column] for row in shown.rows] for column in (0, 8))
    worst = max(range(len(names)), key=lambda index: cost[index])
    better = dict(zip(names, cost, strict=True)).get(names[worst] + FUSED)
    facts, threads = document["environment"], document["settings"]["threads"]
    first = document["rows"][0]
    sources = {source for name in names if (known := told(name)) for source in known[1:]}
    lines = [
        "# Published models, time and memory",
        "",
        "<!-- Written by docs/results/zoo_bench.py. -->",
        "",
        f"Random weights, float32, each at its own input size, {threads} thread(s) of "
        f"{facts['cpu']}, torch {facts['versions']['torch']}; median of "
        f"{first['latency']['encoder']['n']} calls in turns with `{first['name']}`. Memory is "
        "above that of the imports, for one image and one box in a process of its own. "
        "`+fused`: after `sc.attention.Fused()`; without it blocks are segment_anything's. The "
        "last column is a quotient of published times, on another processor with more threads.",
        "",
        shown.markdown(),
        "",
        f"The most time for its work takes `{names[worst]}`, {cost[worst]:.3g} ns a "
        f"multiply-accumulate{f'; after `sc.attention.Fused()` {better:.3g}' if better else ''}.",
        "",
        *(f"Published: {source}." for source in sorted(sources)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Read the command line, measure what is not in the file yet, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, the base first")
    parser.add_argument("--calls", type=int, default=5, help="calls that count, of each part")
    parser.add_argument("--threads", type=int, default=1, help="of an operator")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "zoo_bench.json"
    sc.evaluate.benchmark(
        {name: made(name) for name in args.models.split(",")},
        sc.shapes(1, seed=9, size=(768, 1024)),
        prompts=("box",),
        accuracy=False,
        rounds=args.calls,
        threads=args.threads,
        out=results,
    )
    text = page(json.loads(results.read_text()))
    (args.out / "zoo.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
