"""Where a step runs: in one process with plain torch, or in several with a library made for that.

An engine wraps the objective, exchanges gradients and sums numbers over the processes; the loop of
`_fit` does the rest. There is none of our own for several processes: Hugging Face accelerate starts
them, or torchrun, and Lightning Fabric can.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ._require import require
from .contract import device_of
from .errors import ConfigError


class Engine:
    """One process with plain torch.

    Attributes:
        index: of this process.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def prepare(self, objective: nn.Module) -> nn.Module:
        """What to call in place of the objective, whose gradients are averaged over processes."""
        return objective

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients travel with the last one only."""
        return nullcontext()

    def autocast(self, device: torch.device, precision: str) -> AbstractContextManager[Any]:
        """Around the forward pass: matrix products in `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, in each of them."""
        return values

    def wait(self) -> None:
        """Until every process has come here."""


class Accelerate(Engine):
    """Hugging Face accelerate, under ``torchrun`` or ``accelerate launch``.

    Args:
        device: where the objective is; the CPU for processes without accelerators.

    Raises:
        MissingDependencyError: if accelerate is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        module = require("accelerate", extra="train", purpose="training in several processes")
        # A parameter may be idle in a step: no mask prompt was drawn, for example.
        options = module.DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = module.Accelerator(
            cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[options]
        )
        self.index = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    def prepare(self, objective: nn.Module) -> nn.Module:
        """Wrap it.

        Raises:
            ConfigError: if the objective is on another device than the process.
        """
        _check_device(objective, self._accelerator.device)
        module: nn.Module = self._accelerator.prepare_model(objective)
        return module

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See `Engine`."""
        if last:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(module)
        return context

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._accelerator.backward(loss)

    def sum(self, values: Tensor) -> Tensor:
        """See `Engine`."""
        total: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "sum")
        return total

    def wait(self) -> None:
        """See `Engine`."""
        self._accelerator.wait_for_everyone()


class Fabric(Engine):
    """Lightning Fabric, launched by the caller.

    Args:
        fabric: with full precision; for several processes with the strategy
            ``"ddp_find_unused_parameters_true"``, as a parameter may be idle in a step.
    """

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric
        self.index, self.count = fabric.global_rank, fabric.world_size

    def prepare(self, objective: nn.Module) -> nn.Module:
        """Wrap it.

        Raises:
            ConfigError: if the objective is on another device than the process.
        """
        _check_device(objective, self._fabric.device)
        module: nn.Module = self._fabric.setup_module(objective)
        return module

    def accumulate(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See `Engine`."""
        context: AbstractContextManager[Any] = self._fabric.no_backward_sync(
            module, enabled=not last
        )
        return context

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._fabric.backward(loss)

    def sum(self, values: Tensor) -> Tensor:
        """See `Engine`."""
        total: Tensor = self._fabric.all_reduce(values.to(self._fabric.device), reduce_op="sum")
        return total

    def wait(self) -> None:
        """See `Engine`."""
        self._fabric.barrier()


def engine_for(device: torch.device) -> Engine:
    """Accelerate if this is one of several processes, else plain torch."""
    return Accelerate(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Engine()


def _check_device(objective: nn.Module, device: torch.device) -> None:
    found = device_of(objective)
    if found.type != device.type or (found.index or 0) != (device.index or 0):
        raise ConfigError(
            "the model is not on the device of its process.",
            got=found,
            expected=device,
            fix=f'device="{device}", or torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))',
        )
