"""Every runtime and precision that this machine has, against segment_anything in PyTorch.

    python docs/results/runtimes.py

Image encoders of `vit_b` and MobileSAM at 1024 px, of EfficientViT-SAM-L0 at 512, and the mask
decoder of `vit_b` at 16 boxes. Weights are random, tables and biases too: times and sizes are those
of any other weights, errors and masks are not. Each candidate is made in a process of its own and
measured in another; its calls take turns with those of segment_anything's eager float32, which a
third process makes, so that each ratio is of one time. No other candidate is in memory then.

The machine's own peak is that of torch's matrix products at three sizes; its share is what a
candidate's multiply-accumulates (those of the model before any step) reach of the peak of its kind
of numbers. What is not installed is named with its reason. Each row goes to runtimes.json when
it is measured, and rows that stand there stay if they are of the same settings, processor and
packages: an interrupted run goes on, a later one adds to it. Tables go to runtimes.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _subject import subject

import samcompress as sc
from samcompress.compile.backends import BACKENDS
from samcompress.compile.export import Export
from samcompress.compile.torch import Torch
from samcompress.core.errors import SamCompressError
from samcompress.core.files import write_whole
from samcompress.core.macs import decoder_macs, macs
from samcompress.core.predict import Embedding, decode, preprocess
from samcompress.core.transform import Transform
from samcompress.evaluate.environment import environment
from samcompress.evaluate.memory import Process

HERE = Path(__file__).parent
BASE = "segment_anything, float32"
PROMPTS = 16
WARM = 3  # calls of a new process that are slower than all later ones: its memory is new, too
SIZES = {"vit_b": 1024, "mobile_sam": 1024, "efficient_vit_sam_l0": 512, "decoder": 1024}
PRODUCTS = ((4096, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048))


def model(name: str, size: int) -> Any:
    """The model; for the decoder one of `vit_b`'s behind a small encoder."""
    if name != "decoder":
        return subject(name, size)
    small = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 1, "out_chans": 256}
    small |= {"global_attn_indexes": (), "mask_in_chans": 16, "decoder_mlp_dim": 2048}
    return subject("tiny", size, **small, decoder_num_heads=8, iou_head_hidden_dim=256)


def chains(name: str, args: argparse.Namespace) -> dict[str, sc.Pipeline]:
    """Name of a candidate to its pipeline; what it computes in is behind the comma."""
    fused, half = sc.attention.Fused(), sc.quantize.BFloat16()
    found: dict[str, tuple[Transform, ...]] = {}
    both = name in ("vit_b", "decoder")
    for title, first in (("", ()), ("fused, ", (fused,))) if both else (("", ()),):
        if title:
            found["fused, torch, float32"] = first
        found[f"{title}torch, bfloat16"] = *first, half
        if name != "decoder":
            integers = sc.quantize.Int8Dynamic(force=True)
            found[f"{title}torch, int8"] = *first, integers
            found[f"{title}torch in bfloat16, int8"] = *first, integers, half
        if args.compile:
            for kind, freeze in (("compiled", False), ("compiled and frozen", True)):
                step = Torch(decoder=name == "decoder", prompts=PROMPTS, freeze=freeze)
                found[f"{title}torch {kind}, float32"] = *first, step
                found[f"{title}torch {kind}, bfloat16"] = *first, half, step
        for backend, row in BACKENDS.items():
            # A runtime whose sizes are fixed gets those that are asked for.
            fixed = {} if row.dynamic_shapes else {"prompts": (PROMPTS,), "points": (2,)}
            for kind in row.dtypes:
                if (name == "decoder" and kind == "int8") or (
                    backend == "aot" and not args.compile
                ):
                    continue
                parts = {"decoder" if name == "decoder" else "precision": kind}
                step = Export(backend=backend, images=args.images, **parts, **fixed)
                found[f"{title}{backend}, {kind}"] = *first, step
    wanted = [key for key in found if any(part in key for part in args.only)]
    return {key: sc.Pipeline(found[key]) for key in wanted}


