"""Segment everything: samcompress against segment_anything's generator, on the same photos.

    python docs/results/everything.py --data DATA/sa1b --images 48
    python docs/results/everything.py --model vit_b --data DATA/sa1b --images 1 --side 8 \
        --min-iou 0 --min-stability 0 --tau 0.1

All methods take turns on every photo, with the same model, thresholds and threads. Times are CPU
seconds of the process, which other work on the machine changes less than seconds by the clock, and
both are kept; "after the encoder" is without the image encoder, which all run once a photo. Peak
memory is that of a fresh process for each method, beyond what it held when the model was loaded and
one photo encoded. A model without weights of its own (`vit_b`) is random, its tables and biases
too: its times are those of any other, its masks mean nothing.

Writes everything.json and everything.md beside this file, and with --picture a picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _subject import subject
from segment_anything import SamAutomaticMaskGenerator

import samcompress as sc
from samcompress.core.devices import device
from samcompress.core.everything import Everything, Segments, samplers
from samcompress.core.everything._meter import Meter
from samcompress.core.predict import encode
from samcompress.evaluate.environment import environment

HERE = Path(__file__).parent
BASE = "segment_anything"
THRESHOLDS = (0.5, 0.75, 0.9)
Method = Callable[[np.ndarray], Segments]


def methods(sam: Any, args: argparse.Namespace) -> dict[str, Method]:
    """By name; the first is what all are compared with."""
    reference = SamAutomaticMaskGenerator(
        sam,
        points_per_side=args.side,
        pred_iou_thresh=args.min_iou,
        stability_score_thresh=args.min_stability,
    )

    class Records:
        def __init__(self, found: list[dict[str, Any]], size: tuple[int, ...]) -> None:
            self.masks = np.zeros((len(found), *size[:2]), bool)
            for mask, record in zip(self.masks, found, strict=True):
                mask[:] = record["segmentation"]
            self.scores = -np.arange(len(found))  # in their order

    def everything(sampler: Any) -> Method:
        settings = Everything(
            sampler=sampler, min_iou=args.min_iou, min_stability=args.min_stability
        )
        return lambda image: settings(sam, image)

    levels = tuple(n for n in (4, 8, 16, 32, 64) if n <= args.side)
    skip = {
        "levels": levels,
        "tau": args.tau,
        "batch": args.batch,
        "large": args.large,
        "large_side": args.large_side,
    }
    found: dict[str, Method] = {
        BASE: lambda image: Segments.of(Records(reference.generate(image), image.shape)),
        "grid": everything(samplers.Grid(side=args.side)),
        "hierarchical": everything(samplers.Hierarchical(side=args.side, tau=args.tau)),
        "coverage skip": everything(samplers.CoverageSkip(**skip)),
    }
    return {n: f for n, f in found.items() if not args.only or n in (BASE, *args.only.split(","))}


def best_ious(truth: np.ndarray, found: Segments) -> np.ndarray:
    """For each true mask the IoU of the mask most like it."""
    if not len(found):
        return np.zeros(len(truth))
    a = truth.reshape(len(truth), -1).astype(np.float32)
    inside = np.stack([a @ found.mask(i).ravel().astype(np.float32) for i in range(len(found))], 1)
    return (inside / (a.sum(1)[:, None] + found.areas[None] - inside)).max(1)


def alike(found: Segments, wanted: Segments) -> dict[str, Any]:
    """Whether two runs gave the same masks in the same order."""
    same = len(found) == len(wanted)
    off = [
        int((found.mask(i) != wanted.mask(i)).sum()) for i in range(len(found)) if same
    ]  # fmt: skip
    return {
        "same_number": same,
        "masks": len(off),
        "differ": sum(map(bool, off)),
        "pixels": sum(off),
    }


def measure(sam: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All methods on all photos."""
    data = sc.data.open(args.data)
    step = max(1, len(data) // args.images)
    chosen = list(data)[::step][: args.images]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in methods(sam, args)}
    for number, sample in enumerate(chosen):
        image, truth, results = sample.image, sample.masks(), {}
        run = methods(sam, args)
        begin = time.process_time()
        encode(sam, [image])
        encoder = time.process_time() - begin
        names = list(run)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            result = results[name] = run[name](image)
            row = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            stats = result.stats
            row |= {"encoder_cpu_s": encoder, "masks": len(result), "image": sample.id}
            row |= {"prompts": stats.prompts if stats else args.side**2}
            if stats:
                row |= {"stats": {k: v for k, v in vars(stats).items() if k != "peak_bytes"}}
            found[name].append({**row, "ious": best_ious(truth, result).round(4).tolist()})
        found["grid"][-1]["alike"] = alike(results["grid"], results[BASE])
        print(f"{number + 1} of {len(chosen)}", flush=True)
    return found


