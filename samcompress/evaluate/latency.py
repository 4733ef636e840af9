"""How long each part of a SAM takes, measured so that the figure means something.

Every call is warmed up, runs between two synchronisations, gets an input that was changed in place,
and has its output read. The first call is kept apart. Models that are to be compared take turns, so
that what else the machine does falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..core.contract import check_sam, device_of, dtype_of, embedding_shape
from ..core.errors import ConfigError
from ..core.framing import framing_of
from ..core.predict import preprocess
from .devices import Device, Lap, device

PARTS = ("preprocess", "encoder", "prompt", "postprocess", "end_to_end")
Call = Callable[[], Any]
K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often a call is repeated.

    Attributes:
        warmup_calls: calls before the first one that counts, at least this many ...
        warmup_seconds: ... and for at least this long.
        calls: calls that count, at least this many ...
        seconds: ... and for at least this long.
        max_seconds: stop after this long, warm-up included, once three calls have counted.

    Example:
        >>> Rounds.quick().calls
        5
    """

    warmup_calls: int = 10
    warmup_seconds: float = 1.0
    calls: int = 50
    seconds: float = 5.0
    max_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 1 if name == "calls" else 0
            if not value >= least:
                raise ConfigError(
                    f"Rounds.{name} is out of range.", got=value, expected=f"at least {least}"
                )

    @classmethod
    def quick(cls) -> Rounds:
        """Few calls, for a first look: the figures are rougher, the method is the same."""
        return cls(warmup_calls=2, warmup_seconds=0.05, calls=5, seconds=0.25, max_seconds=20.0)

    @classmethod
    def exactly(cls, calls: int) -> Rounds:
        """So many calls after the first, however long they take: for models of many seconds."""
        day = 86_400.0
        return cls(warmup_calls=1, warmup_seconds=0, calls=calls, seconds=0, max_seconds=day)

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """Times of one call, in milliseconds.

    Attributes:
        samples_ms: every call that counted, in the order they were made.
        first_call_ms: the very first call, wall clock.
        wall_median_ms: median by the wall clock; differs from the median where the device has a
            clock of its own.
    """

    samples_ms: tuple[float, ...]
    first_call_ms: float
    wall_median_ms: float

    @property
    def n(self) -> int:
        """Number of calls that counted."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Half of the calls took less."""
        return self._percentile(50)

    @property
    def iqr_ms(self) -> float:
        """Width of the middle half of the calls."""
        return self._percentile(75) - self._percentile(25)

    def _percentile(self, q: float) -> float:
        return float(np.percentile(self.samples_ms, q))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the samples included."""
        return {
            "median_ms": self.median_ms,
            "iqr_ms": self.iqr_ms,
            "p90_ms": self._percentile(90),
            "p99_ms": self._percentile(99),
            "min_ms": min(self.samples_ms),
            "n": self.n,
            "first_call_ms": self.first_call_ms,
            "wall_median_ms": self.wall_median_ms,
            "samples_ms": list(self.samples_ms),
        }

    def __repr__(self) -> str:
        return f"Timing({self.median_ms:.3g} ms, IQR {self.iqr_ms:.3g}, n={self.n})"


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
    """

    preprocess: Timing
    encoder: Timing
    prompt: Timing
    postprocess: Timing
    end_to_end: Timing
    throughput: dict[int, float]
    threads: int

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
        rounds: how often to repeat.
        batches: batch sizes to measure the encoder's throughput at.
        threads: CPU threads inside an operator; as set in this process if left out.

    Example:
        >>> from samcompress.core.build import build
        >>> times = latency(build("tiny"), rounds=Rounds.quick())
        >>> times.end_to_end.median_ms > times.prompt.median_ms
        True
    """
    return latency_many(
        {"model": model}, image=image, rounds=rounds, batches=batches, threads=threads
    )["model"]


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
    """
    places = {str(device_of(model)) for model in models.values()}
    if len(places) != 1:
        raise ConfigError(
            "models are timed together on one device.",
            got=", ".join(sorted(places)) or "no model",
            expected="models on one device",
        )
    at = device(places.pop())
    rounds = rounds or Rounds()
    image = _noise(480, 640) if image is None else image
    with _threads(threads) as used, _evaluating(models.values()), torch.inference_mode():
        work = {name: _Work(model, image) for name, model in models.items()}
        # The parts take turns too: only so do encoder and prompt add up to end_to_end.
        calls = {(name, part): getattr(w, part) for name, w in work.items() for part in PARTS}
        timings = time_many(calls, at, rounds)
        flows: dict[str, dict[int, float]] = {name: {} for name in models}
        for batch in batches:
            batched = {name: w.batched(batch) for name, w in work.items()}
            for name, timing in time_many(batched, at, rounds).items():
                flows[name][batch] = batch * 1e3 / timing.median_ms
    return {
        name: Latency(
            **{part: timings[name, part] for part in PARTS}, throughput=flows[name], threads=used
        )
        for name in models
    }


