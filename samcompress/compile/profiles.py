"""What runs a model fastest on this machine: measured, never looked up."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import devices
from ..core._progress import Progress, ProgressLike
from ..core.contract import check_sam, device_of
from ..core.data import as_dataset, shapes
from ..core.display import Cell, Column, Table
from ..core.errors import BackendError, ConfigError, SamCompressError, sentence
from ..core.pipeline import Pipeline
from ..core.predict import predict
from ..core.prompt import Prompt
from ..core.registry import get
from ..core.timing import Rounds, Work, evaluating, time_many
from ..core.transform import Transform
from .backends import BACKENDS
from .export import Export
from .torch import Torch

EXACT = "attention.fused"
# Steps of other families, in torch; each after `EXACT`, where that fits the model.
IN_TORCH: dict[str, tuple[tuple[str, ...], ...]] = {
    "cpu": (("quantize.b_float16",), ("quantize.int8_dynamic",)),
    "cuda": (("quantize.b_float16",),),
    "mps": (("quantize.b_float16",),),
}
# What the decoder computes in beside the encoder: less than bfloat16 costs masks.
DECODER = {"bfloat16": "bfloat16", "float16": "float16"}
OBJECTS = 8  # of an image that are compared
EVEN = 1.02  # a lower number of threads that is slower by less is taken


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One chain that was tried.

    Attributes:
        steps: the chain; empty for the model as it was.
        agreement: mean IoU of its masks with those of the model as it was; None if it did not run.
        ms: of one image and the prompts, with the most threads.
        speedup: how many times as fast as the model as it was, in turns with it.
        reason: why it was not measured, or cannot win; None for the others.
    """

    steps: tuple[Transform, ...]
    agreement: float | None = None
    ms: float | None = None
    speedup: float | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """The chain, as one would type it."""
        return " | ".join(_call(step) for step in self.steps) or "as it is"


