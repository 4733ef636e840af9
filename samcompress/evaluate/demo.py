"""The whole library in a minute, offline: compress the shipped model, measure, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..core._progress import ProgressLike
from ..core.checkpoint import save
from ..core.data import Dataset, shapes
from ..core.errors import MissingDependencyError
from ..core.figures import png
from ..core.files import write_whole
from ..core.load import load
from ..core.pipeline import Pipeline
from ..core.registry import get
from .benchmark import benchmark
from .devices import pinned
from .latency import Rounds
from .recipes import recipe
from .report import Report
from .row import absent_row

# Enough calls to rank models on a busy machine, few enough that the demo ends within minutes.
ROUNDS = Rounds(warmup_calls=3, warmup_seconds=0.1, calls=10, seconds=0.3, max_seconds=10.0)
BASE = 128  # px; at the 256 px of `mini` as it ships the demo would take three times as long
SIDE = 96  # what the 512 px of the recipe for large models becomes beside that

NEXT = """\
Next, on your own SAM and data (official .pth, transformers folder or Hub id; COCO, SA-1B, masks):
  samcompress apply small --model sam_vit_b_01ec64.pth --data DATA --out small/
  samcompress bench sam_vit_b_01ec64.pth small/ --data DATA --json r.json --html r.html
  samcompress list        all techniques and recipes; samcompress doctor checks this machine"""


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        report: base and variants, measured.
        files: what was written.
    """

    report: Report
    files: tuple[Path, ...]


def demo(
    out: str | Path = "samcompress-demo",
    *,
    images: int = 16,
    rounds: Rounds = ROUNDS,
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
    progress: ProgressLike = True,
) -> Demo:
    """Compress the shipped model by several chains, measure all, write a report.

    Nothing is downloaded: data are drawn scenes, other ones for calibration than for measuring. A
    chain whose optional package is absent gives a row that says what to install.

    Args:
        out: folder for ``report.html``, ``report.json``, ``pareto.png`` and the models.
        images: scenes to calibrate on, and as many to measure on.
        rounds: how often calls are timed.
        memory: measure it, in a process of its own for each model.
        say: is told what is being done.
        progress: bars, as everywhere.

    Raises:
        CheckpointError: if `out` cannot be written.
    """
    folder = Path(out)
    # Layers of so small images are too short for two threads: they would wait for one another.
    with pinned(1):
        models, absent, test = _compress(folder, images, say, progress)
        say(f"measuring {len(models)} models on {len(test)} scenes they have not seen")
        report = benchmark(models, test, rounds=rounds, memory=memory, threads=1, progress=progress)
        rows = [absent_row(name, "cpu", base=False, reason=why) for name, why in absent.items()]
        report = Report({**report.doc, "rows": report.rows + rows})
        files = tuple(folder / name for name in ("report.html", "report.json", "pareto.png"))
        report.html(files[0], data=test, models=models)
    report.save(files[1])
    write_whole(files[2], png(report.pareto()))
    return Demo(report, files)


def _compress(
    folder: Path, images: int, say: Callable[[str], None], progress: ProgressLike
) -> tuple[dict[str, nn.Module], dict[str, str], Dataset]:
    """Models by name, reasons of those that could not be made, and the scenes to measure on."""
    sam = get("substitute.image_size", size=BASE)(load("mini"))
    calibration, test = shapes(images, seed=1001), shapes(images, seed=2002)
    models: dict[str, nn.Module] = {"base": sam}
    absent: dict[str, str] = {}
    for name, chain in chains().items():
        say(f"{name}: {' | '.join(step.label for step in chain)}")
        try:
            models[name] = chain(sam, data=calibration, progress=progress)
        except MissingDependencyError as err:
            absent[name] = err.fix or err.what
            continue
        save(models[name], folder / "models" / name)
    return models, absent, test


def chains() -> dict[str, Pipeline]:
    """The recipes that ship with the package, and the first step of ``recover`` by itself."""
    names = ("recover", "small", "cpu", "mobile")
    found = {name: recipe(name, image_size=SIDE if name == "mobile" else None) for name in names}
    return {"pruned": Pipeline(found["recover"].steps[:1]), **found}
