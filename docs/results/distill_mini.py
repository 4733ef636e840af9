"""Distil `mini` into a third of its encoder: embeddings alone, or masks after them.

    python docs/results/distill_mini.py --data DATA --work WORK

DATA holds ``coco/train2017`` and ``coco/val2017`` with annotations, and ``sa1b_train``. A student
of about a third of the encoder's multiply-accumulates learns by `Encoder`; from there it goes on by
`PromptLoop`, or by `Encoder` again for at least as long. All are asked for the same objects of
images that none has seen. Every training tells its time before its first step; an interrupted run
goes on in WORK, from the last checkpoint and the last arm that was measured. Writes
``distill_MODEL.md`` and ``.json`` beside this script, or at ``--out``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from _rows import Rows, accuracies, plain

import samcompress as sc
from samcompress.core.checkpoint import fingerprint
from samcompress.core.files import write_whole

PROMPTS = ("box", "point", "clicks-3", "clicks-5")


def learn(name: str, step: Any, sam: Any, teacher: Any, data: Any, work: Path) -> tuple[Any, float]:
    """The model after a step, from the folder of an earlier run if there is one, and its time.

    The time is that of the last go, if the run was interrupted.
    """
    folder, clock = work / name, work / f"{name}.json"
    if not folder.exists():
        start = time.perf_counter()
        found = step(sam, teacher=teacher, data=data, workdir=work, progress=False)
        clock.write_text(json.dumps(time.perf_counter() - start))
        sc.save(found, folder)
    return sc.load(folder), json.loads(clock.read_text())


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher", default="mini")
    parser.add_argument("--steps", type=int, nargs=3, default=(500, 250, 500))
    parser.add_argument("--images", type=int, help="fewer images to judge on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="path without ending")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    teacher = sc.load(args.teacher)
    photos = sc.data.join(
        sc.data.open(f"{args.data}/coco@train2017"),
        sc.data.open(args.data / "sa1b_train"),
        name="photos",
    )
    held_out = sc.data.open(f"{args.data}/coco@val2017")[: args.images]
    names = ("teacher", "cut", "encoder", "encoder, encoder", "encoder, prompt_loop")
    rows = Rows(
        args.work,
        dict.fromkeys(names, "arm"),
        weights=fingerprint(teacher),
        judged=held_out.fingerprint,
        learned=photos.fingerprint,
        steps=args.steps,
    )
    work = args.work / rows.key
    work.mkdir(exist_ok=True)
    if not (work / "cut").exists():
        fewer = sc.prune.Blocks(count=len(teacher.image_encoder.blocks) * 3 // 8)
        cut = fewer | sc.prune.Heads(ratio=0.5) | sc.prune.Mlp(ratio=0.5)
        sc.save(cut(teacher, data=photos.subset(32, seed=0), progress=False), work / "cut")
    student = sc.load(work / "cut")
    share = sc.evaluate.macs(student).encoder / sc.evaluate.macs(teacher).encoder

    first, loop, more = args.steps
    encoder = {"batch_size": 4, "lr": 5e-4, "precision": "bf16"}
    masks = {"batch_size": 4, "prompts": 6, "rounds": 3, "lr": 3e-4, "precision": "bf16"}
    started, spent = learn(
        "encoder", sc.distill.Encoder(steps=first, **encoder), student, teacher, photos, work
    )
    arms = {"teacher": (teacher, 0.0), "cut": (student, 0.0), "encoder": (started, spent)}
    for name, step in {
        "encoder, encoder": sc.distill.Encoder(steps=more, seed=1, **encoder),
        "encoder, prompt_loop": sc.distill.PromptLoop(steps=loop, **masks),
    }.items():
        model, seconds = learn(name, step, started, teacher, photos, work)
        arms[name] = (model, spent + seconds)

    def answers(model: Any) -> Any:
        found = sc.evaluate.accuracies(model, held_out, PROMPTS, feedback="logits", keep_masks=True)
        return plain(found)

    found = {
        name: accuracies(rows.get(name, lambda model=model: answers(model)))
        for name, (model, _) in arms.items()
    }
    table = []
    for name, results in found.items():
        row: dict[str, Any] = {"name": name, "minutes": round(arms[name][1] / 60, 1)}
        for prompt, result, base, taught in zip(
            PROMPTS, results, found["encoder, encoder"], found["teacher"], strict=True
        ):
            change = result.against(base)
            row[prompt] = {
                "miou": result.miou,
                "ci": list(result.ci()),
                "delta": change.delta,
                "delta_ci": list(change.ci),
                "agreement": sc.evaluate.agreement(result, taught),
            }
        table.append(row)
    doc = {
        "model": args.teacher,
        "data": held_out.name,
        "images": len(held_out),
        "encoder_macs_share": share,
        "steps": list(args.steps),
        "environment": sc.evaluate.environment(),
        "rows": table,
    }
    out = args.out or Path(__file__).with_name(f"distill_{args.teacher}")
    write_whole(out.with_suffix(".json"), (json.dumps(doc, indent=1) + "\n").encode())
    write_whole(out.with_suffix(".md"), page(doc).encode())
    print(page(doc))


def page(doc: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        f"# Distilling `{doc['model']}` to {doc['encoder_macs_share']:.0%} of its encoder's MACs",
        "",
        f"Steps (encoder, prompt loop, encoder again): {doc['steps']}. mIoU with the annotated",
        f"masks on {doc['images']} images of {doc['data']} that neither model was trained on; in",
        "brackets the difference to `encoder, encoder`, paired, with its 95 % interval; then mean",
        "IoU with the teacher's masks. The last mask is fed back with each click.",
        "",
        "| model | minutes | " + " | ".join(PROMPTS) + " |",
        "|---" * (2 + len(PROMPTS)) + "|",
    ]
    for row in doc["rows"]:
        cells = [row["name"], f"{row['minutes']:.0f}"]
        for prompt in PROMPTS:
            cell = row[prompt]
            low, high = cell["delta_ci"]
            cells.append(
                f"{cell['miou']:.3f} ({cell['delta']:+.3f}, {low:+.3f} to {high:+.3f}); "
                f"{cell['agreement']:.3f}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
