"""Report of the ternary weights of a run: a table with one row per matrix, and a figure per layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from kabrn_dist.analysis.table import print_table
from kabrn_dist.inference.load import load_weights
from kabrn_dist.inference.run import Run
from kabrn_dist.inference.working_copy import round_to_working_copies
from kabrn_dist.metrics.ternary import TernaryStats, weight_sums
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import absmean_quantize
from kabrn_dist.plots.figure import to_png
from kabrn_dist.plots.ternary_figure import TernaryFigure, make_ternary_figure
from kabrn_dist.plots.weights import draw_weights
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError

WEIGHT_COLUMNS = ("layer", "matrix", "shape", "−1 %", "zeros %", "+1 %", "margin", "scale", "changed %")


class Matrix(NamedTuple):
    """A ternary matrix or a stack of E matrices.

    Attributes:
        layer: Index of the layer.
        sums: [E] statistics of each matrix; flips are counted since the start.
        figure: Data of its figure.
    """

    layer: int
    sums: TernaryStats
    figure: TernaryFigure


def report_weights(folder: Path, out: Path | None, console: Console) -> None:
    """Print a table of the ternary weights and write a figure per layer.

    Args:
        folder: Folder of the run.
        out: Folder for the figures; None for the folder report/ of the run.
        console: Where the table is printed.

    Raises:
        UserError: if the folder holds no such run, or one without ternary weights.
    """
    run = Run.open(folder)
    config = run.config
    if not config.model.quantize:
        raise UserError(f"{folder}: model.quantize is false, so no weight is ternary; name a run that has them")
    step, matrices = measure_matrices(run)
    title = f"{folder}: ternary weights at step {step}"
    print_table(console, title, WEIGHT_COLUMNS, _make_rows(matrices), keys=2, left=("matrix",))
    console.print(
        "margin: mean distance of |latent| from the threshold γ/2, relative to it. scale: γ, the mean |latent|. "
        "changed: codes that differ from the start. Stacks: mean, then lowest–highest of the experts.",
        soft_wrap=not console.is_terminal,
    )
    if config.run.init_from is not None:
        console.print("start: newly initialized weights, not those of run.init_from.")
    for picture in _draw(matrices, step, out or folder / "report"):
        console.print(f"wrote {picture}", soft_wrap=True)


def measure_matrices(run: Run) -> tuple[int, list[Matrix]]:
    """Return the step of a run's checkpoint and its ternary matrices, with the codes that training computes with."""
    model = run.initial_model()
    round_to_working_copies(model, run.config, run.manifest.world_size)
    start = _read_codes(model)
    load_weights(model, run.checkpoint)
    round_to_working_copies(model, run.config, run.manifest.world_size)
    return model.routers.step, list(_measure(model, start))


@torch.no_grad()
def _read_codes(model: MixKABRN) -> list[Tensor]:
    return [
        absmean_quantize(_stack(matrix.parameter), model.config.scale_group_size)[0].to(torch.int8)
        for matrix in model.ternary_weights()
    ]


@torch.no_grad()
def _measure(model: MixKABRN, start: list[Tensor]) -> Iterator[Matrix]:
    for (layer, name, weight, _), before in zip(model.ternary_weights(), start, strict=True):
        latent = _stack(weight)
        codes, gamma = absmean_quantize(latent, model.config.scale_group_size)
        each = [weight_sums(*parts) for parts in zip(latent, codes, gamma, before, strict=True)]
        yield Matrix(
            layer,
            TernaryStats(*map(torch.stack, zip(*each, strict=True))),
            make_ternary_figure(name, tuple(weight.shape), latent, codes, gamma),
        )


def _stack(weight: Tensor) -> Tensor:
    return weight.detach().view(-1, *weight.shape[-2:])


def _make_rows(matrices: list[Matrix]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for layer, sums, figure in matrices:
        shares = (_show(sums, name, ".1f", 100) for name in ("minus", "zero", "plus"))
        rest = _show(sums, "margin", ".3f"), _show(sums, "scale", ".4f"), _show(sums, "flips", ".1f", 100)
        rows.append((str(layer), figure.name, " × ".join(map(str, figure.shape)), *shares, *rest))
    return rows


def _show(sums: TernaryStats, name: str, style: str, unit: float = 1.0) -> str:
    """The mean over all weights, and the range over the matrices if there are several."""
    each = sums.values()[name]
    mean = TernaryStats(*(part.sum() for part in sums)).values()[name]
    text, low, high = (format(unit * float(value), style) for value in (mean, each.min(), each.max()))
    return text if len(each) == 1 else f"{text} ({low}–{high})"


def _draw(matrices: list[Matrix], step: int, folder: Path) -> Iterator[Path]:
    make_folder(folder)
    for layer in dict.fromkeys(matrix.layer for matrix in matrices):
        figures = [matrix.figure for matrix in matrices if matrix.layer == layer]
        path = folder / f"weights_layer_{layer}.png"
        atomic_write(path, to_png(draw_weights(figures, f"layer {layer}, step {step}")))
        yield path
