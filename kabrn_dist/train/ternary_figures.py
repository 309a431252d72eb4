"""Data of the pictures of ternary weights, collected from all ranks of a model in training."""

from __future__ import annotations

import torch
from torch import Tensor

from kabrn_dist.backend.deepspeed import gathered
from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.ternary_sharding import TernaryShard
from kabrn_dist.backend.ternary_weights import is_counted_here
from kabrn_dist.model.parameters import TernaryWeight
from kabrn_dist.ops.weight_quant import absmean_quantize
from kabrn_dist.plots.ternary_figure import BINS, CORNER, TernaryFigure, count_latents, make_ternary_figure


@torch.no_grad()
def collect_layer_figures(engine: Engine) -> dict[int, list[TernaryFigure]]:
    """Return the pictures' data of every layer's matrices. Collective.

    Histograms are of all experts, each counted once; codes are of this rank's first expert.
    """
    weights = list(engine.model.ternary_weights())
    counts = torch.zeros(len(weights), BINS, dtype=torch.float64, device=engine.mesh.device)
    figures: dict[int, list[TernaryFigure]] = {}
    engine.refresh()
    for number, weight in enumerate(weights):
        figure, counted = _local_figure(engine, number, weight)
        if counted:
            counts[number] = figure.histogram
        figures.setdefault(weight.layer, []).append(figure)
    histograms = iter(engine.mesh.all_reduce_sum(counts).cpu())
    return {layer: [figure._replace(histogram=next(histograms)) for figure in each] for layer, each in figures.items()}


def _local_figure(engine: Engine, number: int, matrix: TernaryWeight) -> tuple[TernaryFigure, bool]:
    """What this rank sees of a matrix, and whether its histogram is one of those that add up to the whole."""
    _, name, weight, routed = matrix
    shard = engine.ternary_shard(weight)
    if shard is not None:
        return _with_all_experts(engine, _shard_figure(name, shard, weight), routed), True
    with gathered([weight], engine.stage):
        latent = weight.detach().view(-1, *weight.shape[-2:])
        quantized = absmean_quantize(latent, engine.config.model.scale_group_size)
        figure = make_ternary_figure(name, tuple(weight.shape), latent, *quantized)
        return _with_all_experts(engine, figure, routed), is_counted_here(engine, number, routed)


def _shard_figure(name: str, shard: TernaryShard, piece: Tensor) -> TernaryFigure:
    """A histogram of this rank's latents, and codes of the whole."""
    histogram = torch.zeros(BINS, dtype=torch.float64, device=piece.device)
    for latent, gamma in shard.scaled_runs(piece.detach()):
        histogram += count_latents(latent, gamma)
    codes = shard.matrices().codes(torch.int8)[0, :CORNER, :CORNER].cpu()
    return TernaryFigure(name, histogram, codes, shard.logical)


def _with_all_experts(engine: Engine, figure: TernaryFigure, routed: bool) -> TernaryFigure:
    if not routed:
        return figure
    return figure._replace(shape=(engine.config.model.experts.num_experts, *figure.shape[1:]))
