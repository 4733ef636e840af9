"""Train `tiny`, the test-sized SAM that ships with samcompress, on drawn scenes.

    python examples/train_tiny.py train  --work /tmp/tiny    # about an hour on one core; resumes
    python examples/train_tiny.py export --work /tmp/tiny    # into the package

Losses and prompts follow SAM (arXiv 2304.02643): a point or a jittered box, then clicks where the
masks are wrong, with the last mask as a prompt; of three masks only the best learns. From random
weights that starts slowly, so there are three lessons: the image encoder learns which pixels belong
together, then the decoder what prompts mean, then all learns together, first with BCE and dice, at
the end with SAM's focal loss and dice.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from samcompress.core._draws import batch, generator
from samcompress.core._fit import Plan, fit, trained
from samcompress.core._objective import Objective, Share
from samcompress.core._progress import Progress
from samcompress.core.build import build
from samcompress.core.data import shapes

log = logging.getLogger("train_tiny")
SEED = 7
HELD_OUT = 1_000_000  # added to the seed for scenes that training never sees


@dataclass(frozen=True)
class Scenes:
    """Scenes as arrays, so that no time goes into drawing while training.

    Attributes:
        images: (B, 3, S, S) uint8.
        masks: (I, S/2, S/2) uint8, quarters of a cell that are covered, 0 to 4.
        boxes: (I, 4) x0, y0, x1, y1.
        first: (B + 1,) where each image's instances begin.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    first: Tensor

    @classmethod
    def make(cls, n: int, seed: int, side: int, cache: Path) -> Scenes:
        """Draw them once, then read them from `cache`."""
        if not cache.exists():
            images, masks, boxes, first = [], [], [], [0]
            for scene in Progress(True, "scenes").track(shapes(n, seed=seed, size=side)):
                found = scene.instances
                # Contiguous: safetensors writes the bytes as they lie in memory.
                images.append(np.ascontiguousarray(scene.image.transpose(2, 0, 1)))
                full = np.stack([i.mask for i in found]).astype(np.uint8)
                masks.append(full.reshape(-1, side // 2, 2, side // 2, 2).sum((2, 4)))
                boxes.append(np.array([i.box for i in found], np.float32))
                first.append(first[-1] + len(found))
            cache.parent.mkdir(parents=True, exist_ok=True)
            arrays = {
                "images": np.stack(images),
                "masks": np.concatenate(masks).astype(np.uint8),
                "boxes": np.concatenate(boxes),
                "first": np.array(first),
            }
            save_file(arrays, cache)
        return cls(**{k: torch.from_numpy(v) for k, v in load_file(cache).items()})

    def draw(self, images: list[int], each: int, g: torch.Generator) -> tuple[Tensor, ...]:
        """Images, target masks in [0, 1], boxes of `each` instances an image, turned at random."""
        side = self.images.shape[-1]
        pictures, masks, boxes = [], [], []
        for i in images:
            low, high = int(self.first[i]), int(self.first[i + 1])
            # Large objects a little more often: of small ones the coarse grid shows little.
            weight = self.masks[low:high].sum((1, 2)).float() ** 0.3
            pick = low + torch.multinomial(weight, each, replacement=True, generator=g)
            picture, mask, box = self.images[i], self.masks[pick], self.boxes[pick]
            channels = torch.randperm(3, generator=g)
            flip_x, flip_y, swap = torch.randint(2, (3,), generator=g).tolist()
            if flip_x:
                picture, mask = picture.flip(-1), mask.flip(-1)
                box = torch.stack([side - box[:, 2], box[:, 1], side - box[:, 0], box[:, 3]], 1)
            if flip_y:
                picture, mask = picture.flip(-2), mask.flip(-2)
                box = torch.stack([box[:, 0], side - box[:, 3], box[:, 2], side - box[:, 1]], 1)
            if swap:
                picture, mask = picture.mT, mask.mT
                box = box[:, [1, 0, 3, 2]]
            pictures.append(picture[channels])
            masks.append(mask)
            boxes.append(box)
        return torch.stack(pictures).float(), torch.cat(masks).float() / 4, torch.cat(boxes)


# ------------------------------------------------------------------------------------- prompts


def jitter(boxes: Tensor, side: int, g: torch.Generator) -> Tensor:
    """Noise of a tenth of each side, at most 20 pixels in 1024."""
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    limit = 20 * side / 1024
    noise = (torch.randn(boxes.shape, generator=g) * size * 0.1).clamp(-limit, limit)
    # A box never turns inside out.
    noise = torch.maximum(torch.minimum(noise, size * 0.3), -size * 0.3)
    return (boxes + noise).clamp(0, side)


def point_in(weight: Tensor, g: torch.Generator) -> Tensor:
    """(P, 2) frame coordinates of a cell drawn by (P, h, w) weights."""
    width = weight.shape[-1]
    cell = torch.multinomial(weight.flatten(1) + 1e-9, 1, generator=g)[:, 0]
    place = torch.stack([cell % width, cell // width], 1).float()
    # A cell is two pixels wide; where in it the click falls is drawn too.
    return 2 * place + torch.rand(place.shape, generator=g) * 1.999 - 0.5


def grown(clicks: Tensor | None, new: Tensor) -> Tensor:
    """One more click, or its label, a prompt."""
    return new[:, None] if clicks is None else torch.cat([clicks, new[:, None]], 1)


def first_click(target: Tensor, g: torch.Generator) -> Tensor:
    """Half the prompts anywhere in the object, half well inside it."""
    inside = (target >= 0.5).float()
    inside = torch.where(inside.sum((1, 2), keepdim=True) > 0, inside, target)
    deep = inside * F.avg_pool2d(inside[:, None], 9, 1, 4)[:, 0] ** 6
    choice = torch.rand(len(target), 1, 1, generator=g) < 0.5
    return point_in(torch.where(choice, inside, deep), g)


def next_click(logits: Tensor, target: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A click where mask and target differ, and its label; in the object where nothing does."""
    truth = target >= 0.5
    wrong = (logits > 0) != truth
    none = ~wrong.flatten(1).any(1)[:, None, None]
    point = point_in(torch.where(none, target, wrong.float()), g)
    cell = ((point + 0.5) / 2).long().clamp(0, target.shape[-1] - 1)
    label = truth[torch.arange(len(point)), cell[:, 1], cell[:, 0]]
    return point, label.float()


# ------------------------------------------------------------------------------- model and loss


def start(scenes: Scenes) -> Sam:
    """`tiny` with random weights that learn fast.

    Relative positions are not zero, so that they are used. The waves that encode coordinates are
    twice as long as SAM's, as there are only 16 cells a side. Patches are embedded by their
    principal components, whitened in part: fine detail counts from the beginning, which halves the
    steps that the lesson on pixels needs.
    """
    sam = build("tiny", seed=SEED)
    g = generator(SEED, "positions")
    with torch.no_grad():
        sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= 0.5
        for name, p in sam.image_encoder.named_parameters():
            if "rel_pos" in name or name == "pos_embed":
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
        stem = sam.image_encoder.patch_embed.proj
        side, width = stem.kernel_size[0], stem.out_channels
        images = (scenes.images[:1000].float() - sam.pixel_mean) / sam.pixel_std
        patches = F.unfold(images, side, stride=side).mT.flatten(0, 1)
        values, vectors = torch.linalg.eigh(patches.T.cov())
        values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
        weight = (vectors / values.sqrt() * (values / values[0]) ** 0.2).T
        stem.weight.copy_(weight.view(stem.weight.shape))
        stem.bias.copy_(-weight @ patches.mean(0))
    return sam


def decode(
    sam: Sam, features: Tensor, **prompt: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """All four masks (P, 4, h, w) and scores (P, 4) for P prompts, each with its own features."""
    sparse, dense = sam.prompt_encoder(**prompt)
    decoder, n = sam.mask_decoder, len(features)
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(n, -1, -1), sparse], 1)
    place = sam.prompt_encoder.get_dense_pe().expand(n, -1, -1, -1)
    hidden, keys = decoder.transformer(features + dense, place, tokens)
    fine = decoder.output_upscaling(keys.mT.reshape(features.shape))
    heads = enumerate(decoder.output_hypernetworks_mlps, 1)
    weights = torch.stack([head(hidden[:, i]) for i, head in heads], 1)
    masks = torch.einsum("pmc,pchw->pmhw", weights, fine)
    return masks, decoder.iou_prediction_head(hidden[:, 0])


def mask_losses(logits: Tensor, target: Tensor, focus: float) -> Tensor:
    """(P, 4) loss of each mask: `focus` of the way from 4 BCE + dice to 20 focal + dice."""
    target = target[:, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = logits.sigmoid()
    # |p - target| is 1 - p_t of focal loss (gamma 2), and right for soft targets too.
    balance = 0.25 * target + 0.75 * (1 - target)
    weight = 4 * (1 - focus) + focus * 20 * balance * (p - target).detach() ** 2
    both = (p * target).sum((2, 3))
    dice = 1 - (2 * both + 1) / (p.sum((2, 3)) + target.sum((2, 3)) + 1)
    return (weight * bce).mean((2, 3)) + dice


def overlap(logits: Tensor, target: Tensor) -> Tensor:
    """(P, 4) IoU of the masks with the target."""
    mask, truth = logits > 0, (target >= 0.5)[:, None]
    return (mask & truth).sum((2, 3)) / (mask | truth).sum((2, 3)).clamp(min=1)


def terms(logits: Tensor, scores: Tensor, target: Tensor, focus: float) -> dict[str, Tensor]:
    """The single mask's loss, that of the best of three, and that of the predicted IoUs."""
    losses = mask_losses(logits, target, focus)
    return {
        "single": losses[:, 0].mean(),
        "multi": losses[:, 1:].min(1).values.mean(),
        "score": F.mse_loss(scores, overlap(logits, target)),
    }


@dataclass(frozen=True)
class Drawn:
    """Images, the masks and boxes of their instances, and what goes on drawing from there."""

    images: Tensor
    target: Tensor
    boxes: Tensor
    generator: torch.Generator

    @property
    def weight(self) -> float:
        """The number of instances."""
        return float(len(self.target))


@dataclass(frozen=True)
class Draw:
    """Draws the batches of a lesson, in one piece: its images share one generator.

    Attributes:
        scenes: to draw from.
        lesson: its name is one of the generator's keys.
        images: images a step.
        each: instances an image.
    """

    scenes: Scenes
    lesson: str
    images: int
    each: int

    def draw(self, step: int, share: Share) -> Drawn:
        """The batch of a step."""
        assert share.count == 1
        g = generator(SEED, self.lesson, step)
        chosen = batch(len(self.scenes.images), self.images, seed=SEED, step=step)
        return Drawn(*self.scenes.draw(chosen, self.each, g), g)


class Pixels(Objective):
    """First lesson, without prompts: which pixels belong together.

    A small head that is thrown away looks at the features of one pixel, and has to find the other
    pixels of its object among the upscaled features. Object and rest weigh the same: at the
    beginning, the easiest mask would be the empty one.
    """

    def __init__(self, sam: Sam, scenes: Scenes) -> None:
        super().__init__(sam, Draw(scenes, "pixels", images=8, each=12))
        coarse = sam.prompt_encoder.embed_dim
        fine = coarse // 8
        self.head = nn.Sequential(nn.Linear(coarse + fine, 64), nn.ReLU(), nn.Linear(64, fine))
        with torch.no_grad():
            for p in self.head.parameters():
                g = generator(SEED, "head", p.shape)
                p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)

    def forward(self, drawn: Drawn, step: int) -> dict[str, Tensor]:
        """Term ``pixels``."""
        target, sam = drawn.target, self.student
        coarse = sam.image_encoder(sam.preprocess(drawn.images))
        fine = sam.mask_decoder.output_upscaling(coarse)
        point = (point_in((target >= 0.5).float(), drawn.generator) + 0.5).long() // 2
        owner = torch.arange(len(coarse)).repeat_interleave(len(target) // len(coarse))
        x, y = point.clamp(0, target.shape[-1] - 1).T
        seen = torch.cat([fine[owner, :, y, x], coarse[owner, :, y // 4, x // 4]], 1)
        logits = torch.einsum("pc,pchw->phw", self.head(seen), fine[owner])
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        inside, outside = (t.sum((1, 2), keepdim=True).clamp(min=1) for t in (target, 1 - target))
        return {"pixels": (bce * (target / inside + (1 - target) / outside)).sum((1, 2)).mean()}


class Prompts(Objective):
    """The real thing: images, prompts and rounds are drawn from the step's own generator.

    Args:
        sam: the model.
        scenes: to learn from.
        steps: say how far training is: rounds of clicks begin after a quarter, the turn from BCE to
            focal loss takes the middle third. None for neither.
    """

    def __init__(self, sam: Sam, scenes: Scenes, steps: int | None) -> None:
        super().__init__(sam, Draw(scenes, "prompts", images=6, each=8))
        self.steps = steps

    def forward(self, drawn: Drawn, step: int) -> dict[str, Tensor]:
        """Terms ``single``, ``multi`` and ``score``, means over the rounds."""
        sam, done = self.student, step / self.steps if self.steps else 0.0
        focus = min(max(3 * done - 1, 0.0), 1.0)
        g, target = drawn.generator, drawn.target
        features = sam.image_encoder(sam.preprocess(drawn.images))
        features = features.repeat_interleave(len(target) // len(features), 0)
        with_box, with_mask = torch.rand(2, generator=g) < torch.tensor([0.45, 0.75])
        rounds = int(torch.randint(1, 4, (1,), generator=g)) if done > 0.25 else 1
        box = jitter(drawn.boxes, sam.image_encoder.img_size, g) if with_box else None
        points = labels = mask = None
        if not with_box:
            points, labels = first_click(target, g)[:, None], torch.ones(len(target), 1)
        total: dict[str, Tensor] = {}
        for index in range(rounds):
            click = None if points is None or labels is None else (points, labels)
            logits, scores = decode(sam, features, points=click, boxes=box, masks=mask)
            for name, value in terms(logits, scores, target, focus).items():
                total[name] = total.get(name, 0) + value / rounds
            if index + 1 < rounds:
                with torch.no_grad():
                    best = self._best(logits, scores, index == 0 and not with_box)
                    point, label = next_click(best, target, g)
                points, labels = grown(points, point), grown(labels, label)
                mask = best[:, None].detach() if with_mask else None
        return total

    @staticmethod
    def _best(logits: Tensor, scores: Tensor, ambiguous: bool) -> Tensor:
        """The mask a user would go on with: the one of three with the best score for one point."""
        index = scores[:, 1:].argmax(1) + 1 if ambiguous else torch.zeros(len(logits)).long()
        return logits[torch.arange(len(logits)), index]


# ------------------------------------------------------------------------------------- commands


def train(args: argparse.Namespace) -> None:
    """Train, or go on from the checkpoints in the work folder."""
    args.work.mkdir(parents=True, exist_ok=True)
    scenes = Scenes.make(args.scenes, SEED, 128, args.work / "scenes")
    sam = start(scenes)
    encoder = ("student.image_encoder", "student.mask_decoder.output_upscaling")
    decoder = (
        "student.prompt_encoder",
        *(
            f"student.mask_decoder.{n}"
            for n, _ in sam.mask_decoder.named_children()
            if n != "output_upscaling"
        ),
    )
    plan = Plan(steps=1200, lr=2e-3, warmup=0.04, weight_decay=0.02, clip=1.0, seed=SEED)
    run(Pixels(sam, scenes), plan, (*encoder, "head"), args.work / "pixels.safetensors")
    plan = replace(plan, steps=900, lr=3e-3)
    run(Prompts(sam, scenes, None), plan, decoder, args.work / "decoder.safetensors")
    plan = replace(plan, steps=args.steps, lr=1e-3, ema=0.998)
    run(Prompts(sam, scenes, args.steps), plan, ("student",), args.work / "all.safetensors")


def run(objective: Objective, plan: Plan, parts: tuple[str, ...], place: Path) -> None:
    """One stretch of training; the engine logs its losses."""
    log.info("%s", place.stem)
    fit(objective, plan, parts=parts, checkpoint=place, progress=Progress(True, "tiny"))


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights reached so far, as float16."""
    weights = trained(args.work / "all.safetensors")
    save_file(
        {k.removeprefix("student."): v.half().contiguous().numpy() for k, v in weights.items()},
        args.to,
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of scenes and checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="of the last lesson")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--to", type=Path, default=Path("samcompress/core/tiny/model.safetensors"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    {"train": train, "export": export}[args.command](args)


if __name__ == "__main__":
    main()
