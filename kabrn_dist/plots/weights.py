"""Pictures of ternary weights: where latents lie between the thresholds, and what the codes look like.

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

from kabrn_dist.plots.figure import COLOURS, make_figure
from kabrn_dist.plots.ternary_figure import BINS, REACH, TernaryFigure

# Orange, light grey and blue for −1, 0 and +1.
CODE_COLOURS, NAMES = (COLOURS[1], "#D9D9D9", COLOURS[0]), ("−1", "0", "+1")
COLUMNS = 6


def draw_weights(portraits: Sequence[TernaryFigure], title: str) -> Figure:
    """A histogram of latent / γ over a map of codes for each matrix, all with the same axes and colours.

    The dashed line is where Gaussian latents lie, as they are drawn at the start; dotted lines are the thresholds.
    """
    columns = min(COLUMNS, len(portraits))
    lines = math.ceil(len(portraits) / columns)
    # Places in inches: a layout solver takes longer than everything else together.
    left, right, wide, above, tall = 0.55, 0.15, 2.1, 0.55, 3.75
    width, height = left + right + max(3, columns) * wide, above + lines * tall + 0.1
    figure = make_figure(width, height, solve=False)
    tops = [_density(portrait.histogram)[1:-1].max() for portrait in portraits]
    limit = 1.25 * max(0.35, *map(float, tops))
    for place, portrait in enumerate(portraits):
        line, column = divmod(place, columns)
        x, y = left + column * wide, height - above - (line + 1) * tall
        upper = figure.add_axes((x / width, (y + 2.3) / height, (wide - 0.2) / width, 1.05 / height))
        lower = figure.add_axes((x / width, (y + 0.1) / height, (wide - 0.2) / width, 1.9 / height))
        _draw_latents(upper, portrait, limit, column == 0)
        _draw_codes(lower, portrait)
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=11)
    _name_marks(figure, 1 - 0.43 / height)
    return figure


def _name_marks(figure: Figure, height: float) -> None:
    names = [Patch(color=color, label=f"code {name}") for color, name in zip(CODE_COLOURS, NAMES, strict=True)]
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


def _draw_latents(axes: Axes, portrait: TernaryFigure, limit: float, first: bool) -> None:
    density, edges = _density(portrait.histogram), np.linspace(-REACH, REACH, BINS + 1)
    for color, middle, (low, high) in zip(CODE_COLOURS, (-2.6, 0.0, 2.6), _spans(), strict=True):
        axes.stairs(density[low:high], edges[low : high + 1], fill=True, color=color)
        share = density[low:high].sum() * 2 * REACH / BINS
        axes.text(middle, 0.97 * limit, f"{100 * share:.1f} %", ha="center", va="top", fontsize=7)
    # γ is the mean |w|, which of a Gaussian is √(2/π) of its standard deviation.
    x = np.linspace(-REACH, REACH, 161)
    axes.plot(x, np.exp(-(x**2) / np.pi) / np.pi, color="black", linewidth=0.8, linestyle="--")
    for threshold in (-0.5, 0.5):
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(-REACH, REACH)
    axes.set_ylim(0, limit)
    shape = " × ".join(map(str, portrait.shape))
    axes.set_title(f"{portrait.name}\n{shape}", fontsize=7.5, pad=3)
    axes.tick_params(labelsize=6, labelleft=first)
    axes.set_xlabel("latent / γ", fontsize=6.5, labelpad=1)
    if first:
        axes.set_ylabel("density", fontsize=7)


def _spans() -> tuple[tuple[int, int], ...]:
    """First and last bin of each code."""
    low, high = (round((REACH + threshold) * BINS / (2 * REACH)) for threshold in (-0.5, 0.5))
    return (0, low), (low, high), (high, BINS)


def _draw_codes(axes: Axes, portrait: TernaryFigure) -> None:
    codes = portrait.codes.detach().cpu().numpy()
    axes.imshow(codes, cmap=ListedColormap(CODE_COLOURS), vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
    axes.set_anchor("N")
    whole = portrait.shape[-2:]
    rows, columns = (f"{'first ' if n < of else ''}{n}" for n, of in zip(codes.shape, whole, strict=True))
    expert = "expert 0: " if len(portrait.shape) == 3 and portrait.shape[0] > 1 else ""
    axes.set_xlabel(f"{columns} inputs", fontsize=6.5, labelpad=2)
    axes.set_ylabel(f"{expert}{rows} outputs", fontsize=6.5, labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])
