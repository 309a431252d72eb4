"""Experts with a piecewise-linear function on every edge: B-splines of degree 1, hats."""

from __future__ import annotations

from typing import ClassVar

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.bspline import BsplineExperts
from kabrn_dist.ops.grids import Grid


class HatExperts(BsplineExperts):
    """`BsplineExperts` of degree 1: a coefficient is the function's value at a knot, and K = grid size + 1.

    Between knots the function is `numpy.interp` of the coefficients; outside, the two end pieces are continued.
    """

    function_keys: ClassVar[tuple[str, ...]] = ("grid_size", "grid_range")

    @classmethod
    def make_grid(cls, config: ExpertsConfig) -> Grid:
        """Return the hats' grid."""
        return Grid(*config.grid_range, config.grid_size, 1)
