"""Experts with a piecewise-linear function on every edge: B-splines of degree 1, hats."""

from __future__ import annotations

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.bspline import BsplineExperts
from kabrn_dist.ops.grids import Grid


class HatExperts(BsplineExperts):
    """As `BsplineExperts`, with degree 1: a coefficient is the function's value at a knot, and K = grid + 1.

    Between knots the function is `numpy.interp` of the coefficients; the two end pieces go on outside.
    """

    @staticmethod
    def _grid(settings: ExpertsConfig) -> Grid:
        return Grid(*settings.grid_range, settings.grid_size, 1)
