"""What `sc.evaluate.accuracy` costs beside the model's own forward passes.

    python docs/results/benchmark_cost.py coco/val2017 coco/annotations/instances_val2017.json

Both sides go over the same images in turns of a few, one after the other, each time in another
order, on one thread. One side is `accuracy`: reading and decoding images and annotations, prompts,
forward passes, masks at full size, IoU, records. The other holds everything ready, tensors of
images and prompts in the model's own form, and calls the three parts of the model on them: nothing
is read, resized, enlarged, thresholded or compared. `sam forward` adds to that what
`segment_anything.Sam.forward` does to its output: masks at the original size, thresholded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samcompress as sc
from samcompress.core.framing import framing_of
from samcompress.core.predict import preprocess
from samcompress.evaluate.prompts import Rule


@dataclass(frozen=True)
class Ready:
    """One image and its prompts as the parts of the model take them."""

    image: Tensor
    points: tuple[Tensor, Tensor] | None
    boxes: Tensor | None
    size: tuple[int, int]


def ready(model: Any, sample: Any, rule: Rule) -> Ready | None:
    """Everything before the forward pass, done once."""
    asked = [rule.start(i, i.mask, image_id=sample.id) for i in sample.instances if not i.crowd]
    if not asked:
        return None
    image, _ = preprocess(model, sample.image)
    scale = np.array(framing_of(model).scale(sample.size))

    def placed(arrays: list[Any]) -> Tensor:
        return torch.as_tensor(np.stack(arrays) * scale, dtype=torch.float32)

    if rule.first == "box":
        boxes = placed([p.box.reshape(2, 2) for p in asked]).flatten(1)
        return Ready(image[None], None, boxes, sample.size)
    points = placed([p.points for p in asked])
    return Ready(image[None], (points, torch.ones(points.shape[:2])), None, sample.size)


def forward(model: Any, ready: Ready, *, full_size: bool) -> None:
    """The three parts, and the masks at the original size if asked for."""
    with torch.inference_mode():
        features = model.image_encoder(ready.image)
        sparse, dense = model.prompt_encoder(points=ready.points, boxes=ready.boxes, masks=None)
        low, _ = model.mask_decoder(
            image_embeddings=features,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        if full_size:
            _ = framing_of(model).full_size(low, ready.size) > model.mask_threshold


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images")
    parser.add_argument("annotations")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompt", default="box", choices=("box", "center"))
    parser.add_argument("--n", type=int, default=100, help="images")
    parser.add_argument("--turn", type=int, default=10, help="images a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU time, for a busy machine")
    words = parser.parse_args()
    torch.set_num_threads(1)
    model = sc.load(words.model).eval()
    data = sc.data.coco(words.images, words.annotations).subset(words.n)
    rule = Rule.parse(words.prompt)
    clock: Callable[[], float] = time.process_time if words.cpu else time.perf_counter
    ratios: dict[str, list[float]] = {"forward": [], "sam forward": []}
    for repeat in range(words.repeats + 1):
        spent = dict.fromkeys(("accuracy", *ratios), 0.0)
        for turn, start in enumerate(range(0, len(data), words.turn)):
            part = data[start : start + words.turn]
            held = [r for sample in part.readable() if (r := ready(model, sample, rule))]
            sides: list[tuple[str, Callable[[], object]]] = [
                ("accuracy", lambda part=part: sc.evaluate.accuracy(model, part, words.prompt)),
                ("forward", lambda held=held: [forward(model, r, full_size=False) for r in held]),
                (
                    "sam forward",
                    lambda held=held: [forward(model, r, full_size=True) for r in held],
                ),
            ]
            shift = (turn + repeat) % len(sides)
            for name, call in (*sides[shift:], *sides[:shift]):
                began = clock()
                call()
                spent[name] += clock() - began
        if repeat == 0:
            continue  # warm-up
        for name, values in ratios.items():
            values.append(spent["accuracy"] / spent[name])
        print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items()))
    for name, values in ratios.items():
        listed = " ".join(f"{value:.3f}" for value in values)
        print(f"accuracy / {name}: median {statistics.median(values):.3f} of {listed}")


if __name__ == "__main__":
    main()
