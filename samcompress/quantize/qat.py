"""Training through the rounding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from ..core._progress import Progress
from ..core.errors import ConfigError
from ..core.registry import get, register
from ..core.transform import Context, State, Transform
from ._fake import Rounded
from ._quantizers import Grouped, Quantizer
from .reconstruct import check_simulated

LEARNERS = {"embedding": "distill.encoder", "masks": "distill.prompt_loop"}
SAME = ("batch_size", "lr", "weight_decay", "workers", "seed")  # settings of the same names


@register
@dataclass(frozen=True, kw_only=True)
class QAT(Transform, family="quantize", phase=50):
    """Train a simulated model through its rounding, until it says again what the original said.

    Gradients pass through the rounding as if it were not there; the steps of activations learn
    too, except in the last part of the run, in which the weights settle. Use it where calibration
    and `Reconstruct` leave a gap, with a thousand images or more. Weights end on their grids.

    Args:
        target: what is learned. "embedding" trains the image encoder by `distill.Encoder`,
            "masks" what `distill.PromptLoop` trains, from its masks.
        steps: of the optimiser in all, >= 1.
        settle: share of them, the last ones, in which the steps of activations stay, in [0, 1].
        batch_size: images a step, >= 1.
        lr: highest learning rate, > 0; low, as the weights are nearly right.
        weight_decay: of weights, >= 0.
        workers: processes that read images. Changes nothing but the time.
        seed: of the order of images.

    Raises:
        ConfigError: if a field is out of range, or training diverges.
        ModelError: if the model is not simulated, or not float32.
        NoEffectError: if it says what the teacher says already.
        DataError: if there are no images.

    Effect:
        Weights stay on their grids, whose steps do not change; size and speed are those of the
        simulation. The state has the loss before and after.

    Composes with:
        After `FakeQuant`, `PTQ4SAM` or `TinySAM`, and perhaps `Reconstruct`; the model that came
        in, or ``teacher=``, is the teacher.

    Source:
        Straight-through estimator: Y. Bengio et al., 2013, arXiv 1308.3432; learned steps: LSQ,
        S. Esser et al., 2020, arXiv 1902.08153. No paper trains SAM so; the recipe is ours.

    Example:
        >>> import samcompress as sc
        >>> rounded = sc.quantize.FakeQuant(weight_bits=4, activation_bits=4, images=2)
        >>> recipe = rounded | sc.quantize.QAT(steps=4, batch_size=2)
        >>> trained = recipe(sc.load("tiny"), data=sc.shapes(2))
        >>> len(sc.lineage(trained)[-1].state["runs"])
        2
    """

    simulated: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    target: Literal["embedding", "masks"] = "embedding"
    steps: int = 1000
    settle: float = 0.2
    batch_size: int = 8
    lr: float = 2e-5
    weight_decay: float = 0.0
    workers: int = 0
    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def validate(self) -> None:
        """Check the fields, those of training as the engine's techniques do."""
        self.between("settle", 0, 1, closed=True)
        self.between("lr", 0, math.inf)
        self.between("weight_decay", 0, math.inf, closed=True)
        self.between("workers", 0, math.inf, closed=True)
        if self.steps < 1:
            raise ConfigError(
                f"{self.label}: steps is out of range.", got=self.steps, expected=">= 1"
            )
        if self.batch_size < 1:
            raise ConfigError(
                f"{self.label}: batch_size is out of range.", got=self.batch_size, expected=">= 1"
            )

    def check(self, model: nn.Module) -> None:
        """Check that the part that trains can be trained."""
        self._learner(1).check(model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Train with steps that learn, then with steps that stay."""
        check_simulated(self.label, model)
        settling = round(self.settle * self.steps)
        runs = []
        if self.steps > settling:
            with learning(model):
                runs.append(self._train(self.steps - settling, model, ctx))
        if settling:
            runs.append(self._train(settling, model, ctx))
        for layer in model.modules():
            if isinstance(layer, Rounded):
                layer.settle()
        return {"runs": runs, "iou_trained": any(run["iou_trained"] for run in runs)}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Nothing to do: no shape has changed."""
        return state

    def _learner(self, steps: int) -> Transform:
        settings: dict[str, Any] = {name: getattr(self, name) for name in SAME}
        return get(LEARNERS[self.target], steps=steps, **settings)

    def _train(self, steps: int, model: nn.Module, ctx: Context) -> State:
        learner = self._learner(steps)
        progress = Progress(ctx.progress.mode, learner.label)
        return learner.apply(model, dataclasses.replace(ctx, step=learner.label, progress=progress))


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """The steps of activations are parameters as long as the context lasts, then buffers again."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    # Those of groups are folded into weights as they are.
    names = [(q, n) for q in quantizers if not isinstance(q, Grouped) for n in q.learned]
    for quantizer, name in names:
        value = getattr(quantizer, name)
        delattr(quantizer, name)
        quantizer.register_parameter(name, nn.Parameter(value.detach().clone()))
    try:
        yield
    finally:
        for quantizer, name in names:
            value = getattr(quantizer, name).detach().abs()
            delattr(quantizer, name)
            quantizer.register_buffer(name, value)
