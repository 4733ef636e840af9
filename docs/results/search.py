"""A search over chains of `mini` that need no training: which are on the front, and why?

    python docs/results/search.py --data DATA --work WORK

DATA holds ``coco/train2017`` and ``coco/val2017`` with annotations. Techniques that look at images
get some of train2017; masks are judged on images of val2017, which `mini` has not seen. Every chain
is kept in WORK when it is measured: kill the run at any moment and make the same call again.
With ``--threads 1`` on a quiet core the times mean something; on a busy one only their ratios do,
as every chain takes turns with the base.

Writes ``search.md`` and, in ``docs/images``, ``search.png``; the page is ``WORK/report.html``, and
recipes of all chains are in ``WORK/recipes``. With ``--check`` the models of the front are made
again from their recipe files; their weights and accuracy have to be those that the search found.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import samcompress as sc
from samcompress.core.figures import png
from samcompress.core.files import write_whole
from samcompress.evaluate.search import search
from samcompress.evaluate.study import Study

HERE = Path(__file__).with_suffix("")
FIGURE = HERE.parents[1] / "images" / "search.png"


def main() -> None:
    """Search, write, and make the worst masks of the front again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--images", type=int, default=6, help="to judge on")
    parser.add_argument("--calibration", type=int, default=4, help="images for techniques")
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--calls", type=int, default=3, help="timed calls of each part")
    parser.add_argument("--budget", action="append", default=[])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--published", nargs="*", default=(), help="models laid over the picture")
    parser.add_argument("--check", action="store_true", help="make the front again from recipes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sam = sc.load(args.model)
    judged = sc.data.open(f"{args.data}/coco@val2017").subset(args.images, seed=args.seed)
    seen = sc.data.open(f"{args.data}/coco@train2017").subset(args.calibration, seed=args.seed)
    study = search(
        None,
        args.budget,
        sam,
        judged,
        calibration=seen,
        chains=args.chains,
        seed=args.seed,
        rounds=sc.evaluate.Rounds(
            warmup_calls=1, warmup_seconds=0, calls=args.calls, seconds=0, max_seconds=600
        ),
        memory=args.memory,
        threads=args.threads,
        out=args.work,
    )
    write_whole(HERE.with_suffix(".md"), page(study).encode())
    write_whole(FIGURE, png(study.pareto(published=args.published)))
    names = {worst.name for worst in study.worst()}
    models = {name: study.recipe(name)(sam, data=seen, progress=False) for name in names}
    models[study.base["name"]] = sam
    study.html(args.work / "report.html", data=judged, models=models, published=args.published)
    print(study)
    print(f"techniques on the front: {', '.join(techniques(study))}")
    if args.check:
        check(study, sam, judged, seen, args.work)


def techniques(study: Study) -> list[str]:
    """Techniques of the chains on the front."""
    chains = [row for row in study.front if not row["base"]]
    return sorted({step.label for row in chains for step in study.recipe(row["name"])})


def check(study: Study, sam: Any, judged: Any, seen: Any, work: Path) -> None:
    """Make each model of the front from its recipe file, and compare it with its row."""
    recipes = {sc.Pipeline.load(file): file.name for file in (work / "recipes").glob("*.json")}
    for row in study.front:
        if row["base"]:
            continue
        chain = study.recipe(row["name"])
        again = sc.Pipeline.load(work / "recipes" / recipes[chain])(sam, data=seen, progress=False)
        what = {"prompts": ("box", "point"), "latency": False, "memory": False, "progress": False}
        (found,) = sc.evaluate.benchmark({"again": again}, judged, **what).rows
        before, now = ([a["miou"] for a in r["accuracy"]] for r in (row, found))
        same = before == now and found["weights_sha256"] == row["weights_sha256"]
        print(f"{'same' if same else 'DIFFERS'}: {recipes[chain]}")


def page(study: Study) -> str:
    """The tables as Markdown."""
    environment: dict[str, Any] = study.report.doc["environment"]
    data = study.report.doc["data"]
    cpu = environment.get("cpu")
    model = cpu.get("model") if isinstance(cpu, dict) else cpu
    return "\n".join(
        [
            "# Search over chains of `mini`",
            "",
            f"{data['name']}, {data['n_images']} images, {data['n_instances']} objects; {model}.",
            f"Techniques on the front: {', '.join(techniques(study))}.",
            "",
            "![front](../images/search.png)",
            "",
            study.table().markdown(),
            "",
            study.report.markdown(),
            study.refusals().markdown() if study.refused else "",
            "",
        ]
    )


if __name__ == "__main__":
    main()