def time_many(calls: Mapping[K, Call], at: Device, rounds: Rounds) -> dict[K, Timing]:
    """Time functions that take turns; who begins changes with every turn.

    Args:
        calls: functions without arguments, by name.
        at: the device they work on.
        rounds: how often to call each.
    """
    began = time.perf_counter()
    laps: dict[K, list[Lap]] = {name: [] for name in calls}
    first = {name: at.time(call).wall_ms for name, call in calls.items()}

    def elapsed() -> float:
        return time.perf_counter() - began

    turn, start = 1, elapsed()
    while turn < rounds.warmup_calls or elapsed() - start < rounds.warmup_seconds:
        if elapsed() > rounds.max_seconds / 4:
            break
        for name in _order(calls, turn):
            at.time(calls[name])
        turn += 1
    counted, start = 0, elapsed()
    while counted < rounds.calls or elapsed() - start < rounds.seconds:
        if counted >= 3 and elapsed() > rounds.max_seconds:
            break
        for name in _order(calls, counted):
            laps[name].append(at.time(calls[name]))
        counted += 1
    return {
        name: Timing(
            tuple(lap.ms for lap in laps[name]),
            first[name],
            float(np.median([lap.wall_ms for lap in laps[name]])),
        )
        for name in calls
    }


def one_call(model: nn.Module) -> Call:
    """A function that runs the encoder and one box, from a preprocessed image to logits."""
    work = _Work(model, _noise(480, 640))

    def call() -> None:
        with torch.inference_mode():
            work.end_to_end()

    return call


class _Work:
    """The calls of one model, with inputs made beforehand."""

    def __init__(self, model: Any, image: np.ndarray) -> None:
        check_sam(model)
        self.model = model
        self.image = image.copy()
        self.framing = framing_of(model)
        self.pixels = preprocess(model, image)[0][None]
        side = float(self.framing.frame)
        self.box = torch.tensor([[0.2, 0.2, 0.6, 0.6]], device=self.pixels.device) * side
        self.position = model.prompt_encoder.get_dense_pe().to(dtype_of(model.mask_decoder))
        draw = torch.Generator().manual_seed(0)
        self.features = torch.randn(1, *embedding_shape(model), generator=draw).to(self.position)
        low = (1, 1, *model.prompt_encoder.mask_input_size)
        self.logits = torch.randn(low, generator=draw).to(self.pixels.device)
        self.turn = 0

    def preprocess(self) -> Tensor:
        self.image[0, 0, 0] = self._next()
        return _read(preprocess(self.model, self.image)[0])

    def encoder(self) -> Tensor:
        return _read(self._encode(self.pixels))

    def prompt(self) -> Tensor:
        return _read(self._decode(self.features))

    def postprocess(self) -> Tensor:
        self.logits.view(-1)[0] = self._next()
        height, width = self.image.shape[:2]
        full = self.framing.full_size(self.logits, (height, width))
        return _read((full > self.model.mask_threshold).cpu())

    def end_to_end(self) -> Tensor:
        return _read(self._decode(self._encode(self.pixels)))

    def batched(self, batch: int) -> Call:
        pixels = self.pixels.repeat(batch, 1, 1, 1)
        return lambda: _read(self._encode(pixels))

    def _encode(self, pixels: Tensor) -> Tensor:
        # One pixel differs from call to call, so that nothing along the way can answer from memory.
        pixels[0, 0, 0, 0] = self._next() / 256
        features: Tensor = self.model.image_encoder(pixels)
        return features

    def _decode(self, features: Tensor) -> Tensor:
        self.box[0, 0] = self._next() / 64
        sparse, dense = self.model.prompt_encoder(points=None, boxes=self.box, masks=None)
        kind = self.position.dtype
        logits, _ = self.model.mask_decoder(
            image_embeddings=features.to(kind),
            image_pe=self.model.prompt_encoder.get_dense_pe().to(kind),
            sparse_prompt_embeddings=sparse.to(kind),
            dense_prompt_embeddings=dense.to(kind),
            multimask_output=False,
        )
        masks: Tensor = logits
        return masks

    def _next(self) -> int:
        self.turn = (self.turn + 1) % 256
        return self.turn


def _read(output: Tensor) -> Tensor:
    # A lazy backend does its work only when somebody looks at the result.
    output.reshape(-1)[-1:].clone()
    return output


def _order(calls: Mapping[K, Call], turn: int) -> list[K]:
    names = list(calls)
    return names[turn % len(names) :] + names[: turn % len(names)]


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@contextmanager
def _threads(number: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if number is not None:
        if number < 1:
            raise ConfigError("threads is out of range.", got=number, expected="at least 1")
        torch.set_num_threads(number)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(models: Any) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
