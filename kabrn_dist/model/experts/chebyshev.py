"""Chebyshev experts: Kolmogorov-Arnold networks whose univariate functions are cubics, shared by groups of channels.

Shapes:
    N: rows (routed tokens).
    D: channels.
    E: experts of this rank.
    G: groups of channels.
    C: coefficients of a function, c₀…c₃ in the experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.grouped import LAYERS, GroupedExperts, per_row, sum_per_expert
from kabrn_dist.ops.activation_quant import to_fp32

TERMS = 4
FIT_NODES = 64


def chebyshev_naive(
    x: Tensor, coefficients: Tensor, tokens_per_expert: Sequence[int], range_ends: tuple[float, float]
) -> Tensor:
    """Compute `chebyshev` by the definition Tₙ(cos θ) = cos nθ within the range, and by its tangents outside."""
    low, high = range_ends
    out = []
    for rows, c in zip(x.split(list(tokens_per_expert)), coefficients, strict=True):
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


def chebyshev(
    x: Tensor, coefficients: Tensor, tokens_per_expert: Sequence[int], range_ends: tuple[float, float]
) -> Tensor:
    """Return Σ cₙTₙ(u), where u is x with the range mapped to [−1,1]; outside the range, a straight line.

    Computed in fp32 or wider, by recurrence.

    Args:
        x: [N,D] rows sorted by expert.
        coefficients: [E,G,C] c, of any degree C − 1.
        tokens_per_expert: rows of each expert, which sum to N.
        range_ends: low < high, in x.

    Returns:
        [N,D] in the dtype of x.
    """
    return _Chebyshev.apply(x, coefficients, tuple(tokens_per_expert), range_ends)


class _Chebyshev(torch.autograd.Function):
    """Keeps only x; backward computes the polynomials again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coefficients: Tensor, tokens_per_expert: tuple[int, ...], range_ends: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(x, coefficients)
        ctx.tokens_per_expert, ctx.range_ends = tokens_per_expert, range_ends
        u, outside, c = _to_fp32(x, coefficients, tokens_per_expert, range_ends)
        out = torch.zeros_like(u)
        for n, (value, slope) in enumerate(_polynomials(u, c.shape[2])):
            out += c[:, :, n] * (value + slope * outside)
        return out.view_as(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, coefficients = ctx.saved_tensors
        u, outside, c = _to_fp32(x, coefficients, ctx.tokens_per_expert, ctx.range_ends)
        grad = grad.reshape(u.shape).to(u.dtype)
        slopes, sums = torch.zeros_like(u), []
        for n, (value, slope) in enumerate(_polynomials(u, c.shape[2])):
            slopes += c[:, :, n] * slope
            sums.append((grad * (value + slope * outside)).sum(-1))
        grad_x = grad * slopes * (2 / (ctx.range_ends[1] - ctx.range_ends[0]))
        grad_c = sum_per_expert(torch.stack(sums, -1), ctx.tokens_per_expert)
        return grad_x.view_as(x).to(x.dtype), grad_c.to(coefficients.dtype), None, None


def _to_fp32(
    x: Tensor, coefficients: Tensor, tokens_per_expert: tuple[int, ...], range_ends: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u clamped to [−1,1], the excess [N,G,D/G], and coefficients [N,G,C,1] or [1,G,C,1]; fp32 or wider."""
    x, groups, (low, high) = to_fp32(x), coefficients.shape[1], range_ends
    u = (x.reshape(len(x), groups, x.shape[1] // groups) - (low + high) / 2) * (2 / (high - low))
    inside = u.clamp(-1, 1)
    return inside, u - inside, per_row(coefficients.to(x.dtype), tokens_per_expert)


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


def fit_swish(range_ends: tuple[float, float]) -> tuple[float, ...]:
    """Return the coefficients of the cubic nearest to swish at the Chebyshev nodes of the range, by least squares."""
    low, high = range_ends
    center, reach = (low + high) / 2, (high - low) / 2
    angles = [math.pi * (i + 0.5) / FIT_NODES for i in range(FIT_NODES)]
    points = [center + reach * math.cos(angle) for angle in angles]
    swish = [x / (1 + math.exp(-x)) for x in points]
    # cos nθ are orthogonal over the nodes, so that least squares is a projection.
    sums = [sum(y * math.cos(n * angle) for y, angle in zip(swish, angles, strict=True)) for n in range(TERMS)]
    return tuple(total * (1 if n == 0 else 2) / FIT_NODES for n, total in enumerate(sums))


class ChebyshevExperts(GroupedExperts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ is a cubic on `grid_range`, one per group and expert.

    Attributes:
        inner: [E,G,C], coefficients of φ₁.
        outer: [E,G,C], coefficients of φ₂.
    """

    function_keys: ClassVar[tuple[str, ...]] = ("function_groups", "grid_range")

    inner: Tensor
    outer: Tensor

    def __init__(self, spec: ExpertSpec) -> None:
        low, high = self.function_range(spec.config)
        super().__init__(spec, UnivariateFunction("chebyshev", (low + high) / 2, (high - low) / 2))
        shape = len(spec.expert_ids), spec.config.function_groups, TERMS
        for layer in LAYERS:
            self.register_parameter(layer, nn.Parameter(torch.empty(shape)))

    def initialize(self, seed: int, name: str) -> None:
        """Draw the matrices, and start φ₁ as the identity and φ₂ as the cubic nearest to swish."""
        super().initialize(seed, name)
        identity = (self.function.center, self.function.reach, 0.0, 0.0)
        self.inner.data.copy_(torch.tensor(identity))
        self.outer.data.copy_(torch.tensor(fit_swish(self.range_ends)))

    def coefficients(self, layer: str) -> Tensor:
        """Return c [E,G,C] of "inner" or "outer"."""
        return self.get_parameter(layer)

    def apply_eager(self, x: Tensor, coefficients: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply `chebyshev`."""
        return chebyshev(x, coefficients, tokens_per_expert, self.range_ends)
