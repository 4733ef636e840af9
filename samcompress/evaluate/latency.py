"""How long each part of a SAM takes; how it is measured is told in `core.timing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.contract import device_of
from ..core.errors import ConfigError, ModelError
from ..core.history import lineage
from ..core.timing import Call, Rounds, Timing, Work, evaluating, time_many
from .devices import device, pinned

__all__ = [
    "PARTS",
    "Latency",
    "Rounds",
    "Timing",
    "latency",
    "latency_many",
    "one_call",
    "time_many",
]

PARTS = ("preprocess", "encoder", "prompt", "postprocess", "end_to_end")


@dataclass(frozen=True)
class Latency:
    """Times of the parts of one model on one device.

    Attributes:
        preprocess: resize, normalise and pad one image.
        encoder: one preprocessed image, batch 1.
        prompt: one box on a cached embedding, to low-resolution logits.
        postprocess: logits of one mask to booleans at the image's own size.
        end_to_end: encoder and one box, from a preprocessed image to low-resolution logits.
        throughput: images a second through the encoder, by batch size.
        threads: CPU threads used inside an operator.
        settings: what else times depend on: CPUs the threads were bound to, precision of products,
            and a GPU's clock when the measurement began and ended.
    """

    preprocess: Timing
    encoder: Timing
    prompt: Timing
    postprocess: Timing
    end_to_end: Timing
    throughput: dict[int, float]
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        best = max(self.throughput, key=self.throughput.__getitem__, default=None)
        return {
            **{part: getattr(self, part).to_dict() for part in PARTS},
            "throughput": {
                "images_per_s": {str(k): v for k, v in self.throughput.items()},
                "best_batch": best,
            },
            "threads": self.threads,
            "settings": self.settings,
        }


def latency(
    model: nn.Module,
    *,
    image: np.ndarray | None = None,
    rounds: Rounds | None = None,
    batches: Sequence[int] = (),
    threads: int | None = None,
) -> Latency:
    """Time the parts of a SAM on the device it is on.

    Args:
        model: a SAM.
        image: (H, W, 3) uint8 that pre- and postprocessing use; 480 x 640 of noise if left out.
        rounds: how often to repeat; in this process, whatever `Rounds.processes` says.
        batches: batch sizes to measure the encoder's throughput at.
        threads: CPU threads inside an operator, each bound to a CPU of its own; as they are in this
            process if left out.

    Example:
        >>> from samcompress.core.build import build
        >>> times = latency(build("tiny"), rounds=Rounds.quick())
        >>> times.end_to_end.median_ms > times.prompt.median_ms
        True
    """
    return latency_many(
        {"model": model}, image=image, rounds=rounds, batches=batches, threads=threads
    )["model"]


def check_real(name: str, model: nn.Module) -> None:
    """Check that a model computes as it would in use.

    Raises:
        ModelError: if a step of it only simulates, as its time would say nothing.
    """
    steps = [step.transform.label for step in lineage(model) if step.simulated]
    if steps:
        raise ModelError(
            "a simulated model is not timed.",
            where=name,
            got=f"floating point that imitates other numbers, by {', '.join(steps)}",
            expected="a model that computes as it would in use",
            fix="measure its accuracy; for speed, use a step that runs integers",
        )


def latency_many(
    models: Mapping[str, nn.Module],
    *,
    image: np.ndarray | None = None,
    rounds: Rounds | None = None,
    batches: Sequence[int] = (),
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several models that take turns call by call, so that their ratios are fair.

    Args:
        models: SAMs by name, all on one device.
        image: as in `latency`.
        rounds: as in `latency`; the limits of time hold for all models together.
        batches: as in `latency`.
        threads: as in `latency`.

    Raises:
        ConfigError: if there is no model, or they are on different devices.
        ModelError: if a model is simulated.
    """
    for name, model in models.items():
        check_real(name, model)
    places = {str(device_of(model)) for model in models.values()}
    if len(places) != 1:
        raise ConfigError(
            "models are timed together on one device.",
            got=", ".join(sorted(places)) or "no model",
            expected="models on one device",
        )
    at = device(places.pop())
    rounds = rounds or Rounds()
    # Where the number of calls is given, it is kept to.
    settle = rounds.warmup_seconds > 0 and any(_compiled(model) for model in models.values())
    clocks: list[float | None] = []
    with pinned(threads) as used, evaluating(models.values()), torch.inference_mode():
        work = {name: Work(model, image) for name, model in models.items()}
        # The parts take turns too: only so do encoder and prompt add up to end_to_end.
        calls = {(name, part): getattr(w, part) for name, w in work.items() for part in PARTS}
        timings = time_many(
            calls, at, rounds, settle=settle, border=lambda: clocks.append(at.clock_mhz())
        )
        settings = at.settings() | _clock(clocks)
        flows: dict[str, dict[int, float]] = {name: {} for name in models}
        for batch in batches:
            batched = {name: w.batched(batch) for name, w in work.items()}
            for name, timing in time_many(batched, at, rounds).items():
                flows[name][batch] = batch * 1e3 / timing.median_ms
    return {
        name: Latency(
            **{part: timings[name, part] for part in PARTS},
            throughput=flows[name],
            threads=used,
            settings=settings,
        )
        for name in models
    }


def one_call(model: nn.Module) -> Call:
    """A function that runs the encoder and one box, from a preprocessed image to logits."""
    work = Work(model)

    def call() -> None:
        with torch.inference_mode():
            work.end_to_end()

    return call


def _compiled(model: nn.Module) -> bool:
    return any(step.transform.terminal for step in lineage(model))


def _clock(seen: Sequence[float | None]) -> dict[str, Any]:
    """A clock that falls by more than a twentieth: the GPU was too hot, or short of power."""
    first, last = seen[0], seen[-1]
    if first is None or last is None:
        return {}
    return {"clock_mhz": [first, last], "throttled": last < 0.95 * first}
