"""What all techniques have in common that only simulate quantization, in floating point."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.history import lineage
from ..core.transform import Context, State, Transform
from ..core.where import Where
from ._calibrate import Prompts, Tap, calibrate, check_images, end, remembered
from ._choose import finite_weight
from ._fake import Rounded, Site, attentions, fakeable, install, replace, sites
from ._layers import Stored
from ._observe import Observer, Range, finite
from ._quantizers import Affine, Quantizer, from_spec
from ._uniform import Grid

WORST = 5  # layers named in the state
BITS = (2, 8)


class Fitter(Protocol):
    """Sees what passes a site, then gives a quantizer for it."""

    def update(self, *inputs: Any, **rest: Any) -> None:
        """Take the inputs of the module at the site's tap into account."""

    def quantizer(self) -> Quantizer:
        """What rounds there from now on."""


class Even:
    """Evenly spaced levels over an observed range: a `Fitter`."""

    def __init__(self, observer: Observer, grid: Grid, place: int = 0) -> None:
        self.observer, self.grid, self.place = observer, grid, place

    def update(self, *inputs: Tensor) -> None:
        """Observe."""
        self.observer.update(inputs[self.place])

    def quantizer(self) -> Quantizer:
        """With the steps that the range needs."""
        return Affine(self.grid.bits, self.grid.symmetric).cover(*self.observer.range())


