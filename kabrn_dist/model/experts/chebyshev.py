"""Chebyshev experts: Kolmogorov-Arnold networks whose univariate functions are cubics, shared by groups of channels.

Shapes: N rows, D width, E experts, G groups of channels, C coefficients c₀…c₃ of a function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.experts.grouped import GroupedExperts, per_expert, per_row
from kabrn_dist.ops.weight_quant import QuantState

TERMS = 4
NODES = 64  # of the fit at the start


def chebyshev_naive(x: Tensor, coefficients: Tensor, counts: Sequence[int], ends: tuple[float, float]) -> Tensor:
    """`chebyshev` by the definition Tₙ(cos θ) = cos nθ within the range, and by its tangents outside."""
    low, high = ends
    out = []
    for rows, c in zip(x.split(list(counts)), coefficients, strict=True):
        u = (rows.unflatten(-1, (c.shape[0], -1)) * 2 - low - high) / (high - low)
        inside = u.clamp(-1, 1)
        angle = inside.acos()
        value, slope = torch.zeros_like(u), torch.zeros_like(u)
        for n in range(c.shape[1]):
            weight = c[:, n, None]
            value = value + weight * torch.where(u.abs() < 1, (n * angle).cos(), inside.sign() ** n)
            # At the ends Tₙ' is n²·(±1)ⁿ⁺¹.
            slope = slope + weight * n**2 * inside.sign() ** (n + 1)
        out.append((value + slope * (u - inside)).view_as(rows))
    return torch.cat(out)


def chebyshev(x: Tensor, coefficients: Tensor, counts: Sequence[int], ends: tuple[float, float]) -> Tensor:
    """Σ cₙTₙ(u), u = x with `ends` mapped to [−1,1]; outside them a straight line. In fp32 or wider, by recurrence.

    Args:
        x: [N,D] rows sorted by expert.
        coefficients: [E,G,C] c, of any degree C − 1.
        counts: rows of each expert, which sum to N.
        ends: of the range in x, low < high.

    Returns:
        [N,D] in the dtype of x.
    """
    return _Chebyshev.apply(x, coefficients, tuple(counts), ends)


class _Chebyshev(torch.autograd.Function):
    """Keeps only x; backward computes the polynomials again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coefficients: Tensor, counts: tuple[int, ...], ends: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(x, coefficients)
        ctx.counts, ctx.ends = counts, ends
        u, outside, c = _widen(x, coefficients, counts, ends)
        out = torch.zeros_like(u)
        for n, (value, slope) in enumerate(_polynomials(u, c.shape[2])):
            out += c[:, :, n] * (value + slope * outside)
        return out.view_as(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, coefficients = ctx.saved_tensors
        u, outside, c = _widen(x, coefficients, ctx.counts, ctx.ends)
        grad = grad.reshape(u.shape).to(u.dtype)
        slopes, sums = torch.zeros_like(u), []
        for n, (value, slope) in enumerate(_polynomials(u, c.shape[2])):
            slopes += c[:, :, n] * slope
            sums.append((grad * (value + slope * outside)).sum(-1))
        for_x = grad * slopes * (2 / (ctx.ends[1] - ctx.ends[0]))
        for_c = per_expert(torch.stack(sums, -1), ctx.counts)
        return for_x.view_as(x).to(x.dtype), for_c.to(coefficients.dtype), None, None


def _widen(
    x: Tensor, coefficients: Tensor, counts: tuple[int, ...], ends: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """u within [−1,1] and what of it is outside, [N,G,D/G]; coefficients [N,G,C,1] or [1,G,C,1]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups, (low, high) = coefficients.shape[1], ends
    u = (x.to(dtype).reshape(len(x), groups, x.shape[1] // groups) - (low + high) / 2) * (2 / (high - low))
    inside = u.clamp(-1, 1)
    return inside, u - inside, per_row(coefficients.to(dtype), counts)


def _polynomials(u: Tensor, terms: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tₙ(u) and Tₙ'(u), n = 0, 1, …: Tₙ₊₁ = 2uTₙ − Tₙ₋₁ and its derivative."""
    value, slope = torch.ones_like(u), torch.zeros_like(u)
    # T₋₁ = T₁ = u
    last_value, last_slope = u, torch.ones_like(u)
    for _ in range(terms):
        yield value, slope
        value, slope, last_value, last_slope = (
            2 * u * value - last_value,
            2 * (value + u * slope) - last_slope,
            value,
            slope,
        )


def fit_swish(ends: tuple[float, float]) -> tuple[float, ...]:
    """Coefficients of the cubic nearest to swish at the Chebyshev nodes of the range, by least squares."""
    center, reach = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    angles = [math.pi * (i + 0.5) / NODES for i in range(NODES)]
    points = [center + reach * math.cos(angle) for angle in angles]
    swish = [x / (1 + math.exp(-x)) for x in points]
    # cos nθ are orthogonal over the nodes, so that least squares is a projection.
    sums = [sum(y * math.cos(n * angle) for y, angle in zip(swish, angles, strict=True)) for n in range(TERMS)]
    return tuple(total * (1 if n == 0 else 2) / NODES for n, total in enumerate(sums))


class ChebyshevExperts(GroupedExperts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ a cubic on `settings.range`, one per group and expert."""

    inner: Tensor
    outer: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        settings: ExpertsConfig,
        experts: range,
        quantized: bool | QuantState = True,
        gain: float = 1.0,
    ) -> None:
        low, high = settings.grid_range
        function = UnivariateFunction("chebyshev", (low + high) / 2, (high - low) / 2)
        super().__init__(width, hidden, experts, quantized, gain, function, settings.grid_range)
        for name in ("inner", "outer"):
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), settings.function_groups, TERMS)))

    def initialize(self, seed: int, name: str) -> None:
        """φ₁ starts as the identity, φ₂ as the cubic nearest to swish."""
        super().initialize(seed, name)
        identity = (self.function.center, self.function.reach, 0.0, 0.0)
        self.inner.data.copy_(torch.tensor(identity))
        self.outer.data.copy_(torch.tensor(fit_swish(self.ends)))

    def coefficients(self, layer: str) -> Tensor:
        return self.get_parameter(layer)

    def eager(self, x: Tensor, coefficients: Tensor, counts: Sequence[int]) -> Tensor:
        return chebyshev(x, coefficients, counts, self.ends)
