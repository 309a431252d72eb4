"""Figures of learned univariate functions.

Shapes: E experts, F functions of an expert (its groups, or the edges that are shown), P points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kabrn_dist.plots.figure import COLORS, make_figure


def draw_functions(
    points: Tensor,
    now: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    span: tuple[float, float],
    title: str,
    most: int = 64,
) -> Figure:
    """Return one panel per expert with a curve per function; initial functions are dashed, the range is shaded.

    Args:
        points: [P] arguments.
        now: [E,F,P] values of the functions before ("inner") and after ("outer") the hidden layer.
        start: The same at the start of training.
        span: Ends of the grid, or of the range that the initial functions were fitted on.
        title: Title, such as "layer 3, routed experts, step 600".
        most: Maximum number of experts, from the first one on.
    """
    count, functions = next(iter(now.values())).shape[:2]
    experts = min(most, count)
    columns = min(8, math.ceil(math.sqrt(experts)))
    lines = math.ceil(experts / columns)
    panel = (1.2, 1.05) if experts > 16 else (1.9, 1.7)
    block, height = max(4.2, columns * panel[0] + 0.75), max(2.2, lines * panel[1]) + 1.5
    # Positions in inches: a layout solver takes longer than everything else together.
    figure = make_figure(len(now) * block, height, solve=False)
    for block_index, (role, curves) in enumerate(now.items()):
        width = figure.get_figwidth()
        left, right = (block * block_index + 0.75) / width, (block * (block_index + 1) - 0.1) / width
        edges = {"left": left, "right": right, "bottom": 0.75 / height, "top": 1 - 0.75 / height}
        grid = figure.add_gridspec(lines, columns, **edges, wspace=0.08, hspace=0.22)
        panels = grid.subplots(sharex=True, sharey=True, squeeze=False).flatten().tolist()
        for panel in panels[max(0, experts - columns) : experts]:
            panel.tick_params(labelbottom=True)
        _draw_experts(panels, points, curves[:experts], start[role][:experts], span)
        center = (left + right) / 2
        figure.text(center, 1 - 0.42 / height, f"{role} functions", ha="center", va="center", fontsize=10)
        figure.text(center, 0.4 / height, "input", ha="center", va="center", fontsize=9)
        figure.text(left - 0.6 / width, 0.5, "value", va="center", rotation=90, fontsize=9)
    shown = "" if count == experts else f", first {experts} of {count} experts"
    note = "(solid: learned, dashed: start, shaded: range)"
    figure.text(0.5, 1 - 0.16 / height, f"{title}{shown} {note}", ha="center", va="center", fontsize=9)
    _name_colors(figure, functions)
    return figure


def _name_colors(figure: Figure, functions: int) -> None:
    lines = [Line2D([], [], color=color, label=f"function {i}") for i, color in enumerate(COLORS[:functions])]
    if functions <= len(COLORS):
        figure.legend(handles=lines, loc="lower center", ncols=len(COLORS), fontsize=8, frameon=False)


def _draw_experts(
    panels: Sequence[Axes], points: Tensor, now: Tensor, start: Tensor, span: tuple[float, float]
) -> None:
    """One panel per expert, all with the same axes."""
    for panel in panels[len(now) :]:
        panel.set_visible(False)
    for expert, panel in enumerate(panels[: len(now)]):
        _draw_curves(panel, points, now[expert], start[expert])
        panel.axvspan(*span, color="0.92", zorder=0)
        panel.set_title(f"expert {expert}", fontsize=7, pad=2)
        panel.tick_params(labelsize=6)
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], prune="both"))
    panels[0].set_xlim(float(points[0]), float(points[-1]))
    panels[0].set_ylim(*_limits(points, now, start, span))


def _draw_curves(panel: Axes, points: Tensor, now: Tensor, start: Tensor) -> None:
    x = points.detach().cpu().numpy()
    for i, (learned, first) in enumerate(zip(now.detach().cpu(), start.detach().cpu(), strict=True)):
        color = COLORS[i % len(COLORS)]
        panel.plot(x, learned.numpy(), color=color, linewidth=1.1)
        panel.plot(x, first.numpy(), color=color, linewidth=0.7, linestyle="--", alpha=0.7)


def _limits(points: Tensor, now: Tensor, start: Tensor, span: tuple[float, float]) -> tuple[float, float]:
    """Limits of the values inside the range, so that growth outside does not flatten the learned part."""
    inside = (points >= span[0]) & (points <= span[1])
    both = [part[..., inside].detach().float().flatten() for part in (now, start)]
    low = min(float(part.min()) for part in both)
    high = max(float(part.max()) for part in both)
    margin = 0.15 * (high - low) or 0.5
    return low - margin, high + margin