@dataclass(frozen=True)
class Choice:
    """What a `Profile` found; shows itself as a table.

    Attributes:
        profile: what was asked.
        model: the fastest SAM; the given one, copied, where nothing was faster.
        best: its line of the table.
        trials: every chain, in the order they were tried.
        threads: CPU threads that are best for it; for ``torch.set_num_threads``. None on others.
        by_threads: milliseconds of the fastest by number of threads.
    """

    profile: Profile
    model: Any
    best: Trial
    trials: tuple[Trial, ...]
    threads: int | None
    by_threads: dict[int, float]

    @property
    def pipeline(self) -> Pipeline | None:
        """The chain, to be saved as a recipe or called on other models; None if it is empty."""
        return Pipeline(self.best.steps) if self.best.steps else None

    def table(self) -> Table:
        """Every chain with its time, its masks, and why it did not win."""
        columns = (
            Column("chain", align="left"),
            Column("IoU to model"),
            Column("time", "ms"),
            Column("speed-up", "x"),
            Column("result", align="left"),
        )
        rows = [
            (
                Cell(trial.name, mark="bold" if trial is self.best else ""),
                trial.agreement,
                trial.ms,
                trial.speedup,
                "chosen" if trial is self.best else trial.reason or "",
            )
            for trial in self.trials
        ]
        counts = ", ".join(f"{n}: {ms:.3g} ms" for n, ms in self.by_threads.items())
        notes = [
            f"one image and {self.profile.prompts} prompt(s), in turns with the model as it is"
        ]
        if counts:
            notes.append(f"threads {counts}; chosen: {self.threads}")
        absent = devices.unavailable(self.profile.device)
        where = absent or devices.device(self.profile.device).name
        return Table(columns, rows, title=f"{self.profile.device}: {where}", notes=tuple(notes))

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Tries chains of runtimes and precisions on this machine; made by `for_device`.

    Args:
        device: where the model is to run.
        agreement: least mean IoU of the masks with those of the model as it is.
        prompts: prompts an image is asked with: many make the decoder's time count.
        images: images the masks are compared on, the first of the data.
        threads: numbers of CPU threads to choose among; 1, 2, 4, ... up to all CPUs if left out.
        rounds: how often calls are repeated.

    Raises:
        ConfigError: if the device is unknown, or a number is out of range.
    """

    device: str
    agreement: float = 0.98
    prompts: int = 1
    images: int = 4
    threads: tuple[int, ...] | None = None
    rounds: Rounds = field(default_factory=Rounds.quick)

    def __post_init__(self) -> None:
        devices.unavailable(self.device)
        for name, good, expected in (
            ("agreement", 0 <= self.agreement <= 1, "0 to 1"),
            ("prompts", self.prompts >= 1, "at least 1"),
            ("images", self.images >= 1, "at least 1"),
            ("threads", all(n >= 1 for n in self.threads or (1,)), "each at least 1"),
        ):
            if not good:
                got = getattr(self, name)
                raise ConfigError(f"{name} is out of range.", got=got, expected=expected)

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``, say."""
        return self.device.partition(":")[0]

    def chains(self, model: nn.Module) -> Iterator[tuple[Transform, ...]]:
        """Chains to try on a model, the empty one first."""
        exact = _fitting(get(EXACT), model)
        yield ()
        if exact:
            yield exact
        for names in IN_TORCH.get(self.kind, ()):
            yield (*exact, *(get(name) for name in names))
        if self.kind == "cuda":
            yield (*exact, get("quantize.b_float16"), Torch())
        for runtime in BACKENDS.values():
            if self.kind in runtime.devices:
                for dtype in runtime.dtypes:
                    decoder = DECODER.get(dtype, "float32")
                    step: Any = {"backend": runtime.name, "precision": dtype, "decoder": decoder}
                    yield (*exact, Export(**step))

    def __call__(self, model: Any, *, data: Any = None, progress: ProgressLike = True) -> Choice:
        """Try every chain on a copy of a model and keep the fastest that gives the same masks.

        Args:
            model: a SAM; it is not changed.
            data: images: to compare masks on, and for runtimes that calibrate. Without, masks are
                compared on drawn shapes, and such runtimes are not tried.
            progress: True for bars, False for silence, a callable for events.

        Raises:
            ConfigError: if the device is not there.
            BackendError: if nothing runs this model there.
        """
        check_sam(model)
        if self.kind == devices.EdgeTpu.kind:
            return self._edge_tpu(model, data)
        at = devices.device(self.device)
        base = model
        if device_of(model) != at.torch_device:
            base = copy.deepcopy(model).to(at.torch_device)
        asked = _Asked(data, self.images)
        counts = self._counts()
        masks = asked.masks(base)
        trials: list[Trial] = []
        best, best_model = Trial(steps=()), None
        chains = list(self.chains(base))
        for steps in Progress(progress, "for_device").track(chains, label="chains"):
            trial, made = self._try(steps, base, data, asked, masks, at, counts)
            trials.append(trial)
            if trial.reason is None and (trial.speedup or 0) > (best.speedup or 0):
                best, best_model = trial, made
            del made
            gc.collect()  # files of runtimes go with their models
        if best_model is None:
            raise BackendError(
                "nothing runs this model here.", where=self.device, got=trials[0].reason
            )
        if best_model is base:
            best_model = copy.deepcopy(base)
        by_threads = self._by_threads(best_model, at, counts)
        return Choice(self, best_model, best, tuple(trials), _fewest(by_threads), by_threads)

    def _try(
        self,
        steps: tuple[Transform, ...],
        base: Any,
        data: Any,
        asked: _Asked,
        masks: list[Tensor],
        at: devices.Device,
        counts: Sequence[int],
    ) -> tuple[Trial, Any]:
        trial = Trial(steps=steps)
        try:
            made = Pipeline(steps)(base, data=data, progress=False) if steps else base
            same = _agreement(asked.masks(made), masks)
            took, before = self._times(made, base, at, counts)
        except (SamCompressError, RuntimeError, NotImplementedError) as err:
            return replace(trial, reason=f"not measured: {sentence(err)}"), None
        trial = replace(trial, agreement=same, ms=took, speedup=before / took)
        # Not a number is not enough either.
        if not same >= self.agreement:
            return replace(trial, reason=f"masks differ: below {self.agreement:g}"), None
        return trial, made

    def _times(
        self, made: Any, base: Any, at: devices.Device, counts: Sequence[int]
    ) -> tuple[float, float]:
        """Milliseconds of a model and of the one it came from, in turns."""
        models = {"made": made} | ({"base": base} if made is not base else {})
        with (
            devices.pinned(max(counts, default=None)),
            evaluating(models.values()),
            torch.inference_mode(),
        ):
            calls = {
                (name, part): getattr(work, part)
                for name, work in ((n, Work(m)) for n, m in models.items())
                for part in ("encoder", "prompt")
            }
            found = time_many(calls, at, self.rounds, settle=True)
        times = {
            name: found[name, "encoder"].median_ms + self.prompts * found[name, "prompt"].median_ms
            for name in models
        }
        return times["made"], times.get("base", times["made"])

    def _counts(self) -> tuple[int, ...]:
        if self.kind != "cpu":
            return ()
        if self.threads is not None:
            return tuple(sorted(set(self.threads)))
        most = len(devices.cpus() or ()) or torch.get_num_threads()
        return (*(2**k for k in range(most.bit_length()) if 2**k < most), most)

    def _by_threads(
        self, model: Any, at: devices.Device, counts: Sequence[int]
    ) -> dict[int, float]:
        # The most threads first: some runtimes never take more than they began with.
        return {n: self._times(model, model, at, (n,))[0] for n in reversed(counts)}

    def _edge_tpu(self, model: Any, data: Any) -> Choice:
        """The only chain there is: an int8 file, looked at operator by operator."""
        if BACKENDS["litert"].hindrance("int8") is not None:
            raise BackendError(
                "nothing here runs a model on an Edge TPU.",
                got=devices.unavailable(self.device) or "an Edge TPU, and no converter",
                expected="int8 LiteRT files made by edgetpu_compiler; no ViT encoder becomes one",
                fix="a small convolutional encoder, e.g. sc.substitute.RepViT, and LiteRT",
            )
        step = Export(backend="litert", precision="int8")
        made: Any = Pipeline([step])(model, data=data, progress=False)
        asked = _Asked(data, self.images)
        same = _agreement(asked.masks(made), asked.masks(model))
        reason = devices.unavailable(self.device)
        # The decoder is in floats, and stays on the CPU.
        (found,) = made.image_encoder.checks()
        trial = Trial(
            steps=(step,),
            agreement=same,
            reason=f"{found['title']}; time not measured{f': {reason}' if reason else ''}",
        )
        return Choice(self, made, trial, (trial,), None, {})


