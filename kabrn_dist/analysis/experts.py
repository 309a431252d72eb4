"""Report of the load balance of a run's experts: a table and three pictures from its log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from kabrn_dist.analysis.log import ExpertLog, read_expert_log
from kabrn_dist.analysis.table import print_table
from kabrn_dist.metrics.moe import UNDERUSED, measure_balance
from kabrn_dist.plots.experts import draw_history, draw_load, draw_violation
from kabrn_dist.plots.figure import to_png
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError

EXPERT_COLUMNS = (
    "layer",
    "load max",
    "load min",
    "CV",
    "MaxVio",
    "dead",
    f"< {UNDERUSED:g}",
    "entropy",
    "bias range",
    "dropped %",
    "copies/rank",
    "MiB/rank",
    "exchange ms",
)


def report_experts(folder: Path, last: int, layer: int | None, console: Console) -> None:
    """Print tables of the load balance and write pictures to the folder report/ of the run.

    Args:
        folder: Folder of the run.
        last: Number of logged steps that the second table averages.
        layer: Layer whose experts are drawn over the steps; None for the largest mean MaxVio in those steps.
        console: Where the tables are printed.

    Raises:
        UserError: if there is no log of experts, or no such layer in it.
    """
    log = read_expert_log(folder)
    if layer is not None and layer not in log.layers:
        named = ", ".join(map(str, log.layers))
        raise UserError(f"--layer {layer}: layers with a mixture of experts are {named}")
    end, tail = log.last(1), log.last(last)
    print_table(console, f"{folder}: experts at step {end.steps[0]}", EXPERT_COLUMNS, _make_rows(end), keys=1)
    if len(tail.steps) > 1:
        span = f"{len(tail.steps)} logged steps, {tail.steps[0]} to {tail.steps[-1]}"
        print_table(console, f"mean of the last {span}", EXPERT_COLUMNS, _make_rows(tail), keys=1)
    console.print(
        "load: tokens of an expert, relative to the mean of the layer. CV: standard deviation of the loads. MaxVio: "
        f"largest load − 1. dead: experts without a token; < {UNDERUSED:g}: with a load below that. entropy: of the "
        "router's choice, nats per token. Columns per rank: lowest–highest.",
        soft_wrap=not console.is_terminal,
    )
    for path in draw(log, tail, layer, folder / "report"):
        console.print(f"wrote {path}", soft_wrap=True)


def _make_rows(log: ExpertLog) -> list[tuple[str, ...]]:
    """One row per layer; every value is the mean over the steps of the log."""
    rows: list[tuple[str, ...]] = []
    balance = [part.mean(0).tolist() for part in measure_balance(log.load)]
    entropy, bias, dropped = (part.mean(0).tolist() for part in (log.entropy, log.bias_range, log.dropped))
    ranks = _rank_columns(log)
    for i, layer in enumerate(log.layers):
        most, least, variation, violation, dead, underused = (part[i] for part in balance)
        even = (f"{value:.3f}" for value in (most, least, variation, violation))
        counts = f"{dead:.3g}", f"{underused:.3g}"
        rest = f"{entropy[i]:.3f}", f"{bias[i]:.4f}", f"{100 * dropped[i]:.2f}"
        rows.append((str(layer), *even, *counts, *rest, *ranks[i]))
    return rows


def draw(log: ExpertLog, tail: ExpertLog, layer: int | None, folder: Path) -> Iterator[Path]:
    """Write the pictures and yield their paths.

    Args:
        log: All logged steps.
        tail: The last steps.
        layer: Layer whose experts are drawn; None for the least balanced one of `tail`.
        folder: Folder to write to.
    """
    make_folder(folder)
    violation = measure_balance(log.load).violation
    if layer is None:
        layer = log.layers[int(measure_balance(tail.load).violation.mean(0).argmax())]
    load = log.load[:, log.layers.index(layer)]
    figures = {
        "load.png": draw_load(log.load[-1], log.layers, log.steps[-1]),
        "maxvio.png": draw_violation(log.steps, violation, log.layers),
        f"load_layer_{layer}.png": draw_history(log.steps, load / load.mean(-1, keepdim=True).clamp(min=1e-9), layer),
    }
    for name, figure in figures.items():
        atomic_write(folder / name, to_png(figure))
        yield folder / name


def _rank_columns(log: ExpertLog) -> list[tuple[str, str, str]]:
    """Routed tokens, MiB and milliseconds of each layer, lowest to highest over the ranks of the last session."""
    known = [traffic for traffic in log.traffic if traffic is not None]
    same = [traffic for traffic in known if traffic.shape == known[-1].shape]
    if not same:
        return [("–", "–", "–")] * len(log.layers)
    mean = torch.stack(same).mean(0)
    scale = torch.tensor([1.0, 2.0**-20, 1e3], dtype=torch.float64)
    low, high = (mean.amin(0) * scale, mean.amax(0) * scale)
    return [
        (_span(a[0], b[0], ",.0f"), _span(a[1], b[1], ".3f"), _span(a[2], b[2], ".2f"))
        for a, b in zip(low, high, strict=True)
    ]


def _span(low: Tensor, high: Tensor, style: str) -> str:
    texts = format(float(low), style), format(float(high), style)
    return texts[0] if texts[0] == texts[1] else "–".join(texts)
