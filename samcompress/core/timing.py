"""How often to call, in which turns, and what one image and one prompt are.

Every call is warmed up, runs between two synchronisations, gets an input that was changed in place,
and has its output read. The first call is kept apart. Calls that are to be compared take turns, so
that what else the machine does falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .contract import check_sam, dtype_of, embedding_shape
from .devices import Device, Lap
from .errors import ConfigError
from .framing import framing_of
from .predict import preprocess

PROCESSES = 5  # fewest medians that an interval is drawn from
PATIENCE = 60  # calls after which nobody waits for a quiet machine any more
SETTLED = 1.05  # the longest of three calls over the shortest, once nothing is compiled any more
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
        processes: new processes that each do all of this, for an interval of the median: calls of
            one process resemble each other. 1, in this very process, or at least `PROCESSES`.

    Example:
        >>> Rounds.quick().calls
        5
    """

    warmup_calls: int = 10
    warmup_seconds: float = 1.0
    calls: int = 50
    seconds: float = 5.0
    max_seconds: float = 300.0
    processes: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 1 if name in ("calls", "processes") else 0
            if not value >= least:
                raise ConfigError(
                    f"Rounds.{name} is out of range.", got=value, expected=f"at least {least}"
                )
        if 1 < self.processes < PROCESSES:
            raise ConfigError(
                "Rounds.processes is too few for an interval.",
                got=self.processes,
                expected=f"1 for none, or at least {PROCESSES}",
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
        # Files from before there was a choice say nothing of processes.
        return {k: v for k, v in asdict(self).items() if k != "processes" or v > 1}


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


def time_many(
    calls: Mapping[K, Call],
    at: Device,
    rounds: Rounds,
    *,
    settle: bool = False,
    border: Call = lambda: None,
) -> dict[K, Timing]:
    """Time functions that take turns; who begins changes with every turn.

    Args:
        calls: functions without arguments, by name.
        at: the device they work on.
        rounds: how often to call each.
        settle: warm up until three calls in a row take the same time, within a twentieth: what
            compiles itself, or tries kernels, may do so for any number of calls.
        border: called when the warm-up is over, and after the last call.
    """
    began = time.perf_counter()
    laps: dict[K, list[Lap]] = {name: [] for name in calls}
    first = {name: at.time(call).wall_ms for name, call in calls.items()}

    def elapsed() -> float:
        return time.perf_counter() - began

    turn, start = 1, elapsed()
    warm: dict[K, list[float]] = {name: [] for name in calls}
    while (
        turn < rounds.warmup_calls
        or elapsed() - start < rounds.warmup_seconds
        or (settle and turn < PATIENCE and not all(map(_settled, warm.values())))
    ):
        if elapsed() > rounds.max_seconds / 4:
            break
        for name in _order(calls, turn):
            warm[name].append(at.time(calls[name]).wall_ms)
        turn += 1
    border()
    counted, start = 0, elapsed()
    while counted < rounds.calls or elapsed() - start < rounds.seconds:
        if counted >= 3 and elapsed() > rounds.max_seconds:
            break
        for name in _order(calls, counted):
            laps[name].append(at.time(calls[name]))
        counted += 1
    border()
    return {
        name: Timing(
            tuple(lap.ms for lap in laps[name]),
            first[name],
            float(np.median([lap.wall_ms for lap in laps[name]])),
        )
        for name in calls
    }


class Work:
    """The calls of one model, with inputs made beforehand.

    Args:
        model: a SAM; its calls are to be made in `evaluating` and inference mode.
        image: (H, W, 3) uint8; `noise` if left out.
    """

    def __init__(self, model: Any, image: np.ndarray | None = None) -> None:
        check_sam(model)
        image = noise(480, 640) if image is None else image
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
        """Resize, normalise and pad the image."""
        self.image[0, 0, 0] = self._next()
        return _read(preprocess(self.model, self.image)[0])

    def encoder(self) -> Tensor:
        """One preprocessed image."""
        return _read(self._encode(self.pixels))

    def prompt(self) -> Tensor:
        """One box on a cached embedding, to low-resolution logits."""
        return _read(self._decode(self.features))

    def postprocess(self) -> Tensor:
        """Logits of one mask to booleans at the image's own size."""
        self.logits.view(-1)[0] = self._next()
        height, width = self.image.shape[:2]
        full = self.framing.full_size(self.logits, (height, width))
        return _read((full > self.model.mask_threshold).cpu())

    def end_to_end(self) -> Tensor:
        """Encoder and one box, from a preprocessed image to logits."""
        return _read(self._decode(self._encode(self.pixels)))

    def batched(self, batch: int) -> Call:
        """The encoder on so many images at once."""
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


def _settled(times: list[float]) -> bool:
    last = times[-3:]
    return len(last) == 3 and max(last) <= SETTLED * min(last)


def _order(calls: Mapping[K, Call], turn: int) -> list[K]:
    names = list(calls)
    return names[turn % len(names) :] + names[: turn % len(names)]


def noise(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8, always the same."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Without dropout and the like; each module's mode is restored."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
