"""Experts with a B-spline on every edge, as in the KAN paper, on fixed grids.

Shapes:
    N: rows (routed tokens).
    D: hidden size of the model.
    H: hidden units of an expert.
    K: basis functions, grid size + degree.
    E: experts of this rank.
    P: points where functions are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import Experts, ExpertSpec, MatrixSpec, check_tokens_per_expert, normal_mean
from kabrn_dist.ops.activation_quant import Quantized, rms_norm, to_fp32
from kabrn_dist.ops.edge_layer import edge_layer
from kabrn_dist.ops.edge_low_rank import add_edge_low_ranks
from kabrn_dist.ops.grids import Grid, refine_grid
from kabrn_dist.ops.splines import basis

# Fraction of a layer's variance that comes from the splines at the start: functions begin near silu, as in the paper.
# Fractions of 2 to 25 % learned alike in trials, 50 % less well.
SPLINE_VARIANCE = 0.1


class BsplineExperts(Experts):
    """Two layers D → H → D with a function b·silu(x) + Σₖ sₖBₖ(x) on every edge (arXiv 2404.19756, eq. 2.10).

    Inputs of both layers are normalized. Outside the grid a function is continued along straight lines.

    Attributes:
        grid: of the splines.
        inner_base: [E,H,D], ternary, the b of the first layer.
        inner_spline: [E,H,D·K], ternary, the s of the first layer, the K of an edge side by side.
        outer_base: [E,D,H], ternary, the b of the second layer.
        outer_spline: [E,D,H·K], ternary, the s of the second layer.
    """

    function_keys: ClassVar[tuple[str, ...]] = ("grid_size", "spline_order", "grid_range")

    inner_base: Tensor
    inner_spline: Tensor
    outer_base: Tensor
    outer_spline: Tensor

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        self.grid = self.make_grid(spec.config)

    @classmethod
    def make_grid(cls, config: ExpertsConfig) -> Grid:
        """Return the splines' grid."""
        return Grid(*config.grid_range, config.grid_size, config.spline_order)

    @classmethod
    def define_matrices(cls, spec: ExpertSpec) -> dict[str, MatrixSpec]:
        """Return a base and a spline matrix for each layer."""
        grid, inputs, hidden, gain = (
            cls.make_grid(spec.config),
            spec.hidden_size,
            spec.expert_hidden_size,
            spec.init_gain,
        )
        base, spline = _gains(grid)
        return {
            "inner_base": MatrixSpec(hidden, inputs, base),
            "inner_spline": MatrixSpec(hidden, inputs * grid.size, spline),
            "outer_base": MatrixSpec(inputs, hidden, base * gain, reads_hidden=True),
            "outer_spline": MatrixSpec(inputs, hidden * grid.size, spline * gain, reads_hidden=True),
        }

    def forward(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply both layers; see `Experts.forward`."""
        hidden = self._hidden_units(_dequantize(x), tokens_per_expert)
        return self._layer("outer", hidden, tokens_per_expert)

    def _hidden_units(self, x: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """[N,D] → [N,H], normalized: what the outer functions read."""
        check_tokens_per_expert(len(x), tokens_per_expert, len(self.expert_ids))
        return rms_norm(self._layer("inner", x, tokens_per_expert))

    def _layer(self, layer: str, x: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        base, spline = (self.matrices(f"{layer}_{branch}") for branch in ("base", "spline"))
        out = edge_layer(x, base, spline, tokens_per_expert, self.grid)
        return add_edge_low_ranks(out, x, base, spline, tokens_per_expert, self.grid)

    @torch.no_grad()
    def functions(self, points: Tensor, edges: int) -> dict[str, Tensor]:
        """Evaluate the functions of evenly chosen edges; see `Experts.functions`."""
        return {layer: self._edge_functions(layer, points, edges) for layer in ("inner", "outer")}

    def _edge_functions(self, layer: str, points: Tensor, edges: int) -> Tensor:
        base, spline = (self._effective_weight(f"{layer}_{branch}") for branch in ("base", "spline"))
        outputs, inputs = base.shape[1:]
        chosen = torch.arange(min(edges, max(outputs, inputs)), device=base.device)
        # Along the diagonal, so that inputs and outputs both vary.
        o, i = (torch.div(chosen * n, len(chosen), rounding_mode="floor") for n in (outputs, inputs))
        x = points.to(base)
        values = basis(x[None], self.grid)[0]
        return base[:, o, i, None] * F.silu(x) + spline.unflatten(-1, (inputs, -1))[:, o, i] @ values

    def _effective_weight(self, name: str) -> Tensor:
        """The matrix that rows are multiplied by, in fp32 or wider."""
        matrices = self.matrices(name)
        if matrices.gamma is None:
            weight = to_fp32(matrices.latents)
        else:
            weight = matrices.codes(matrices.gamma.dtype) * matrices.gamma
        return weight if matrices.low_rank is None else weight + matrices.low_rank.b @ matrices.low_rank.a

    @torch.no_grad()
    def outside(self, x: Quantized, tokens_per_expert: Sequence[int]) -> dict[str, Tensor]:
        """Measure the fraction of both layers' inputs outside the grid; see `Experts.outside`."""
        values = _dequantize(x)
        inputs = {"inner": values, "outer": self._hidden_units(values, tokens_per_expert)}
        return {layer: self._fraction_outside(part, tokens_per_expert) for layer, part in inputs.items()}

    def _fraction_outside(self, x: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        out = ((x < self.grid.low) | (x > self.grid.high)).float().mean(-1)
        return torch.stack([rows.sum() / max(len(rows), 1) for rows in out.split(list(tokens_per_expert))])


def extend_grid(experts: BsplineExperts, grid_size: int) -> BsplineExperts:
    """Return new experts that compute the same function on a finer grid, by knot insertion (arXiv 2404.19756, §2.5).

    The latent coefficients are refined. With plain matrices the function is the same; ternary codes round the finer
    coefficients again, so there it is only about the same.

    Args:
        experts: with any grid.
        grid_size: intervals of the new grid.

    Raises:
        ValueError: if `grid_size` is not a multiple of the old one.
    """
    config = experts.spec.config.model_copy(update={"grid_size": grid_size})
    extended = type(experts)(replace(experts.spec, config=config, quant=experts.quant))
    for name, old in experts.named_parameters():
        weight = old.detach()
        if name.endswith("spline"):
            edges = weight.unflatten(-1, (-1, experts.grid.size))
            weight = refine_grid(edges, experts.grid.intervals, grid_size, experts.grid.degree).flatten(-2)
        extended.get_parameter(name).data = weight.clone()
    return extended


def _dequantize(x: Quantized) -> Tensor:
    return (x.codes / x.scale).to(x.codes.dtype)


def _gains(grid: Grid) -> tuple[float, float]:
    """Gains of the base and the spline matrix with which a normalized input keeps its variance.

    A branch's variance is that of its matrix times Σ E[f(z)²] over its functions of an input, z ~ N(0,1).
    """
    silu = normal_mean(lambda z: F.silu(z).square())
    splines = normal_mean(lambda z: basis(z[None], grid)[0].square().sum(0))
    return math.sqrt((1 - SPLINE_VARIANCE) / silu), math.sqrt(SPLINE_VARIANCE * grid.size / splines)
