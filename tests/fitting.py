"""An objective small enough to train in milliseconds; also run in processes of its own."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from samcompress.core._draws import batch, generator
from samcompress.core._fit import Plan, Run, fit
from samcompress.core._objective import Objective, Share
from samcompress.core.errors import DataError

KILLED = Plan(steps=60, lr=0.05, accumulate=2, ema=0.9, save_seconds=0)
SHARED = Plan(steps=6, lr=0.05, clip=0.5, ema=0.9, save_seconds=0)


@dataclass(frozen=True)
class Rows:
    """One to three rows of numbers an item, so parts of a batch differ in rows too."""

    x: Tensor
    owner: Tensor

    @property
    def weight(self) -> float:
        return float(len(self.x))


@dataclass
class Numbers:
    """Draws batches of `size` of 7 items; slowly, with an error or Ctrl-C where asked for."""

    size: int = 6
    sleep: float = 0.0
    broken: int | None = None
    interrupt: tuple[int, ...] = ()
    empty: bool = False

    def draw(self, step: int, share: Share) -> Rows:
        time.sleep(self.sleep)
        if step == self.broken:
            raise DataError("an image is damaged.", where=f"step {step}", fix="leave it out")
        for _ in range(self.interrupt.count(step)):
            os.kill(os.getpid(), signal.SIGINT)
        items = share.of(batch(7, self.size, seed=3, step=step))
        rows = [
            torch.randn(1 + i % 3, 4, generator=generator("x", step, place)) for place, i in items
        ]
        owner = [torch.full((len(r),), place) for r, (place, _) in zip(rows, items, strict=True)]
        end = 0 if self.empty else None
        return Rows(torch.cat(rows)[:end], torch.cat(owner)[:end])


class Net(nn.Module):
    """A body with dropout and perhaps a batch norm, and a head."""

    def __init__(self, *, norm: bool, dropout: float) -> None:
        super().__init__()
        middle = [nn.BatchNorm1d(8)] if norm else [nn.LayerNorm(8)]
        self.body = nn.Sequential(nn.Linear(4, 8), *middle, nn.Dropout(dropout))
        self.head = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1) if norm else nn.Identity())
        g = generator("net")
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Regression(Objective):
    """The sum of four numbers, also from a throw-away head; Ctrl-C at `stop`, NaN at `bad`."""

    def __init__(
        self,
        source: Numbers | None = None,
        *,
        norm: bool = True,
        dropout: float = 0.3,
        stop: int | None = None,
        bad: tuple[int, ...] = (),
    ) -> None:
        super().__init__(Net(norm=norm, dropout=dropout), source or Numbers())
        self.extra = nn.Linear(8, 1)
        for p in self.extra.parameters():
            p.data.fill_(0.1)
        self.stop, self.bad = stop, bad

    def forward(self, drawn: Rows, step: int) -> dict[str, Tensor]:
        if step == self.stop:
            raise KeyboardInterrupt
        net, wanted = self.student, drawn.x.sum(1, keepdim=True)
        seen = net.body(drawn.x)
        answer = net.head(seen).float()
        # Only for the first item of some batches, so it sleeps in other parts, as SAM's mask
        # prompts may.
        first = drawn.owner[:, None] == 0
        if step % 3 and first.any():
            answer = answer + first * self.extra(seen).float()
        loss = F.mse_loss(answer, wanted)
        if step in self.bad:
            loss = loss * math.nan
        return {"fit": loss, "size": 1e-3 * net.body[0].weight.square().sum()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def environment() -> dict[str, str]:
    """For processes that run this file."""
    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def shared(place: Path | None, accumulate: int, engine: object = None) -> tuple[Regression, Run]:
    """What is run in one process and in two: 5 of 7 items a step, of unequal weight."""
    objective = Regression(Numbers(size=5), norm=False, dropout=0.0)
    plan = Plan(**{**vars(SHARED), "accumulate": accumulate})
    return objective, fit(objective, plan, parts=("",), checkpoint=place, engine=engine)


def main(command: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if command == "killed":
        fit(Regression(Numbers(sleep=2e-3)), KILLED, parts=("",), checkpoint=folder / "killed")
        return
    import accelerate  # noqa: F401 - or torchrun's processes would run apart

    rank, engine = os.environ["RANK"], None
    if command == "fabric":
        from lightning_fabric import Fabric

        from samcompress.core._engine import Fabric as Engine

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true")
        fabric.launch()
        engine = Engine(fabric)
    for accumulate in (1, 2):
        place = folder / f"{command}-{accumulate}"
        objective, run = shared(place, accumulate, engine)
        found = {**weights(objective), "total": torch.tensor(run.total, dtype=torch.float64)}
        save_file(found, folder / f"{command}-{accumulate}-{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
