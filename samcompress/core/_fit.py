"""Training in one loop; every technique that learns uses it.

All that is drawn at random is a pure function of the seed and the step, so a run that was stopped
goes on from its last checkpoint bit for bit (on the CPU), whatever stopped it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from . import _saved
from ._batches import batches
from ._draws import drawn
from ._engine import Engine, engine_for
from ._interrupt import Stop, interruptible
from ._objective import Objective, Share
from ._plan import Plan, Run
from ._progress import Progress
from ._saved import trained
from ._trainable import inside, trainable, training
from .contract import device_of
from .errors import CheckpointError, ConfigError

__all__ = ["Plan", "Run", "fit", "trainable", "trained", "training"]

log = logging.getLogger("samcompress.fit")
FORMAT = 2
LOG_SECONDS = 30.0
# Of the steps, those spent on a rehearsal at most; so short runs have none.
REHEARSED = 1 / 40
REHEARSALS = 3
HOW_NOT_WHAT = ("save_seconds", "accumulate")  # settings that may change when a run is resumed


def fit(
    objective: Objective,
    plan: Plan,
    *,
    parts: Sequence[str],
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    workers: int = 0,
    engine: Engine | None = None,
) -> Run:
    """Train parts of an objective in place.

    A step minimises the sum of the terms, each the mean over all items of the batch, however the
    batch is divided among micro-batches (`Plan.accumulate`) and processes. Ctrl-C ends the run
    after the step at hand, with a checkpoint; pressed again, at once.

    Args:
        objective: float32, on any device.
        plan: how to train.
        parts: its submodules that train, ``"student.image_encoder"``; the rest is frozen and in
            eval mode.
        checkpoint: safetensors file written now and then and at the end; resumed from if it exists.
            With several processes only the main one writes, and all must see the file.
        identity: plain values that tell this run from others; a checkpoint of another is refused.
        progress: counts the steps.
        workers: processes that draw batches ahead; the result is the same for any number.
        engine: None for plain torch, or accelerate under ``torchrun`` or ``accelerate launch``.

    Raises:
        CheckpointError: if the checkpoint is damaged, of another run, or cannot be written.
        ConfigError: if loss or gradient stays other than finite for `Plan.tolerance` steps, or a
            batch has fewer items than parts.
        NoEffectError, ModelError: see `trainable`.
        KeyboardInterrupt: after Ctrl-C.
    """
    engine = engine or engine_for(device_of(objective))
    with (
        torch.enable_grad(),
        training(objective, parts) as parameters,
        interruptible(checkpoint is not None) as stop,
    ):
        loop = _Loop(objective, parameters, plan, parts, identity or {}, engine)
        if checkpoint is not None and checkpoint.exists():
            loop.load(checkpoint)
        loop.check_start(checkpoint)
        loop.project(workers)
        loop.train(checkpoint, progress or Progress(), workers, stop)
        loop.finish()
        engine.wait()
    run = loop.run
    loop.tell(
        "%d steps in %.1f s, %d skipped; %.3g items/s, %.0f %% of the time waiting for data",
        run.step,
        run.seconds,
        run.skipped,
        run.items_per_second,
        100 * run.data_wait,
    )
    return run


class _Loop:
    def __init__(
        self,
        objective: Objective,
        parameters: dict[str, nn.Parameter],
        plan: Plan,
        parts: Sequence[str],
        identity: Mapping[str, Any],
        engine: Engine,
    ) -> None:
        self.objective, self.parameters, self.plan, self.parts = objective, parameters, plan, parts
        self.engine, self.module = engine, engine.prepare(objective)
        self.device = device_of(objective)
        own, count = plan.accumulate, engine.count * plan.accumulate
        self.shares = [Share(engine.index * own + i, count, filled=True) for i in range(own)]
        self.run, self.bad, self.halved = Run(), 0, 0
        kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters.values() if p.ndim > 1]},
            {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = kind(groups, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
        # After `prepare`, which gives all processes the weights of the main one.
        self.ema = (
            {} if plan.ema is None else {n: p.detach().clone() for n, p in parameters.items()}
        )
        settings = {k: v for k, v in dataclasses.asdict(plan).items() if k not in HOW_NOT_WHAT}
        # Through JSON, so that it compares equal to what a checkpoint gives back.
        self.identity = json.loads(json.dumps({"format": FORMAT, **settings, **identity}))

    def train(self, checkpoint: Path | None, progress: Progress, workers: int, stop: Stop) -> None:
        run, plan = self.run, self.plan
        steps = range(run.step, plan.steps)
        shown = progress if self.engine.is_main else Progress()
        saved = told = time.monotonic()
        window = dataclasses.replace(run)
        with closing(batches(self.objective.source, steps, self.shares, workers)) as drawn:
            for _ in shown.track(steps, label="steps", total=len(steps)):
                begin = time.monotonic()
                batch = next(drawn)
                ready = time.monotonic()
                stopped = not self._advance(batch, stop)
                end = time.monotonic()
                if not stopped:
                    run.waited += ready - begin
                    run.seconds += end - begin
                due = stopped or end - saved >= plan.save_seconds or run.step == plan.steps
                if checkpoint is not None and self.engine.is_main and due:
                    self.save(checkpoint)
                    saved = time.monotonic()
                if stopped:
                    raise KeyboardInterrupt
                if end - told >= LOG_SECONDS:
                    self._tell_window(window)
                    window, told = dataclasses.replace(run), end

    def _advance(self, batch: Sequence[Any], stop: Stop) -> bool:
        """One step, unless a process was asked to stop: then nothing happens in any of them."""
        run, plan = self.run, self.plan
        own = [float(part.weight) for part in batch]
        facts = torch.tensor([sum(own), sum(w <= 0 for w in own), stop.asked], dtype=torch.float64)
        weight, empty, asked = self.engine.sum(facts).tolist()
        if asked:
            return False
        if empty:
            raise ConfigError(
                "a part of a batch is empty.",
                where=f"step {run.step}",
                got=f"{empty:g} parts without items",
                expected="at least one item for each micro-batch of each process",
                fix="a larger batch_size, a smaller accumulate, or fewer processes",
            )
        if plan.epoch and run.step % plan.epoch == 0:
            self.halved = plan.halved(run.total)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(run.step, self.halved)
        total, terms, norm = self._gradients(batch, [w / weight for w in own])
        run.total.append(total)
        for name in terms:
            run.curves.setdefault(name, [math.nan] * run.step)
        for name, curve in run.curves.items():
            curve.append(terms.get(name, math.nan))
        run.items += weight
        if math.isfinite(total) and math.isfinite(norm):
            self.optimizer.step()
            self._average()
            self.bad = 0
        else:
            self._skip(terms, norm)
        self.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        return True

    def _gradients(
        self, batch: Sequence[Any], weights: Sequence[float]
    ) -> tuple[float, dict[str, float], float]:
        """Loss and terms of the whole batch; the norm of the gradient, which is clipped then."""
        plan, engine, step = self.plan, self.engine, self.run.step
        sums: dict[str, Tensor] = {}
        for part, weight, share in zip(batch, weights, self.shares, strict=True):
            with (
                engine.accumulate(self.module, share is self.shares[-1]),
                drawn(self.device, plan.seed, "step", step, share.index),
            ):
                with engine.autocast(self.device, plan.precision):
                    terms = self.module(part, step)
                total = torch.stack(list(terms.values())).sum()
                # Wrappers for several processes average gradients; the sum is wanted.
                engine.backward(total * (weight * engine.count))
            for name, value in {"": total, **terms}.items():
                scaled = value.detach() * weight
                sums[name] = sums[name] + scaled if name in sums else scaled
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if plan.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), plan.clip, norm)
        values = engine.sum(torch.stack(list(sums.values())))
        # One copy to the host, as it makes this thread wait for the device.
        loss, *found, length = torch.cat([values, norm[None].to(values)]).tolist()
        return loss, dict(zip(list(sums)[1:], found, strict=True)), length

    def _average(self) -> None:
        if self.plan.ema is None:
            return
        # A young average forgets faster, or it would stay near the first weights.
        keep = min(self.plan.ema, (1 + self.run.step) / (10 + self.run.step))
        update = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]
        update(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1)

    def _skip(self, terms: Mapping[str, float], norm: float) -> None:
        self.run.skipped += 1
        self.bad += 1
        log.warning("step %d skipped: loss or gradient is not finite", self.run.step)
        if self.bad >= self.plan.tolerance:
            found = {**terms, "gradient": norm}
            raise ConfigError(
                f"training diverged: {self.bad} steps in a row were not finite.",
                where=f"step {self.run.step}",
                got=", ".join(f"{k} {v:g}" for k, v in found.items()),
                expected="finite losses and gradients",
                fix=f"a lower rate than {self.plan.lr:g}, and images and weights without NaN",
            )

    def finish(self) -> None:
        with torch.no_grad():
            for name, mean in self.ema.items():
                self.parameters[name].copy_(mean)

    def check_start(self, checkpoint: Path | None) -> None:
        step = self.run.step
        steps = float(self.engine.sum(torch.tensor([step], dtype=torch.float64)))
        if steps != step * self.engine.count:
            raise CheckpointError(
                "processes found different checkpoints.",
                where=str(checkpoint),
                got=f"step {step} in process {self.engine.index}, another one elsewhere",
                expected="one file that all processes see",
                fix="a folder that all machines share",
            )

    def project(self, workers: int) -> None:
        """Tell what the run will cost, after a few steps that change nothing if it is long."""
        left = self.plan.steps - self.run.step
        # A resumed run knows already.
        seconds = self.run.seconds_per_step or self._rehearse(
            min(REHEARSALS, int(left * REHEARSED)), workers
        )
        if not (seconds and left):
            return
        peak = _peak_bytes(self.device)
        self.tell(
            "%d steps at %.3g s: %s in all; checkpoint of %.3g MB%s",
            left,
            seconds,
            datetime.timedelta(seconds=round(seconds * left)),
            self._checkpoint_bytes() / 1e6,
            f"; at most {peak / 1e9:.3g} GB of memory so far" if peak else "",
        )

    def _rehearse(self, times: int, workers: int) -> float:
        """Seconds of a step; 0 if it was not tried."""
        kept = [(b, b.clone()) for b in self.objective.buffers()]
        best = math.inf
        for _ in range(times):
            begin = time.monotonic()
            batch = [self.objective.source.draw(self.run.step, share) for share in self.shares]
            ready = time.monotonic()
            self._gradients(batch, [1 / len(batch)] * len(batch))
            self.optimizer.zero_grad(set_to_none=True)
            draw, learn = ready - begin, time.monotonic() - ready
            # Workers draw while the model learns.
            best = min(best, max(learn, draw / workers) if workers else learn + draw)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        return best if times else 0.0

    def _tell_window(self, since: Run) -> None:
        run = self.run
        seconds = run.seconds - since.seconds
        curves = {"loss": run.total, **run.curves}
        means = {k: _mean(v[since.step :]) for k, v in curves.items()}
        self.tell(
            "step %d of %d: %s; rate %.3g; %.3g items/s, %.0f %% of the time waiting for data",
            run.step,
            self.plan.steps,
            ", ".join(f"{k} {v:.4g}" for k, v in means.items()),
            self.optimizer.param_groups[0]["lr"],
            (run.items - since.items) / seconds,
            100 * (run.waited - since.waited) / seconds,
        )

    def tell(self, text: str, *values: object) -> None:
        if self.engine.is_main:
            log.info(text, *values)

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self._state().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        run = dataclasses.asdict(self.run)
        tensors["total"] = torch.tensor(run.pop("total"), dtype=torch.float64)
        for name, curve in run.pop("curves").items():
            tensors[f"curve.{name}"] = torch.tensor(curve, dtype=torch.float64)
        _saved.write(path, tensors, {"identity": self.identity, "bad": self.bad, **run})

    def load(self, path: Path) -> None:
        tensors, facts = _saved.read(path)
        other = facts.pop("identity")
        for key in {**self.identity, **other}:
            if self.identity.get(key) != other.get(key):
                raise CheckpointError(
                    f"the training checkpoint is of another run: {key} differs.",
                    where=str(path),
                    got=other.get(key),
                    expected=self.identity.get(key),
                    fix="delete the file to begin anew, or use another folder",
                )
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(tensors[f"model.{name}"])
            for name, mean in self.ema.items():
                mean.copy_(tensors[f"ema.{name}"])
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = tensors.get(f"optimizer.{key}.{name}")
                if stored is not None:
                    # Adam counts its steps on the CPU.
                    where = stored.device if key == "step" else parameter.device
                    self.optimizer.state[parameter][key] = stored.to(where)
        curves = {
            k.removeprefix("curve."): v.tolist()
            for k, v in tensors.items()
            if k.startswith("curve.")
        }
        self.bad = facts.pop("bad")
        self.run = Run(**facts, total=tensors["total"].tolist(), curves=curves)
        self.run.resumed = self.run.step
        self.halved = self.plan.halved(self.run.total)

    def _state(self) -> dict[str, Tensor]:
        """Weights of the trained parts, and their buffers: a batch norm counts while it trains."""
        return {k: v for k, v in self.objective.state_dict().items() if inside(k, self.parts)}

    def _checkpoint_bytes(self) -> int:
        weights = sum(p.nbytes for p in self.parameters.values())
        averages = 2 + (self.plan.ema is not None)
        return sum(t.nbytes for t in self._state().values()) + averages * weights


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