class _Asked:
    """Images and boxes that every model is asked for masks of."""

    def __init__(self, data: Any, images: int) -> None:
        found = shapes(images) if data is None else as_dataset(data)
        samples = itertools.islice(found.readable(), images)
        self.images: list[np.ndarray] = []
        self.prompts: list[list[Prompt]] = []
        for sample in samples:
            boxes = [np.array(i.box) for i in sample.instances[:OBJECTS]]
            if boxes:
                self.images.append(sample.image)
                self.prompts.append([Prompt(box=box) for box in boxes])
        if not self.images:
            raise ConfigError(
                "masks cannot be compared on these images.", got="no image with an object in it"
            )

    def masks(self, model: Any) -> list[Tensor]:
        """(P, 1, H, W) bool an image."""
        with evaluating([model]):
            found = predict(model, self.images, self.prompts)
        return [p.masks for p in found if p.masks is not None]


def for_device(device: str, **settings: Any) -> Profile:
    """What tries back ends, precisions and threads on this machine and keeps the fastest.

    Every candidate is made and run: its masks are compared with those of the model as it is, its
    time is measured in turns with it. A runtime that is absent, or cannot take the model, gives a
    line that says so. Nothing is guessed for a device that is not here.

    Args:
        device: ``cpu``, ``cuda``, ``mps`` or ``edge-tpu``.
        settings: ``agreement``, ``prompts``, ``images``, ``threads``, ``rounds`` of `Profile`.

    Returns:
        A profile; called on a model, and images if there are any, it gives a `Choice`: the table,
        the ``model``, the ``pipeline`` that made it, and the best number of ``threads``.

    Raises:
        ConfigError: if the device is unknown, or a setting is out of range.

    Example:
        >>> import samcompress as sc
        >>> for_device("cpu", agreement=0.95).agreement
        0.95
    """
    try:
        return Profile(device=device, **settings)
    except TypeError as err:
        raise ConfigError(
            "for_device has no such setting.",
            got=", ".join(settings),
            expected="agreement, prompts, images, threads, rounds",
        ) from err


def _agreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean IoU of (P, 1, H, W) boolean masks, an image each; 1 where both are empty."""
    values = []
    for a, b in zip(found, expected, strict=True):
        both, either = ((f(a, b)).sum((1, 2, 3)) for f in (torch.logical_and, torch.logical_or))
        values.append(torch.where(either > 0, both / either.clamp_min(1), 1.0))
    return float(torch.cat(values).mean())


def _fewest(by_threads: dict[int, float]) -> int | None:
    least = min(by_threads.values(), default=0.0)
    return min((n for n, ms in by_threads.items() if ms <= EVEN * least), default=None)


def _fitting(step: Transform, model: nn.Module) -> tuple[Transform, ...]:
    try:
        Pipeline([step]).check(model)
    except SamCompressError:
        return ()
    return (step,)


def _call(step: Transform) -> str:
    values = [str(v) for k, v in step.params().items() if k in ("backend", "precision")]
    return f"{step.label}({', '.join(values)})" if values else step.label
