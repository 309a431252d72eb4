"""The forms of experts by their names in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.experts.bspline import BsplineExperts
from kabrn_dist.model.experts.chebyshev import ChebyshevExperts
from kabrn_dist.model.experts.hat import HatExperts
from kabrn_dist.model.experts.mlp import Relu2Experts, SwigluExperts
from kabrn_dist.model.experts.rational import FITTED, RationalExperts
from kabrn_dist.ops.weight_quant import QuantState

# width, hidden, settings, global numbers of the experts here, quantised, gain → experts
Form = Callable[[int, int, ExpertsConfig, range, bool | QuantState, float], Experts]

EXPERT_TYPES: dict[str, Form] = {
    "rational": RationalExperts,
    "chebyshev": ChebyshevExperts,
    "hat": HatExperts,
    "bspline": BsplineExperts,
    "swiglu": SwigluExperts,
    "relu2": Relu2Experts,
}


def function_range(settings: ExpertsConfig) -> tuple[float, float]:
    """The grid's ends, or the range that the rational's start was fitted on."""
    return FITTED if settings.type == "rational" else settings.grid_range
