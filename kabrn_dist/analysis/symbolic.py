"""Symbolic fits of learned functions by elementary ones, like pykan's `suggest_symbolic`.

Source: KAN (arXiv 2404.19756), section 2.5: y ≈ c·f(a·x + b) + d, with a and b from a grid that is refined around its
best point, and c and d from least squares.

Shapes: N functions, P points, K candidates (a, b).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.analysis.elementary import ELEMENTARY, Elementary

# Steps of the first grid, and of each finer one around the best point so far.
_SLOPES, _SHIFTS, _FINE, _ROUNDS = 40, 61, 7, 9
# Fits that leave less than this fraction of the variance unexplained count as equally good.
_EQUAL = 1e-5
# tanh before sigmoid and sin before cos, which differ only in a, b, c and d.
_ORDER = {function.name: rank for rank, function in enumerate(ELEMENTARY)}

# cos is a sin a quarter of a period away; tanh(x) = 2·sigmoid(2x) − 1.
_SAME = {"cos": "sin", "sigmoid": "tanh"}


class Fit(NamedTuple):
    """A fit y ≈ c·f(a·x + b) + d.

    Attributes:
        name: Name of the elementary function f.
        a: Slope of the argument.
        b: Shift of the argument.
        c: Factor on the values.
        d: Offset of the values.
        r2: Fraction of the variance that the fit explains, at most 1.
        complexity: Complexity of f.
    """

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float
    complexity: int


def fit_symbolic(x: Tensor, y: Tensor) -> list[Fit]:
    """Return the fits of all elementary functions to a set of points, best first; one of sin and cos, and so on.

    Of fits that leave at most 1e-5 of the variance unexplained, or hardly more than the best, the simplest comes
    first: the one of least complexity, then the one with most of a = 1, b = 0, c = 1, d = 0, then the first in
    `ELEMENTARY`. Values that do not vary are `constant`.

    Args:
        x: [P] arguments.
        y: [P] values.
    """
    return fit_all(x, y[None])[0]


def fit_all(x: Tensor, ys: Tensor) -> list[list[Fit]]:
    """Return `fit_symbolic` of N functions at the same points.

    Args:
        x: [P] arguments.
        ys: [N,P] values of each function.
    """
    x, ys = x.detach().double().cpu(), ys.detach().double().cpu()
    fits: list[list[Fit]] = [[] for _ in ys]
    spread = ys.std(-1, correction=0)
    varies = spread > 1e-9 * (1 + ys.abs().amax(-1))
    for i in (~varies).nonzero().flatten().tolist():
        fits[i] = [Fit("constant", 0.0, 0.0, 0.0, float(ys[i].mean()), 1.0, 0)]
    rows = varies.nonzero().flatten().tolist()
    if rows:
        for function in ELEMENTARY:
            for row, fit in zip(rows, _fit_one(function, x, ys[rows]), strict=True):
                fits[row] += [fit] if math.isfinite(fit.r2) else []
    return [_rank(each) if len(each) > 1 else each for each in fits]


def _rank(fits: list[Fit]) -> list[Fit]:
    fits = sorted(_merge_equivalent(fits), key=lambda fit: -fit.r2)
    limit = max(_EQUAL, 1.02 * (1 - fits[0].r2))
    equal = [fit for fit in fits if 1 - fit.r2 <= limit]
    best = min(equal, key=lambda fit: (fit.complexity, -_trivial(fit), _ORDER[fit.name]))
    return [best, *(fit for fit in fits if fit is not best)]


def _merge_equivalent(fits: list[Fit]) -> list[Fit]:
    """Keep one fit of functions that are the same but for a, b, c and d: two names of one fit are no rivals."""
    families: dict[str, list[Fit]] = {}
    for fit in fits:
        families.setdefault(_SAME.get(fit.name, fit.name), []).append(fit)
    kept = []
    for family in families.values():
        limit = max(fit.r2 for fit in family) - _EQUAL
        equal = [fit for fit in family if fit.r2 >= limit]
        kept.append(min(equal, key=lambda fit: (-_trivial(fit), _ORDER[fit.name])))
    return kept


def _trivial(fit: Fit) -> int:
    pairs = ((fit.a, 1), (fit.b, 0), (fit.c, 1), (fit.d, 0))
    return sum(abs(value - plain) < 0.02 for value, plain in pairs)


def _fit_one(function: Elementary, x: Tensor, ys: Tensor) -> list[Fit]:
    """The best a and b of one elementary function for each of N functions, then c and d."""
    middle, half = float(x.min() + x.max()) / 2, float(x.max() - x.min()) / 2
    target = _normalize(ys)
    slopes, shifts = _first_grid(function, half)
    scores = (_normalize(function.apply(_arguments(slopes, shifts, x, middle))) @ target.T).square()
    chosen = scores.nan_to_num(-1.0).argmax(0)
    slope, shift = slopes[chosen], shifts[chosen]
    wide, far = math.log(20 / 0.05) / _SLOPES, 2 * (math.pi + half) / _SHIFTS
    for _ in range(_ROUNDS):
        slope, shift = _refine(function, (slope, shift), (wide, far), (x, middle, target))
        wide, far = wide * 0.4, far * 0.4
    basis = function.apply(_arguments(slope, shift, x, middle))
    return [_solve(function, s, t - s * middle, f, y) for s, t, f, y in zip(slope, shift, basis, ys, strict=True)]


def _first_grid(function: Elementary, half: float) -> tuple[Tensor, Tensor]:
    """K slopes a and K values b' of the argument at the middle of the points, far enough to reach a bend beyond."""
    slopes = torch.ones(1, dtype=torch.float64)
    if function.slope in ("size", "any"):
        slopes = torch.logspace(math.log10(0.05), math.log10(20), _SLOPES, dtype=torch.float64) / half
    if function.slope in ("sign", "any"):
        slopes = torch.cat([slopes, -slopes])
    if not function.shift:
        return slopes, torch.zeros_like(slopes)
    places = torch.linspace(-1, 1, _SHIFTS, dtype=torch.float64)
    shifts = places * (math.pi + slopes.abs() * half)[:, None]
    return slopes.repeat_interleave(_SHIFTS), shifts.flatten()


