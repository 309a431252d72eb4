"""Report of the learned univariate functions of a run: a table, a figure per layer, changes and input ranges.

Shapes: E experts, F functions of an expert (its groups, or the edges that are shown), P points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from kabrn_dist.analysis.function_inputs import Reach, measure_reach
from kabrn_dist.analysis.networks import list_networks
from kabrn_dist.analysis.table import print_table
from kabrn_dist.config import Config
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.inference.load import load_weights
from kabrn_dist.inference.run import Run
from kabrn_dist.inference.working_copy import round_to_working_copies
from kabrn_dist.model.experts.registry import function_range
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.plots.figure import draw_cells, to_png
from kabrn_dist.plots.functions import draw_functions
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError

POINTS = 121
FUNCTION_COLUMNS = (
    "layer",
    "experts",
    "function",
    "number",
    "change mean",
    "change max",
    "of expert",
    "outside % mean",
    "outside % max",
    "99.9 % of |inputs| <",
)


class Curves(NamedTuple):
    """Functions of one network, "inner" before and "outer" after its hidden layer.

    Attributes:
        layer: Index of the layer.
        kind: Kind of its experts: routed, shared or dense.
        now: [E,F,P] values of the learned functions.
        start: [E,F,P] values of the initial functions.
    """

    layer: int
    kind: str
    now: dict[str, Tensor]
    start: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Layer and kind, for titles."""
        return f"layer {self.layer} {self.kind}"


class LearnedFunctions(NamedTuple):
    """Learned functions of a run.

    Attributes:
        config: Configuration of the run.
        model: Model at `step`.
        step: Step of the checkpoint.
        points: [P] arguments of the curves.
        span: Range of the functions, which `points` may exceed.
        curves: Curves of each network with learned functions.
    """

    config: Config
    model: MixKABRN
    step: int
    points: Tensor
    span: tuple[float, float]
    curves: list[Curves]


def read_functions(folder: Path, edges: int, beyond: float = 0.5) -> LearnedFunctions:
    """Return the functions of a run's newest intact checkpoint and of its initial weights.

    Args:
        folder: Folder of the run.
        edges: Number of functions per expert to read, for types with a function on every edge.
        beyond: Distance of the outermost points from the range, as a fraction of half the range.

    Raises:
        UserError: if the folder holds no such run, or its experts have no learned functions.
    """
    run = Run.open(folder)
    config, model = run.config, run.initial_model()
    span = function_range(config.model.experts)
    middle, half = sum(span) / 2, (span[1] - span[0]) / 2 * (1 + beyond)
    points = torch.linspace(middle - half, middle + half, POINTS)
    start = _evaluate(model, points, edges)
    load_weights(model, run.checkpoint)
    round_to_working_copies(model, config, run.manifest.world_size)
    step = model.routers.step
    now = _evaluate(model, points, edges)
    networks = list_networks(model)
    curves = [Curves(n.layer, n.kind, last, first) for n, last, first in zip(networks, now, start, strict=True) if last]
    if not curves:
        raise UserError(
            f"{folder}: model.experts.type {config.model.experts.type} has no learned functions; the types "
            "rational, chebyshev, hat and bspline have"
        )
    return LearnedFunctions(config, model, step, points, span, curves)


def report_functions(folder: Path, edges: int, sequences: int, console: Console) -> None:
    """Print a table of the functions and write figures to the folder report/ of the run.

    Args:
        folder: Folder of the run.
        edges: Number of functions per expert to show, for types with a function on every edge.
        sequences: Number of validation sequences that measure the range of the inputs.
        console: Where the table is printed.
    """
    learned = read_functions(folder, edges)
    batch = _read_data(learned.config, sequences, console)
    reaches = measure_reach(learned.model, batch) if batch else None
    title = f"{folder}: learned functions at step {learned.step}"
    print_table(console, title, FUNCTION_COLUMNS, _make_rows(learned, reaches), keys=3)
    console.print("change: RMS difference since the start, inside the range; mean and largest over the experts.")
    if learned.config.run.init_from is not None:
        console.print("start: newly initialized weights, not those of run.init_from.")
    for path in _draw(learned, reaches, folder / "report"):
        console.print(f"wrote {path}", soft_wrap=True)


