"""Uniform grids of B-splines: their knots, and a function's coefficients on a finer grid.

Shapes: G intervals, p degree, K = G + p coefficients. The knots run p steps past both ends (arXiv 2404.19756, §2.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Uniform grid of B-splines.

    Attributes:
        low: the lower end.
        high: the upper end.
        intervals: G, equal intervals between them.
        degree: p of the splines.

    Example:
        >>> grid = Grid(low=-1.0, high=1.0, intervals=4, degree=3)
        >>> grid.step, grid.size
        (0.5, 7)
    """

    low: float
    high: float
    intervals: int
    degree: int

    @property
    def step(self) -> float:
        """Length of an interval."""
        return (self.high - self.low) / self.intervals

    @property
    def size(self) -> int:
        """K, the number of basis functions."""
        return self.intervals + self.degree

    def knots(self) -> Tensor:
        """Return the knots [K + p + 1] fp64, evenly spaced, p steps past both ends."""
        steps = torch.arange(-self.degree, self.intervals + self.degree + 1, dtype=torch.float64)
        return self.low + steps * self.step


def refine_grid(coefficients: Tensor, grid: int, finer: int, degree: int) -> Tensor:
    """Return the coefficients of the same functions on a finer grid, by knot insertion (the Oslo algorithm).

    Between the ends the functions are the same, so their values and slopes at the ends are, and with those their
    linear continuations.

    Args:
        coefficients: [..., K] with K = grid + degree; hats have degree 1. Experts' matrices are [E,O,I·K] with the
            K of an input next to each other: refine `matrix.unflatten(-1, (-1, K))` and flatten again.
        grid: intervals before.
        finer: intervals after.
        degree: of the splines.

    Returns:
        [..., finer + degree] in the dtype of the coefficients; computed in fp64.

    Raises:
        ValueError: `finer` is not a multiple of `grid`, or the coefficients are not grid + degree.
    """
    if finer < grid or finer % grid:
        raise ValueError(
            f"a grid of {grid} intervals can only become a multiple of it, such as {2 * grid}, not {finer}"
        )
    if coefficients.shape[-1] != grid + degree:
        raise ValueError(
            f"{coefficients.shape[-1]} coefficients do not fit grid {grid} and degree {degree}: "
            f"there are {grid + degree} of them"
        )
    matrix = knot_insertion_matrix(grid, finer, degree).to(coefficients.device)
    return (coefficients.double() @ matrix.T).to(coefficients.dtype)


def knot_insertion_matrix(grid: int, finer: int, degree: int) -> Tensor:
    """Return the matrix [finer + degree, grid + degree] fp64 that turns coarse coefficients into fine ones.

    A fine coefficient is the blossom, at the knots inside its function's support, of the polynomial on any one
    interval there (Ramshaw 1989; Cohen, Lyche, Riesenfeld 1980).
    """
    matrix = torch.zeros(finer + degree, grid + degree, dtype=torch.float64)
    ratio = finer // grid
    for i in range(finer + degree):
        fine = min(max(i - degree // 2, 0), finer - 1)
        at = [(i + 1 + n - degree) / ratio for n in range(degree)]
        matrix[i] = _blossom(fine // ratio, at, grid + degree)
    return matrix


def _blossom(interval: int, at: list[float], size: int) -> Tensor:
    """[size]: weights of the coefficients in the blossom of the piece on `interval` (de Boor; low end 0, step 1)."""
    degree = len(at)
    points = list(torch.eye(size, dtype=torch.float64)[interval : interval + degree + 1])
    for level, u in enumerate(at, 1):
        for s in range(degree, level - 1, -1):
            share = (u - (interval - degree + s)) / (degree + 1 - level)
            points[s] = (1 - share) * points[s - 1] + share * points[s]
    return points[degree]
