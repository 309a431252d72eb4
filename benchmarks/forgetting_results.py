"""The committed sequences of `benchmarks/forgetting.py`, results/forgetting.jsonl, as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.forgetting_matrix import Averages, Matrix, Measurement, average_matrices, stack_measurements
from benchmarks.results import NOT_MEASURED
from kabrn_dist.plots.figure import COLORS, make_figure

EXPERT_MARKS = {"rational": "o", "swiglu": "s"}
METHOD_COLORS = {"full": COLORS[0], "lora": COLORS[1], "ternary_lora": COLORS[2], "state": COLORS[3]}


class WayResult(NamedTuple):
    """One way to fine-tune, over its seeds.

    Attributes:
        method: of fine-tuning.
        experts: "rational" or "swiglu".
        replay: share of the sequences that come from the base's data.
        seeds: number of sequences.
        trained: parameters.
        domains: their names.
        bits: the matrix of bits per byte.
        averages: of all matrices.
    """

    method: str
    experts: str
    replay: float
    seeds: int
    trained: int
    domains: tuple[str, ...]
    bits: Matrix
    averages: Averages


def read_ways(folder: Path) -> list[WayResult]:
    """Return the results of each way, in the order of methods; none without the file."""
    path = folder / "forgetting.jsonl"
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    ways: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for entry in entries:
        ways.setdefault((entry["method"], entry["replay"], entry["experts"]), []).append(entry)
    return [
        _summarize(ways[key]) for key in sorted(ways, key=lambda key: (list(METHOD_COLORS).index(key[0]), *key[1:]))
    ]


def _summarize(entries: list[dict[str, Any]]) -> WayResult:
    first = entries[0]
    stacked = stack_measurements(
        [[[Measurement(*each) for each in row] for row in entry["measured"]] for entry in entries]
    )
    return WayResult(
        method=first["method"],
        experts=first["experts"],
        replay=first["replay"],
        seeds=len(entries),
        trained=first["trained"],
        domains=tuple(first["domains"]),
        bits=stacked[0],
        averages=average_matrices(*stacked),
    )


def forgetting_table(folder: Path) -> str:
    """Return a line of Markdown for each way."""
    lines = [
        "| method | replay | experts | parameters | bits learned | bits at the end | base's bits | tokens learned | "
        "tokens at the end | seeds |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way in read_ways(folder):
        one = way.averages
        figures = (
            f"{one.learned_bits:.2f} | {one.bits:.2f} | {one.base_rise:+.0%} | {one.learned:.2f} | {one.accuracy:.2f}"
        )
        about = f"{way.method} | {way.replay:g} | {way.experts} | {way.trained:,}"
        lines.append(f"| {about} | {figures} | {way.seeds} |".replace("-", "−"))
    return "\n".join(lines) if len(lines) > 2 else NOT_MEASURED


def draw_forgetting(ways: list[WayResult]) -> Figure:
    """Draw what is learned against what the base loses, a point a way, and the matrices of those that replay."""
    figure = make_figure(9.0, 6.4)
    shown = [way for way in ways if way.experts == "rational" and way.replay]
    grid = figure.add_gridspec(2, max(1, len(shown)), height_ratios=(1.3, 1.0))
    _draw_points(figure.add_subplot(grid[0, :]), ways)
    highest = max((way.bits.max() for way in shown), default=1.0)
    for column, way in enumerate(shown):
        axes = figure.add_subplot(grid[1, column])
        axes.imshow(np.log(way.bits), cmap="viridis_r", vmin=np.log(0.5), vmax=np.log(highest))
        names = ["base", *(name[:5] for name in way.domains)]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names if column == 0 else [], fontsize=7)
        for (row, place), bits in np.ndenumerate(way.bits):
            axes.text(
                place, row, f"{bits:.1f}", ha="center", va="center", fontsize=6, color="white" if bits > 3 else "black"
            )
        axes.set_title(f"{way.method}, replay {way.replay:g}", fontsize=8)
        if column == 0:
            axes.set_ylabel("after learning", fontsize=8)
    return figure


def _draw_points(axes: Axes, ways: list[WayResult]) -> None:
    for way in ways:
        axes.plot(
            way.averages.learned_bits,
            100 * way.averages.base_rise,
            EXPERT_MARKS[way.experts],
            color=METHOD_COLORS[way.method],
            fillstyle="full" if way.replay else "none",
            markersize=8,
        )
    for method, color in METHOD_COLORS.items():
        axes.plot([], [], "D", color=color, label=method)
    for experts, mark in EXPERT_MARKS.items():
        axes.plot([], [], mark, color="gray", label=f"{experts} experts")
    axes.plot([], [], "o", color="gray", fillstyle="none", label="without replay")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.legend(fontsize=8, ncols=2)
    axes.set_xlabel("bits per byte of a new domain, as soon as it is learned")
    axes.set_ylabel("rise of the base's bits per byte, %")
    axes.set_title("Learned against forgotten; below, bits per byte after each domain", fontsize=10)
    axes.grid(alpha=0.3)