@dataclass(frozen=True, kw_only=True)
class Simulated(Transform):
    """Layers and attention that compute with rounded numbers, found by looking at images.

    A subclass gives a `fitter` for each site and the `weight_range` of each layer; it may change
    the model before (`prepare`) and after calibration (`refine`).
    """

    simulated: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False

    weight_bits: int = 8
    activation_bits: int | None = 8
    where: Where = Where(("image_encoder.**", "mask_decoder.transformer.**"))
    products: bool = True
    images: int = 32
    prompts: Prompts = "mixed"

    @property
    def needs_data(self) -> bool:
        """Whether activations are rounded."""
        return self.activation_bits is not None

    def validate(self) -> None:
        """Check the fields."""
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is not None and not BITS[0] <= bits <= BITS[1]:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=bits,
                    expected=f"{BITS[0]} <= {name} <= {BITS[1]}",
                )
        check_images(self.label, self.images)

    def check(self, model: nn.Module) -> None:
        """Check that there are layers to round, and none that are rounded already."""
        check_float(self.label, model)
        self._layers(model)
        fused = [s.transform.label for s in lineage(model) if s.transform.family == "attention"]
        if fused and self.products and self.activation_bits is not None:
            raise ModelError(
                f"{self.label} cannot round inside an attention that was rewritten.",
                got=f"a model after {', '.join(fused)}",
                expected="attention as segment_anything has it",
                fix=f"leave {fused[0]} out, as a simulated model has no speed to win, or "
                "products=False",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Calibrate in floating point, then round."""
        layers = dict.fromkeys(self._layers(model), self.weight_bits)
        for name in layers:
            finite_weight(name, model.get_submodule(name), step=self.label)
        state = self.prepare(model, ctx)
        inside = attentions(model, layers) if self.products and self.activation_bits else []
        originals = {name: copy.deepcopy(model.get_submodule(name)) for name in layers}
        replace(model, {}, inside)
        found = self._fitted(model, sites(layers, inside), ctx) if self.activation_bits else {}
        replace(model, layers, (), symmetric=self.symmetric)
        install(model, found)
        for name in ctx.progress.track(layers, label="weights"):
            layer: Any = model.get_submodule(name)
            layer.cover(*self.weight_range(layer.weight, layer.grid))
        state |= {
            "layers": layers,
            "attentions": inside,
            "quantizers": {name: quantizer.spec() for name, quantizer in found.items()},
            **self.refine(model, ctx, originals),
        }
        if ctx.dataset is not None:
            state["worst"] = worst(model, originals, ctx, self.prompts)
        return state

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Put empty fake layers and quantizers where `apply` put full ones."""
        replace(model, state["layers"], state["attentions"], symmetric=self.symmetric)
        install(model, state["quantizers"])
        return state

    def prepare(self, model: nn.Module, ctx: Context) -> State:
        """Change weights before calibration, without changing what the model says."""
        return {}

    @abstractmethod
    def fitter(self, model: nn.Module, site: Site) -> Fitter:
        """What finds the quantizer of a site."""

    @abstractmethod
    def weight_range(self, weight: Tensor, grid: Grid) -> Range:
        """(out,) lowest and highest values that the levels of a weight cover."""

    def refine(self, model: nn.Module, ctx: Context, originals: Mapping[str, nn.Module]) -> State:
        """Change the steps of the rounded model; `originals` are its float layers."""
        return {}

    def _fitted(self, model: nn.Module, places: list[Site], ctx: Context) -> dict[str, Quantizer]:
        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            fitters = {site: self.fitter(model, site) for site in places}
            reached: set[str] = set()
            taps = _taps(fitters, reached)
            seen = [f.observer for f in fitters.values() if isinstance(f, Even)]
            calibrate(
                model,
                taps,
                ctx,
                images=self.images,
                prompts=self.prompts,
                ended=lambda: end(seen),
            )
            # Hiera's neck has a layer that no image passes: it has no inputs to round.
            made = {s.name: fitter.quantizer() for s, fitter in fitters.items() if s.tap in reached}
            tensors = {
                f"{n}.{key}": v for n, q in made.items() for key, v in q.state_dict().items()
            }
            return tensors, {name: quantizer.spec() for name, quantizer in made.items()}

        tensors, specs = remembered(model, ctx, self.params(), compute)
        found = {name: from_spec(spec) for name, spec in specs.items()}
        for name, quantizer in found.items():
            own = {k: tensors[f"{name}.{k}"] for k in quantizer.state_dict()}
            quantizer.load_state_dict(own)
        return found

    def _layers(self, model: nn.Module) -> list[str]:
        found = self.where.select(model, (nn.Linear, nn.Conv2d), step=self.label)
        layers = [name for name, layer in found if fakeable(layer)]
        if not layers:
            raise NoEffectError(
                f"{self.label} found no layer to round.",
                where=repr(self.where),
                got=f"{len(found)} layers that read pixels or are of other classes",
                expected="torch.nn.Linear or Conv2d",
                fix="a wider where=",
            )
        return layers


def check_float(label: str, model: nn.Module) -> None:
    """Check that no layer of a model is quantized.

    Raises:
        ModelError: if one is.
    """
    done = next((n for n, m in model.named_modules() if _rounded(m)), None)
    if done is not None:
        raise ModelError(
            f"{label} met a layer that is quantized already.",
            where=done,
            got=type(model.get_submodule(done)).__name__,
            expected="floating-point layers",
            fix="quantize the model from before that step, once",
        )


def _rounded(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    codes = isinstance(weight, Tensor) and not weight.is_floating_point()
    return codes or isinstance(module, (Rounded, Stored))


def _taps(fitters: Mapping[Site, Fitter], reached: set[str]) -> dict[str, Tap]:
    """One tap a module, which serves all its sites and notes that it was reached."""
    by_tap: dict[str, list[Fitter]] = {}
    for site, fitter in fitters.items():
        by_tap.setdefault(site.tap, []).append(fitter)

    def together(name: str) -> Tap:
        def tap(*inputs: Tensor) -> None:
            reached.add(name)
            for x in inputs:
                finite(name, x)
            for fitter in by_tap[name]:
                fitter.update(*inputs)

        return tap

    return {name: together(name) for name in by_tap}


def worst(
    model: nn.Module, originals: Mapping[str, nn.Module], ctx: Context, prompts: Prompts
) -> dict[str, float]:
    """Relative errors of the layers with the largest, each given what it gets on one image.

    Returns:
        Root of the squared error of a layer's outputs over their own square, by name.
    """
    sums: dict[str, Tensor] = {}

    def tap(name: str) -> Tap:
        def compare(x: Tensor) -> None:
            true = originals[name](x).float()
            error = (model.get_submodule(name).forward(x).float() - true).square().sum()
            found = torch.stack([error, true.square().sum()]).double().cpu()
            sums[name] = sums[name] + found if name in sums else found

        return compare

    quiet = Context(step=ctx.step, dataset=ctx.dataset, device=ctx.device)
    calibrate(model, {name: tap(name) for name in originals}, quiet, images=1, prompts=prompts)
    errors = {name: float((e / t.clamp(min=1e-30)).sqrt()) for name, (e, t) in sums.items()}
    ranked = sorted(errors, key=lambda name: -errors[name])[:WORST]
    return {name: float(f"{errors[name]:.4g}") for name in ranked}
