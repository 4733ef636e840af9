"""Figures made without pyplot, so that no state is left behind and no window can open."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The given axes and their figure, or new ones of `size` inches."""
    if ax is not None:
        return ax.figure.canvas.figure, ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    # Notebooks know figures only through pyplot; this is how an object shows itself without it.
    figure.__dict__["_repr_png_"] = lambda: png(figure)
    return figure, figure.subplots()


def plain(ax: Axes) -> None:
    """A light grid behind what is drawn, no frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
