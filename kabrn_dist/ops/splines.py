"""B-splines of any degree on a uniform grid, continued in straight lines outside it.

B-splines on a uniform grid are shifts of one function, so a value is a closed form of its distance to each centre.
That is a few passes over contiguous memory, several times as fast as scattering the p + 1 values that are not zero.

Outside the grid each basis function goes on along its tangent at the end: values grow linearly, slopes stay as they
are at the end, and both are finite wherever x is. For degree 1 the two end pieces continue exactly.

Shapes: N rows, I inputs, G intervals, p degree, K = G + p basis functions.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from kabrn_dist.kernels.spline import SplineSpec
from kabrn_dist.ops.grids import Grid


def basis_naive(x: Tensor, grid: Grid) -> Tensor:
    """Evaluate `basis` by the Cox–de Boor recurrence on the knots, differentiated by autograd: [...] → [..., K]."""
    knots = grid.knots().to(x.device, x.dtype)
    # The tangents of the ends: at the high end the last interval counts, although it is half open.
    inside = x.clamp(grid.low, grid.high)
    interval = ((inside.detach() - grid.low) / grid.step).floor().clamp(0, grid.intervals - 1).long() + grid.degree
    pieces = torch.nn.functional.one_hot(interval, len(knots) - 1).to(x.dtype)
    values, slopes = pieces, torch.zeros_like(pieces)
    for p in range(1, grid.degree + 1):
        left, right = knots[: -p - 1], knots[p + 1 :]
        span = p * grid.step
        rise, fall = (inside[..., None] - left) / span, (right - inside[..., None]) / span
        slopes = p * (values[..., :-1] - values[..., 1:]) / span
        values = rise * values[..., :-1] + fall * values[..., 1:]
    return values + (x - inside)[..., None] * slopes.detach()


def basis(x: Tensor, grid: Grid) -> Tensor:
    """Evaluate all basis functions at every value.

    Args:
        x: [N,I] fp32 or fp64.
        grid: of the splines.

    Returns:
        [N,K,I]; the K values of an x sum to 1.

    Example:
        >>> basis(torch.tensor([[0.25]]), Grid(low=0.0, high=1.0, intervals=2, degree=1)).flatten()
        tensor([0.5000, 0.5000, 0.0000])
    """
    place = (x - grid.low) * (1 / grid.step)
    inside = place.clamp(0, grid.intervals)
    centers = torch.arange(grid.size, dtype=x.dtype, device=x.device) + (1 - grid.degree) / 2
    values = _cardinal((inside.unsqueeze(-2) - centers[:, None]).abs_(), grid.degree)
    beyond = place - inside
    below, above = beyond.clamp(max=0), beyond.clamp(min=0)
    for k, slope in enumerate(_end(grid.degree)[1]):
        values[..., k, :].add_(below, alpha=slope)
        values[..., grid.size - 1 - k, :].add_(above, alpha=-slope)
    return values


def basis_slope(x: Tensor, grad: Tensor, grid: Grid) -> Tensor:
    """Return Σₖ gradₖ · d basisₖ/dx: x [N,I] and grad [N,K,I] → [N,I].

    A slope is a difference of two splines of degree p − 1.
    """
    inside = ((x - grid.low) * (1 / grid.step)).clamp_(0, grid.intervals)
    interval = inside.floor().clamp_(max=grid.intervals - 1)
    column = interval.long().unsqueeze(-2)
    total: Tensor | None = None
    left = grad.gather(-2, column)
    for weight in _nonzero(inside - interval, grid.degree - 1):
        right = grad.gather(-2, column := column + 1)
        part = (right - left).squeeze(-2) * weight
        total, left = part if total is None else total.add_(part), right
    assert total is not None
    return total * (1 / grid.step)


def basis_bound(x: Tensor, grid: Grid) -> Tensor:
    """Return [N,1], a bound on the size of the basis values of each row; outside the grid the tangents decide."""
    middle, half = (grid.low + grid.high) / 2, (grid.high - grid.low) / 2
    beyond = ((x - middle).abs().amax(-1, keepdim=True) - half).clamp_(min=0) * (1 / grid.step)
    values, slopes = (torch.tensor(part, dtype=x.dtype, device=x.device) for part in _end(grid.degree))
    peak = _cardinal(torch.zeros(1), grid.degree).item()
    return (values - beyond * slopes).abs().amax(-1, keepdim=True).clamp_(min=peak)


@cache
def make_spline_spec(grid: Grid) -> SplineSpec:
    """Return a grid's splines as the kernel takes them."""
    return SplineSpec(*grid, _cardinal(torch.zeros(1), grid.degree).item(), *_end(grid.degree))


def _cardinal(distance: Tensor, degree: int) -> Tensor:
    """The B-spline of a degree on unit knots, at a distance from its centre (Schoenberg 1946); may write into it."""
    if degree == 1:
        return distance.neg_().add_(1).clamp_(min=0)
    reach = (degree + 1) / 2
    total: Tensor | None = None
    for i in range(degree // 2 + 1):
        term = (reach - i - distance).clamp_(min=0).pow(degree)
        term *= (-1) ** i * math.comb(degree + 1, i) / math.factorial(degree)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _nonzero(place: Tensor, degree: int) -> list[Tensor | float]:
    """The degree + 1 B-splines that are not zero, at a place 0…1 of an interval (Cox–de Boor on unit knots)."""
    values: list[Tensor | float] = [1.0]
    for p in range(1, degree + 1):
        padded = [0.0, *values, 0.0]
        values = [((place + (p - r)) * padded[r] + (r + 1 - place) * padded[r + 1]) / p for r in range(p + 1)]
    return values


def _end(degree: int) -> tuple[list[float], list[float]]:
    """Values at the low end of the first degree + 1 functions, and their slopes a step."""
    start = torch.zeros((), dtype=torch.float64)
    values = [float(v) for v in _nonzero(start, degree)]
    lower = [0.0, *(float(v) for v in _nonzero(start, degree - 1)), 0.0]
    return values, [lower[r] - lower[r + 1] for r in range(degree + 1)]
