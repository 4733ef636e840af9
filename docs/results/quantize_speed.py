"""Time, size, memory and error of encoders: four kinds of numbers, five on a GPU, fused and not.

    python docs/results/quantize_speed.py --model vit_b --size 1024 --calls 5
    python docs/results/quantize_speed.py --model vit_h --device cuda --calls 20  # float8 too

All rows take turns, call by call, on one thread, on the same image. A model without weights of its
own (`vit_b`) is random, its tables and biases too: its times and sizes are those of any other, its
errors are lower bounds. Masks are asked for with boxes on drawn scenes. Peak memory is read in a
fresh process for each row. Writes quantize_speed.json and quantize_speed.md; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _subject import subject

import samcompress as sc
from samcompress.core.devices import device
from samcompress.core.predict import decode, encode, preprocess
from samcompress.core.transform import Transform
from samcompress.evaluate.environment import environment
from samcompress.evaluate.memory import memory
from samcompress.quantize.b_float16 import BFloat16
from samcompress.quantize.float8_dynamic import Float8Dynamic
from samcompress.quantize.int8_dynamic import Int8Dynamic

HERE = Path(__file__).parent
BASE = "fp32"
KINDS: dict[str, tuple[Transform, ...]] = {
    BASE: (),
    "bf16": (BFloat16(),),
    "int8": (Int8Dynamic(force=True),),
    "int8 in bf16": (Int8Dynamic(force=True), BFloat16()),
}
ON_GPU: dict[str, tuple[Transform, ...]] = {"fp8 in bf16": (Float8Dynamic(force=True), BFloat16())}


def rows_of(sam: Any) -> dict[str, Any]:
    """Name of a row to its model."""
    found = {}
    kinds = KINDS | (ON_GPU if next(sam.parameters()).is_cuda else {})
    for fused, (kind, steps) in itertools.product((False, True), kinds.items()):
        chain = [*([sc.attention.Fused()] if fused else []), *steps]
        made = sc.Pipeline(chain)(sam, progress=False) if chain else sam
        found[f"{kind}, fused" if fused else kind] = made.eval()
    return found


def times(models: dict[str, Any], image: torch.Tensor, calls: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns; a first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(calls + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.image_encoder(image)
            if image.is_cuda:
                torch.cuda.synchronize()
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def answers(model: Any, scenes: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Embeddings of all scenes, and the masks of each for the boxes of its objects."""
    embeddings, masks = [], []
    for scene in scenes:
        (embedding,) = encode(model, [scene.image])
        boxes = [sc.Prompt(box=instance.box) for instance in scene.instances]
        found = decode(model, embedding, boxes)
        assert found.masks is not None
        embeddings.append(embedding.features.float())
        masks.append(found.masks)
    return torch.cat(embeddings), masks


def overlap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Mean IoU of masks; two empty ones agree."""
    each = []
    for a, b in zip(found, expected, strict=True):
        both, either = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
        each.append(torch.where(either > 0, both / either.clamp_min(1), 1.0).flatten())
    return float(torch.cat(each).mean())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, as plain JSON values."""
    sam = subject(args.model, args.size).to(args.device)
    models = rows_of(sam)
    scenes = sc.shapes(args.images, seed=9, size=(args.size * 3 // 4, args.size))
    with torch.inference_mode():
        image = preprocess(sam, scenes[0].image)[0][None].float().to(args.device)
        taken = times(models, image, args.calls)
    expected = answers(sam, scenes)
    rows = []
    for name, model in models.items():
        features, masks = answers(model, scenes)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            sc.save(model, folder)
            size = (folder / "model.safetensors").stat().st_size
            used = None
            if args.memory:
                used = memory(folder, device=args.device, threads=1).to_dict()
        error = float((features - expected[0]).norm() / expected[0].norm())
        rows.append(
            {
                "name": name,
                "recipe": [repr(step.transform) for step in sc.lineage(model)],
                "seconds": taken[name],
                "embedding_error": error,
                "mask_iou": overlap(masks, expected[1]),
                "bytes": size,
                "memory": used,
            }
        )
    machine = device(args.device).name
    return {
        "format": 1,
        "environment": environment(),
        "settings": {
            **vars(args),
            "threads": 1,
            "machine": f"one thread of {machine}" if args.device == "cpu" else machine,
            "dtype_of_base": "float32",
        },
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    rows, settings = result["rows"], result["settings"]
    base = next(row for row in rows if row["name"] == BASE)
    median = statistics.median(base["seconds"])
    lines = [
        "# Speed of quantization in PyTorch\n",
        f"`{settings['model']}`, {settings['size']} px, {settings['machine']}, torch "
        f"{result['environment']['versions']['torch']}; medians of {settings['calls']} calls in "
        "turns, all calls between the brackets. The first row is segment_anything's own encoder. "
        "Made by `docs/results/quantize_speed.py`.\n",
        "| encoder | s | times as fast | embedding error | mask IoU to fp32 | file, MB | of fp32 "
        "| peak above imports, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        middle = statistics.median(row["seconds"])
        used = row["memory"]
        peak = f"{used['peak_mb'] - used['baseline_mb']:.0f}" if used else "not measured"
        lines.append(
            f"| {row['name']} | {middle:.3g} ({min(row['seconds']):.3g}-{max(row['seconds']):.3g}) "
            f"| {median / middle:.2f} | {row['embedding_error']:.2g} | {row['mask_iou']:.4f} "
            f"| {row['bytes'] / 1e6:.1f} | {row['bytes'] / base['bytes']:.3f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b", help="architecture, or what sc.load opens")
    parser.add_argument("--size", type=int, default=1024, help="side of the padded image")
    parser.add_argument("--calls", type=int, default=5, help="calls that count, of each row")
    parser.add_argument("--images", type=int, default=2, help="scenes errors are measured on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip memory")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = argparse.Namespace(**{**vars(args), "out": None})
    result = measure(settings)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quantize_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "quantize_speed.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
