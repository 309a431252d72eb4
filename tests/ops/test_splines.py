"""Splines on edges: scipy's and numpy's functions inside the grid, straight lines outside, finer grids, learning."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.bspline import BsplineExperts, extend_grid
from kabrn_dist.model.experts.hat import HatExperts
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.ops.activation_quant import Quantized
from kabrn_dist.ops.edge_layer import edge_layer, edge_layer_naive
from kabrn_dist.ops.grids import Grid, refine_grid
from kabrn_dist.ops.splines import basis, basis_bound, basis_naive, basis_slope

GRIDS = [Grid(-2.0, 1.5, g, p) for g, p in [(2, 1), (5, 1), (2, 2), (7, 2), (3, 3), (5, 3), (12, 3), (5, 5), (9, 6)]]
COUNTS = [(6,), (0,), (2, 0, 3, 1, 0), (0, 0, 5, 0, 0), (0, 0, 0)]
SETTINGS = ExpertsConfig(num_experts=1, top_k=1, expert_hidden_size=6, grid_size=4, spline_order=3)


def ids(grid: Grid) -> str:
    return f"grid{grid.intervals}-degree{grid.degree}"


def spread(low: float, high: float, n: int = 301) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def curve(x: Tensor, coefficients: Tensor, grid: Grid) -> Tensor:
    return basis(x[:, None], grid)[..., 0] @ coefficients


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_splines_are_scipys_inside(grid: Grid) -> None:
    torch.manual_seed(0)
    x, c = spread(grid.low, grid.high), torch.randn(grid.size, dtype=torch.float64)
    theirs = BSpline(grid.knots().numpy(), c.numpy(), grid.degree)
    np.testing.assert_allclose(curve(x, c, grid).numpy(), theirs(x.numpy()), atol=1e-12, rtol=0)
    slope = basis_slope(x[:, None], c[None, :, None].expand(len(x), -1, 1), grid)[:, 0]
    if grid.degree > 1:
        np.testing.assert_allclose(slope.numpy(), theirs.derivative()(x.numpy()), atol=1e-11, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_splines_go_on_straight_outside(grid: Grid) -> None:
    torch.manual_seed(0)
    c = torch.randn(grid.size, dtype=torch.float64)
    theirs = BSpline(grid.knots().numpy(), c.numpy(), grid.degree)
    # The slope of degree 1 jumps at the high end, so it is taken within the last piece.
    last = grid.high - (grid.step / 2 if grid.degree == 1 else 0)
    for end, near in ((grid.low, grid.low), (grid.high, last)):
        away = end + spread(0, 1e4) * (1 if end == grid.high else -1)
        line = theirs(end) + (away - end).numpy() * theirs.derivative()(near)
        np.testing.assert_allclose(curve(away, c, grid).numpy(), line, atol=1e-10, rtol=1e-11)


@pytest.mark.parametrize("intervals", [2, 3, 8])
def test_hats_are_numpys_interp_inside_and_its_end_pieces_outside(intervals: int) -> None:
    torch.manual_seed(0)
    grid = Grid(-2.0, 1.5, intervals, 1)
    c, knots = torch.randn(grid.size, dtype=torch.float64), grid.knots().numpy()[1:-1]
    inside, outside = spread(-2.0, 1.5), torch.cat([spread(-9.0, -2.0), spread(1.5, 9.0)])
    np.testing.assert_allclose(curve(inside, c, grid), np.interp(inside, knots, c), atol=1e-13, rtol=0)
    # numpy.interp stays level outside, so that it is asked on knots moved far out along the end pieces.
    first, last = c[0] + (c[0] - c[1]) * 10 / grid.step, c[-1] + (c[-1] - c[-2]) * 10 / grid.step
    wide = np.interp(outside, [-12.0, *knots, 11.5], [first, *c, last])
    np.testing.assert_allclose(curve(outside, c, grid), wide, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_closed_form_is_the_recurrence(grid: Grid) -> None:
    torch.manual_seed(0)
    x = spread(-6, 6, 1201).requires_grad_()
    values, expected = basis(x.detach()[:, None], grid)[..., 0], basis_naive(x, grid)
    torch.testing.assert_close(values, expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(values.sum(-1), torch.ones_like(x), atol=1e-11, rtol=0)
    noise = torch.randn_like(values)
    (slope,) = torch.autograd.grad((expected * noise).sum(), x)
    torch.testing.assert_close(
        basis_slope(x.detach()[:, None], noise[..., None], grid)[:, 0], slope, atol=1e-10, rtol=0
    )
    bound, most = basis_bound(x.detach()[:, None], grid)[:, 0], values.abs().amax(-1)
    assert bool((bound > most - 1e-12).all())
    out = (x < grid.low - grid.degree * grid.step) | (x > grid.high + grid.degree * grid.step)
    torch.testing.assert_close(bound[out], most[out])


def layer(counts: tuple[int, ...], grid: Grid, inputs: int = 5, outputs: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(counts), inputs), (len(counts), outputs, inputs), (len(counts), outputs, inputs * grid.size)]
    return [(1.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("counts", COUNTS)
def test_layer_is_its_definition(
    counts: tuple[int, ...], chunk: int, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kabrn_dist.ops.edge_layer.CHUNK", chunk)
    for grid in GRIDS[1::2]:
        inputs = layer(counts, grid)
        found, expected = (f(*inputs, counts, grid, quantized) for f in (edge_layer, edge_layer_naive))
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
        noise = torch.randn_like(found)
        grads = [torch.autograd.grad((out * noise).sum(), inputs) for out in (found, expected)]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(4,), (2, 0, 1, 0)])
def test_layer_passes_gradcheck(counts: tuple[int, ...]) -> None:
    for grid in (GRIDS[1], GRIDS[5]):
        inputs = layer(counts, grid, 3, 2)
        assert torch.autograd.gradcheck(lambda *i, g=grid: edge_layer(*i, counts, g, False), inputs)


def test_codes_are_int8_inside_and_far_outside() -> None:
    grid, counts = Grid(-2.0, 2.0, 5, 1), (3,)
    # Inside, the one hat of an x on a knot is 127/127: an edge's coefficient comes through unrounded.
    x = torch.tensor([[-2.0, 0.4], [2.0, -0.4], [300.0, 2.0]], dtype=torch.float64)
    base, spline = torch.zeros(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 12, dtype=torch.float64)
    spline[0, 0, [0, 9]] = 1.0  # knot −2 of the first input, knot 0.4 of the second
    gamma = 2 / 12
    out = edge_layer(x, base, spline, counts, grid)[:, 0]
    torch.testing.assert_close(out[:2], torch.tensor([2 * gamma, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    spline[0, 0, [0, 9, 5]] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    far = edge_layer(x, base, spline, counts, grid)[2, 0]
    # The last knot's hat grows with slope 1 a step: 1 + (300 − 2)/0.8 is the row's largest value, code 127.
    torch.testing.assert_close(far, torch.tensor((1 + 298 / 0.8) / 12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("degree", [1, 3])
def test_layer_is_finite_far_out(degree: int, quantized: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grid = Grid(-2.0, 2.0, 5, degree)
    sizes = torch.cat([torch.zeros(1), torch.logspace(-3, 4, 200)])
    rows = torch.cat([-sizes, sizes])[:, None] * torch.tensor([1.0, 1.0, -1.0, 0.5])
    weights = [0.5 * torch.randn(1, 3, 4 * k) for k in (1, grid.size)]
    x, base, spline = inputs = [t.to(dtype).requires_grad_() for t in (rows, *weights)]
    out = edge_layer(x, base, spline, (len(x),), grid, quantized)
    exact = edge_layer(*(t.detach().double() for t in inputs), (len(x),), grid, quantized)
    assert out.dtype == dtype and bool(out.isfinite().all())
    # Large terms may cancel, so errors are compared with what is summed; a code may fall on another side of a half.
    error = (out.double() - exact).abs() / (1 + rows.abs().amax(-1, keepdim=True))
    assert float(error.detach().max()) < max(16 * torch.finfo(dtype).eps, 0.02 if quantized else 0.0)
    out.float().mean().backward()
    assert all(bool(t.grad.isfinite().all()) for t in inputs)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_refined_functions_are_unchanged(grid: Grid, times: int) -> None:
    torch.manual_seed(0)
    c, x = torch.randn(2, 3, grid.size, dtype=torch.float64), spread(-4, 4)
    finer = refine_grid(c, grid.intervals, times * grid.intervals, grid.degree)
    fine = Grid(grid.low, grid.high, times * grid.intervals, grid.degree)
    assert finer.shape == (2, 3, fine.size)
    for old, new in zip(c.view(-1, grid.size), finer.view(-1, fine.size), strict=True):
        torch.testing.assert_close(curve(x, new, fine), curve(x, old, grid), atol=1e-12, rtol=1e-12)


def test_refine_refuses_other_grids() -> None:
    with pytest.raises(ValueError, match=r"grid of 4 intervals .* such as 8, not 6"):
        refine_grid(torch.zeros(7), 4, 6, 3)
    with pytest.raises(ValueError, match=r"grid of 4 intervals .* not 2"):
        refine_grid(torch.zeros(7), 4, 2, 3)
    with pytest.raises(ValueError, match="6 coefficients do not fit grid 4 and degree 3: there are 7"):
        refine_grid(torch.zeros(6), 4, 8, 3)


def make(form: type[BsplineExperts], quantized: bool) -> BsplineExperts:
    experts = form(ExpertSpec(8, 6, SETTINGS, range(2, 5), quantized, 0.5))
    experts.initialize(3, "experts")
    return experts.double()


@pytest.mark.parametrize("form", [HatExperts, BsplineExperts])
def test_extended_experts_compute_the_same(form: type[BsplineExperts]) -> None:
    torch.manual_seed(0)
    experts, counts = make(form, False), (7, 0, 5)
    before = [parameter.clone() for parameter in experts.parameters()]
    extended = extend_grid(experts, 12)
    x = Quantized(2 * torch.randn(12, 8, dtype=torch.float64), torch.ones(12, 1, dtype=torch.float64))
    torch.testing.assert_close(extended(x, counts), experts(x, counts), atol=1e-12, rtol=0)
    assert extended.grid.intervals == extended.spec.config.grid_size == 12 and extended.expert_ids == range(2, 5)
    assert all(new.dtype == torch.float64 and new.requires_grad for new in extended.parameters())
    assert all(torch.equal(old, now) for old, now in zip(before, experts.parameters(), strict=True))
    assert extend_grid(experts, 8).inner_spline.shape == (3, 6, 8 * (8 + experts.grid.degree))
    with pytest.raises(ValueError, match="such as 8, not 6"):
        extend_grid(experts, 6)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", [HatExperts, BsplineExperts])
def test_functions_are_those_of_the_edges(form: type[BsplineExperts], quantized: bool) -> None:
    experts, points = make(form, quantized), spread(-3, 3, 31)
    shown = experts.functions(points, 4)
    assert {name: tuple(values.shape) for name, values in shown.items()} == {"inner": (3, 4, 31), "outer": (3, 4, 31)}
    assert experts.functions(points, 99)["inner"].shape[1] == 8
    # An edge's function is what an output gains when that input alone moves.
    width, hidden = 8, 6
    for place, (e, f) in enumerate(product(range(3), range(4))):
        o, i = f * hidden // 4, f * width // 4
        assert shown["inner"][e, f].std() > 0.01, place
        base, spline = (experts._effective_weight(f"inner_{part}")[e : e + 1] for part in ("base", "spline"))
        rows = torch.zeros(31, width, dtype=torch.float64)
        rows[:, i] = points
        moved = edge_layer_naive(rows, base, spline, (31,), experts.grid, False)[0:, o]
        rest = edge_layer_naive(torch.zeros(1, width).double(), base, spline, (1,), experts.grid, False)[0, o]
        at_zero = experts.functions(torch.zeros(1), 4)["inner"][e, f]
        torch.testing.assert_close(shown["inner"][e, f] - at_zero, moved - rest, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", [HatExperts, BsplineExperts])
def test_outside_counts_inputs_beyond_the_range(form: type[BsplineExperts]) -> None:
    experts, counts = make(form, False), (2, 0, 1)
    x = torch.zeros(3, 8, dtype=torch.float64)
    x[0, :3], x[1, 0], x[2, :] = 2.1, -2.5, 2.0
    shares = experts.outside(Quantized(x, torch.ones(3, 1, dtype=torch.float64)), counts)
    assert shares["inner"].tolist() == [0.25, 0.0, 0.0]
    hidden = experts._hidden_units(x, counts)
    beyond = (hidden.abs() > 2).double().mean(1)
    torch.testing.assert_close(shares["outer"].double(), torch.stack([beyond[:2].mean(), beyond[0] * 0, beyond[2]]))


def fit(network: nn.Module, rows: Tensor, target: Tensor) -> float:
    """Root mean square error after 250 steps of Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        optimizer.zero_grad()
        loss = (network(rows)[:, 0] - target).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return math.sqrt(float(loss.detach()))


