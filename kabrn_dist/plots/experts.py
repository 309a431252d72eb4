"""Figures of the load balance of experts.

Shapes: L mixture layers, E routed experts, S logged steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kabrn_dist.plots.figure import COLORS, draw_cells, make_figure

_DASHES = ("-", "--", ":")


def draw_load(load: Tensor, layers: Sequence[int], step: int) -> Figure:
    """Return a heat map, layer × expert, of the load relative to the mean of its layer.

    Args:
        load: [L,E] tokens routed to each expert, or any multiple of them.
        layers: Indices of the L layers.
        step: Step of the title.
    """
    relative_load = load.double() / load.double().mean(1, keepdim=True).clamp(min=1e-9)
    rows = [f"layer {layer}" for layer in layers]
    return draw_cells(
        relative_load, rows, f"Load of each expert at step {step}", "load / ideal (1 = balanced)", center=1.0
    )


def draw_violation(steps: Sequence[int], violation: Tensor, layers: Sequence[int]) -> Figure:
    """Return a plot of MaxVio over the steps, one line per layer.

    Args:
        steps: The S steps.
        violation: [S,L] MaxVio.
        layers: Indices of the L layers.
    """
    figure = make_figure(9, 4.5)
    axes = figure.add_subplot()
    for column, layer in enumerate(layers):
        _line(axes, steps, violation[:, column], column, f"layer {layer}")
    axes.set(title="Balance of the experts", xlabel="step", ylabel="MaxVio = (max − mean) / mean of the load")
    axes.set_ylim(bottom=0)
    _legend(axes, len(layers))
    return figure


def draw_history(steps: Sequence[int], relative_load: Tensor, layer: int) -> Figure:
    """Return a plot of the load of a layer's experts over the steps; of more than 14, the extreme ones are named.

    Args:
        steps: The S steps.
        relative_load: [S,E] load relative to the mean of the layer.
        layer: Index of the layer.
    """
    figure = make_figure(10, 5)
    axes = figure.add_subplot()
    order = relative_load[-1].argsort(stable=True).tolist()
    named = order if len(order) <= 14 else order[:7] + order[-7:]
    for expert in set(order) - set(named):
        axes.plot(steps, relative_load[:, expert], color="0.8", linewidth=0.8)
    for i, expert in enumerate(sorted(named)):
        _line(axes, steps, relative_load[:, expert], i, f"expert {expert}")
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    others = "" if len(named) == len(order) else " (the 7 idlest and 7 busiest named, the others grey)"
    axes.set(title=f"Load of layer {layer}'s experts{others}", xlabel="step", ylabel="load / ideal (1 = balanced)")
    axes.set_ylim(bottom=0)
    _legend(axes, len(named))
    return figure


def _line(axes: Axes, steps: Sequence[int], values: Tensor, index: int, label: str) -> None:
    color, dash = COLORS[index % len(COLORS)], _DASHES[index // len(COLORS) % len(_DASHES)]
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values.tolist(), color=color, linestyle=dash, marker=marker, linewidth=1.4, label=label)


def _legend(axes: Axes, count: int) -> None:
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, ncols=1 + (count - 1) // 20, frameon=False)
