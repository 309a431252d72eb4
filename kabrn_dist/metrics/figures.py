"""Pictures of a run for TensorBoard: experts' loads, what their functions have learned, and ternary weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.config import Config
from kabrn_dist.metrics.logger import MetricsLogger
from kabrn_dist.metrics.ternary import collect_layer_figures
from kabrn_dist.model.experts.registry import function_range
from kabrn_dist.plots.experts import draw_load
from kabrn_dist.plots.functions import draw_functions
from kabrn_dist.plots.weights import draw_weights

# Functions of an expert that are drawn where each edge has one, and experts that are drawn.
EDGES, EXPERTS = 4, 8


class TrainingFigures:
    """Draws now and then; what a function was is what it was when this session began."""

    def __init__(self, engine: Engine, metrics: MetricsLogger, config: Config, step: int) -> None:
        self.engine, self.metrics, self.layers = engine, metrics, config.model.moe_layers
        experts = config.model.experts
        low, high = self.span = function_range(experts)
        reach = (high - low) / 4
        self.points = torch.linspace(low - reach, high + reach, 201)
        self.began, self.start = step, engine.function_curves(self.points, EDGES)

    def draw(self, step: int, load: Tensor | None) -> None:
        """Collective. `load` [L,E]: copies of each expert in the last logged step, if there was one."""
        curves = self.engine.function_curves(self.points, EDGES)
        if load is not None and len(load):
            self.metrics.write_figure(step, "experts/load", partial(draw_load, load.cpu(), self.layers, step))
        for layer, now in curves.items():
            title = f"layer {layer}, the first rank's experts, step {step} (start: step {self.began})"
            drawn = partial(draw_functions, self.points, now, self.start[layer], self.span, title, EXPERTS)
            self.metrics.write_figure(step, f"functions/layer_{layer}", drawn)
        for layer, portraits in collect_layer_figures(self.engine).items():
            drawn = partial(draw_weights, portraits, f"layer {layer}, step {step}")
            self.metrics.write_figure(step, f"weights/layer_{layer}", drawn)
