"""Keys with two peaks, folded into one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.errors import ConfigError, ModelError
from ..core.registry import register
from ..core.transform import Context, State, Transform
from ._bimodal import crossings, fold
from ._calibrate import Prompts
from ._simulate import check_float


@register
@dataclass(frozen=True, kw_only=True)
class Bimodal(Transform, family="quantize", phase=50):
    """Fold keys of the mask decoder that lie around two opposite values into one peak, exactly.

    Use it before quantizing the decoder, simulated or real: half of the levels lie in the gap
    between the peaks otherwise. It changes nothing in floating point, and nothing at all in a
    model whose keys have one peak. Do not expect it to help the image encoder, which it leaves
    alone: there relative positions meet the queries too.

    Args:
        grid: points at which the density of keys is known, >= 8.
        peak_height: of a peak at least, over the sum of the density at all points, in (0, 1).
        peak_distance: points between two peaks at least, >= 1.
        prompts: what the decoder is asked about the first image.

    Raises:
        ConfigError: if a field is out of range.
        ModelError: if the decoder has no attention of tokens to the image, or is quantized.
        DataError: if there is no image, or keys are not finite.

    Effect:
        Signs of some rows of weights and biases change, in keys and in the queries that meet
        them; masks and scores stay as they are, bit for bit on a CPU. With planted peaks at 8 and
        -8 the 4 bit error of keys falls to a quarter. The state names the channels.

    Composes with:
        Before `FakeQuant`, `TinySAM` or any integer step. `PTQ4SAM` contains it. A second time it
        changes nothing.

    Source:
        Bimodal integration of PTQ4SAM, C. Lv et al., 2024, arXiv 2405.03144; no code used. Ours
        counts values before it smooths them, and gives a channel of mean 0 the sign 1.

    Example:
        >>> import samcompress as sc
        >>> folded = sc.quantize.Bimodal()(sc.load("tiny"), data=sc.shapes(1))
        >>> sorted(sc.lineage(folded)[-1].state)
        ['turned']
    """

    grid: int = 128
    peak_height: float = 0.01
    peak_distance: int = 32
    prompts: Prompts = "mixed"

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def validate(self) -> None:
        """Check the fields."""
        self.between("peak_height", 0, 1)
        for name, least in (("grid", 8), ("peak_distance", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{self.label}: {name} is out of range.",
                    got=getattr(self, name),
                    expected=f">= {least}",
                )

    def check(self, model: nn.Module) -> None:
        """Check that there are keys to fold, in floating point."""
        check_crossings(self.label, model)

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Look at the keys of one image and fold."""
        return {"turned": fold(model, ctx, **self.params())}

    def rebuild(self, model: nn.Module, state: State) -> State:
        """Nothing to do: no shape has changed."""
        return state


def check_crossings(label: str, model: nn.Module) -> None:
    """Check that a decoder has attention of tokens to the image, in floating point.

    Raises:
        ModelError: if not.
    """
    check_float(label, model)
    if not crossings(model):
        raise ModelError(
            f"{label} finds no attention of tokens to the image.",
            where="mask_decoder.transformer",
            expected="segment_anything's two-way transformer, or one with its names",
            fix="leave it out for this decoder",
        )
