"""What the shape of a pruned attention costs: SlimSAM's and ours, of one size, against the whole.

    python docs/results/prune_geometry.py
    python docs/results/prune_geometry.py --size 256 --calls 5

SlimSAM keeps all heads and makes them narrow; ours keeps few, as wide as fit. Both are cut by
magnitude and not trained, as times do not depend on which units stay. Encoders take turns, one
image each, as they are and with fused attention. Writes prune_geometry.json and prune_geometry.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _subject import subject

import samcompress as sc
from samcompress.core.display import Column, Table
from samcompress.core.files import write_whole
from samcompress.evaluate.devices import device
from samcompress.evaluate.latency import Rounds, time_many

WHOLE, FUSED = "whole", ", fused"


def steps() -> dict[str, sc.prune.SlimSAM]:
    """Both shapes at both sizes."""
    found = {}
    for percent in (50, 77):
        plain = {"criterion": "magnitude", "align": False}
        found[f"{percent} %, published"] = sc.prune.SlimSAM.published(percent, **plain)
        found[f"{percent} %, ours"] = sc.prune.SlimSAM(ratio=percent / 100, **plain)
    return found


def encoding(model: Any) -> Callable[[], Any]:
    """A call that encodes another image each time."""
    side, turn = model.image_encoder.img_size, itertools.count(1)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def call() -> Any:
        pixels[0, 0, 0, 0] = next(turn) % 256 / 256
        return model.image_encoder(pixels)

    return call


def shape(model: Any) -> str:
    """Heads and their width, in the first block."""
    attn = model.image_encoder.blocks[0].attn
    return f"{attn.num_heads} x {attn.qkv.out_features // 3 // attn.num_heads}"


def page(doc: dict[str, Any]) -> str:
    """The table as Markdown."""
    ms = {row["name"]: row["encoder"]["median_ms"] for row in doc["rows"]}
    columns = (
        Column("encoder", align="left"),
        Column("heads x width"),
        Column("parameters, all", "M"),
        Column("encoder", "GMAC"),
        Column("time", "ms"),
        Column("of the whole"),
        Column("fused", "ms"),
        Column("of the whole, fused"),
    )
    rows = [
        (
            row["name"],
            row["shape"],
            row["parameters"] / 1e6,
            row["macs"] / 1e9,
            ms[row["name"]],
            ms[row["name"]] / ms[WHOLE],
            ms[row["name"] + FUSED],
            ms[row["name"] + FUSED] / ms[WHOLE + FUSED],
        )
        for row in doc["rows"]
        if not row["name"].endswith(FUSED)
    ]
    settings, versions = doc["settings"], doc["environment"]["versions"]
    return (
        "# What the shape of a pruned attention costs\n\n"
        f"Encoder of `{settings['model']}`, one image of {doc['size']} px, "
        f"{settings['threads']} thread(s) of {doc['environment']['cpu']}, torch "
        f"{versions['torch']}; medians of {settings['calls']} calls in turns. A head has a number "
        "for each pair of tokens, however wide it is: narrow heads cost what wide ones do. Made "
        "by `docs/results/prune_geometry.py`.\n\n"
    ) + Table(columns, rows).markdown()


def main() -> None:
    """Cut, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--size", type=int, help="side of the image; the model's own if left out")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of each encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("prune_geometry"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = subject(args.model, args.size)
    models = {WHOLE: base} | {name: step(base, progress=False) for name, step in steps().items()}
    fuse = sc.attention.Fused()
    models |= {name + FUSED: fuse(sam, progress=False) for name, sam in models.items()}
    with torch.inference_mode():
        calls = {name: encoding(sam) for name, sam in models.items()}
        times = time_many(calls, device("cpu"), Rounds.exactly(args.calls))
    rows = [
        {
            "name": name,
            "shape": shape(models[name.removesuffix(FUSED)]),
            "parameters": sc.evaluate.parameters(sam)["total"],
            "macs": sc.evaluate.macs(sam).encoder,
            "encoder": times[name].to_dict(),
        }
        for name, sam in models.items()
    ]
    doc = {
        "size": base.image_encoder.img_size,
        "settings": {key: getattr(args, key) for key in ("model", "calls", "threads")},
        "environment": sc.evaluate.environment(),
        "rows": rows,
    }
    text = page(doc)
    write_whole(args.out.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(args.out.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
