"""Where may I compress? One technique on one block at a time, and what that does to the masks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core._progress import ProgressLike
from ..core.data import Dataset, Sample
from ..core.display import Cell, Column, Table
from ..core.errors import ConfigError
from ..core.pipeline import Pipeline
from ..core.transform import Transform
from ..core.where import Where
from ._chains import plainly
from .measures import Row, accuracy_of, slots
from .study import Study
from .sweep import sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = re.compile(r".*?\.(?:blocks|layers|stages)\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Spot:
    """One block with one setting.

    Attributes:
        block: its name.
        value: of the setting.
        agreement: mean IoU of the masks with the base's; None where the technique refused.
        change: of the mIoU.
        saved: share of the base's bytes on disk that is saved.
        reason: why there is no number; empty where there is one.
    """

    block: str
    value: Any
    agreement: float | None = None
    change: float | None = None
    saved: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found; shows itself as a table.

    Attributes:
        technique: what was done to each block.
        setting: the field that was varied; None for the technique as it is.
        spots: blocks in the model's order, for each value.
        study: the rows behind it.
    """

    technique: Transform
    setting: str | None
    spots: tuple[Spot, ...]
    study: Study

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks."""
        return list(dict.fromkeys(spot.block for spot in self.spots))

    @property
    def values(self) -> list[Any]:
        """Values of the setting."""
        return list(dict.fromkeys(spot.value for spot in self.spots))

    def table(self) -> Table:
        """A row for each block, the masks' IoU with the base's for each value."""
        found = {(spot.block, spot.value): spot for spot in self.spots}
        columns = [Column("block", align="left")]
        for value in self.values:
            name = f"{self.setting} {plainly(value)}" if self.setting else "as it is"
            columns += [Column(f"{name}: IoU to base"), Column(f"{name}: saved", "%")]
        rows = []
        for block in self.blocks:
            cells: list[Any] = [block]
            for spot in (found[block, value] for value in self.values):
                if spot.agreement is None:
                    cells += [Cell("refused", mark="grey"), Cell(None)]
                else:
                    cells += [spot.agreement, 100 * (spot.saved or 0.0)]
            rows.append(cells)
        reasons = dict.fromkeys(spot.reason for spot in self.spots if spot.reason)
        return Table(tuple(columns), rows, title=repr(self.technique), notes=tuple(reasons))

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def picture(self, *, ax: Axes | None = None) -> Figure:
        """Blocks by values, the darker the more the masks differ from the base's.

        Args:
            ax: axes to draw into.
        """
        import numpy as np

        from ..core.figures import axes

        found = {(spot.block, spot.value): spot.agreement for spot in self.spots}
        grid = np.array(
            [[found[b, v] for b in self.blocks] for v in self.values], dtype=float
        )  # None becomes NaN
        figure, ax = axes(ax, (1.6 + 0.62 * len(self.blocks), 1.9 + 0.42 * len(self.values)))
        low = min(0.5, float(np.nanmin(grid)) if np.isfinite(grid).any() else 0.5)
        ax.imshow(grid, cmap="cividis", vmin=low, vmax=1, aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                text = "refused" if np.isnan(value) else f"{value:.2f}"
                dark = value < (1 + low) / 2
                colour = "#000000" if np.isnan(value) else "white" if dark else "#111111"
                ax.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
        ax.set_xticks(range(len(self.blocks)), [_tick(b) for b in self.blocks], fontsize=8)
        ax.set_yticks(range(len(self.values)), [plainly(v) for v in self.values])
        ax.set_ylabel(self.setting or "")
        ax.set_title(f"{self.technique.label}: IoU of masks with the base's", loc="left")
        return figure


def sensitivity(
    technique: Transform,
    model: nn.Module,
    data: Dataset | Sequence[Sample],
    *,
    values: Mapping[str, Sequence[Any]] | None = None,
    prompt: str = "box",
    calibration: Dataset | Sequence[Sample] | None = None,
    out: str | Path | None = None,
    progress: ProgressLike = True,
    **protocol: Any,
) -> Sensitivity:
    """Apply a technique to one block at a time, and measure how far masks move.

    What is insensitive alone may still be needed together with others; the table is where to begin
    a `Space`, not its result.

    Args:
        technique: one with a field ``where``; the modules it matches are taken block by block.
        model: a SAM; not changed.
        data: images with masks.
        values: one field and what it is set to, as ``{"ratio": (0.25, 0.5)}``; the technique as it
            is if left out.
        prompt: how objects are asked for.
        calibration: images for techniques that look at some.
        out: folder for results; the same call goes on from there.
        progress: True for bars, False for silence, a callable for events.
        protocol: as for `accuracy`.

    Raises:
        ConfigError: if the technique has no ``where``, or values are of several fields.
        NoEffectError: if its ``where`` matches no module.

    Example:
        >>> import samcompress as sc
        >>> found = sensitivity(
        ...     sc.prune.Mlp(criterion="magnitude"),
        ...     sc.build("tiny"),
        ...     sc.shapes(1),
        ...     values={"ratio": (0.5,)},
        ...     progress=False,
        ... )
        >>> found.blocks[0]
        'image_encoder.blocks.0'
    """
    where = getattr(technique, "where", None)
    if not isinstance(where, Where):
        raise ConfigError(
            f"{technique.label} acts on the whole model, not on chosen blocks.",
            expected="a technique with a field where, such as sc.prune.Mlp()",
        )
    if values is not None and len(values) != 1:
        raise ConfigError(
            "values are of one field.", got=", ".join(values) or "{}", expected='{"ratio": (0.5,)}'
        )
    setting, wanted = next(iter(values.items())) if values else (None, (None,))
    plans: dict[tuple[str, Any], Pipeline] = {}
    for block, names in blocks(where, model).items():
        for value in wanted:
            changes = {"where": Where(names)} | ({setting: value} if setting else {})
            step = type(technique).from_params({**technique.params(), **changes})
            plans[block, value] = Pipeline([step])
    names_of = {key: f"{key[0]} {plainly(key[1])}" if setting else key[0] for key in plans}
    study = sweep(
        {names_of[key]: plan for key, plan in plans.items()},
        model,
        data,
        calibration=calibration,
        objectives=("size_mb", "miou"),
        prompts=(prompt,),
        latency=False,
        out=out,
        progress=progress,
        **protocol,
    )
    spots = tuple(_spot(study, *key, names_of[key]) for key in plans)
    return Sensitivity(technique, setting, spots, study)


def blocks(where: Where, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The modules that patterns match, by the block or part they lie in.

    Raises:
        NoEffectError: if they match none.
    """
    names = [name for name, _ in where.select(model)]
    found: dict[str, list[str]] = {}
    for name in names:
        block = BLOCK.match(name)
        # A module around others that matched as well is no block of its own.
        around = any(other.startswith(f"{name}.") for other in names)
        if block is not None or not around:
            part = block[0] if block else ".".join(name.split(".")[:2])
            found.setdefault(part, []).append(name)
    return {part: tuple(inside) for part, inside in found.items()}


def _spot(study: Study, block: str, value: Any, name: str) -> Spot:
    row: Row | None = next((r for r in study.rows if r["name"] == name), None)
    if row is None or row["status"] != "measured":
        reasons = {r.name: r.reason for r in study.refused}
        return Spot(block, value, reason=f"{name}: {reasons.get(name, 'not measured')}")
    entry: Row = accuracy_of(row, slots([row])[0]) or {}
    before, now = study.base["bytes_on_disk"], row["bytes_on_disk"]
    saved = 1 - now / before if before and now else None
    return Spot(block, value, entry.get("agreement"), entry.get("delta"), saved)


def _tick(block: str) -> str:
    """A block on two short lines."""
    *above, last = block.split(".")
    return f"{above[-1] if above else ''}\n{last}" if last.isdigit() else last.replace("_", "\n")
