"""All presets of distillation in small; also trained in processes that are killed, or in two."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import random_sam
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import samcompress as sc
from samcompress.core import _fit
from samcompress.core._objective import Objective
from samcompress.core.data import Dataset
from samcompress.distill._learner import Learner

PRESETS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "prompt_loop": {"prompts": 2, "rounds": 2},
    "full_stage": {"prompts": 2},
    "layer_wise": {},
    "sami": {"decoder_depth": 1, "decoder_width": 32, "lr": 1.0},
    "align_bottleneck": {"feature_epochs": 1},
    "align_embedding": {"feature_epochs": 2},
    "supervised": {"prompts": 2, "rounds": 2},
}
MIDDLE = {"steps": 6, "accumulate": 2, "ema": 0.9}  # 2 of 5 images a step, in two parts
RANDOM = {"steps": 24, "accumulate": 2, "augment": None}
# Of 5 images, in two processes: two and one. The rate is low, as Adam divides by gradients that may
# be nothing but rounding.
SHARED = {"steps": 4, "batch_size": 3, "lr": 4e-5}
KILLS = 3


def preset(name: str, **fields: Any) -> Learner:
    return sc.get(f"distill.{name}", **{"batch_size": 2, **PRESETS[name], **fields})


def run() -> dict[str, Any]:
    """What all of them are given: a teacher of the student's sizes, images with padding."""
    return {"data": images(), "teacher": random_sam(seed=5), "progress": False}


def images() -> Dataset:
    wide, high = sc.shapes(3, size=(40, 64)), sc.shapes(5, size=(64, 48))[3:]
    return sc.data.as_dataset([*wide, *high])


def trained(step: Learner, folder: Path | None = None) -> nn.Module:
    return step(random_sam(), **run(), workdir=folder)


def dying(step: Learner, folder: Path) -> None:
    """Killed in the second part of the fourth batch."""
    parts = []

    def count(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, Objective) and inputs[1] == 3:
            parts.append(module)
            if len(parts) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_pre_hook(count)
    trained(step, folder)


def killed(folder: Path) -> None:
    """Each preset with and without workers, then one at random moments.

    This process only forks: importing takes longer than all the rest.
    """
    _fit.Plan = functools.partial(_fit.Plan, save_seconds=0.0)
    for name in PRESETS:
        for workers in (0, 2):
            number = os.fork()
            if number == 0:
                dying(preset(name, workers=workers, **MIDDLE), folder / f"{name}-{workers}")
                os._exit(0)
            _check_killed(number)
    place, seen = folder / "random", -1.0
    for _ in range(KILLS):
        number = os.fork()
        if number == 0:
            trained(preset("supervised", **RANDOM), place)
            os._exit(0)
        while (now := max((p.stat().st_mtime for p in place.glob("*s")), default=-1.0)) <= seen:
            time.sleep(0.005)
        time.sleep(0.05 * random.random())
        seen = now
        os.kill(number, signal.SIGKILL)
        _check_killed(number)


def _check_killed(number: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    if code != -signal.SIGKILL:
        raise RuntimeError(code)


def main(command: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if command == "killed":
        killed(folder)
        return
    import accelerate  # noqa: F401 - or the processes would run apart

    for name in ("encoder", "supervised"):
        done = trained(preset(name, **SHARED), folder / name)
        save_file(done.state_dict(), folder / f"{name}-{os.environ['RANK']}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
