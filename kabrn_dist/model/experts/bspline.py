"""Experts with a B-spline on every edge, as in the KAN paper, on fixed grids.

Shapes: N rows, D width, H hidden width, K = grid + degree basis functions, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import Experts, check_counts, normal_mean
from kabrn_dist.ops.activation_quant import rms_norm, to_fp32
from kabrn_dist.ops.edge_layer import edge_layer
from kabrn_dist.ops.grids import Grid, refine_grid
from kabrn_dist.ops.splines import basis
from kabrn_dist.ops.weight_quant import QuantState

# The splines' share of a layer's variance at the start: functions begin near silu, as in the paper. Shares of 2 to 25 %
# learned alike in trials, 50 % less well.
SPLINE_SHARE = 0.1


class BsplineExperts(Experts):
    """Two layers D → H → D with a function b·silu(x) + Σₖ sₖBₖ(x) on every edge (arXiv 2404.19756, eq. 2.10).

    Inputs of both layers are normalised. The coefficients are ternary matrices: `inner_base` [E,H,D] and
    `inner_spline` [E,H,D·K], `outer_base` [E,D,H] and `outer_spline` [E,D,H·K], the K of an edge side by side.
    Outside the grid a function goes on along straight lines.
    """

    inner_base: Tensor
    inner_spline: Tensor
    outer_base: Tensor
    outer_spline: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        settings: ExpertsConfig,
        experts: range,
        quantized: bool | QuantState = True,
        gain: float = 1.0,
    ) -> None:
        self.sizes, self.settings, self.gain, self.grid = (width, hidden), settings, gain, self._grid(settings)
        base, spline = _gains(self.grid)
        k = self.grid.size
        matrices = {
            "inner_base": (hidden, width, base),
            "inner_spline": (hidden, width * k, spline),
            "outer_base": (width, hidden, base * gain),
            "outer_spline": (width, hidden * k, spline * gain),
        }
        super().__init__(matrices, experts, quantized)

    @staticmethod
    def _grid(settings: ExpertsConfig) -> Grid:
        return Grid(*settings.grid_range, settings.grid_size, settings.spline_order)

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int], kept: Tensor | None = None) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]."""
        hidden = self._inner((codes / scale).to(codes.dtype), counts)
        return edge_layer(hidden, self.matrices("outer_base"), self.matrices("outer_spline"), counts, self.grid)

    def _inner(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        check_counts(len(x), counts, len(self.expert_ids))
        return rms_norm(edge_layer(x, self.matrices("inner_base"), self.matrices("inner_spline"), counts, self.grid))

    @torch.no_grad()
    def functions(self, points: Tensor, edges: int) -> dict[str, Tensor]:
        return {layer: self._edge_functions(layer, points, edges) for layer in ("inner", "outer")}

    def _edge_functions(self, layer: str, points: Tensor, edges: int) -> Tensor:
        base, spline = (self._used(f"{layer}_{branch}") for branch in ("base", "spline"))
        outputs, inputs = base.shape[1:]
        chosen = torch.arange(min(edges, max(outputs, inputs)), device=base.device)
        # Along the diagonal, so that inputs and outputs both vary.
        o, i = (torch.div(chosen * n, len(chosen), rounding_mode="floor") for n in (outputs, inputs))
        x = points.to(base)
        shape = basis(x[None], self.grid)[0]
        return base[:, o, i, None] * F.silu(x) + spline.unflatten(-1, (inputs, -1))[:, o, i] @ shape

    def _used(self, name: str) -> Tensor:
        """The matrix that rows are multiplied by."""
        matrices = self.matrices(name)
        if matrices.gamma is None:
            return to_fp32(matrices.latents)
        return matrices.codes(matrices.gamma.dtype) * matrices.gamma

    @torch.no_grad()
    def outside(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        x = (codes / scale).to(codes.dtype)
        inputs = {"inner": x, "outer": self._inner(x, counts)}
        return {layer: self._share_outside(values, counts) for layer, values in inputs.items()}

    def _share_outside(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = ((x < self.grid.low) | (x > self.grid.high)).float().mean(-1)
        return torch.stack([rows.sum() / max(len(rows), 1) for rows in out.split(list(counts))])


def extend_grid(experts: BsplineExperts, finer: int) -> BsplineExperts:
    """New experts that compute the same function with `finer` intervals, by knot insertion (arXiv 2404.19756, §2.5).

    The latent coefficients are refined. With plain matrices the function is the same; ternary codes round the finer
    coefficients anew, so there it is only about the same.

    Raises:
        ValueError: `finer` is no multiple of the grid.
    """
    width, hidden = experts.sizes
    settings = experts.settings.model_copy(update={"grid_size": finer})
    extended = type(experts)(width, hidden, settings, experts.expert_ids, experts.quant, experts.gain)
    for name, old in experts.named_parameters():
        weight = old.detach()
        if name.endswith("spline"):
            edges = weight.unflatten(-1, (-1, experts.grid.size))
            weight = refine_grid(edges, experts.grid.intervals, finer, experts.grid.degree).flatten(-2)
        extended.get_parameter(name).data = weight.clone()
    return extended


def _gains(grid: Grid) -> tuple[float, float]:
    """Gains of the base and the spline matrix with which a normalised input keeps its variance.

    A branch's variance is that of its matrix times Σ E[f(z)²] over its functions of an input, z ~ N(0,1).
    """
    silu = normal_mean(lambda z: F.silu(z).square())
    splines = normal_mean(lambda z: basis(z[None], grid)[0].square().sum(0))
    return math.sqrt((1 - SPLINE_SHARE) / silu), math.sqrt(SPLINE_SHARE * grid.size / splines)
