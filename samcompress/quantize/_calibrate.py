"""Images and prompts through a model, one image at a time, while somebody looks inside.

As every image is alone in its pass, nothing here depends on a batch size. Statistics of the same
model, data and settings are kept in ``workdir=``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core import _saved
from ..core.checkpoint import identity as model_identity
from ..core.contract import device_of, dtype_of
from ..core.data import Sample
from ..core.errors import ConfigError, DataError
from ..core.framing import framing_of
from ..core.predict import preprocess
from ..core.transform import Context
from ._observe import Observer, Range

Prompts = Literal["mixed", "box", "point"]
Tap = Callable[..., None]
Found = tuple[dict[str, Tensor], dict[str, Any]]
Object = tuple[tuple[float, float, float, float], tuple[float, float]]  # its box, a point in it
OBJECTS = 8  # asked about in an image
GRID = (0.25, 0.75)  # where there are no annotations, objects are said to be here


@dataclass(frozen=True)
class Asked:
    """Prompts of one image, in the square that the prompt encoder knows.

    Attributes:
        boxes: (P, 4), may be empty.
        points: (P', 1, 2), may be empty; all inside their object.
    """

    boxes: Tensor
    points: Tensor


@dataclass(frozen=True)
class Answer:
    """What a model says about one image.

    Attributes:
        features: (1, C, h, w).
        logits: (P + P', M, 4h, 4w), boxes before points, single mask and the others.
        scores: (P + P', M).
    """

    features: Tensor
    logits: Tensor
    scores: Tensor


def calibrate(
    model: nn.Module,
    taps: Mapping[str, Tap],
    ctx: Context,
    *,
    outputs: Mapping[str, Tap] | None = None,
    images: int = 32,
    prompts: Prompts = "mixed",
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Run images, and prompts where a tap is outside the image encoder, through a model.

    Args:
        model: a SAM; runs in eval mode without gradients, and is left as it was.
        taps: by module name, what is called with the module's positional inputs.
        ctx: data and progress.
        outputs: by module name, what is called with the module's output.
        images: at most so many, the first of the data.
        prompts: what is asked; "mixed" takes boxes and points in turn.
        ended: called after each image.

    Raises:
        DataError: if there are no images, or a tap meets a value that is not finite.
    """
    outputs = outputs or {}
    decodes = any(not name.startswith("image_encoder.") for name in (*taps, *outputs))
    samples = first_images(ctx, images)
    total = min(images, len(ctx.data))
    with torch.no_grad(), evaluating(model), tapped(model, taps, outputs):
        for index, sample in enumerate(
            ctx.progress.track(samples, label="calibration images", total=total)
        ):
            features = encoded(model, sample)
            if decodes:
                # All masks are computed whichever are asked for.
                decoded(model, features, asked(model, sample, index, prompts), (False,))
            ended()


def first_images(ctx: Context, count: int) -> Iterator[Sample]:
    """The first images that can be read, at most so many.

    Raises:
        DataError: if there are no data, or none of them can be read.
    """
    read = 0
    for sample in itertools.islice(ctx.data.readable(), count):
        read += 1
        yield sample
    if not read:
        raise DataError(
            f"{ctx.step} has to look at images, and none could be read.",
            where=ctx.data.name,
            got=f"{len(ctx.data)} samples, {len(ctx.data.skipped)} of them skipped",
            expected="at least one",
            fix="other data=, or on_error='raise' in sc.data.open to see the first fault",
        )


def observe(
    model: nn.Module,
    observers: Mapping[str, Observer],
    ctx: Context,
    *,
    images: int = 32,
) -> dict[str, Range]:
    """Ranges of the inputs of modules, from the work folder if they were found before.

    Args:
        model: see `calibrate`.
        observers: by module name.
        ctx: data, progress and work folder.
        images: see `calibrate`.

    Raises:
        DataError: if there are no data, a value is not finite, or a module was never reached.
    """

    def compute() -> dict[str, Tensor]:
        taps = {name: _first(found.update) for name, found in observers.items()}
        calibrate(model, taps, ctx, images=images, ended=lambda: end(observers.values()))
        ends = {name: found.range() for name, found in observers.items()}
        return {
            f"{name}:{end}": value
            for name, both in ends.items()
            for end, value in zip(("low", "high"), both, strict=True)
        }

    identity = {
        "images": images,
        "observers": {
            n: [type(o).__name__, *map(str, _plain(o))] for n, o in sorted(observers.items())
        },
    }
    found, _ = remembered(model, ctx, identity, lambda: (compute(), {}))
    return {name: (found[f"{name}:low"], found[f"{name}:high"]) for name in observers}


def remembered(
    model: nn.Module,
    ctx: Context,
    settings: Mapping[str, Any],
    compute: Callable[[], Found],
) -> Found:
    """Tensors and plain values that `compute` gives; from the work folder if they are there.

    Args:
        model: its weights and history, and
        ctx: its data, and
        settings: these plain values tell one result from another.
        compute: called if there is no file.

    Raises:
        CheckpointError: if the file is damaged or cannot be written.
    """
    if ctx.workdir is None:
        return compute()
    identity = {
        **settings,
        "step": ctx.step,
        "model": model_identity(model),
        "data": ctx.data.fingerprint,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = ctx.workdir / f"{ctx.step.replace('.', '-')}-ranges-{digest[:12]}.safetensors"
    at = device_of(model)
    if path.is_file():
        tensors, facts = _saved.read(path)
    else:
        tensors, facts = compute()
        _saved.write(path, tensors, facts)
    return {name: value.to(at) for name, value in tensors.items()}, facts


def answer(model: nn.Module, sample: Sample, prompts: Asked) -> Answer:
    """What a model says about an image; with gradients where they are on."""
    features = encoded(model, sample)
    return Answer(features, *decoded(model, features, prompts))


def encoded(model: Any, sample: Sample) -> Tensor:
    """(1, C, h, w) features of an image, by SAM's own preprocessing, padding included."""
    features: Tensor = model.image_encoder(preprocess(model, sample.image)[0][None])
    return features


def decoded(
    model: Any, features: Tensor, prompts: Asked, kinds: tuple[bool, ...] = (False, True)
) -> tuple[Tensor, Tensor]:
    """Logits and scores for prompts on an encoded image: those of `Answer`.

    Args:
        model: a SAM.
        features: from `encoded`.
        prompts: from `asked`.
        kinds: which masks: the single one (False), the others (True).
    """
    kind = dtype_of(model.mask_decoder)
    labels = torch.ones(prompts.points.shape[:2], device=features.device)
    found = []
    for boxes, points in ((prompts.boxes, None), (None, (prompts.points, labels))):
        if not len(prompts.points if boxes is None else boxes):
            continue
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=None)
        embeddings = {
            "image_embeddings": features,
            "image_pe": model.prompt_encoder.get_dense_pe(),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense,
        }
        ready = {name: value.to(kind) for name, value in embeddings.items()}
        each = [model.mask_decoder(**ready, multimask_output=several) for several in kinds]
        found.append([torch.cat(masks, 1) for masks in zip(*each, strict=True)])
    logits, scores = (torch.cat(part) for part in zip(*found, strict=True))
    return logits, scores


def asked(model: Any, sample: Sample, index: int, kind: Prompts) -> Asked:
    """Boxes of annotated objects and points in them; of a grid of objects where there are none.

    Args:
        model: a SAM.
        sample: the image.
        index: its place; what "mixed" begins with changes from image to image.
        kind: what is asked.
    """
    real = [o for o in sample.instances if not o.crowd][:OBJECTS]
    objects: list[Object] = [(o.box, _middle(o.mask)) for o in real] or _drawn(sample.size)
    turns = {"box": 0, "point": 1}
    boxed = [turns.get(kind, (index + n) % 2) == 0 for n in range(len(objects))]
    boxes = [box for (box, _), by_box in zip(objects, boxed, strict=True) if by_box]
    points = [point for (_, point), by_box in zip(objects, boxed, strict=True) if not by_box]
    framing = framing_of(model)
    ratio = model.prompt_encoder.input_image_size[0] / framing.frame
    scale = torch.tensor(framing.scale(sample.size), dtype=torch.float64)

    def placed(corners: list[Any], count: int) -> Tensor:
        framed = torch.tensor(corners, dtype=torch.float64).reshape(-1, count, 2) * scale
        # Pixel centres are whole numbers in either square.
        framed = framed if ratio == 1 else (framed + 0.5) * ratio - 0.5
        return framed.float().to(device_of(model))

    return Asked(placed(boxes, 2).flatten(1), placed(points, 1))


@contextmanager
def tapped(
    model: nn.Module, taps: Mapping[str, Tap], outputs: Mapping[str, Tap] | None = None
) -> Iterator[None]:
    """Call taps with the inputs, or outputs, of modules as long as the context lasts."""

    def looking(tap: Tap) -> Any:
        return lambda module, inputs: tap(*inputs)

    def reading(tap: Tap) -> Any:
        return lambda module, inputs, output: tap(output)

    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_pre_hook(looking(tap)) for n, tap in taps.items()]
    handles += [
        modules[n].register_forward_hook(reading(tap)) for n, tap in (outputs or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_images(label: str, images: int) -> None:
    """Check a field that says how many images are looked at.

    Raises:
        ConfigError: if there are none.
    """
    if images < 1:
        raise ConfigError(f"{label}: images is out of range.", got=images, expected=">= 1")


def end(observers: Iterable[Observer]) -> None:
    """Tell observers that an image is over."""
    for each in observers:
        each.end()


def _first(update: Callable[[Tensor], None]) -> Tap:
    return lambda x, *rest: update(x)


def _plain(found: Observer) -> list[Any]:
    return [found.axis, getattr(found, "percent", None), getattr(found, "grid", None)]


def _middle(mask: np.ndarray) -> tuple[float, float]:
    """The pixel of a mask nearest to its centre of mass."""
    rows, columns = np.nonzero(mask)
    far = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    nearest = int(far.argmin())
    return float(columns[nearest]), float(rows[nearest])


def _drawn(size: tuple[int, int]) -> list[Object]:
    height, width = size
    quarters = [(x * width, y * height) for y in GRID for x in GRID]
    return [
        ((x - width / 6, y - height / 6, x + width / 6, y + height / 6), (x, y))
        for x, y in quarters
    ]
