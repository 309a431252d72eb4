"""Common parts of all figures: figures without a display, pixels, PNG, and colors for the color-blind."""

from __future__ import annotations

import io
import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette, without its yellow, which is lost on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def make_figure(width: float, height: float, solve: bool = True) -> Figure:
    """Return an empty figure that is drawn by Agg, without pyplot, its global state or a display.

    Args:
        width: Width in inches.
        height: Height in inches.
        solve: Let matplotlib make room for labels; otherwise the caller places everything.
    """
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained" if solve else None)
    FigureCanvasAgg(figure)
    return figure


def to_pixels(figure: Figure) -> np.ndarray:
    """Return the pixels of a figure, [height,width,3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def draw_cells(
    values: Tensor, rows: list[str], title: str, unit: str, center: float | None = None, columns: str = "expert"
) -> Figure:
    """Return a heat map with a color bar, and numbers in the cells if they fit.

    Args:
        values: [R,C] values; NaN leaves a cell empty.
        rows: Names of the R rows.
        title: Title of the figure.
        unit: Label of the color bar.
        center: Value that is drawn white, with orange above it (up to 4 times as much, so one outlier does not hide
            the rest) and purple below it; None for a scale from 0.
        columns: Label of the columns, which are numbered from 0.
    """
    cells = values.detach().double().cpu().numpy()
    count, wide = cells.shape
    figure = make_figure(min(18.0, 3.5 + 0.55 * max(wide, 6)), max(3.0, 1.6 + 0.42 * count))
    axes = figure.add_subplot()
    finite = cells[np.isfinite(cells)]
    top = float(finite.max()) if finite.size else 1.0
    if center is None:
        image = axes.imshow(cells, aspect="auto", cmap="cividis", vmin=0.0, vmax=top or 1.0)
    else:
        norm = TwoSlopeNorm(center, vmin=0.0, vmax=min(max(2 * center, top), 4 * center))
        image = axes.imshow(cells, aspect="auto", cmap="PuOr_r", norm=norm)
    beyond = center is not None and top > 4 * center
    figure.colorbar(image, ax=axes, label=unit, pad=0.01, extend="max" if beyond else "neither")
    axes.set_title(title)
    axes.set_xlabel(columns)
    axes.set_xticks(range(0, wide, max(1, math.ceil(wide / 32))))
    axes.set_yticks(range(count), rows)
    if wide <= 16:
        _write_numbers(figure, cells)
    return figure


def _write_numbers(figure: Figure, cells: np.ndarray) -> None:
    axes = figure.axes[0]
    image = axes.images[0]
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            color = "white" if dark else "black"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
