"""Rational experts: Kolmogorov-Arnold networks whose univariate functions are P₅/Q₄, shared by groups of channels.

Shapes: N rows, D width, E experts, G groups of channels, W = D / G channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.config import Experts as Settings
from kabrn_dist.model.bitlinear import bit_product
from kabrn_dist.model.kan.stacked import StackedExperts

# x·(1 + x²/50) / (1 + |x²/50|) is x itself, and its denominator has a slope to train along from the first step.
IDENTITY = ((0.0, 1.0, 0.0, 0.02, 0.0, 0.0), (0.0, 0.02, 0.0, 0.0))
# x/2 + (n₂x² + n₄x⁴)/(1 + b₂x² + b₄x⁴), fitted to swish by least squares with full weight on [−3,3] and 2 % on
# [−8,8]: off by 1e-4 on [−3,3], by 5e-3 on [−8,8], of swish's sign and of linear growth everywhere.
_N2, _N4, _B2, _B4 = 0.249895, 0.005332, 0.104352, 0.000439
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


def _per_row(coefficients: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[E,G,C] → [N,G,C,1] (or [1,G,C,1], which broadcasts, where there is one expert)."""
    if len(counts) == 1:
        return coefficients.unsqueeze(-1)
    parts = [c.expand(n, *c.shape) for c, n in zip(coefficients, counts, strict=True)]
    return torch.cat(parts).unsqueeze(-1)


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
        for_p = grad.view_as(z) * over_q
        for_inner = -for_p * p * over_q * inner.sign()
        dp = (((5 * a[:, :, 5] * z + 4 * a[:, :, 4]) * z + 3 * a[:, :, 3]) * z + 2 * a[:, :, 2]) * z + a[:, :, 1]
        dinner = ((4 * b[:, :, 3] * z + 3 * b[:, :, 2]) * z + 2 * b[:, :, 1]) * z + b[:, :, 0]
        for_x = (for_p * dp + for_inner * dinner).view_as(x).to(x.dtype)
        sums = _powers(for_p, z, 6), _powers(for_inner * z, z, 4)
        for_a, for_b = (_per_expert(s, ctx.counts) for s in sums)
        return for_x, for_a.to(numerator.dtype), for_b.to(denominator.dtype), None


def _widen(x: Tensor, numerator: Tensor, denominator: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype).view(len(x), numerator.shape[1], x.shape[1] // numerator.shape[1])
    return z, _per_row(numerator.to(dtype), counts), _per_row(denominator.to(dtype), counts)


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


def _per_expert(rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    return torch.stack([part.sum(0) for part in rows.split(list(counts))])


class RationalExperts(StackedExperts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ rational, one per group and expert (GR-KAN)."""

    up: Tensor
    down: Tensor
    inner_numerator: Tensor
    inner_denominator: Tensor
    outer_numerator: Tensor
    outer_denominator: Tensor

    def __init__(
        self, width: int, hidden: int, settings: Settings, experts: range, quantised: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__({"up": (hidden, width, 1.0), "down": (width, hidden, gain)}, experts, quantised)
        for name, coefficients in (("inner", IDENTITY), ("outer", SWISH)):
            for part, values in zip(("numerator", "denominator"), coefficients, strict=True):
                self.register_parameter(
                    f"{name}_{part}", nn.Parameter(torch.empty(len(experts), settings.groups, len(values)))
                )

    def initialise(self, seed: int, name: str) -> None:
        super().initialise(seed, name)
        for function, coefficients in (("inner", IDENTITY), ("outer", SWISH)):
            for part, values in zip(("numerator", "denominator"), coefficients, strict=True):
                self.get_parameter(f"{function}_{part}").data.copy_(torch.tensor(values))

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]."""
        x = (codes / scale).to(codes.dtype)
        x = rational(x, self.inner_numerator, self.inner_denominator, counts)
        x = bit_product(self._requantise(x), self.up, counts, self.quantised)
        x = rational(x, self.outer_numerator, self.outer_denominator, counts)
        return bit_product(self._requantise(x), self.down, counts, self.quantised)