def made(name: str, key: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Save a candidate to a folder; says what it took, or why there is none."""
    process, start = Process(), time.process_time()
    sam = model(name, args.size or SIZES[name])
    facts: dict[str, Any] = {}
    try:
        if key != BASE:
            scenes = sc.shapes(args.images, seed=5, size=sam.image_encoder.img_size)
            sam = chains(name, args)[key](sam, data=scenes, consume=True, progress=False)
            facts["granted"] = sc.lineage(sam)[-1].state.get("granted")
        else:
            one = decoder_macs(sam, PROMPTS) if name == "decoder" else macs(sam).encoder
            facts["macs"] = one
        sc.save(sam, folder)
    except (SamCompressError, ValueError) as err:
        return {"reason": str(err).splitlines()[0]}
    return facts | {"prepare_s": time.process_time() - start, "prepare_mb": process.peak_mb()}


class Caller:
    """A saved candidate, ready to be called.

    Args:
        name: the subject.
        folder: where the candidate is.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.process = Process()
        self.baseline = self.process.now_mb()
        self.sam: Any = sc.load(folder).eval()
        side = self.sam.image_encoder.img_size
        scene = sc.shapes(1, seed=9, size=(side * 3 // 4, side))[0]
        drawn = torch.Generator().manual_seed(3)
        corner = torch.rand(PROMPTS, 2, generator=drawn) * side / 2
        self.boxes = torch.cat([corner, corner + side / 4], 1)
        self.of_decoder = name == "decoder"
        with torch.inference_mode():
            self.image, self.inside = preprocess(self.sam, scene.image)
        self.image, self.size = self.image[None].float(), scene.image.shape[:2]
        h, w = self.sam.prompt_encoder.image_embedding_size
        self.features = torch.randn(1, self.sam.prompt_encoder.embed_dim, h, w, generator=drawn)
        self.loaded = self.process.now_mb()

    def call(self) -> Any:
        """What is measured: an image through the encoder, or 16 boxes through the decoder."""
        if not self.of_decoder:
            return self.sam.image_encoder(self.image)
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=self.boxes, masks=None)
        return self.sam.mask_decoder(
            image_embeddings=self.features,
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    def timed(self) -> dict[str, float]:
        """One call: CPU seconds, seconds by the clock, highest memory meanwhile."""
        self.process.reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        self.call()
        taken = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        return taken | {"peak_mb": self.process.peak_mb()}

    def answers(self, path: Path) -> dict[str, float]:
        """Write the output and masks of the first call, which opens and compiles."""
        start, found = time.perf_counter(), self.call()
        first = time.perf_counter() - start
        if self.of_decoder:
            output, masks = found[0], found[0] > 0
        else:
            output = found
            embedding = Embedding(found.float(), self.inside, self.size)
            prompts = [sc.Prompt(box=box.tolist()) for box in self.boxes * 0.7]
            masks = decode(self.sam, embedding, prompts, full_size=False).logits > 0
        np.savez(path, output=output.float().numpy(), masks=masks.numpy())
        return {"first_s": first, "baseline_mb": self.baseline, "loaded_mb": self.loaded}


def serve(name: str, folder: Path) -> None:
    """Answer each line of the input with a line of JSON, until it ends."""
    with torch.inference_mode():
        caller = Caller(name, folder)
        for line in sys.stdin:
            asked = line.strip()
            found = caller.timed() if asked == "call" else caller.answers(Path(asked))
            print(json.dumps(found), flush=True)


class Worker:
    """A process that serves a candidate."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*command(args), "--serve", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> dict[str, float]:
        """Its answer to a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))

    def answers(self) -> dict[str, Any]:
        """Output and masks of the first call, and what it took."""
        path = self.folder.with_suffix(".npz")
        facts = self.ask(str(path))
        with np.load(path) as arrays:
            return facts | dict(arrays)

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def peaks() -> dict[str, float]:
    """GFLOP/s of torch's own matrix products, the best of three sizes and five calls each."""
    found = {}
    for kind in ("float32", "bfloat16", "int8"):
        best = 0.0
        for m, k, n in PRODUCTS:
            a, b = torch.ones(m, k), torch.ones(k, n)
            a, b = (t.to(getattr(torch, kind)) for t in (a, b))
            product: Any = torch._int_mm if kind == "int8" else torch.mm
            for _ in range(6):
                start = time.perf_counter()
                product(a, b)
                best = max(best, 2 * m * k * n / (time.perf_counter() - start) / 1e9)
        found[kind] = best
    return found


def command(args: argparse.Namespace) -> list[str]:
    """This script with the same settings, for a child."""
    settings = {"--threads": args.threads, "--images": args.images, "--size": args.size}
    flags = [part for item in settings.items() for part in map(str, item)]
    return [sys.executable, __file__, *flags, *(["--compile"] if args.compile else [])]


def child(args: argparse.Namespace, *asked: str) -> dict[str, Any]:
    """The last line of what this script prints in a process of its own."""
    done = subprocess.run([*command(args), *asked], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"reason": f"exit code {done.returncode}: {lines[-1]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


class Kept:
    """Measured rows in the result file.

    Args:
        path: the file; its rows are taken up if they can be compared with new ones.
        head: settings, environment and peaks of this run.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        old = json.loads(path.read_text()) if path.exists() else None
        if old and comparable(old) == comparable(head):
            self.rows = {(row["subject"], row["name"]): row for row in old["rows"]}

    def wanted(self, name: str, keys: list[str]) -> list[str]:
        """Candidates that have no times yet."""
        return [key for key in keys if not self.rows.get((name, key), {}).get("calls")]

    def put(self, row: dict[str, Any]) -> None:
        """Keep a row, in the place of an older one."""
        self.rows[row["subject"], row["name"]] = row
        write_whole(self.path, (json.dumps(self.result(), indent=1) + "\n").encode())

    def result(self) -> dict[str, Any]:
        """Everything, subjects and candidates in order."""
        order = list(SIZES)
        rows = sorted(self.rows.values(), key=lambda row: order.index(row["subject"]))
        return self.head | {"rows": rows}


def comparable(doc: dict[str, Any]) -> list[Any]:
    """What must be equal for rows to stand in one table."""
    settings = [doc["settings"][key] for key in ("size", "calls", "images", "threads")]
    return [doc["format"], *settings, doc["environment"]["cpu"], doc["environment"]["versions"]]


def measure(name: str, args: argparse.Namespace, kept: Kept) -> None:
    """The missing rows of one subject."""
    keys = kept.wanted(name, list(chains(name, args)))
    if not keys:
        return
    with tempfile.TemporaryDirectory(prefix="samcompress-") as scratch:
        home = Path(scratch) / "base"
        base = {"subject": name, "name": BASE} | child(args, "--make", name, BASE, str(home))
        if "reason" in base:
            return kept.put(base)
        eager = Worker(name, home, args)
        expected = eager.answers()
        for _ in range(WARM):
            eager.ask("call")
        base |= {key: expected[key] for key in ("first_s", "baseline_mb", "loaded_mb")}
        base |= {"error": 0.0, "mask_iou": 1.0, "bytes": weight(home)}
        calls = kept.rows.get((name, BASE), {}).get("calls", [])
        for key in keys:
            row = candidate(name, key, Path(scratch) / "candidate", eager, expected, args)
            calls = [*calls, *row.get("base_calls", [])]
            kept.put(base | {"calls": calls})
            kept.put(row)
            print(name, key, row.get("reason") or f"{ratio(row):.2f} times", flush=True)
        eager.close()
    return None


def candidate(
    name: str,
    key: str,
    folder: Path,
    eager: Worker,
    expected: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """A row: how the candidate was made, and its calls in turns with eager's."""
    row = {"subject": name, "name": key}
    row |= {"recipe": [repr(step) for step in chains(name, args)[key]]}
    row |= child(args, "--make", name, key, str(folder))
    if "reason" in row:
        return row
    worker = Worker(name, folder, args)
    found = worker.answers()
    output, masks = found.pop("output"), found.pop("masks")
    off = np.linalg.norm(output - expected["output"]) / np.linalg.norm(expected["output"])
    both, either = masks & expected["masks"], masks | expected["masks"]
    overlap = both.sum((-2, -1)) / np.maximum(either.sum((-2, -1)), 1)
    row |= found | turns(eager, worker, args.calls)
    row |= {"error": float(off), "mask_iou": float(overlap.mean()), "bytes": weight(folder)}
    worker.close()
    shutil.rmtree(folder)
    return row


def turns(eager: Worker, other: Worker, calls: int) -> dict[str, list[dict[str, float]]]:
    """Calls of both in turns; the first ones, after minutes without any, do not count."""
    pairs = [(eager.ask("call"), other.ask("call")) for _ in range(calls + 1)][1:]
    return {"base_calls": [a for a, _ in pairs], "calls": [b for _, b in pairs]}


def weight(folder: Path) -> int:
    """Bytes of all files of a saved model."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def median(calls: list[dict[str, float]], key: str = "wall_s") -> float:
    """The median of a figure."""
    return statistics.median(call[key] for call in calls)


def ratio(row: dict[str, Any]) -> float:
    """How many times as fast as eager, whose calls took turns with these."""
    return median(row["base_calls"]) / median(row["calls"])


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    settings, peak = result["settings"], result["peaks_gflops"]
    best = ", ".join(f"{kind} {value:.0f}" for kind, value in peak.items())
    lines = [
        "# Runtimes\n",
        f"{settings['threads']} thread(s) of {result['environment']['cpu']}, torch "
        f"{result['environment']['versions']['torch']}; seconds by the clock, medians of "
        f"{settings['calls']} calls in turns with eager. Error: relative L2 of the output. "
        "Memory: the whole process, above its imports; extra: above the loaded model, which in "
        f"other runtimes opens later. Peak of torch's matrix products, GFLOP/s: {best}. Made by "
        "`docs/results/runtimes.py`.",
    ]
    for name in dict.fromkeys(row["subject"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["subject"] == name]
        base = next((row for row in rows if row["name"] == BASE and row.get("calls")), None)
        lines += [f"\n## {name}\n"]
        if base:
            lines += [
                "| | s | times as fast | share of peak | error | mask IoU | MB memory | extra "
                "| MB on disk | to prepare, CPU s |",
                "|---|---|---|---|---|---|---|---|---|---|",
                *(cells(row, base, peak) for row in rows if row.get("calls")),
            ]
        absent = [f"- {row['name']}: {row['reason']}" for row in rows if "reason" in row]
        lines += ["", "Not measured:", "", *absent] if absent else []
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any], base: dict[str, Any], peak: dict[str, float]) -> str:
    """A row in Markdown."""
    seconds, memory = median(row["calls"]), median(row["calls"], "peak_mb")
    fast = 1.0 if row is base else ratio(row)
    kind = row["name"].rpartition(", ")[2]
    share = 2 * base["macs"] / seconds / 1e9 / peak[kind] if kind in peak else float("nan")
    return (
        f"| {row['name']} | {seconds:.3g} | {fast:.2f} | {share:.2f} | {row['error']:.2g} "
        f"| {row['mask_iou']:.4f} | {memory - row['baseline_mb']:.0f} "
        f"| {memory - row['loaded_mb']:.0f} | {row['bytes'] / 1e6:.3g} | {row['prepare_s']:.0f} |"
    )


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--size", type=int, default=0, help="side of the input instead of its own")
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each candidate")
    parser.add_argument("--images", type=int, default=4, help="to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="candidates named like these")
    parser.add_argument("--compile", action="store_true", help="torch's compiler too: minutes more")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of both files")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        return serve(args.serve[0], Path(args.serve[1]))
    if args.make or args.peaks:
        found = made(*args.make[:2], Path(args.make[2]), args) if args.make else peaks()
        print(json.dumps(found))
        return None
    hidden = ("out", "make", "serve", "peaks", "subjects", "only")
    head = {
        "format": 3,
        "environment": environment(),
        "settings": {k: v for k, v in vars(args).items() if k not in hidden},
        "peaks_gflops": child(args, "--peaks"),
    }
    kept = Kept(args.out / "runtimes.json", head)
    for name in args.subjects:
        measure(name, args, kept)
    page = table(kept.result())
    write_whole(args.out / "runtimes.md", page.encode())
    print(page)
    return None


if __name__ == "__main__":
    main()
