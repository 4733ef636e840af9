"""Steps a second of the training engine beside a plain PyTorch loop over the same modules.

    python docs/results/engine_overhead.py --steps 100 --repeats 7

The image encoder of `tiny` learns the embeddings of another one. Both loops draw the same images,
run the same forward and backward pass, clip, step AdamW along the same cosine and read the loss.
They take turns, in another order each time, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import samcompress as sc
from samcompress.core._draws import batch, generator
from samcompress.core._fit import Plan, fit
from samcompress.core._objective import Objective, Share

PART = "student.image_encoder"


@dataclass(frozen=True)
class Pairs:
    """(B, 3, S, S) images and the (B, C, h, w) embeddings to learn."""

    images: Tensor
    wanted: Tensor

    @property
    def weight(self) -> float:
        """The number of images."""
        return float(len(self.images))


class Noise:
    """Noise for images, in memory; embeddings of a random teacher."""

    def __init__(self, size: int, images: int = 32) -> None:
        teacher = sc.build("tiny", seed=1)
        side = teacher.image_encoder.img_size
        self.size = size
        self.images = torch.randn(images, 3, side, side, generator=generator("images"))
        with torch.no_grad():
            self.wanted = torch.cat([teacher.image_encoder(x) for x in self.images.split(8)])

    def draw(self, step: int, share: Share) -> Pairs:
        """Part of the batch of a step."""
        chosen = batch(len(self.images), self.size, seed=0, step=step)
        indices = [index for _, index in share.of(chosen)]
        return Pairs(self.images[indices], self.wanted[indices])


class Imitation(Objective):
    """Mean squared error."""

    def forward(self, drawn: Pairs, step: int) -> dict[str, Tensor]:
        """Term ``embedding``."""
        device = next(self.student.parameters()).device
        found = self.student.get_submodule("image_encoder")(drawn.images.to(device))
        return {"embedding": F.mse_loss(found, drawn.wanted.to(device))}


def plain(objective: Imitation, plan: Plan) -> list[float]:
    """What one writes by hand."""
    encoder = objective.student.get_submodule("image_encoder")
    objective.requires_grad_(False).eval()
    encoder.requires_grad_(True).train()
    weights = list(encoder.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in weights if p.ndim > 1]},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=plan.lr,
        weight_decay=plan.weight_decay,
    )
    losses = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        loss = sum(objective(objective.source.draw(step, Share()), step).values())
        loss.backward()
        nn.utils.clip_grad_norm_(weights, plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def engine(objective: Imitation, plan: Plan) -> list[float]:
    """What the techniques use."""
    return fit(objective, plan, parts=(PART,)).total


def main() -> None:
    """Read the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan, source = Plan(steps=args.steps), Noise(args.batch_size)
    loops = {"plain PyTorch": plain, "samcompress": engine}
    found: dict[str, list[float]] = {name: [] for name in loops}
    losses = {}
    for turn in range(args.repeats + 1):
        for name in sorted(loops, reverse=bool(turn % 2)):
            objective = Imitation(sc.build("tiny").to(args.device), source)
            start = time.perf_counter()
            losses[name] = loops[name](objective, plan)
            # The first turn warms up.
            if turn:
                found[name].append(args.steps / (time.perf_counter() - start))
    assert losses["plain PyTorch"] == losses["samcompress"], "the loops did not do the same"
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"tiny's encoder, {args.batch_size} images a step, {args.steps} steps, {args.device};")
    print(f"median of {args.repeats} turns, lowest and highest in brackets\n")
    print("| loop | steps a second | time over plain |\n|---|---|---|")
    for name, rates in found.items():
        middle = statistics.median(rates)
        over = f"{100 * (statistics.median(ratios) - 1):+.1f} %" if name == "samcompress" else ""
        print(f"| {name} | {middle:.3g} ({min(rates):.3g}-{max(rates):.3g}) | {over} |")


if __name__ == "__main__":
    main()
