"""Chebyshev functions: numpy's within the range, straight lines outside it, right gradients, sane everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.chebyshev import ChebyshevExperts, chebyshev, chebyshev_naive, fit_swish

WIDTH, GROUPS = 12, 4
ENDS = (-1.5, 2.5)
COUNTS = [(6,), (0,), (2, 0, 3, 1, 0), (0, 0)]


def draw(counts: tuple[int, ...], terms: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = 2 * torch.randn(sum(counts), WIDTH, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(len(counts), GROUPS, terms, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("terms", [1, 2, 4, 7])
@pytest.mark.parametrize("counts", COUNTS)
def test_chebyshev_is_its_definition(counts: tuple[int, ...], terms: int) -> None:
    x, c = draw(counts, terms)
    found, expected = chebyshev(x, c, counts, ENDS), chebyshev_naive(x, c, counts, ENDS)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    noise = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad((out * noise).sum(), (x, c)) for out in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("ends", [(-2.0, 2.0), ENDS])
def test_chebyshev_is_numpys_and_a_tangent_outside(ends: tuple[float, float]) -> None:
    torch.manual_seed(0)
    c = torch.randn(1, 1, 4, dtype=torch.float64)
    exact = Chebyshev(c[0, 0].numpy(), domain=ends)
    low, high = ends
    inside = np.concatenate([np.linspace(low, high, 101), [low, high]])
    expected = [exact(inside)]
    outside = []
    for end, sign in ((low, -1), (high, 1)):
        far = np.logspace(-6, 4, 50)
        outside.append(end + sign * far)
        expected.append(exact(end) + exact.deriv()(end) * sign * far)
    x = torch.from_numpy(np.concatenate([inside, *outside]))[:, None].requires_grad_()
    out = chebyshev(x, c, (len(x),), ends)
    np.testing.assert_allclose(out.detach()[:, 0].numpy(), np.concatenate(expected), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(out.sum(), x)
    slopes = exact.deriv()(np.clip(x.detach()[:, 0].numpy(), low, high))
    np.testing.assert_allclose(slope[:, 0].numpy(), slopes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counts", [(4,), (2, 0, 1, 0, 2)])
def test_chebyshev_passes_gradcheck(counts: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda x, c: chebyshev(x, c, counts, ENDS), draw(counts))


def test_chebyshev_takes_any_memory_layout() -> None:
    x, c = draw((6,))
    noise = torch.randn(WIDTH, 6, dtype=torch.float64)
    found = []
    for rows in (x, x.detach().T.contiguous().T.requires_grad_()):
        out = chebyshev(rows, c, (6,), ENDS)
        found.append((out.detach(), *torch.autograd.grad((out.T.contiguous() * noise).sum(), (rows, c))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ends", [(-2.0, 2.0), ENDS, (-1.0, 1.0)])
def test_swish_start_is_the_nearest_cubic(ends: tuple[float, float]) -> None:
    def worst(coefficients: tuple[float, ...]) -> float:
        points = torch.linspace(*ends, 401, dtype=torch.float64)[:, None]
        c = torch.tensor(coefficients, dtype=torch.float64)[None, None]
        return float((chebyshev(points, c, (401,), ends) - F.silu(points)).square().mean())

    fitted = fit_swish(ends)
    assert worst(fitted) < 1e-3
    numpys = Chebyshev.interpolate(lambda x: x / (1 + np.exp(-x)), 63, domain=ends).coef[:4]
    np.testing.assert_allclose(fitted, numpys, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["inner", "outer"])
def test_starts_are_finite_far_out(layer: str, dtype: torch.dtype) -> None:
    config = ExpertsConfig(num_experts=1, top_k=1, expert_hidden_size=4, function_groups=1)
    made = ChebyshevExperts(ExpertSpec(4, 4, config, range(1)))
    made.initialize(0, "experts")
    c = made.coefficients(layer).detach().requires_grad_()
    sizes = torch.cat([torch.zeros(1), torch.logspace(-3, 4, 500)])
    x = torch.cat([-sizes, sizes]).to(dtype)[:, None].requires_grad_()
    out = chebyshev(x, c, (len(x),), made.range_ends)
    assert out.dtype == dtype and bool(out.isfinite().all())
    out.float().mean().backward()
    assert x.grad is not None and c.grad is not None and c.grad.dtype == torch.float32
    assert bool(x.grad.isfinite().all()) and bool(c.grad.isfinite().all())
    exact = chebyshev(x.detach().double(), c.detach().double(), (len(x),), made.range_ends)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(out.detach().double(), exact, atol=4 * precision, rtol=4 * precision)