def _refine(
    function: Elementary,
    best: tuple[Tensor, Tensor],
    steps: tuple[float, float],
    data: tuple[Tensor, float, Tensor],
) -> tuple[Tensor, Tensor]:
    """A finer grid around each function's own best a and b'. The best point itself is part of it."""
    (slope, shift), (wide, far), (x, middle, target) = best, steps, data
    ticks = torch.linspace(-1, 1, _FINE, dtype=torch.float64)
    stretches = (wide * ticks).exp() if function.slope in ("size", "any") else torch.ones(1, dtype=torch.float64)
    moves = far * ticks if function.shift else torch.zeros(1, dtype=torch.float64)
    count = len(stretches) * len(moves)
    slopes = (slope[:, None, None] * stretches[:, None]).expand(-1, -1, len(moves)).reshape(-1, count)
    # The bend of a steep slope is placed as finely as that of a gentle one.
    reach = slope.abs().clamp(min=1)[:, None, None]
    shifts = (shift[:, None, None] + reach * moves).expand(-1, len(stretches), -1).reshape(-1, count)
    picked = []
    for s, t, y in zip(slopes.split(64), shifts.split(64), target.split(64), strict=True):
        basis = _normalize(function.apply(_arguments(s, t, x, middle)))
        picked.append((basis @ y[:, :, None]).squeeze(-1).square().nan_to_num(-1.0).argmax(1))
    chosen = torch.cat(picked)[:, None]
    return slopes.gather(1, chosen).squeeze(1), shifts.gather(1, chosen).squeeze(1)


def _arguments(slope: Tensor, shift: Tensor, x: Tensor, middle: float) -> Tensor:
    return slope[..., None] * (x - middle) + shift[..., None]


def _normalize(values: Tensor) -> Tensor:
    """Mean 0 and length 1 along the last axis; NaN where the values do not vary, or not by a meaningful digit."""
    centered = values - values.mean(-1, keepdim=True)
    length = centered.norm(dim=-1, keepdim=True)
    return centered / length.masked_fill(length <= 1e-9 * values.norm(dim=-1, keepdim=True), float("nan"))


def _solve(function: Elementary, slope: Tensor, shift: Tensor, basis: Tensor, y: Tensor) -> Fit:
    """c, d and R² of one function by least squares."""
    f, centered = basis - basis.mean(), y - y.mean()
    c = (f @ centered) / (f @ f)
    d = y.mean() - c * basis.mean()
    r2 = 1 - (y - c * basis - d).square().sum() / centered.square().sum()
    b = float(shift)
    if function.period:
        turns = round(b / (function.period / 2))
        b, c = b - turns * function.period / 2, c * (-1) ** turns
    return Fit(function.name, float(slope), b, float(c), float(d), float(r2), function.complexity)
