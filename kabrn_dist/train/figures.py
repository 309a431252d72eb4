"""Pictures of a run for TensorBoard: experts' loads, what their functions have learned, and ternary weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.metrics.logger import MetricsLogger
from kabrn_dist.model.experts.registry import function_range
from kabrn_dist.plots.ternary_figure import TernaryFigure
from kabrn_dist.train.ternary_figures import collect_layer_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Edges of an expert whose functions are drawn where each edge has one, and the number of experts that are drawn.
_MAX_EDGES, _MAX_EXPERTS = 4, 8


class TrainingFigures:
    """Draws the state of the model and compares functions with those at the start of the session.

    Args:
        engine: the model in training.
        metrics: where pictures go.
        step: steps done before this session.
    """

    def __init__(self, engine: Engine, metrics: MetricsLogger, step: int) -> None:
        self.engine, self.metrics = engine, metrics
        low, high = self.span = function_range(engine.config.model.experts)
        margin = (high - low) / 4
        self.points = torch.linspace(low - margin, high + margin, 201)
        self.start_step = step
        self.start_curves = {} if engine.is_adapter else engine.function_curves(self.points, _MAX_EDGES)

    def draw(self, step: int, tokens_per_expert: Tensor | None) -> None:
        """Draw everything that changes. Collective.

        Args:
            step: steps done.
            tokens_per_expert: [L,E] loads of the last logged step, None before the first.
        """
        if tokens_per_expert is not None and len(tokens_per_expert):
            draw_load = _load_figure(tokens_per_expert.cpu(), self.engine.config.model.moe_layers, step)
            self.metrics.write_figure(step, "experts/load", draw_load)
        if self.engine.is_adapter:
            return
        for layer, now in self.engine.function_curves(self.points, _MAX_EDGES).items():
            title = f"layer {layer}, experts of rank 0, step {step} (start: step {self.start_step})"
            self.metrics.write_figure(step, f"functions/layer_{layer}", self._function_figure(layer, now, title))
        for layer, matrices in collect_layer_figures(self.engine).items():
            title = f"layer {layer}, step {step}"
            self.metrics.write_figure(step, f"weights/layer_{layer}", _weight_figure(matrices, title))

    def _function_figure(self, layer: int, now: dict[str, Tensor], title: str) -> Callable[[], Figure]:
        def draw() -> Figure:
            from kabrn_dist.plots.functions import draw_functions

            return draw_functions(self.points, now, self.start_curves[layer], self.span, title, _MAX_EXPERTS)

        return draw


# Each of these imports matplotlib when it draws, which only the rank that writes does.
def _load_figure(load: Tensor, layers: Sequence[int], step: int) -> Callable[[], Figure]:
    def draw() -> Figure:
        from kabrn_dist.plots.experts import draw_load

        return draw_load(load, layers, step)

    return draw


def _weight_figure(matrices: Sequence[TernaryFigure], title: str) -> Callable[[], Figure]:
    def draw() -> Figure:
        from kabrn_dist.plots.weights import draw_weights

        return draw_weights(matrices, title)

    return draw
