"""Mask accuracy of a SAM on data, by named protocols.

Each image is encoded once, however many protocols are asked for, and the masks of at most a few
objects are in memory at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import nn

from ..core._progress import Progress, ProgressLike
from ..core.contract import check_sam
from ..core.data import Dataset, Instance, Sample, Skipped, as_dataset
from ..core.errors import ConfigError, DataError, ShapeError
from ..core.history import lineage
from ..core.predict import Embedding, Prediction, decode, encode
from ..core.prompt import Prompt, check_inside
from .masks import Mask
from .masks import encode as encode_mask
from .protocol import Choice, Feedback, Protocol, Target, rounds
from .records import Accuracy, Record, agreement
from .stats import Average

__all__ = ["Accuracy", "accuracies", "accuracy", "agreement"]

log = logging.getLogger("samcompress.evaluate")
# Full-size masks of one group of objects take at most about this many bytes.
_MASK_BYTES = 2**27


def accuracy(
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    prompts: str = "box",
    *,
    choice: Choice = "single",
    feedback: Feedback = "none",
    include_crowd: bool = False,
    min_area: float = 0,
    average: Average = "instance",
    seed: int = 0,
    keep_masks: bool = False,
    batch_size: int = 1,
    prompt_batch: int = 64,
    progress: ProgressLike = False,
) -> Accuracy:
    """Mean IoU of a SAM by one protocol.

    Args:
        model: any SAM, on any device.
        data: images with masks.
        prompts: ``box``, ``point``, ``random-3``, ``clicks-5``, ...: see `evaluate.prompts`.
        choice: which mask counts; see `Protocol`, as for what follows. The log warns of
            ``predicted`` if the model's last training did not teach it the IoU of its masks.
        feedback: whether the last mask goes along with a correcting click.
        include_crowd: score regions of many objects too.
        min_area: leave out smaller objects, in pixels.
        average: what weighs the same.
        seed: of drawn prompts.
        keep_masks: keep every mask as run lengths, some hundred bytes each, for `agreement`.
        batch_size: images encoded at once.
        prompt_batch: objects decoded at once, at most.
        progress: True for a bar, or a callable that receives events.

    Returns:
        The IoU of every object, with averages and intervals.

    Raises:
        ModelError: if the model is no SAM.
        ConfigError: if the protocol is unknown.
        DataError: if there is nothing to score.
        NonFiniteError: if the model gives a score or mask that is not finite.

    Example:
        >>> import samcompress as sc
        >>> found = accuracy(sc.build("tiny"), sc.data.shapes(2), "point")
        >>> found.protocol.split("/")[1:3], 0 <= found.miou <= 1
        (['center', 'single'], True)
    """
    (found,) = accuracies(
        model,
        data,
        (prompts,),
        choice=choice,
        feedback=feedback,
        include_crowd=include_crowd,
        min_area=min_area,
        average=average,
        seed=seed,
        keep_masks=keep_masks,
        batch_size=batch_size,
        prompt_batch=prompt_batch,
        progress=progress,
    )
    return found


def accuracies(
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    prompts: Sequence[str] = ("box", "point"),
    *,
    keep_masks: bool = False,
    batch_size: int = 1,
    prompt_batch: int = 64,
    progress: ProgressLike = False,
    **protocol: Any,
) -> list[Accuracy]:
    """`accuracy` for several kinds of prompts with one encoding of every image.

    Args:
        model: any SAM, on any device.
        data: images with masks.
        prompts: one name a result.
        keep_masks: as for `accuracy`, like all that follows.
        batch_size: images encoded at once.
        prompt_batch: objects decoded at once, at most.
        progress: True for a bar, or a callable that receives events.
        protocol: choice, feedback, include_crowd, min_area, average, seed.

    Returns:
        One result a name, in order.

    Raises:
        ModelError, ConfigError, DataError, NonFiniteError: as for `accuracy`.
    """
    check_sam(model)
    data = as_dataset(data)
    name = f"{data.name}#{len(data)}"
    protocols = [Protocol(data=name, prompt=prompt, **protocol) for prompt in prompts]
    if not protocols:
        raise ConfigError("there is no prompt to ask with.", expected='prompts=("box", "point")')
    for value, what in ((batch_size, "batch_size"), (prompt_batch, "prompt_batch")):
        if value < 1:
            raise ConfigError(f"{what} is below 1.", got=value, expected="1 or more")
    if protocols[0].choice == "predicted" and _stale(model):
        log.warning("the model was last trained without a loss on predicted IoU, which decides")
    scorer = _Scorer(model, protocols, keep_masks, prompt_batch)
    track = Progress(progress, "accuracy").track(data.readable(), label="images", total=len(data))
    with _evaluating(model):
        while batch := list(islice(track, batch_size)):
            for sample, embedding in scorer.encode(batch):
                scorer.add(sample, embedding)
    return [
        Accuracy(protocol, tuple(records), (*data.skipped, *scorer.unread, *skipped))
        for protocol, records, skipped in zip(
            protocols, scorer.records, scorer.skipped, strict=True
        )
    ]


class _Scorer:
    """Collects the records of all protocols, image by image."""

    def __init__(
        self, model: nn.Module, protocols: list[Protocol], keep_masks: bool, prompt_batch: int
    ) -> None:
        self.model = model
        self.protocols = protocols
        self.keep_masks = keep_masks
        self.prompt_batch = prompt_batch
        self.records: list[list[Record]] = [[] for _ in protocols]
        self.skipped: list[list[Skipped]] = [[] for _ in protocols]
        self.unread: list[Skipped] = []

    def encode(self, samples: list[Sample]) -> Iterator[tuple[Sample, Embedding]]:
        """Embeddings of the samples that hold something to score and that the model can take."""
        samples = [s for s in samples if any(self.protocols[0].keeps(i) for i in s.instances)]
        if not samples:
            return
        try:
            found = encode(self.model, [s.image for s in samples], batch_size=len(samples))
        except (DataError, ShapeError) as err:
            if len(samples) > 1:
                for sample in samples:
                    yield from self.encode([sample])
            else:
                self.unread.append(Skipped(samples[0].id, "image", _reason(err)))
            return
        yield from zip(samples, found, strict=True)

    def add(self, sample: Sample, embedding: Embedding) -> None:
        """Score one image by every protocol, a group of objects at a time."""
        instances = [i for i in sample.instances if self.protocols[0].keeps(i)]
        masks_each = 3 if self.protocols[0].multimask else 1
        room = _MASK_BYTES // (masks_each * math.prod(sample.size))
        size = min(self.prompt_batch, max(1, room))
        for start in range(0, len(instances), size):
            group = [(i, i.mask) for i in instances[start : start + size]]
            for index in range(len(self.protocols)):
                self._add(index, sample, embedding, group)

    def _add(
        self, index: int, sample: Sample, embedding: Embedding, group: list[tuple[Instance, Mask]]
    ) -> None:
        protocol = self.protocols[index]
        asked, targets = [], []
        for instance, mask in group:
            name = f"image {sample.id}, annotation {instance.id}, prompt {protocol.prompt}"
            try:
                prompt = protocol.rule.start(instance, mask, image_id=sample.id, seed=protocol.seed)
                check_inside(prompt, sample.size, 0)
            except DataError as err:
                what = f"annotation {instance.id}"
                self.skipped[index].append(Skipped(sample.id, what, _reason(err)))
                continue
            asked.append(instance)
            targets.append(Target(name, mask, prompt))

        def ask(prompts: list[Prompt], multimask: bool) -> Prediction:
            return decode(
                self.model,
                embedding,
                prompts,
                multimask=multimask,
                prompt_batch=self.prompt_batch,
            )

        *_, answers = rounds(protocol, targets, ask)
        for instance, answer in zip(asked, answers, strict=True):
            points = answer.prompt.points
            self.records[index].append(
                Record(
                    image_id=sample.id,
                    annotation_id=instance.id,
                    category=instance.category,
                    area=instance.area,
                    iou=answer.iou,
                    score=answer.score,
                    clicks=0 if points is None else len(points),
                    mask=encode_mask(answer.mask) if self.keep_masks else None,
                )
            )


def _stale(model: nn.Module) -> bool:
    """Whether masks were trained after the IoUs that the model predicts of them."""
    taught = [s.state["iou_trained"] for s in lineage(model) if "iou_trained" in s.state]
    return bool(taught) and not taught[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _reason(err: DataError | ShapeError) -> str:
    return err.what if err.got is None else f"{err.what} Got {err.got}."
