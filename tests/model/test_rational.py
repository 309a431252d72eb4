"""Rational experts: of unit variance at the start, and open to view."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.chebyshev import ChebyshevExperts
from kabrn_dist.model.experts.grouped import GroupedExperts
from kabrn_dist.model.experts.rational import RationalExperts, rational_naive
from kabrn_dist.ops.activation_quant import quantize, rms_norm

FORMS = {"rational": RationalExperts, "chebyshev": ChebyshevExperts}


def make(form: str, width: int, hidden: int, experts: int, quantized: bool = True, gain: float = 1.0) -> GroupedExperts:
    settings = ExpertsConfig(num_experts=experts, top_k=1, expert_hidden_size=hidden, function_groups=4)
    made = FORMS[form](ExpertSpec(width, hidden, settings, range(experts), quantized, gain))
    made.initialize(3, "experts")
    return made


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_variance_at_the_start(form: str, quantized: bool) -> None:
    experts = make(form, 256, 256, 2, quantized, gain=0.5)
    torch.manual_seed(0)
    rows = torch.randn(4096, 256)  # 1,048,576 samples
    with torch.no_grad():
        out = experts(quantize(rms_norm(rows), quantized), (2048, 2048))
    for part in out.split(2048):
        assert float(part.var()) == pytest.approx(0.25, rel=0.05)
        assert abs(float(part.mean())) < 0.02


def test_functions_are_each_group_by_its_formula() -> None:
    experts = make("rational", 8, 12, 3)
    torch.manual_seed(0)
    for parameter in (experts.inner_numerator, experts.outer_denominator):
        parameter.data += 0.1 * torch.randn(parameter.shape)
    points = torch.linspace(-4, 4, 9)
    shown = experts.functions(points, 1)
    for layer in ("inner", "outer"):
        assert shown[layer].shape == (3, 4, 9)
        for expert in range(3):
            for group in range(4):
                parts = (experts.get_parameter(f"{layer}_{part}") for part in ("numerator", "denominator"))
                a, b = (part[expert, None, group, None] for part in parts)
                expected = rational_naive(points[:, None], a, b, (9,))[:, 0]
                torch.testing.assert_close(shown[layer][expert, group], expected)


@pytest.mark.parametrize("form", FORMS)
def test_functions_at_the_start(form: str) -> None:
    points = torch.linspace(-2, 2, 41)
    shown = make(form, 8, 12, 2).functions(points, 4)
    torch.testing.assert_close(shown["inner"], points.expand(2, 4, 41), atol=1e-6, rtol=0)
    error = {"rational": 2e-4, "chebyshev": 0.05}[form]
    torch.testing.assert_close(shown["outer"], F.silu(points).expand(2, 4, 41), atol=error, rtol=0)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_share_of_inputs_outside(form: str, quantized: bool) -> None:
    experts = make(form, 8, 400, 3, quantized)
    torch.manual_seed(0)
    rows = torch.randn(600, 8)
    x = quantize(rows, quantized)
    reach = experts.range_ends[1]
    shares = experts.outside(x, (200, 0, 400))
    values = x.codes / x.scale
    expected = [(part.abs() > reach).float().mean() if len(part) else 0.0 for part in values.split([200, 0, 400])]
    torch.testing.assert_close(shares["inner"], torch.tensor(expected))
    # Products of normalised rows are near normal at the start.
    beyond = 2 - 2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(float(reach)))
    assert float(shares["outer"][1]) == 0
    torch.testing.assert_close(shares["outer"][[0, 2]], beyond.expand(2), atol=0.02, rtol=0)
