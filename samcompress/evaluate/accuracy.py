"""Mask accuracy of a SAM on data, by named protocols.

Each image is encoded once, however many protocols are asked for, and the masks of at most a few
objects are in memory at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import nn

from ..core._progress import Progress, ProgressLike
from ..core.contract import check_sam
from ..core.data import Dataset, Instance, Sample, Skipped, as_dataset
from ..core.errors import ConfigError, DataError
from ..core.framing import framing_of
from ..core.history import lineage
from ..core.predict import Embedding, Prediction, decode
from ..core.prompt import Prompt, check_inside
from ._reading import ahead, encoded, evaluating, group_size, reason
from .field import Field, resampled
from .masks import Mask
from .masks import encode as encode_mask
from .presets import preset_protocol
from .protocol import Choice, Feedback, Overlap, Protocol, Target, rounds
from .records import Accuracy, Record, agreement
from .stats import Average

__all__ = ["Accuracy", "accuracies", "accuracy", "agreement"]

log = logging.getLogger("samcompress.evaluate")


def accuracy(
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    prompts: str | None = None,
    *,
    preset: str | None = None,
    choice: Choice | None = None,
    feedback: Feedback | None = None,
    include_crowd: bool | None = None,
    min_area: float | None = None,
    average: Average | None = None,
    overlap: Overlap | None = None,
    seed: int = 0,
    keep_masks: bool = False,
    batch_size: int = 1,
    prompt_batch: int = 64,
    workers: int = 0,
    progress: ProgressLike = False,
) -> Accuracy:
    """Mean IoU of a SAM by one protocol.

    Args:
        model: any SAM, on any device.
        data: images with masks.
        prompts: ``box`` (the default), ``point``, ``random-3``, ``clicks-5``, ...: see
            `evaluate.prompts`.
        preset: instead of `prompts` and all rules below but the seed: those of a published table,
            such as ``edgesam-box``; see `evaluate.presets`.
        choice: which mask counts, ``single`` if left out; see `Protocol`, as for what follows. The
            log warns of ``predicted`` if the model's last training did not teach it the IoU of its
            masks.
        feedback: whether the last mask goes along with a correcting click.
        include_crowd: score regions of many objects too.
        min_area: leave out smaller objects, in pixels.
        average: what weighs the same.
        overlap: ``boundary`` for the mean boundary IoU.
        seed: of drawn prompts.
        keep_masks: keep every mask as run lengths, some hundred bytes each, for `agreement`.
        batch_size: images encoded at once.
        prompt_batch: objects decoded at once, at most.
        workers: threads that read images ahead; changes no number.
        progress: True for a bar, or a callable that receives events.

    Returns:
        The IoU of every object, with averages and intervals.

    Raises:
        ModelError: if the model is no SAM.
        ConfigError: if the protocol is unknown, or a preset comes with rules of its own.
        DataError: if there is nothing to score.
        NonFiniteError: if the model gives a score or mask that is not finite.

    Example:
        >>> import samcompress as sc
        >>> found = accuracy(sc.build("tiny"), sc.data.shapes(2), "point")
        >>> found.protocol.split("/")[1:3], 0 <= found.miou <= 1
        (['center', 'single'], True)
    """
    rules: dict[str, Any] = {
        "choice": choice,
        "feedback": feedback,
        "include_crowd": include_crowd,
        "min_area": min_area,
        "average": average,
        "overlap": overlap,
    }
    if preset is not None and prompts is not None:
        raise ConfigError(
            "a preset brings its own prompt.",
            got=f"prompts={prompts!r}, preset={preset!r}",
            expected="one of them",
        )
    (found,) = accuracies(
        model,
        data,
        () if preset is not None else ("box" if prompts is None else prompts,),
        presets=() if preset is None else (preset,),
        seed=seed,
        keep_masks=keep_masks,
        batch_size=batch_size,
        prompt_batch=prompt_batch,
        workers=workers,
        progress=progress,
        **{name: value for name, value in rules.items() if value is not None},
    )
    return found


def accuracies(
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    prompts: Sequence[str] | None = None,
    *,
    presets: Sequence[str] = (),
    seed: int = 0,
    keep_masks: bool = False,
    batch_size: int = 1,
    prompt_batch: int = 64,
    workers: int = 0,
    progress: ProgressLike = False,
    **protocol: Any,
) -> list[Accuracy]:
    """`accuracy` for several kinds of prompts with one encoding of every image.

    Args:
        model: any SAM, on any device.
        data: images with masks.
        prompts: one name a result; box and point if neither these nor presets are given.
        presets: one name a result, after those of the prompts.
        seed: of drawn prompts.
        keep_masks: as for `accuracy`, like all that follows.
        batch_size: images encoded at once.
        prompt_batch: objects decoded at once, at most.
        workers: threads that read ahead.
        progress: True for a bar, or a callable that receives events.
        protocol: choice, feedback, include_crowd, min_area, average, overlap, truth of the prompts.

    Returns:
        One result a name, in order.

    Raises:
        ModelError, ConfigError, DataError, NonFiniteError: as for `accuracy`.
    """
    check_sam(model)
    data = as_dataset(data)
    name = f"{data.name}#{len(data)}"
    prompts = ("box", "point") if prompts is None and not presets else prompts or ()
    if protocol and not prompts:
        raise ConfigError(
            "a preset brings its own rules.",
            got=", ".join(f"{key}={value!r}" for key, value in protocol.items()),
            expected="none beside the seed",
            fix="give prompts and rules instead of the preset",
        )
    protocols = [Protocol(data=name, prompt=p, seed=seed, **protocol) for p in prompts]
    protocols += [preset_protocol(preset, name, seed=seed) for preset in presets]
    if not protocols:
        raise ConfigError("there is no prompt to ask with.", expected='prompts=("box", "point")')
    for value, what, least in (
        (batch_size, "batch_size", 1),
        (prompt_batch, "prompt_batch", 1),
        (workers, "workers", 0),
    ):
        if value < least:
            raise ConfigError(f"{what} is below {least}.", got=value, expected=f"{least} or more")
    if any(p.choice == "predicted" for p in protocols) and _stale(model):
        log.warning("the model was last trained without a loss on predicted IoU, which decides")
    scorer = _Scorer(model, protocols, keep_masks, prompt_batch)
    track = Progress(progress, "accuracy").track(
        ahead(data, workers), label="images", total=len(data)
    )
    with evaluating(model):
        while batch := list(islice(track, batch_size)):
            for sample, embedding in scorer.encode(batch):
                scorer.add(sample, embedding)
    return [
        Accuracy(protocol, tuple(records), (*data.skipped, *scorer.unread, *skipped))
        for protocol, records, skipped in zip(
            protocols, scorer.records, scorer.skipped, strict=True
        )
    ]


def aim(
    model: nn.Module, protocol: Protocol, instance: Instance, mask: Mask, *, image_id: Any
) -> Target:
    """What a protocol asks a model for, for one object.

    Args:
        model: the SAM that will be asked.
        protocol: the rules.
        instance: the annotation.
        mask: (H, W) bool, its mask, not empty.
        image_id: id of its image.

    Raises:
        DataError: if the annotation lacks what the prompt is made of.
    """
    prompt = protocol.rule.start(instance, mask, image_id=image_id, seed=protocol.seed)
    check_inside(prompt, (mask.shape[0], mask.shape[1]), 0)
    field = None
    if protocol.rule.kind == "random":
        sam: Any = model
        key = (protocol.seed, image_id, instance.id)
        field = Field.of(mask, framing_of(model), sam.prompt_encoder.mask_input_size, key)
    return Target(
        f"image {image_id}, annotation {instance.id}, prompt {protocol.prompt}",
        mask,
        prompt,
        resampled(mask) if protocol.truth == "resampled" else None,
        field,
    )


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

    def _kept(self, instance: Instance) -> bool:
        return any(protocol.keeps(instance) for protocol in self.protocols)

    def encode(self, samples: list[Sample]) -> Iterator[tuple[Sample, Embedding]]:
        """Embeddings of the samples that hold something to score and that the model can take."""
        samples = [s for s in samples if any(map(self._kept, s.instances))]
        return encoded(self.model, samples, self.unread)

    def add(self, sample: Sample, embedding: Embedding) -> None:
        """Score one image by every protocol, a group of objects at a time."""
        instances = [i for i in sample.instances if self._kept(i)]
        masks_each = 3 if any(protocol.multimask for protocol in self.protocols) else 1
        size = group_size(sample.size, masks_each, self.prompt_batch)
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
            if not protocol.keeps(instance):
                continue
            try:
                target = aim(self.model, protocol, instance, mask, image_id=sample.id)
            except DataError as err:
                what = f"annotation {instance.id}"
                self.skipped[index].append(Skipped(sample.id, what, reason(err)))
                continue
            asked.append(instance)
            targets.append(target)

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
