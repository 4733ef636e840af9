"""A GPU: image encoders and segment-everything, against segment_anything in float32.

    python docs/results/gpu.py --work WORK
    python docs/results/gpu.py --work WORK --models vit_h=sam_vit_h_4b8939.pth --photos PHOTOS
    python docs/results/gpu.py --work /tmp/try --device cpu --models tiny --side 4 --calls 2

Each chain takes turns with segment_anything's own code, call by call, in one process; so each
ratio is of one time. Segment everything is `SamAutomaticMaskGenerator` on one side, `sc.Everything`
on the other, with one grid and the same thresholds; agreement is the mean IoU of each of its masks
with the most alike of ours. Published beside it are the ratios of "Segment Anything, Fast" (PyTorch
team, 2023; A100, eight images at a time with their centre points). A model without weights is
random: its times are those of any other if nothing is filtered, its masks mean nothing. Rows are
kept in WORK when they are measured; the same command goes on after an interruption. Writes gpu.json
and gpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rows import Rows
from _subject import subject
from pycocotools import mask as coco
from segment_anything import SamAutomaticMaskGenerator

import samcompress as sc
from samcompress.core.devices import Device, device
from samcompress.core.errors import SamCompressError, sentence
from samcompress.core.predict import preprocess
from samcompress.core.transform import Transform
from samcompress.evaluate.environment import environment
from samcompress.evaluate.latency import Rounds, time_many
from samcompress.evaluate.masks import encode

HERE = Path(__file__).parent
PROMPTS = 64  # in one call of the decoder, as SamAutomaticMaskGenerator has it
EVERYTHING = "everything"
PUBLISHED = {"vit_b": 7.6, "vit_h": 8.9}  # Segment Anything, Fast


def chains(images: int) -> dict[str, tuple[Transform, ...]]:
    """Name to steps, for a number of images at a time."""
    fused, half = sc.attention.Fused(), sc.quantize.BFloat16()
    compiled = sc.compile.Torch(images=images, prompts=PROMPTS)
    return {
        "bfloat16": (half,),
        "fused": (fused,),
        "fused, bfloat16": (fused, half),
        "fused, bfloat16, compiled": (fused, half, compiled),
        "fused, int8, compiled": (fused, sc.quantize.Int8Dynamic(force=True), half, compiled),
        "fused, fp8, compiled": (fused, sc.quantize.Float8Dynamic(force=True), half, compiled),
    }


def pictures(args: argparse.Namespace, size: int) -> list[np.ndarray]:
    """Photos, or drawn scenes of 3:4."""
    if args.photos is None:
        return [s.image for s in sc.shapes(args.images, seed=9, size=(size * 3 // 4, size))]
    data = sc.data.open(args.photos)
    return [data[i].image for i in range(min(args.images, len(data)))]


def encoders(base: Any, other: Any, images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of both encoders, memory of the chain's, change of the embedding."""
    at, size = device(args.device), base.image_encoder.img_size
    shown = pictures(args, size)
    with torch.inference_mode():
        square = [preprocess(base, shown[i % len(shown)])[0] for i in range(images)]
        batch = torch.stack(square).float()
        expected = base.image_encoder(batch).float()
        off = (other.image_encoder(batch).float() - expected).norm() / expected.norm()
        del expected
        calls = {"base": partial(base.image_encoder, batch)}
        calls["this"] = partial(other.image_encoder, batch)
        times = time_many(calls, at, Rounds.exactly(args.calls), settle=True)
        peaks = {name: peak(at, call) for name, call in calls.items()}
    return {
        "ms": {name: times[name].samples_ms for name in calls},
        "peak_mb": peaks,
        "change": float(off),
    }