def measure_change(curves: Curves, points: Tensor, span: tuple[float, float]) -> dict[str, Tensor]:
    """Return the change of the functions since the start.

    Args:
        curves: The functions of one network.
        points: [P] their arguments.
        span: Range of the functions; points outside do not count.

    Returns:
        [E] RMS over functions and points, for "inner" and "outer".
    """
    inside = (points >= span[0]) & (points <= span[1])
    return {
        role: (now - curves.start[role])[..., inside].double().square().mean((1, 2)).sqrt()
        for role, now in curves.now.items()
    }


@torch.no_grad()
def _evaluate(model: MixKABRN, points: Tensor, edges: int) -> list[dict[str, Tensor]]:
    return [
        {role: values.detach().clone() for role, values in network.experts.functions(points, edges).items()}
        for network in list_networks(model)
    ]


def _read_data(config: Config, sequences: int, console: Console) -> Batch | None:
    """The first validation sequences of each source; None, with the reason printed, if they cannot be read."""
    data = config.data
    try:
        split = TokenDataset(open_corpus(data), "validation", data.sequence_length, config.run.seed, ordered=False)
        return split.get(split.validation_positions(sequences))
    except UserError as error:
        console.print(f"the range of inputs is left out: {error}", soft_wrap=True)
        return None


def _make_rows(learned: LearnedFunctions, reaches: list[Reach] | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for curves, reach in zip(learned.curves, _matching(learned, reaches), strict=True):
        for role, change in measure_change(curves, learned.points, learned.span).items():
            figures = f"{change.mean():.4f}", f"{change.max():.4f}", str(int(change.argmax()))
            number = f"{curves.now[role].shape[0]} × {curves.now[role].shape[1]}"
            rows.append((str(curves.layer), curves.kind, role, number, *figures, *_reach_columns(reach, role)))
    return rows


def _reach_columns(reach: Reach | None, role: str) -> tuple[str, str, str]:
    if reach is None:
        return "–", "–", "–"
    known = reach.outside[role][reach.tokens_per_expert > 0]
    share = (f"{100 * known.mean():.2f}", f"{100 * known.max():.2f}") if len(known) else ("–", "–")
    return *share, f"{reach.quantile:.2f}" if role == "inner" else "–"


def _matching(learned: LearnedFunctions, reaches: list[Reach] | None) -> list[Reach | None]:
    """The ranges of those networks that have curves."""
    if reaches is None:
        return [None] * len(learned.curves)
    return [reach for reach in reaches if reach.outside]


def _draw(learned: LearnedFunctions, reaches: list[Reach] | None, folder: Path) -> Iterator[Path]:
    make_folder(folder)
    for curves in learned.curves:
        title = f"{learned.config.model.experts.type}: {curves.name}, step {learned.step}"
        figure = draw_functions(learned.points, curves.now, curves.start, learned.span, title)
        yield _write(folder / f"functions_layer_{curves.layer}_{curves.kind}.png", figure)
    names = [f"{curves.name} {role}" for curves in learned.curves for role in curves.now]
    changes = [measure_change(curves, learned.points, learned.span) for curves in learned.curves]
    cells = _stack([row for change in changes for row in change.values()])
    yield _write(folder / "change.png", draw_cells(cells, names, "Change since the start", "RMS difference"))
    if reaches is not None:
        low, high = learned.span
        rows = [100 * row for reach in reaches for row in reach.outside.values()]
        title = f"Inputs outside [{low:g}, {high:g}]"
        yield _write(folder / "outside.png", draw_cells(_stack(rows), names, title, "% of the values"))


def _stack(rows: list[Tensor]) -> Tensor:
    """[R,max E], NaN where a network has fewer experts."""
    wide = max(len(row) for row in rows)
    cells = torch.full((len(rows), wide), math.nan, dtype=torch.float64)
    for cell, row in zip(cells, rows, strict=True):
        cell[: len(row)] = row
    return cells


def _write(path: Path, figure: Figure) -> Path:
    atomic_write(path, to_png(figure))
    return path
