"""Rational experts: Kolmogorov-Arnold networks whose univariate functions are P₅/Q₄, shared by groups of channels.

Shapes:
    N: rows (routed tokens).
    D: channels.
    E: experts of this rank.
    G: groups of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.grouped import LAYERS, GroupedExperts, per_row, sum_per_expert
from kabrn_dist.ops.activation_quant import to_fp32

# x·(1 + x²/50) / (1 + |x²/50|) is x itself, and its denominator has a slope to train along from the first step.
IDENTITY_COEFFICIENTS = ((0.0, 1.0, 0.0, 0.02, 0.0, 0.0), (0.0, 0.02, 0.0, 0.0))
# x/2 + (n₂x² + n₄x⁴)/(1 + b₂x² + b₄x⁴), fitted to swish by least squares with full weight on [−3,3] and 2 % on
# [−8,8]: off by 1e-4 on [−3,3], by 5e-3 on [−8,8], of swish's sign and of linear growth everywhere.
_N2, _N4, _B2, _B4 = 0.249895, 0.005332, 0.104352, 0.000439
FIT_RANGE = (-3.0, 3.0)
SWISH = ((0.0, 0.5, _N2, _B2 / 2, _N4, _B4 / 2), (0.0, _B2, 0.0, _B4))


def rational_naive(x: Tensor, numerator: Tensor, denominator: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """Compute `rational` by its formula, with powers, differentiated by autograd."""
    out = []
    for rows, a, b in zip(x.split(list(tokens_per_expert)), numerator, denominator, strict=True):
        z = rows.unflatten(-1, (a.shape[0], -1))
        p = sum(a[:, i, None] * z**i for i in range(6))
        q = 1 + sum(b[:, i, None] * z ** (i + 1) for i in range(4)).abs()
        out.append((p / q).view_as(rows))
    return torch.cat(out)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """Return the safe Padé unit P(x)/(1 + |A(x)|), P = Σ aᵢxⁱ (i 0…5), A = Σ bᵢxⁱ (i 1…4), in fp32 or wider.

    Source: Padé activation units (arXiv 1907.06732), grouped as in KAT (arXiv 2409.10594).

    Args:
        x: [N,D] rows sorted by expert.
        numerator: [E,G,6] a.
        denominator: [E,G,4] b.
        tokens_per_expert: rows of each expert, which sum to N.

    Returns:
        [N,D] in the dtype of x.
    """
    return _Rational.apply(x, numerator, denominator, tuple(tokens_per_expert))


class _Rational(torch.autograd.Function):
    """Keeps only x; backward computes P, A and their slopes again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor, tokens_per_expert: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.tokens_per_expert = tokens_per_expert
        z, a, b = _to_fp32(x, numerator, denominator, tokens_per_expert)
        p, inner = _polynomials(z, a, b)
        return p.div_(inner.abs_().add_(1)).view_as(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, numerator, denominator = ctx.saved_tensors
        z, a, b = _to_fp32(x, numerator, denominator, ctx.tokens_per_expert)
        p, inner = _polynomials(z, a, b)
        over_q = 1 / (1 + inner.abs())
        grad_p = grad.reshape(z.shape) * over_q
        grad_inner = -grad_p * p * over_q * inner.sign()
        dp = (((5 * a[:, :, 5] * z + 4 * a[:, :, 4]) * z + 3 * a[:, :, 3]) * z + 2 * a[:, :, 2]) * z + a[:, :, 1]
        dinner = ((4 * b[:, :, 3] * z + 3 * b[:, :, 2]) * z + 2 * b[:, :, 1]) * z + b[:, :, 0]
        grad_x = (grad_p * dp + grad_inner * dinner).view_as(x).to(x.dtype)
        sums = _power_sums(grad_p, z, 6), _power_sums(grad_inner * z, z, 4)
        grad_a, grad_b = (sum_per_expert(s, ctx.tokens_per_expert) for s in sums)
        return grad_x, grad_a.to(numerator.dtype), grad_b.to(denominator.dtype), None


def _to_fp32(
    x: Tensor, numerator: Tensor, denominator: Tensor, tokens_per_expert: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x as [N,G,D/G], and the coefficients of each row, in fp32 or wider."""
    z = to_fp32(x).reshape(len(x), numerator.shape[1], x.shape[1] // numerator.shape[1])
    return z, per_row(numerator.to(z.dtype), tokens_per_expert), per_row(denominator.to(z.dtype), tokens_per_expert)


def _polynomials(z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.addcmul(a[:, :, 4], a[:, :, 5], z)
    for i in (3, 2, 1, 0):
        p = torch.addcmul(a[:, :, i], p, z)
    inner = torch.addcmul(b[:, :, 2], b[:, :, 3], z)
    for i in (1, 0):
        inner = torch.addcmul(b[:, :, i], inner, z)
    return p, inner * z


def _power_sums(grad: Tensor, z: Tensor, n: int) -> Tensor:
    """[N,G,n]: Σ over a group's channels of grad·zⁱ, i = 0…n−1."""
    sums = [grad.sum(-1)]
    for _ in range(n - 1):
        grad = grad * z
        sums.append(grad.sum(-1))
    return torch.stack(sums, -1)


class RationalExperts(GroupedExperts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ is rational, one per group and expert (GR-KAN).

    Attributes:
        inner_numerator: [E,G,6], of φ₁.
        inner_denominator: [E,G,4], of φ₁.
        outer_numerator: [E,G,6], of φ₂.
        outer_denominator: [E,G,4], of φ₂.
    """

    inner_numerator: Tensor
    inner_denominator: Tensor
    outer_numerator: Tensor
    outer_denominator: Tensor

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec, UnivariateFunction("rational"))
        for layer in LAYERS:
            for part, terms in (("numerator", 6), ("denominator", 4)):
                coefficients = torch.empty(len(spec.expert_ids), spec.config.function_groups, terms)
                self.register_parameter(f"{layer}_{part}", nn.Parameter(coefficients))

    @classmethod
    def function_range(cls, config: ExpertsConfig) -> tuple[float, float]:
        """Return the range that the swish at the start was fitted on."""
        return FIT_RANGE

    def initialize(self, seed: int, name: str) -> None:
        """Draw the matrices, and start φ₁ as the identity and φ₂ as swish."""
        super().initialize(seed, name)
        for layer, start in zip(LAYERS, (IDENTITY_COEFFICIENTS, SWISH), strict=True):
            for part, values in zip(("numerator", "denominator"), start, strict=True):
                self.get_parameter(f"{layer}_{part}").data.copy_(torch.tensor(values))

    def coefficients(self, layer: str) -> Tensor:
        """Return a and b of "inner" or "outer", side by side: [E,G,10]."""
        return torch.cat([self.get_parameter(f"{layer}_{part}") for part in ("numerator", "denominator")], -1)

    def apply_eager(self, x: Tensor, coefficients: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply `rational`."""
        numerator, denominator = coefficients.split([6, 4], -1)
        return rational(x, numerator, denominator, tokens_per_expert)