def everything(base: Any, other: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds an image of both generators, and whether they find the same masks."""
    at = device(args.device)
    reference = SamAutomaticMaskGenerator(
        base,
        points_per_side=args.side,
        points_per_batch=PROMPTS,
        pred_iou_thresh=args.min_iou,
        stability_score_thresh=args.min_stability,
    )
    ours = sc.Everything(
        sampler=sc.samplers.Grid(side=args.side),
        points_per_batch=PROMPTS,
        min_iou=args.min_iou,
        min_stability=args.min_stability,
    )
    shown = pictures(args, base.image_encoder.img_size)
    taken: dict[str, list[float]] = {"base": [], "this": []}
    peaks: dict[str, float | None] = {}
    agreement, counts = [], []
    for number, image in enumerate([shown[0], *shown]):  # the first is the warm-up's
        answers: dict[str, Any] = {}
        runs: dict[str, Callable[[], Any]] = {
            "base": partial(reference.generate, image),
            "this": partial(ours, other, image),
        }
        for name in sorted(runs, reverse=bool(number % 2)):
            lap = at.time(lambda run=runs[name], into=answers, key=name: into.update({key: run()}))
            if number:
                taken[name].append(lap.wall_ms)
        if not number:
            peaks = {name: peak(at, run) for name, run in runs.items()}
            continue
        theirs = [encode(r["segmentation"]) for r in answers["base"] if r["area"]]
        found = answers["this"]
        mine = [found.rle(i, compressed=True) for i in range(len(found))]
        counts.append((len(answers["base"]), len(mine)))
        if theirs:
            best = coco.iou(theirs, mine, [0] * len(mine)).max(1) if mine else np.zeros(1)
            agreement.append(float(np.mean(best)))
    return {
        "ms": taken,
        "peak_mb": peaks,
        "agreement": float(np.mean(agreement)) if agreement else None,
        "masks": np.mean(counts, 0).tolist(),
    }


def peak(at: Device, call: Callable[[], Any]) -> float | None:
    """MiB of a call beyond what is held before it; None where the device does not tell."""
    before = at.memory()
    if before is None:
        return None
    at.reset_peak()
    call()
    at.synchronize()
    after = at.memory()
    assert after is not None  # as before
    return after["peak_mb"] - before["now_mb"]


def measured(model: str, task: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"model": model.partition("=")[0], "task": task, "name": name}
    images = 1 if task == EVERYTHING else int(task.split()[1])
    base = subject(model.partition("=")[2] or model, args.size).to(args.device)
    steps = chains(images)[name]
    row["recipe"] = [repr(step) for step in steps]
    try:
        other = sc.Pipeline(steps)(base, progress=False).eval()
        if task == EVERYTHING:
            return row | everything(base, other, args)
        return row | encoders(base, other, images, args)
    except (SamCompressError, torch.OutOfMemoryError) as err:
        return row | {"reason": sentence(err)}


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    settings = result["settings"]
    lines = [
        "# A GPU\n",
        f"{settings['machine']}, torch {result['environment']['versions']['torch']}; medians of "
        f"{settings['calls']} calls in turns with segment_anything in float32; segment everything: "
        f"{settings['side']} x {settings['side']} points, {settings['images']} images. Extra "
        "memory: of a call, above what is held before it. Made by `docs/results/gpu.py`.\n",
        "| model | task | chain | segment_anything, ms | ms | times as fast | SAMfast, published "
        "| extra memory, share | change or agreement | masks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        head = f"| {row['model']} | {row['task']} | {row['name']} "
        if "reason" in row:
            lines.append(f"{head}| not measured: {row['reason']} | | | | | | |")
            continue
        before, now = (statistics.median(row["ms"][name]) for name in ("base", "this"))
        held, least = (row["peak_mb"][name] for name in ("base", "this"))
        share = "" if not held else f"{least / held:.2f}"
        same = row.get("change", row.get("agreement"))
        counts = " and ".join(f"{count:.0f}" for count in row.get("masks", ()))
        lines.append(
            f"{head}| {before:.4g} | {now:.4g} | {before / now:.2f} "
            f"| {PUBLISHED.get(row['model'], '')} | {share} "
            f"| {'' if same is None else format(same, '.3g')} | {counts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of measured rows")
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_h"], help="NAME or NAME=FILE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, help="side of the input instead of the model's own")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images at a time")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each encoder")
    parser.add_argument("--images", type=int, default=4, help="segmented by each generator")
    parser.add_argument("--photos", help="folder of photos; drawn scenes if left out")
    parser.add_argument("--side", type=int, default=32, help="points along a side of the grid")
    parser.add_argument("--min-iou", type=float, default=0.0)
    parser.add_argument("--min-stability", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both files")
    args = parser.parse_args()
    tasks = [*(f"encoder, {images} at a time" for images in args.batches), EVERYTHING]
    named = [(model, task, name) for model in args.models for task in tasks for name in chains(1)]
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "models")}
    settings["machine"] = device(args.device).name
    kept = Rows(args.work, {": ".join(key): key[1] for key in named}, **settings)
    rows = [kept.get(": ".join(key), partial(measured, *key, args)) for key in named]
    settings["models"] = args.models
    result = {"format": 1, "environment": environment(), "settings": settings, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "gpu.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
