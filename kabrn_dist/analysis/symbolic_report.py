"""Report of the elementary function nearest to each learned function of a run: a table and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from kabrn_dist.analysis.elementary import write_formula
from kabrn_dist.analysis.functions import Curves, LearnedFunctions, read_functions
from kabrn_dist.analysis.symbolic import Fit, fit_all
from kabrn_dist.analysis.table import print_table
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError

# Best fits of each function in the JSON file.
FITS_PER_FUNCTION = 5
# Limit on the rows of the table; the JSON file has all.
TABLE_ROWS = 200
FIT_COLUMNS = ("layer", "experts", "expert", "function", "number", "name", "R²", "formula", "next best")


class SymbolicFunction(NamedTuple):
    """A learned function and its symbolic fits.

    Attributes:
        layer: Index of the layer.
        kind: Kind of its experts: routed, shared or dense.
        expert: Index of the expert.
        role: "inner" before the hidden layer, "outer" after it.
        function: Index of the function in the expert.
        fits: Fits, best first.
    """

    layer: int
    kind: str
    expert: int
    role: str
    function: int
    fits: list[Fit]


def report_symbolic(folder: Path, edges: int, layer: int | None, expert: int | None, console: Console) -> None:
    """Print a table of symbolic fits and write report/symbolic.json in the folder of the run.

    Args:
        folder: Folder of the run.
        edges: Number of functions per expert to fit, for types with a function on every edge.
        layer: Layer to report; None for all.
        expert: Expert to report; None for all.
        console: Where the table is printed.

    Raises:
        UserError: if the run has no learned functions, or none in that layer and expert.
    """
    learned = read_functions(folder, edges, beyond=0.0)
    curves = [each for each in learned.curves if layer in (None, each.layer)]
    named = [one for each in curves for one in _name(learned, each, expert)]
    if not named:
        layers = ", ".join(str(n) for n in sorted({curves.layer for curves in learned.curves}))
        most = max(next(iter(curves.now.values())).shape[0] for curves in learned.curves)
        asked = " ".join(f"--{k} {v}" for k, v in (("layer", layer), ("expert", expert)) if v is not None)
        raise UserError(f"{asked}: there are functions in layers {layers}, of experts 0 to {most - 1}")
    title = f"{folder}: nearest elementary functions at step {learned.step}"
    left = ("formula", "next best")
    print_table(console, title, FIT_COLUMNS, _make_rows(named[:TABLE_ROWS]), keys=5, left=left)
    if len(named) > TABLE_ROWS:
        console.print(f"{len(named) - TABLE_ROWS} more are in symbolic.json; --layer and --expert choose")
    path = folder / "report" / "symbolic.json"
    make_folder(path.parent)
    atomic_write(path, (json.dumps(_as_json(learned, named), indent=1, ensure_ascii=False) + "\n").encode())
    console.print(f"wrote {path}", soft_wrap=True)


def _name(learned: LearnedFunctions, curves: Curves, expert: int | None) -> list[SymbolicFunction]:
    functions = []
    for role, values in curves.now.items():
        chosen = [e for e in range(len(values)) if expert in (None, e)]
        if not chosen:
            continue
        per_expert = values.shape[1]
        fits = fit_all(learned.points, torch.cat([values[e] for e in chosen]))
        functions += [
            SymbolicFunction(curves.layer, curves.kind, chosen[i // per_expert], role, i % per_expert, each)
            for i, each in enumerate(fits)
        ]
    return functions


def _make_rows(named: list[SymbolicFunction]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in named:
        best, *others = one.fits
        location = str(one.layer), one.kind, str(one.expert), one.role, str(one.function)
        rest = ", ".join(f"{fit.name} {fit.r2:.5f}" for fit in others[:2])
        rows.append((*location, best.name, f"{best.r2:.5f}", write_formula(*best[:5]), rest))
    return rows


def _as_json(learned: LearnedFunctions, named: list[SymbolicFunction]) -> dict[str, object]:
    functions = [one._asdict() | {"fits": [fit._asdict() for fit in one.fits[:FITS_PER_FUNCTION]]} for one in named]
    kind = learned.config.model.experts.type
    return {"step": learned.step, "form": kind, "range": list(learned.span), "functions": functions}
