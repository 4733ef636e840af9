"""A named way to ask and to score, and the one loop of questions and answers that follows it.

The loop knows no model: it calls a decoder, prompts in, `Prediction` out, so that it can be tested
against a predictor of three lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, SamCompressError, closest
from ..core.predict import Prediction
from ..core.prompt import Prompt
from .field import Field
from .masks import Mask, boundary_iou, box_iou, iou
from .prompts import Rule
from .stats import Average

Choice = Literal["single", "predicted", "oracle", "box-iou"]
Feedback = Literal["none", "logits"]
Truth = Literal["exact", "resampled"]
Overlap = Literal["mask", "boundary"]
Decoder = Callable[[list[Prompt], bool], Prediction]


_VALUES = {
    "choice": Choice,
    "feedback": Feedback,
    "average": Average,
    "truth": Truth,
    "overlap": Overlap,
}
_LATER = {"truth": "exact", "overlap": "mask"}


class NonFiniteError(SamCompressError, ArithmeticError):
    """A model gave a score or a mask that is infinite or not a number."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that must be equal for two accuracies to be compared. Its text is the protocol id.

    Args:
        data: name of the data and number of images, as ``coco@val2017#108``.
        prompt: how objects are asked for; the names are in `samcompress.evaluate.prompts`.
        choice: ``single``, the one mask of an unambiguous prompt; ``predicted``, of three masks the
            one the model scores highest; ``oracle``, of three the truly best: an upper bound;
            ``box-iou``, of three the one that overlaps the prompt's box most.
        feedback: ``logits`` sends the last mask along with every correcting click.
        include_crowd: score regions of many objects too.
        min_area: leave out objects of a smaller annotated area, in pixels.
        average: what weighs the same: instances, categories or images.
        seed: of drawn prompts.
        truth: ``resampled`` compares with the truth after a bilinear way to 1024 pixels and back,
            as EdgeSAM's evaluation does.
        overlap: ``boundary`` scores the IoU of the rims; which mask counts is decided without.

    Raises:
        ConfigError: if a value is unknown, or ``box-iou`` is asked of a prompt without a box.

    Example:
        >>> print(Protocol(data="coco@val2017#108", prompt="point"))
        coco@val2017#108/center/single/feedback=none/crowd=no,min_area=0/instance
    """

    data: str
    prompt: str = "box"
    choice: Choice = "single"
    feedback: Feedback = "none"
    include_crowd: bool = False
    min_area: float = 0
    average: Average = "instance"
    seed: int = 0
    truth: Truth = "exact"
    overlap: Overlap = "mask"

    def __post_init__(self) -> None:
        rule = Rule.parse(self.prompt)
        object.__setattr__(self, "prompt", rule.name)
        for name, allowed in _VALUES.items():
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ConfigError(
                    f"unknown {name}.",
                    got=value,
                    expected=" | ".join(known),
                    fix=closest(str(value), known),
                )
        if not self.min_area >= 0:
            raise ConfigError("min_area is below 0.", got=self.min_area, expected="0 or more")
        if self.choice == "box-iou" and rule.first not in ("box", "box-tight"):
            raise ConfigError(
                "box-iou chooses by a box, and this prompt has none.",
                got=self.prompt,
                expected="box, box-tight, or one of them with clicks",
            )
        # What has no influence must not make two equal measurements look different.
        if not rule.clicks:
            object.__setattr__(self, "feedback", "none")
        if not rule.draws:
            object.__setattr__(self, "seed", 0)

    @cached_property
    def rule(self) -> Rule:
        """How prompts are made."""
        return Rule.parse(self.prompt)

    @property
    def multimask(self) -> bool:
        """Whether three masks are asked for."""
        return self.choice != "single"

    def keeps(self, instance: Any) -> bool:
        """Whether an annotation is scored."""
        return (self.include_crowd or not instance.crowd) and instance.area >= self.min_area

    def __str__(self) -> str:
        prompt = f"{self.prompt}:seed={self.seed}" if self.rule.draws else self.prompt
        kept = f"crowd={'yes' if self.include_crowd else 'no'},min_area={self.min_area:g}"
        kept += "".join(f",{name}={getattr(self, name)}" for name in self._unusual)
        return "/".join(
            (self.data, prompt, self.choice, f"feedback={self.feedback}", kept, self.average)
        )

    @property
    def _unusual(self) -> list[str]:
        """Fields that came later, so that ids from before stay what they were."""
        return [name for name, usual in _LATER.items() if getattr(self, name) != usual]

    @property
    def label(self) -> str:
        """The prompt, and in words what else is not as usual: what a table's column is called.

        Example:
            >>> Protocol(data="x", prompt="box", include_crowd=True, overlap="boundary").label
            'box, with crowds, boundary'
        """
        parts = [
            (self.feedback == "logits", "mask sent back"),
            (self.include_crowd, "with crowds"),
            (self.min_area > 0, f"from {self.min_area:g} px"),
            (self.truth == "resampled", "resampled truth"),
            (self.overlap == "boundary", "boundary"),
            (self.average != "instance", f"by {self.average}"),
        ]
        return ", ".join([self.prompt, *(words for holds, words in parts if holds)])

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """The protocol of an id.

        Raises:
            ConfigError: if the text is no protocol id.

        Example:
            >>> text = str(Protocol(data="shapes#8", prompt="random-3", seed=5))
            >>> Protocol.parse(text).seed
            5
        """
        try:
            data, prompt, choice, feedback, kept, average = text.rsplit("/", 5)
            prompt, _, seed = prompt.partition(":seed=")
            rest: dict[str, Any] = dict(part.split("=") for part in kept.split(","))
            crowd, area = rest.pop("crowd"), rest.pop("min_area")
            found = cls(
                data=data,
                prompt=prompt,
                choice=choice,  # type: ignore[arg-type]
                feedback=feedback.removeprefix("feedback="),  # type: ignore[arg-type]
                include_crowd=crowd == "yes",
                min_area=float(area),
                average=average,  # type: ignore[arg-type]
                seed=int(seed or 0),
                **rest,
            )
        except (KeyError, TypeError, ValueError) as err:
            example = cls(data="coco@val2017#108")
            raise ConfigError("this is no protocol id.", got=text, expected=f"{example}") from err
        return found


@dataclass(frozen=True)
class Target:
    """One object to be found.

    Attributes:
        name: what errors call it.
        mask: (H, W) bool, the truth, not empty.
        prompt: the first question.
        compared: (H, W) bool, what answers are compared with if it is not the truth itself.
        field: the truth at low resolution, for rules that draw clicks there.
    """

    name: str
    mask: Mask
    prompt: Prompt
    compared: Mask | None = None
    field: Field | None = None


@dataclass(frozen=True)
class Answer:
    """The mask chosen for one object.

    Attributes:
        prompt: all that was asked.
        mask: (H, W) bool.
        iou: with the truth.
        score: the model's own estimate of it.
        logits: (1, 4h, 4w), what ``feedback="logits"`` sends back.
    """

    prompt: Prompt
    mask: Mask
    iou: float
    score: float
    logits: Tensor


def rounds(
    protocol: Protocol, targets: Sequence[Target], decoder: Decoder
) -> Iterator[list[Answer]]:
    """Ask for all objects of an image together, then correct with one click a round.

    Args:
        protocol: the rule, choice and feedback to follow.
        targets: the objects of one image.
        decoder: prompts and whether to give three masks, to a `Prediction` at the masks' size.

    Yields:
        One answer a target, after the first prompt and after each click. An object whose answer
        leaves nothing to click keeps it.

    Raises:
        NonFiniteError: if a score or logit is not finite, naming the target.
    """
    answers = _ask(protocol, targets, [target.prompt for target in targets], decoder)
    yield answers
    for _ in range(protocol.rule.clicks):
        going: list[int] = []
        prompts: list[Prompt] = []
        for index, (target, answer) in enumerate(zip(targets, answers, strict=True)):
            low = None if target.field is None else (answer.logits[0] > 0).numpy()
            prompt = protocol.rule.correct(
                answer.prompt, target.mask, answer.mask, low=low, field=target.field
            )
            if prompt is not None:
                going.append(index)
                sent = answer.logits if protocol.feedback == "logits" else None
                prompts.append(replace(prompt, mask=sent))
        answers = list(answers)
        corrected = _ask(protocol, [targets[i] for i in going], prompts, decoder)
        for index, answer in zip(going, corrected, strict=True):
            answers[index] = answer
        yield answers


def _ask(
    protocol: Protocol, targets: Sequence[Target], prompts: list[Prompt], decoder: Decoder
) -> list[Answer]:
    if not prompts:
        return []
    prediction = decoder(prompts, protocol.multimask)
    check_finite(prediction, [target.name for target in targets])
    assert prediction.masks is not None  # the decoders of this package give full-size masks
    masks, scores = prediction.masks.numpy(), prediction.scores.numpy()
    answers = []
    for row, (target, prompt) in enumerate(zip(targets, prompts, strict=True)):
        truth = target.mask if target.compared is None else target.compared
        best = chosen(protocol.choice, masks[row], scores[row], prompt, truth)
        mask = masks[row, best]
        overlap = boundary_iou if protocol.overlap == "boundary" else iou
        answers.append(
            Answer(
                prompt,
                mask,
                float(overlap(mask, truth)),
                float(scores[row, best]),
                prediction.logits[row, best : best + 1],
            )
        )
    return answers


def check_finite(prediction: Prediction, names: Sequence[str]) -> None:
    """Refuse an answer that is infinite or not a number.

    Args:
        prediction: P answers.
        names: what errors call them.

    Raises:
        NonFiniteError: naming the first.
    """
    sound = torch.isfinite(prediction.scores).all(1)
    sound &= torch.isfinite(prediction.logits).flatten(1).all(1)
    if sound.all():
        return
    row = int(sound.logical_not().nonzero()[0])
    raise NonFiniteError(
        "the model's answer is not finite.",
        where=names[row],
        got=f"scores {prediction.scores[row].tolist()}, "
        f"{int((~torch.isfinite(prediction.logits[row])).sum())} bad logits",
        expected="finite scores and logits",
        fix="run it in float32, or leave out the step that made it so",
    )


def chosen(
    choice: Choice, masks: Mask, scores: np.ndarray, prompt: Prompt, truth: Mask | None = None
) -> int:
    """Which of an object's masks counts; the first of equals.

    Args:
        choice: the rule.
        masks: (M, H, W) bool.
        scores: (M,), the model's own.
        prompt: what was asked.
        truth: (H, W) bool, for ``oracle``.
    """
    if len(masks) == 1:
        return 0
    if choice == "oracle":
        assert truth is not None  # only `accuracy` has this choice, and it knows the truth
        return int(np.argmax(iou(masks, truth)))
    if choice == "box-iou":
        return int(np.argmax([box_iou(mask, prompt.box) for mask in masks]))
    return int(np.argmax(scores))
