"""Time saved against change of the embedding: fewer tokens, beside all tokens computed two ways.

    python docs/results/token_methods.py --model vit_b --size 1024 --calls 5 --out tokens.json

Each row is the image encoder of one model. All rows take turns, call by call, on the same
photo of 3:4, and share their weights. The change is that of the embedding from the eager
encoder's, relative L2, mean of some photos; once of the whole embedding, once of what shows the
photo. A model without weights of its own (`vit_b`) is random, its tables and biases too: its times
are those of any other, its changes are not. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _subject import subject
from torch import Tensor, nn

import samcompress as sc
from samcompress.core.predict import preprocess
from samcompress.evaluate.devices import device
from samcompress.evaluate.environment import environment
from samcompress.evaluate.latency import Rounds, time_many
from samcompress.evaluate.macs import macs

EAGER, FUSED = "segment_anything", "fused"


def chains(depth: int) -> dict[str, sc.Pipeline | None]:
    """Rows by name; None is the model as it is."""
    fused = sc.attention.Fused()
    merge, cluster, skip = (
        partial(sc.get, f"prune.{name}")
        for name in ("merge_tokens", "cluster_tokens", "skip_padding")
    )
    rows: dict[str, sc.Pipeline | None] = {EAGER: None, FUSED: sc.Pipeline([fused])}
    rows["skip windows, not fused"] = sc.Pipeline([skip()])
    rows["skip windows"] = skip() | fused
    for margin in (1, 2, 4, 8):
        rows[f"skip photo, margin {margin}"] = sc.Pipeline([skip(photo=True, margin=margin)])
    for ratio in (0.25, 0.5, 0.75, 0.9):
        rows[f"merge {ratio}"] = merge(ratio=ratio) | fused
    for ratio, start in itertools.product(
        (0.3, 0.5, 0.6), (depth // 4, depth // 2, 3 * depth // 4)
    ):
        rows[f"cluster {ratio} from {start}"] = cluster(ratio=ratio, start=start) | fused
    rows[f"cluster 0.5 from {depth // 2}, replace"] = cluster(ratio=0.5, restore="replace") | fused
    rows["skip windows, merge 0.5"] = sc.Pipeline([skip(), merge(ratio=0.5)])
    return rows


def changed(sam: nn.Module, chain: sc.Pipeline | None) -> Any:
    """The model after the chain, with the same weights in the same places of memory."""
    memo: dict[int, Any] = {id(t): t for t in (*sam.parameters(), *sam.buffers())}
    twin = copy.deepcopy(sam, memo)
    return (twin if chain is None else chain(twin, consume=True, progress=False)).eval()


def encoding(model: Any, image: Tensor) -> Callable[[], Tensor]:
    """A call that gets another image each time, and whose result is read."""
    pixels, turn = image.clone(), itertools.count(1)

    def call() -> Tensor:
        pixels[0, 0, 0, 0] = next(turn) % 256 / 256
        found: Tensor = model.image_encoder(pixels)
        found.reshape(-1)[-1:].clone()
        return found

    return call


def change(found: Tensor, expected: Tensor) -> float:
    """Relative L2 of two embeddings."""
    return float((found - expected).norm() / expected.norm())


def changes(model: Any, images: list[tuple[Tensor, Tensor]], inside: float) -> tuple[float, float]:
    """Mean change of the whole embedding, and of what shows the photos."""
    found = []
    for image, expected in images:
        given = model.image_encoder(image)
        rows = round(given.shape[2] * inside)
        found.append((change(given, expected), change(given[:, :, :rows], expected[:, :, :rows])))
    whole, photo = np.mean(found, 0).tolist()
    return whole, photo


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, as plain JSON values."""
    sam = subject(args.model, args.size)
    models = {n: changed(sam, c) for n, c in chains(len(sam.image_encoder.blocks)).items()}
    scenes = sc.shapes(args.images, seed=9, size=(args.size * 3 // 4, args.size))
    at = device("cpu")
    with torch.inference_mode():
        inputs = [preprocess(sam, scene.image)[0][None] for scene in scenes]
        images = [(image, sam.image_encoder(image)) for image in inputs]
        found = {name: changes(model, images, 3 / 4) for name, model in models.items()}
        calls = {name: encoding(model, inputs[0]) for name, model in models.items()}
        times = time_many(calls, at, Rounds.exactly(args.calls))
    rows = []
    for name, model in models.items():
        steps = [step.transform for step in sc.lineage(model)]
        rows.append(
            {
                "name": name,
                "recipe": sc.Pipeline(steps).to_dict() if steps else None,
                "change": {"whole": found[name][0], "photo": found[name][1]},
                "macs": macs(model).to_dict(),
                "encoder": times[name].to_dict(),
            }
        )
    return {
        "format": 1,
        "environment": environment(),
        "settings": {**vars(args), "photo": [args.size * 3 // 4, args.size], "device": at.name},
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    rows, settings = result["rows"], result["settings"]
    times = {row["name"]: row["encoder"]["median_ms"] for row in rows}
    lines = [
        f"{settings['model']}, {settings['size']} px, photo of 3:4, float32, "
        f"{settings['threads']} thread(s) of {settings['device']}; median of "
        f"{settings['calls']} calls in turns, half between the brackets; MACs are "
        "those of a square photo\n",
        "| encoder | s | over segment_anything | over fused | GMAC | change | in the photo |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        samples = row["encoder"]["samples_ms"]
        low, high = np.percentile(samples, [25, 75]) / 1e3
        time = times[row["name"]]
        lines.append(
            f"| {row['name']} | {time / 1e3:.3g} ({low:.3g}-{high:.3g}) "
            f"| {time / times[EAGER]:.2f} | {time / times[FUSED]:.2f} "
            f"| {row['macs']['encoder'] / 1e9:.4g} "
            f"| {row['change']['whole']:.2g} | {row['change']['photo']:.2g} |"
        )
    return "\n".join(lines)


def figure(result: dict[str, Any], path: Path) -> None:
    """Change in the photo against time, a line for each technique."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.subplots()
    fused = next(r["encoder"]["median_ms"] for r in result["rows"] if r["name"] == FUSED)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row["name"] == EAGER:
            continue  # far to the right of all others
        label = row["name"].rstrip("0123456789. ")
        label = "cluster" if label.startswith("cluster") else label.removesuffix(", margin")
        spot = row["encoder"]["median_ms"] / fused, row["change"]["photo"]
        lines.setdefault(label, []).append(spot)
    for label, spots in lines.items():
        joined = "" if label == "cluster" else "-"
        axes.plot(*zip(*sorted(spots), strict=True), f"o{joined}", label=label)
    axes.set_xlabel(f"time of the encoder over `{FUSED}`")
    axes.set_ylabel("relative change of the embedding in the photo")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.savefig(path, dpi=150)


def main() -> None:
    """Read the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b", help="architecture, or what sc.load opens")
    parser.add_argument("--size", type=int, default=1024, help="side of the padded image")
    parser.add_argument("--calls", type=int, default=5, help="calls that count, of each row")
    parser.add_argument("--images", type=int, default=2, help="photos that changes are measured on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file to write, and a Markdown file beside it")
    parser.add_argument("--figure", help="picture to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
        Path(args.out).with_suffix(".md").write_text(f"# Fewer tokens\n\n{table(result)}\n")
    if args.figure:
        figure(result, Path(args.figure))
    print(table(result))


if __name__ == "__main__":
    main()