def peak(args: argparse.Namespace) -> int | None:
    """Bytes that one method takes beyond the loaded model, in this process."""
    sam = subject(args.model)
    image = sc.data.open(args.data)[0].image
    run = methods(sam, args)[args.peak]
    with torch.inference_mode():
        encode(sam, [image])
    meter = Meter(device("cpu"))
    run(image)
    return meter.peak_bytes


def peaks(args: argparse.Namespace) -> dict[str, int | None]:
    """Peak memory of each method, in a process of its own."""
    found = {}
    for name in methods(subject(args.model), args):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--peak", name],
            check=True,
            capture_output=True,
            text=True,
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, Any], memory: dict[str, Any]) -> str:
    """A row for each method."""
    heads = ["method", "prompts", "masks", "CPU s", "after the encoder", "times as fast",
             *(f"recall at {t}" for t in THRESHOLDS), "mean best IoU", "peak MiB"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    base = None
    for name, rows in found.items():
        mean = {k: np.mean([r[k] for r in rows]) for k in ("prompts", "masks", "cpu_s")}
        after = mean["cpu_s"] - np.mean([r["encoder_cpu_s"] for r in rows])
        base = base or after
        ious = np.concatenate([r["ious"] for r in rows])
        cells = [name, f"{mean['prompts']:.0f}", f"{mean['masks']:.0f}", f"{mean['cpu_s']:.2f}",
                 f"{after:.2f}", f"{base / after:.1f}",
                 *(f"{(ious >= t).mean():.3f}" for t in THRESHOLDS), f"{ious.mean():.3f}",
                 f"{(memory.get(name) or 0) / 2**20:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def stages(found: dict[str, Any]) -> str:
    """Where the time by the clock goes."""
    names = ("encoder", "sampling", "decoding", "post")
    lines = [f"| method | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for name, rows in found.items():
        stats = [r["stats"] for r in rows if "stats" in r]
        if stats:
            total = sum(s["total_s"] for s in stats)
            shares = [sum(s[f"{n}_s"] for s in stats) / total for n in names]
            lines.append(f"| {name} | {' | '.join(f'{100 * s:.0f} %' for s in shares)} |")
    return "\n".join(lines)


def picture(sam: Any, args: argparse.Namespace) -> None:
    """The masks of three methods, each mask in a colour of its own; nothing of the photo."""
    from matplotlib import pyplot as plt
    from PIL import Image

    image = sc.data.open(args.data)[args.photo].image
    run = methods(sam, args)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, name in zip(axes, (BASE, "grid", "coverage skip"), strict=True):
        found = run[name](image)
        colours = np.random.default_rng(1).uniform(0.15, 1, (len(found), 3))
        layer = np.ones((*found.size, 3))
        # Parts lie on their wholes.
        for index in np.argsort(-found.areas, kind="stable"):
            layer[found.mask(index)] = colours[index]
        axis.imshow(layer)
        axis.set_xticks([])
        axis.set_yticks([])
        prompts = found.stats.prompts if found.stats else args.side**2
        axis.set_title(f"{name}: {len(found)} masks of {prompts} prompts", fontsize=10)
    figure.savefig(args.picture, dpi=80, metadata={"Software": None})
    Image.open(args.picture).convert("RGB").quantize(128).save(args.picture, optimize=True)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="images with masks, as sc.data.open takes")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--min-iou", type=float, default=0.2)
    parser.add_argument("--min-stability", type=float, default=0.4)
    parser.add_argument("--tau", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--large", type=float, default=0.2)
    parser.add_argument("--large-side", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="methods, with commas between them")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--photo", type=int, default=0, help="of the picture")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak(args)))
        return
    sam = subject(args.model)
    if args.picture:
        picture(sam, args)
        return
    found, memory = measure(sam, args), peaks(args)
    paths = ("data", "out", "picture", "peak")
    settings = {k: v for k, v in vars(args).items() if k not in paths}
    rows = {
        "settings": {**settings, "data": sc.data.open(args.data).name},
        "environment": environment(),
        "peak_bytes": memory,
        "rows": found,
    }
    (args.out / "everything.json").write_text(json.dumps(rows, indent=1) + "\n")
    same = [row["alike"] for row in found["grid"]]
    sums = {k: sum(s[k] for s in same) for k in ("same_number", "masks", "differ", "pixels")}
    text = [
        f"`{args.model}`, {len(same)} photos, {args.threads} thread, predicted IoU above "
        f"{args.min_iou:g}, stability from {args.min_stability:g}, tau {args.tau:g}.",
        table(found, memory),
        f"Grid against segment_anything: {sums['same_number']} of {len(same)} photos with as many "
        f"masks; of {sums['masks']} masks {sums['differ']} differ, by {sums['pixels']} pixels.",
        "Shares of the time by the clock:",
        stages(found),
    ]
    (args.out / "everything.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
