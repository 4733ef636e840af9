"""Train `mini`, a small SAM meant to ship with samcompress, on real images and drawn scenes.

    python examples/train_mini.py train  --data DATA --work WORK    # hours on a CPU core; resumes
    python examples/train_mini.py train  --data DATA --work WORK --device cuda --gpu
    python examples/train_mini.py score  --data DATA --work WORK    # what each lesson has gained
    python examples/train_mini.py export --work WORK                # into the package

DATA holds ``coco/train2017`` with its annotations, ``sa1b_train`` (SA-1B's layout) and ``bsds500``;
`score` reads ``coco/val2017``, which no lesson sees.

From random weights a promptable model starts slowly, so there are five lessons, each a resumable
run: the image encoder learns which pixels belong together; prompt encoder and decoder learn what
prompts mean, on drawn ellipses that no image shows; all learns together at half the side; all
learns at full size, twice. The last three are `sc.distill.Supervised`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core import _fit
from samcompress.core._draws import generator
from samcompress.core._objective import Objective, Share
from samcompress.core.files import whole
from samcompress.distill import Augment, Supervised
from samcompress.distill._samples import Batch, Frame, Samples
from samcompress.distill.supervised import Rounds
from samcompress.evaluate.prompts import Rule

log = logging.getLogger("train_mini")
SEED = 7
HALF = 128  # side of the first three lessons
DISC = 0.08  # radius of the prior of a point, in the longest side
FINER = 2  # places along the side of a pixel where an ellipse is looked up
NEAR = Augment(scale=(0.6, 3.0))  # at half the side, so that objects keep their size in pixels
FULL = Augment(scale=(0.6, 2.0))

Lesson = Callable[[Any, dict[str, "sc.data.Dataset"]], nn.Module]

# What a lesson costs: steps, and images a step.
CPU = {
    "pixels": (2500, 8),
    "geometry": (2200, 4),
    "half": (2500, 8),
    "full": (1000, 4),
    "last": (1400, 4),
}
GPU = {
    "pixels": (3000, 32),
    "geometry": (4000, 16),
    "half": (12000, 32),
    "full": (6000, 32),
    "last": (3000, 32),
}


def datasets(root: Path) -> dict[str, sc.data.Dataset]:
    """What the lessons learn from, and what they are judged by."""
    photos = [
        sc.data.open(f"{root}/coco@train2017"),
        sc.data.open(root / "sa1b_train"),
        *(sc.data.masks(root / "bsds500" / part) for part in ("train", "val", "test")),
    ]
    drawn = sc.data.shapes(400, seed=SEED, size=256)
    return {
        "early": sc.data.join(*photos, drawn, name="photos and drawn scenes"),
        "late": sc.data.join(*photos, name="photos"),
        "judge": sc.data.open(f"{root}/coco@val2017"),
    }


# ---------------------------------------------------------------------------- the lesson on pixels


class Pixels(Objective):
    """Without prompts: which pixels belong together.

    A small head that is thrown away looks at the features of one pixel, and has to find the other
    pixels of its object among the upscaled features. Object and rest weigh the same: at the
    beginning, the easiest mask would be the empty one.
    """

    source: Samples

    def __init__(self, student: Sam, source: Samples) -> None:
        super().__init__(student, source)
        coarse = student.prompt_encoder.embed_dim
        fine = coarse // 8
        self.head = nn.Sequential(nn.Linear(coarse + fine, 64), nn.ReLU(), nn.Linear(64, fine))

    def forward(self, drawn: Batch, step: int) -> Mapping[str, Tensor]:
        """The balanced cross-entropy of one pixel's mask for each object."""
        device = self.head[0].weight.device
        drawn = drawn.to(device)
        coarse = self.student.image_encoder(drawn.images)
        fine = self.student.mask_decoder.output_upscaling(coarse).float()
        g = generator(SEED, "pixel", step)
        target, valid = drawn.target, drawn.valid[drawn.owner]
        inside = (target >= 0.5).flatten(1).float().cpu() + 1e-9
        cell = torch.multinomial(inside, 1, generator=g)[:, 0].to(device)
        side = target.shape[-1]
        x, y, ratio = cell % side, cell // side, side // coarse.shape[-1]
        near = coarse.float()[drawn.owner, :, y // ratio, x // ratio]
        seen = torch.cat([fine[drawn.owner, :, y, x], near], 1)
        logits = torch.einsum("pc,pchw->phw", self.head(seen).float(), fine[drawn.owner])
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        parts = (target * valid, (1 - target) * valid)
        weight = sum(p / p.sum((1, 2), keepdim=True).clamp(min=1) for p in parts)
        return {"pixels": (bce * weight).sum((1, 2)).mean()}


def start(source: Samples) -> Sam:
    """`mini` with random weights that learn fast.

    Relative positions are not zero, so that they are used; the waves that encode coordinates are
    longer than SAM's, as the grid is coarser. Patches are embedded by their principal components,
    whitened in part, so fine detail counts from the beginning.
    """
    torch.manual_seed(SEED)
    sam = sc.build("mini", image_size=HALF, seed=SEED)
    g = generator(SEED, "positions")
    with torch.no_grad():
        sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= 0.7
        for name, p in sam.image_encoder.named_parameters():
            if "rel_pos" in name or name == "pos_embed":
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
        stem = sam.image_encoder.patch_embed.proj
        side, width = stem.kernel_size[0], stem.out_channels
        images = torch.cat([source.draw(10_000_000 + i, Share()).images for i in range(40)])
        patches = F.unfold(images, side, stride=side).mT.flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T.cov())
        values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
        share = (values / values[0]).clamp(min=1e-3)
        weight = (vectors / (share * values[0]).sqrt() * share**0.2).T
        stem.weight.copy_(weight.view(stem.weight.shape))
        stem.bias.copy_(-weight @ patches.mean(0))
    return sam


