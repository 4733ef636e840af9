"""Training in one small loop; every technique that learns uses it.

All that is drawn at random is a pure function of the seed and the step, so a run that was stopped
goes on from its last checkpoint bit for bit (on the CPU), whatever stopped it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._draws import drawn
from ._progress import Progress
from .contract import device_of
from .errors import CheckpointError, ConfigError, ModelError, NoEffectError
from .files import whole

log = logging.getLogger("samcompress.fit")
FORMAT = 1
Loss = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train.

    Attributes:
        steps: optimiser steps.
        lr: highest learning rate; it rises linearly, then falls along a cosine.
        optimizer: AdamW decays weights apart from the gradient, Adam within it.
        betas: decay of the optimiser's two averages.
        weight_decay: of parameters with two or more dimensions; biases and norms have none.
        warmup: share of the steps in which the rate rises.
        floor: last learning rate over the highest.
        clip: largest norm of the whole gradient; None for no limit.
        ema: decay of a running average of the weights, which is the result; None for none.
        patience: steps in a row whose loss or gradient may be other than finite.
        save_seconds: time between checkpoints.
        seed: of everything drawn at random.
    """

    steps: int
    lr: float = 1e-3
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: float = 0.05
    floor: float = 0.01
    clip: float | None = 5.0
    ema: float | None = None
    patience: int = 5
    save_seconds: float = 60.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        share = (step - rise) / max(1, self.steps - rise)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass
class Run:
    """What happened.

    Attributes:
        step: steps done, all sessions together.
        resumed: step of the checkpoint this session began with, 0 for none.
        skipped: steps left out because loss or gradient was not finite.
        total: the summed loss of each step.
        curves: each loss term's value at each step, NaN where a step lacked it.
        seconds: time spent, all sessions together.
    """

    step: int = 0
    resumed: int = 0
    skipped: int = 0
    total: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def curve(self, points: int = 50) -> list[float]:
        """The summed loss in at most `points` means over equal stretches, without skipped steps."""
        total = [v for v in self.total if math.isfinite(v)]
        width = max(1, math.ceil(len(total) / points))
        parts = [total[i : i + width] for i in range(0, len(total), width)]
        return [float(f"{sum(p) / len(p):.6g}") for p in parts]


