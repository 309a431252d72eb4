"""Rational experts: Kolmogorov-Arnold networks whose univariate functions are P₅/Q₄, shared by groups of channels.

Shapes: N rows, D width, E experts, G groups of channels, W = D / G channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.experts.grouped import LAYERS, GroupedExperts, per_expert, per_row
from kabrn_dist.ops.weight_quant import QuantState

# x·(1 + x²/50) / (1 + |x²/50|) is x itself, and its denominator has a slope to train along from the first step.
IDENTITY = ((0.0, 1.0, 0.0, 0.02, 0.0, 0.0), (0.0, 0.02, 0.0, 0.0))
# x/2 + (n₂x² + n₄x⁴)/(1 + b₂x² + b₄x⁴), fitted to swish by least squares with full weight on [−3,3] and 2 % on
# [−8,8]: off by 1e-4 on [−3,3], by 5e-3 on [−8,8], of swish's sign and of linear growth everywhere.
_N2, _N4, _B2, _B4 = 0.249895, 0.005332, 0.104352, 0.000439
FITTED = (-3.0, 3.0)
SWISH = ((0.0, 0.5, _N2, _B2 / 2, _N4, _B4 / 2), (0.0, _B2, 0.0, _B4))


def rational_naive(x: Tensor, numerator: Tensor, denominator: Tensor, counts: Sequence[int]) -> Tensor:
    """`rational` by its formula, powers and all, differentiated by autograd."""
    out = []
    for rows, a, b in zip(x.split(list(counts)), numerator, denominator, strict=True):
        z = rows.unflatten(-1, (a.shape[0], -1))
        p = sum(a[:, i, None] * z**i for i in range(6))
        q = 1 + sum(b[:, i, None] * z ** (i + 1) for i in range(4)).abs()
        out.append((p / q).view_as(rows))
    return torch.cat(out)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, counts: Sequence[int]) -> Tensor:
    """The safe Padé unit P(x)/(1 + |A(x)|), P = Σ aᵢxⁱ (i 0…5), A = Σ bᵢxⁱ (i 1…4), in fp32 or wider.

    Source: Padé activation units (arXiv 1907.06732), grouped as in KAT (arXiv 2409.10594).

    Args:
        x: [N,D] rows sorted by expert.
        numerator: [E,G,6] a; denominator: [E,G,4] b.
        counts: rows of each expert, which sum to N.

    Returns:
        [N,D] in the dtype of x.
    """
    return _Rational.apply(x, numerator, denominator, tuple(counts))


class _Rational(torch.autograd.Function):
    """Keeps only x; backward computes P, A and their slopes again and sums coefficients' gradients expert by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.counts = counts
        z, a, b = _widen(x, numerator, denominator, counts)
        p, inner = _polynomials(z, a, b)
        return p.div_(inner.abs_().add_(1)).view_as(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, numerator, denominator = ctx.saved_tensors
        z, a, b = _widen(x, numerator, denominator, ctx.counts)
        p, inner = _polynomials(z, a, b)
        over_q = 1 / (1 + inner.abs())
        for_p = grad.reshape(z.shape) * over_q
        for_inner = -for_p * p * over_q * inner.sign()
        dp = (((5 * a[:, :, 5] * z + 4 * a[:, :, 4]) * z + 3 * a[:, :, 3]) * z + 2 * a[:, :, 2]) * z + a[:, :, 1]
        dinner = ((4 * b[:, :, 3] * z + 3 * b[:, :, 2]) * z + 2 * b[:, :, 1]) * z + b[:, :, 0]
        for_x = (for_p * dp + for_inner * dinner).view_as(x).to(x.dtype)
        sums = _powers(for_p, z, 6), _powers(for_inner * z, z, 4)
        for_a, for_b = (per_expert(s, ctx.counts) for s in sums)
        return for_x, for_a.to(numerator.dtype), for_b.to(denominator.dtype), None


def _widen(x: Tensor, numerator: Tensor, denominator: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype).reshape(len(x), numerator.shape[1], x.shape[1] // numerator.shape[1])
    return z, per_row(numerator.to(dtype), counts), per_row(denominator.to(dtype), counts)


def _polynomials(z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.addcmul(a[:, :, 4], a[:, :, 5], z)
    for i in (3, 2, 1, 0):
        p = torch.addcmul(a[:, :, i], p, z)
    inner = torch.addcmul(b[:, :, 2], b[:, :, 3], z)
    for i in (1, 0):
        inner = torch.addcmul(b[:, :, i], inner, z)
    return p, inner * z


def _powers(grad: Tensor, z: Tensor, n: int) -> Tensor:
    """[N,G,n]: Σ over a group's channels of grad·zⁱ, i = 0…n−1."""
    sums = [grad.sum(-1)]
    for _ in range(n - 1):
        grad = grad * z
        sums.append(grad.sum(-1))
    return torch.stack(sums, -1)


class RationalExperts(GroupedExperts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ rational, one per group and expert (GR-KAN)."""

    inner_numerator: Tensor
    inner_denominator: Tensor
    outer_numerator: Tensor
    outer_denominator: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        settings: ExpertsConfig,
        experts: range,
        quantized: bool | QuantState = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__(width, hidden, experts, quantized, gain, UnivariateFunction("rational"), FITTED)
        for layer in LAYERS:
            for part, terms in (("numerator", 6), ("denominator", 4)):
                self.register_parameter(
                    f"{layer}_{part}", nn.Parameter(torch.empty(len(experts), settings.function_groups, terms))
                )

    def initialize(self, seed: int, name: str) -> None:
        """φ₁ starts as the identity, φ₂ as swish."""
        super().initialize(seed, name)
        for layer, start in zip(LAYERS, (IDENTITY, SWISH), strict=True):
            for part, values in zip(("numerator", "denominator"), start, strict=True):
                self.get_parameter(f"{layer}_{part}").data.copy_(torch.tensor(values))

    def coefficients(self, layer: str) -> Tensor:
        return torch.cat([self.get_parameter(f"{layer}_{part}") for part in ("numerator", "denominator")], -1)

    def eager(self, x: Tensor, coefficients: Tensor, counts: Sequence[int]) -> Tensor:
        numerator, denominator = coefficients.split([6, 4], -1)
        return rational(x, numerator, denominator, counts)