class Alone(nn.Module):
    """One expert as a network of two inputs."""

    def __init__(self, form: str) -> None:
        super().__init__()
        settings = ExpertsConfig(
            num_experts=1, top_k=1, expert_hidden_size=8, grid_size=8 if form == "hat" else 6, spline_order=3
        )
        self.expert = EXPERT_TYPES[form](ExpertSpec(2, 8, settings, range(1), False))
        self.expert.initialize(0, "alone")

    def forward(self, rows: Tensor) -> Tensor:
        return self.expert(Quantized(rows, torch.ones(len(rows), 1)), (len(rows),))


@pytest.mark.slow
def test_splines_learn_what_an_mlp_of_equal_size_does_not() -> None:
    torch.manual_seed(0)
    rows = torch.rand(300, 2) * 2 - 1
    target = torch.exp(torch.sin(torch.pi * rows[:, 0]) + rows[:, 1] ** 2)
    mlp = nn.Sequential(nn.Linear(2, 15), nn.SiLU(), nn.Linear(15, 15), nn.SiLU(), nn.Linear(15, 2))
    networks = {"hat": Alone("hat"), "bspline": Alone("bspline"), "mlp": mlp}
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert sizes == {"hat": 320, "bspline": 320, "mlp": 317}
    errors = {name: fit(network, rows, target) for name, network in networks.items()}
    assert errors["hat"] < 0.6 * errors["mlp"] and errors["bspline"] < 0.5 * errors["mlp"], errors
