"""The types of experts by their names in the configuration (`model.experts.type`)."""

from __future__ import annotations

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.experts.bspline import BsplineExperts
from kabrn_dist.model.experts.chebyshev import ChebyshevExperts
from kabrn_dist.model.experts.hat import HatExperts
from kabrn_dist.model.experts.mlp import Relu2Experts, SwigluExperts
from kabrn_dist.model.experts.rational import RationalExperts

EXPERT_TYPES: dict[str, type[Experts]] = {
    "rational": RationalExperts,
    "chebyshev": ChebyshevExperts,
    "hat": HatExperts,
    "bspline": BsplineExperts,
    "swiglu": SwigluExperts,
    "relu2": Relu2Experts,
}


def function_range(config: ExpertsConfig) -> tuple[float, float]:
    """Return the range of inputs that the functions of the configured type are made for."""
    return EXPERT_TYPES[config.type].function_range(config)