def trainable(model: nn.Module, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The floating-point parameters of submodules, by name.

    Raises:
        NoEffectError: if there are none.
        ModelError: if they are not float32.
    """
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if _inside(name, parts) and parameter.is_floating_point()
    }
    if not chosen:
        raise NoEffectError(
            "there is nothing to train.", where=", ".join(parts), got="no floating-point weights"
        )
    odd = next((name for name, p in chosen.items() if p.dtype != torch.float32), None)
    if odd is not None:
        raise ModelError(
            "weights can only be trained in float32.",
            where=odd,
            got=chosen[odd].dtype,
            fix="model.float() first; reduce the precision afterwards",
        )
    return chosen


@contextmanager
def training(model: nn.Module, parts: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Let only the named submodules train, all else frozen and in eval mode; restored afterwards.

    Args:
        model: the model.
        parts: dotted names of submodules; ``""`` is the whole model.

    Yields:
        The parameters that train, by name.

    Raises:
        NoEffectError, ModelError: see `trainable`.
    """
    chosen = trainable(model, parts)
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for part in parts:
            model.get_submodule(part).train()
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def fit(
    model: nn.Module,
    loss: Loss,
    plan: Plan,
    *,
    parts: Sequence[str] = ("",),
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train parts of a model in place.

    Args:
        model: float32, on any device.
        loss: from the step to named terms, scalars already weighted; their sum is minimised. Must
            be a pure function of step and weights: batches and draws come from `_draws`.
        plan: how to train.
        parts: submodules that train; the rest is frozen and in eval mode.
        checkpoint: safetensors file written now and then and at the end; resumed from if it exists.
        identity: plain values that tell this run from others; a checkpoint of another is refused.
        progress: counts the steps.

    Raises:
        CheckpointError: if the checkpoint is damaged, of another run, or cannot be written.
        ConfigError: if loss or gradient stays other than finite for `Plan.patience` steps.
        NoEffectError, ModelError: see `trainable`.
    """
    with training(model, parts) as parameters:
        loop = _Loop(model, parameters, plan, parts, identity or {})
        if checkpoint is not None and checkpoint.exists():
            loop.load(checkpoint)
        run, saved = loop.run, time.monotonic()
        run.resumed = run.step
        for step in (progress or Progress()).track(
            range(run.step, plan.steps), label="steps", total=plan.steps - run.step
        ):
            start = time.monotonic()
            loop.advance(loss)
            run.seconds += time.monotonic() - start
            due = time.monotonic() - saved >= plan.save_seconds or step + 1 == plan.steps
            if checkpoint is not None and due:
                loop.save(checkpoint)
                saved = time.monotonic()
        loop.finish()
    log.info("%d steps in %.1f s, %d skipped", run.step, run.seconds, run.skipped)
    return run


def trained(checkpoint: Path) -> dict[str, Tensor]:
    """The weights a run has reached, averaged ones where it keeps an average.

    Raises:
        CheckpointError: if the file is damaged.
    """
    tensors, _ = _read(checkpoint)
    found = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    found |= {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    return found


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        plan: Plan,
        parts: Sequence[str],
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.parameters, self.plan, self.parts = model, parameters, plan, parts
        self.run, self.bad = Run(), 0
        kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters.values() if p.ndim > 1]},
            {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = kind(groups, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
        self.ema = (
            {} if plan.ema is None else {n: p.detach().clone() for n, p in parameters.items()}
        )
        settings = dataclasses.asdict(plan)
        del settings["save_seconds"]
        # Through JSON, so that it compares equal to what a checkpoint gives back.
        self.identity = json.loads(json.dumps({**settings, **identity}))

    def advance(self, loss: Loss) -> None:
        run, plan = self.run, self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(run.step)
        with drawn(device_of(self.model), plan.seed, "step", run.step):
            terms = loss(run.step)
            total = torch.stack(list(terms.values())).sum()
            norm = total.detach()
            if torch.isfinite(total):
                total.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(
                    self.parameters.values(), math.inf if plan.clip is None else plan.clip
                )
        run.total.append(float(total.detach()))
        for name in terms:
            run.curves.setdefault(name, [math.nan] * run.step)
        for name, curve in run.curves.items():
            curve.append(float(terms[name].detach()) if name in terms else math.nan)
        if torch.isfinite(norm):
            self.optimizer.step()
            self._average()
            self.bad = 0
        else:
            self._skip(terms)
        self.optimizer.zero_grad(set_to_none=True)
        run.step += 1

    def _average(self) -> None:
        if self.plan.ema is None:
            return
        # A young average forgets faster, or it would stay near the first weights.
        keep = min(self.plan.ema, (1 + self.run.step) / (10 + self.run.step))
        for name, mean in self.ema.items():
            mean.lerp_(self.parameters[name].detach(), 1 - keep)

    def _skip(self, terms: Mapping[str, Tensor]) -> None:
        self.run.skipped += 1
        self.bad += 1
        log.warning("step %d skipped: loss or gradient is not finite", self.run.step)
        if self.bad >= self.plan.patience:
            raise ConfigError(
                f"training diverged: {self.bad} steps in a row were not finite.",
                where=f"step {self.run.step}",
                got=", ".join(f"{k} {float(v.detach()):g}" for k, v in terms.items()),
                expected="finite losses and gradients",
                fix=f"a lower rate than {self.plan.lr:g}, and images and weights without NaN",
            )

    def finish(self) -> None:
        with torch.no_grad():
            for name, mean in self.ema.items():
                self.parameters[name].copy_(mean)

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self._state().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["total"] = torch.tensor(self.run.total, dtype=torch.float64)
        for name, curve in self.run.curves.items():
            tensors[f"curve.{name}"] = torch.tensor(curve, dtype=torch.float64)
        facts = {
            "format": FORMAT,
            "identity": self.identity,
            "step": self.run.step,
            "skipped": self.run.skipped,
            "bad": self.bad,
            "seconds": self.run.seconds,
        }
        ready = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with whole(path) as temporary:
            try:
                save_file(ready, temporary, metadata={"samcompress": json.dumps(facts)})
            except SafetensorError as err:
                raise OSError(str(err)) from err

    def load(self, path: Path) -> None:
        tensors, facts = _read(path)
        for key in {**self.identity, **facts["identity"]}:
            mine, other = self.identity.get(key), facts["identity"].get(key)
            if mine != other:
                raise CheckpointError(
                    f"the training checkpoint is of another run: {key} differs.",
                    where=str(path),
                    got=other,
                    expected=mine,
                    fix="delete the file to begin anew, or use another folder",
                )
        state = self._state()
        device = {n: p.device for n, p in self.parameters.items()}
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[f"model.{name}"])
            for name, mean in self.ema.items():
                mean.copy_(tensors[f"ema.{name}"])
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = tensors.get(f"optimizer.{key}.{name}")
                if stored is not None:
                    # Adam counts its steps on the CPU.
                    where = stored.device if key == "step" else device[name]
                    self.optimizer.state[parameter][key] = stored.to(where)
        self.run = Run(
            step=facts["step"],
            skipped=facts["skipped"],
            seconds=facts["seconds"],
            total=tensors["total"].tolist(),
            curves={
                k.removeprefix("curve."): v.tolist()
                for k, v in tensors.items()
                if k.startswith("curve.")
            },
        )
        self.bad = facts["bad"]

    def _state(self) -> dict[str, Tensor]:
        """Weights of the trained parts, and their buffers: a batch norm counts while it trains."""
        return {k: v for k, v in self.model.state_dict().items() if _inside(k, self.parts)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["samcompress"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as err:
        raise CheckpointError(
            "the training checkpoint cannot be read.",
            where=str(path),
            got=f"{type(err).__name__}: {err}",
            expected="a file written by samcompress while training",
            fix="delete the file to begin anew",
        ) from err
    return tensors, facts


def _inside(name: str, parts: Sequence[str]) -> bool:
    return any(not part or name == part or name.startswith(f"{part}.") for part in parts)