def pixels(data: sc.data.Dataset, args: argparse.Namespace) -> Sam:
    """The first lesson."""
    steps, size = args.cost["pixels"]
    frame = Frame(HALF, HALF // 2, *statistics())  # as fine as the upscaled features
    source = Samples(data, [frame], batch_size=size, prompts=12, augment=NEAR, seed=SEED)
    objective = Pixels(start(source), source).to(args.device)
    plan = _fit.Plan(
        steps=steps,
        lr=1.5e-3,
        warmup=0.04,
        weight_decay=0.02,
        clip=1.0,
        precision="bf16",
        seed=SEED,
    )
    parts = ("student.image_encoder", "student.mask_decoder.output_upscaling", "head")
    place = args.work / "pixels.safetensors"
    _fit.fit(objective, plan, parts=parts, checkpoint=place, workers=args.workers)
    return objective.student


def statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of SAM's pixels."""
    config = sc.SamConfig()
    return config.pixel_mean, config.pixel_std


# -------------------------------------------------------------------------- the lesson on geometry


class Ellipses:
    """Draws objects without images: boxes of all sizes, filled by something like an ellipse."""

    def __init__(self, images: int, prompts: int) -> None:
        self.images, self.prompts = images, prompts

    def draw(self, step: int, share: Share) -> Batch:
        """A part of the batch of a step."""
        places = [place for place, _ in share.of(range(self.images))]
        found = [self._objects(generator(SEED, "ellipses", step, place)) for place in places]
        none, size = torch.zeros(len(places), 3, 1, 1), (HALF, HALF)
        return Batch(
            images=none,
            others=(),
            sizes=(size,) * len(places),
            valid=torch.ones(len(places), HALF, HALF),
            target=torch.cat([target for target, _ in found]),
            boxes=torch.cat([boxes for _, boxes in found]),
            owner=torch.arange(len(places)).repeat_interleave(self.prompts),
            places=tuple(places),
            indices=tuple(places),
        )

    def _objects(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        n = self.prompts
        size = HALF / 64 * 50 ** torch.rand(n, generator=g)
        shape = torch.exp(0.5 * torch.randn(n, generator=g)).clamp(0.25, 4).sqrt()
        sides = torch.stack([size * shape, size / shape], 1).clamp(2, 0.94 * HALF)
        centre = sides / 2 + torch.rand(n, 2, generator=g) * (HALF - sides)
        # From an ellipse, 2, towards a rectangle.
        power = (2 + 2 * torch.rand(n, generator=g) ** 2)[:, None, None]
        pixel = (torch.arange(FINER * HALF) + 0.5) / FINER
        x, y = ((pixel - centre[:, i, None]).abs() / (sides[:, i, None] / 2) for i in (0, 1))
        full = (x[:, None, :] ** power + y[:, :, None] ** power <= 1).float()
        boxes = torch.cat([centre - sides / 2, centre + sides / 2], 1)
        return F.avg_pool2d(full[:, None], FINER)[:, 0], boxes


class Geometry(Rounds):
    """The loop of prompts, on embeddings of images that have nothing to do with the objects."""

    def __init__(self, student: nn.Module, kept: Tensor, settings: Supervised, steps: int) -> None:
        source: Any = Ellipses(settings.batch_size, settings.prompts)
        source.frames = (Frame(HALF, HALF, *statistics()),)
        super().__init__(student, source, settings, steps)
        self.kept = kept

    def features(self, drawn: Batch) -> Tensor:
        """Embeddings in the order of the places, turned by the step."""
        return self.kept[torch.tensor(drawn.places) % len(self.kept)].to(drawn.owner.device)


def geometry(sam: nn.Module, data: sc.data.Dataset, args: argparse.Namespace) -> nn.Module:
    """The second lesson."""
    steps, size = args.cost["geometry"]
    frame = Frame(HALF, HALF, *statistics())
    photos = Samples(data, [frame], batch_size=64, prompts=1, augment=NEAR, seed=SEED)
    with torch.no_grad():
        kept = sam.image_encoder(photos.draw(0, Share()).images)
    settings = Supervised(
        batch_size=size, prompts=8, rounds=2, turn=(0.9, 1.0), feed=0.7, box_jitter=0.03, seed=SEED
    )
    objective = Geometry(sam, kept, settings, steps).to(args.device)
    plan = _fit.Plan(
        steps=steps,
        lr=2e-3,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        clip=1.0,
        precision="bf16",
        seed=SEED,
    )
    parts = ("student.prompt_encoder", "student.mask_decoder")
    _fit.fit(objective, plan, parts=parts, checkpoint=args.work / "geometry.safetensors")
    return sam


# ------------------------------------------------------------------------------------ all lessons


def lessons(args: argparse.Namespace) -> dict[str, Lesson]:
    """All lessons, in order."""

    def supervised(name: str, source: str, resize: int | None, **fields: Any) -> Lesson:
        steps, size = args.cost[name]
        lesson = Supervised(
            steps=steps,
            batch_size=size,
            precision="bf16",
            workers=args.workers,
            seed=SEED,
            **fields,
        )
        sized = [sc.substitute.ImageSize(size=resize)] if resize else []
        step = sc.Pipeline([*sized, lesson], any_order=True)
        return lambda sam, data: step(
            sam, data=data[source], workdir=args.work, device=args.device, progress=False
        )

    return {
        "pixels": lambda _, data: pixels(data["early"], args),
        "geometry": lambda sam, data: geometry(sam, data["early"], args),
        "half": supervised(
            "half",
            "early",
            None,
            rounds=2,
            lr=8e-4,
            turn=(0.8, 1.0),
            augment=NEAR,
            ema=0.999,
            feed=0.8,
            box_jitter=0.03,
        ),
        "full": supervised(
            "full",
            "late",
            256,
            rounds=2,
            lr=6e-4,
            augment=FULL,
            ema=0.998,
            feed=0.8,
            box_jitter=0.03,
        ),
        # SAM's focal loss counts what is not the object three times: uncertain masks shrink.
        "last": supervised(
            "last",
            "late",
            None,
            rounds=2,
            lr=5e-4,
            turn=(0.99, 1.0),
            augment=FULL,
            ema=0.998,
            feed=0.8,
            box_share=0.6,
            box_jitter=0.03,
        ),
    }


def train(args: argparse.Namespace) -> None:
    """Train, or go on from the checkpoints in the work folder."""
    args.work.mkdir(parents=True, exist_ok=True)
    data = datasets(args.data)
    sam: nn.Module | None = None
    for name, lesson in lessons(args).items():
        folder = args.work / name
        if folder.exists():
            sam = sc.load(folder)
            continue
        log.info("lesson %s", name)
        sam = lesson(sam, data)
        sc.save(sam, folder)


def priors(data: sc.data.Dataset) -> dict[str, float]:
    """What masks have that never look at the image: an ellipse in the box, a disc at the point."""
    found: dict[str, list[float]] = {"box": [], "point": []}
    rule = Rule.parse("point")
    for sample in data:
        y, x = np.mgrid[: sample.size[0], : sample.size[1]] + 0.5
        for thing in sample.instances:
            if thing.crowd:
                continue
            x0, y0, x1, y1 = thing.box
            across, down = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
            prompt = rule.start(thing, thing.mask, image_id=sample.id)
            px, py = np.asarray(prompt.points)[0]
            near = (x - px) ** 2 + (y - py) ** 2 <= (DISC * max(sample.size)) ** 2
            for name, guess in (("box", across**2 + down**2 <= 1), ("point", near)):
                found[name].append((guess & thing.mask).sum() / (guess | thing.mask).sum())
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def score(args: argparse.Namespace) -> None:
    """Print and keep what each lesson's model is worth on images no lesson saw."""
    data = datasets(args.data)["judge"]
    found: dict[str, Any] = {"priors": priors(data)}
    print("priors", found["priors"])
    for name in ("geometry", "half", "full", "last"):
        if not (args.work / name).exists():
            continue
        sam, rows = sc.load(args.work / name), []
        for prompt, feedback in (("box", "none"), ("point", "none"), ("clicks-3", "logits")):
            for choice in ("single", "predicted", "oracle") if prompt == "point" else ("single",):
                result = sc.evaluate.accuracy(sam, data, prompt, feedback=feedback, choice=choice)
                scores, ious = ([getattr(r, k) for r in result.records] for k in ("score", "iou"))
                low, high = result.ci()
                row = {
                    "protocol": result.protocol,
                    "miou": round(result.miou, 4),
                    "interval": [round(low, 4), round(high, 4)],
                    "by_size": {k: round(v["miou"], 4) for k, v in result.by_size().items()},
                    "spearman": round(float(spearmanr(scores, ious).statistic), 4),
                    "objects": result.n_instances,
                    "images": result.n_images,
                }
                rows.append(row)
                print(name, row, flush=True)
        found[name] = rows
    with whole(args.work / "scores.json") as place:
        place.write_text(json.dumps(found, indent=1) + "\n")


def export(args: argparse.Namespace) -> None:
    """Write the weights of the last lesson, as float16."""
    sam = sc.load(args.work / "last")
    weights = {k: v.half().contiguous() for k, v in sam.state_dict().items()}
    with whole(args.to) as place:
        save_file(weights, place)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "score", "export"))
    parser.add_argument("--data", type=Path, help="folder of the images")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu", action="store_true", help="the longer lessons")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, default=Path("samcompress/core/mini/model.safetensors"))
    args = parser.parse_args()
    args.cost = GPU if args.gpu else CPU
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    {"train": train, "score": score, "export": export}[args.command](args)


if __name__ == "__main__":
    main()
