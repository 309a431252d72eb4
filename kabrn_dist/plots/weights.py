"""Figures of ternary weights: latent weights between the thresholds, and maps of codes.

Shapes: R rows and C columns of a matrix that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from kabrn_dist.plots.figure import COLORS, make_figure
from kabrn_dist.plots.ternary_figure import BINS, REACH, TernaryFigure

# Orange, light grey and blue for −1, 0 and +1.
CODE_COLORS, NAMES = (COLORS[1], "#D9D9D9", COLORS[0]), ("−1", "0", "+1")
MAX_COLUMNS = 6


def draw_weights(matrices: Sequence[TernaryFigure], title: str) -> Figure:
    """Return a histogram of latent / γ above a map of codes for each matrix, all with the same axes and colors.

    The dashed line is the density of Gaussian latent weights, as at initialization; dotted lines are the thresholds.

    Args:
        matrices: The matrices.
        title: Title of the figure.
    """
    columns = min(MAX_COLUMNS, len(matrices))
    lines = math.ceil(len(matrices) / columns)
    # Positions in inches: a layout solver takes longer than everything else together.
    left, right, wide, above, tall = 0.55, 0.15, 2.1, 0.55, 3.75
    width, height = left + right + max(3, columns) * wide, above + lines * tall + 0.1
    figure = make_figure(width, height, solve=False)
    tops = [_density(matrix.histogram)[1:-1].max() for matrix in matrices]
    limit = 1.25 * max(0.35, *map(float, tops))
    for i, matrix in enumerate(matrices):
        line, column = divmod(i, columns)
        x, y = left + column * wide, height - above - (line + 1) * tall
        upper = figure.add_axes((x / width, (y + 2.3) / height, (wide - 0.2) / width, 1.05 / height))
        lower = figure.add_axes((x / width, (y + 0.1) / height, (wide - 0.2) / width, 1.9 / height))
        _draw_latents(upper, matrix, limit, column == 0)
        _draw_codes(lower, matrix)
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=11)
    _name_marks(figure, 1 - 0.43 / height)
    return figure


def _name_marks(figure: Figure, height: float) -> None:
    names = [Patch(color=color, label=f"code {name}") for color, name in zip(CODE_COLORS, NAMES, strict=True)]
    lines = [
        Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="Gaussian, as at the start"),
        Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="threshold γ/2"),
    ]
    figure.legend(
        handles=[*names, *lines], loc="center", bbox_to_anchor=(0.5, height), ncols=5, fontsize=8, frameon=False
    )


def _density(histogram: Tensor) -> np.ndarray:
    counts = histogram.detach().double().cpu().numpy()
    return counts / max(1.0, counts.sum()) * (BINS / (2 * REACH))


def _draw_latents(axes: Axes, matrix: TernaryFigure, limit: float, first: bool) -> None:
    density, edges = _density(matrix.histogram), np.linspace(-REACH, REACH, BINS + 1)
    for color, middle, (low, high) in zip(CODE_COLORS, (-2.6, 0.0, 2.6), _spans(), strict=True):
        axes.stairs(density[low:high], edges[low : high + 1], fill=True, color=color)
        fraction = density[low:high].sum() * 2 * REACH / BINS
        axes.text(middle, 0.97 * limit, f"{100 * fraction:.1f} %", ha="center", va="top", fontsize=7)
    # γ is the mean |w|, which is √(2/π) of the standard deviation of a Gaussian.
    x = np.linspace(-REACH, REACH, 161)
    axes.plot(x, np.exp(-(x**2) / np.pi) / np.pi, color="black", linewidth=0.8, linestyle="--")
    for threshold in (-0.5, 0.5):
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(-REACH, REACH)
    axes.set_ylim(0, limit)
    shape = " × ".join(map(str, matrix.shape))
    axes.set_title(f"{matrix.name}\n{shape}", fontsize=7.5, pad=3)
    axes.tick_params(labelsize=6, labelleft=first)
    axes.set_xlabel("latent / γ", fontsize=6.5, labelpad=1)
    if first:
        axes.set_ylabel("density", fontsize=7)


def _spans() -> tuple[tuple[int, int], ...]:
    """First and last bin of each code."""
    low, high = (round((REACH + threshold) * BINS / (2 * REACH)) for threshold in (-0.5, 0.5))
    return (0, low), (low, high), (high, BINS)


def _draw_codes(axes: Axes, matrix: TernaryFigure) -> None:
    codes = matrix.codes.detach().cpu().numpy()
    axes.imshow(codes, cmap=ListedColormap(CODE_COLORS), vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
    axes.set_anchor("N")
    whole = matrix.shape[-2:]
    rows, columns = (f"{'first ' if n < of else ''}{n}" for n, of in zip(codes.shape, whole, strict=True))
    expert = "expert 0: " if len(matrix.shape) == 3 and matrix.shape[0] > 1 else ""
    axes.set_xlabel(f"{columns} inputs", fontsize=6.5, labelpad=2)
    axes.set_ylabel(f"{expert}{rows} outputs", fontsize=6.5, labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])
